"""What named GPUs can do at most, for the floor of a step's time: multiplications and bytes per second.

Dense 16-bit tensor-core rates with 32-bit accumulation, and memory bandwidth, from NVIDIA's data sheets and white papers,
as in `qlora_core.train.device_peaks`, which a test holds the rates to.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_core.errors import ConfigError


@dataclass(frozen=True)
class Figures:
    """Of one device.

    Attributes:
        name: of it.
        tflops: dense 16-bit, in 10^12 operations per second.
        gb_per_s: of its memory, in 10^9 bytes per second.
        memory_bytes: of it, as sold.
    """

    name: str
    tflops: float
    gb_per_s: float
    memory_bytes: int


_GIB = 2**30
_KNOWN = (
    Figures("B200", 2250.0, 8000, 180 * _GIB),
    Figures("H200", 989.4, 4800, 141 * _GIB),
    Figures("H100 PCIe", 756.0, 2000, 80 * _GIB),
    Figures("H100", 989.4, 3350, 80 * _GIB),
    Figures("A100 40GB", 312.0, 1555, 40 * _GIB),
    Figures("A100", 312.0, 2039, 80 * _GIB),
    Figures("A10", 125.0, 600, 24 * _GIB),
    Figures("L40S", 362.0, 864, 48 * _GIB),
    Figures("L4", 121.0, 300, 24 * _GIB),
    Figures("RTX 4090", 165.2, 1008, 24 * _GIB),
    Figures("RTX 3090", 71.0, 936, 24 * _GIB),
    Figures("T4", 65.0, 320, 16 * _GIB),
)
# One core of a server processor with AVX2: 16 multiplications and additions in float32 at 3 GHz, and its share of DDR4.
CPU_CORE = Figures("CPU core", 0.096, 10, 0)


def figures_of(card: str) -> Figures:
    """Give the figures of a card by its name here, such as "H100" or "RTX 4090".

    Raises:
        ConfigError: it is not known.
    """
    wanted = card.strip().casefold()
    for figures in _KNOWN:
        if figures.name.casefold() == wanted:
            return figures
    raise ConfigError(
        f"no figures are known of the card {card!r}; there are {', '.join(one.name for one in _KNOWN)}"
    )
