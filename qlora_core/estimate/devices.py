"""What known GPUs can do at most, by name: multiplications per second, which MFU is a share of, and bytes per second.

Rates are dense 16-bit tensor-core rates with 32-bit accumulation, from NVIDIA's documents, which often print only the
doubled figure "with sparsity"; bandwidths are of the card's own memory, from the same documents. A card that is not here
has no MFU, and neither has a CPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """Of one device, at most.

    Attributes:
        name: words that its name holds.
        tflops: in 10^12 operations per second.
        gb_per_s: in 10^9 bytes per second.
    """

    name: str
    tflops: float
    gb_per_s: float


# By words of the name that `torch.cuda.get_device_name` gives, the more particular first.
_KNOWN = (
    Figures("B200", 2250.0, 8000),  # HGX B200 data sheet: 36 PFLOP/s for eight, with sparsity
    Figures("GH200", 989.4, 4000),  # GH200 data sheet: 1,979 with sparsity
    Figures("H200 NVL", 835.5, 4800),  # H200 data sheet: 1,671 with sparsity
    Figures("H200", 989.4, 4800),  # H200 data sheet: 1,979 with sparsity
    Figures("H100 NVL", 835.5, 3900),  # H100 data sheet: 1,671 with sparsity
    Figures("H100 PCIe", 756.0, 2000),  # H100 data sheet: 1,513 with sparsity
    Figures("H100", 989.4, 3350),  # H100 data sheet: 1,979 with sparsity
    Figures("A100", 312.0, 1555),  # A100 data sheet; that with 80 GB has 2,039 GB/s
    Figures("A40", 149.7, 696),  # A40 data sheet
    Figures("A30", 165.0, 933),  # A30 data sheet
    Figures("A10", 125.0, 600),  # A10 data sheet
    Figures("L40S", 362.0, 864),  # L40S data sheet
    Figures("L40", 181.0, 864),  # L40 data sheet
    Figures("L4", 121.0, 300),  # L4 data sheet: 242 with sparsity
    Figures("RTX 6000 Ada", 364.2, 960),  # Ada architecture white paper
    Figures("RTX A6000", 154.8, 768),  # GA102 architecture white paper
    Figures("RTX 4090", 165.2, 1008),  # Ada architecture white paper
    Figures("RTX 3090", 71.0, 936),  # GA102 architecture white paper
    Figures("V100 PCIE", 112.0, 900),  # V100 data sheet
    Figures("V100", 125.0, 900),  # V100 data sheet
    Figures("T4", 65.0, 320),  # T4 data sheet
)
# Words that make another chip, or a part of one, of a known name.
_OTHERWISE = re.compile(r"\b(Laptop|Mobile|Max-Q|MIG|Ti|D)\b")

CPU_CORE = Figures("CPU core", 0.096, 10)
"""A guess: 16 multiplications and additions in float32 at 3 GHz, and a core's share of the memory's rate."""


def figures_of(device_name: str) -> Figures | None:
    """Give a card's figures by its name, None where they are not known."""
    if _OTHERWISE.search(device_name):
        return None
    for figures in _KNOWN:
        # Whole words: an L40 is no L4, and an A10G no A10.
        if re.search(rf"\b{figures.name}\b", device_name.replace("-", " "), re.IGNORECASE):
            return figures
    return None


def known_cards() -> list[str]:
    """Give the names of all cards that are known."""
    return [figures.name for figures in _KNOWN]
