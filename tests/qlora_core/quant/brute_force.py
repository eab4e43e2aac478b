"""NF4 written a second time, one element at a time in exact arithmetic, to hold the engine to.

Shares nothing with `qlora_core.quant`: levels are copied from the paper's appendix, floats are
compared as fractions, and codes are found by distance instead of thresholds.
"""

from fractions import Fraction

import numpy as np

LEVELS = [
    np.float32(level)
    for level in (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022833334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
]


def quantize(values: list[float], block_size: int) -> tuple[list[int], list[float]]:
    """Give the code of each value and the scale of each block; values are float32."""
    codes: list[int] = []
    scales: list[float] = []
    for start in range(0, len(values), block_size):
        block = [np.float32(value) for value in values[start : start + block_size]]
        scale = max(abs(value) for value in block)
        scales.append(float(scale))
        if scale == 0:
            codes += [7] * len(block)
            continue
        inverse = np.float32(1.0) / scale
        codes += [nearest(value * inverse) for value in block]
    return codes, scales


def nearest(value: np.float32) -> int:
    """Give the index of the nearest level, the lower one on a tie, by exact distances."""
    distances = [abs(Fraction(float(value)) - Fraction(float(level))) for level in LEVELS]
    return distances.index(min(distances))


def pack(codes: list[int]) -> list[int]:
    """Give two codes per byte, the even element's in the high nibble."""
    padded = [*codes, 7] if len(codes) % 2 else codes
    return [16 * high + low for high, low in zip(padded[::2], padded[1::2], strict=True)]
