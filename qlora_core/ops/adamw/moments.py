"""The moments of AdamW over a flat buffer: as they are, or in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moments32:
    """Both moments as numbers.

    Attributes:
        mean: float32 [n], the first moment.
        square: float32 [n], the second.
    """

    mean: Tensor
    square: Tensor


@dataclass(frozen=True)
class Moments8:
    """Both moments as codes of the dynamic map, in blocks of 256 with a scale each; zeros mean zero.

    Attributes:
        mean: uint8 [n], codes of the signed map.
        square: uint8 [n], codes of the unsigned map.
        mean_absmax: float32 [n / 256].
        square_absmax: float32 [n / 256].
    """

    mean: Tensor
    square: Tensor
    mean_absmax: Tensor
    square_absmax: Tensor
