"""The formats that NF4 is compared with: FP4, symmetric int4 and int8, each with one scale per block.

Plain PyTorch, for tables and explanations; nothing is trained in them. What they share with NF4 is
the rule of the scale: the largest absolute value of a block becomes the largest level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qlora_core.errors import ShapeError
from qlora_core.quant.checks import (
    check_block_size,
    check_dtype,
    check_float,
    check_layout,
    check_scales_finite,
    check_values,
)
from qlora_core.quant.codebook import (
    E2M1_LEVELS,
    FP4_LEVELS,
    ascending_codes,
    thresholds_between,
)
from qlora_core.quant.nf4.reference import reciprocal, unpack_codes

_INT4_LARGEST = 7
_INT8_LARGEST = 127


@dataclass(frozen=True, eq=False)
class ComparatorWeight:
    """A tensor in one of the formats of this module, with the surface of `NF4Weight`.

    Attributes:
        codes: four-bit codes two per byte, uint8 [ceil(n / 2)], element 2j in the high nibble of
            byte j; or int8 [n].
        absmax: float32 [ceil(n / block_size)], one scale per block.
        levels: what the codes stand for, in units of the scale, from the smallest code on.
        shape: of the dense tensor, row-major; n elements.
        block_size: elements per scale.
        dtype: of the tensor this was made from.
    """

    codes: Tensor
    absmax: Tensor
    levels: tuple[float, ...]
    shape: torch.Size
    block_size: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.codes.nbytes + self.absmax.nbytes

    @property
    def bits_per_parameter(self) -> float:
        """Bits per element of the dense tensor, scales included."""
        return 8 * self.nbytes / self.shape.numel()

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Give the dense tensor back: ``level * scale`` in float32, rounded once.

        Args:
            dtype: float16, bfloat16 or float32; that of ``out`` or of the original when None.
            out: where to write: a contiguous tensor of n elements on the same device.

        Returns:
            dtype, of the original shape; a view of ``out`` if that was given.

        Raises:
            DtypeError, LayoutError, ShapeError: ``dtype`` or ``out`` is not as described.
        """
        n = self.shape.numel()
        dtype = dtype or (self.dtype if out is None else out.dtype)
        check_float(dtype, "dtype")
        if out is None:
            out = torch.empty(n, dtype=dtype, device=self.codes.device)
        check_dtype(dtype, out=out)
        check_layout(codes=self.codes, out=out)
        if out.numel() != n:
            raise ShapeError(f"out has {out.numel()} elements, but there are {n} codes")

        if self.codes.dtype == torch.int8:
            places = self.codes.int() + _INT8_LARGEST
        else:
            places = unpack_codes(self.codes, n).int()
        levels = torch.tensor(self.levels, dtype=torch.float32, device=self.codes.device)
        scales = self.absmax.repeat_interleave(self.block_size)[:n]
        return out.view(-1).copy_(levels[places] * scales).view(self.shape)


def quantize_fp4(weight: Tensor, *, block_size: int = 64, name: str = "weight") -> ComparatorWeight:
    """Quantize to FP4, a sign, two bits of exponent and one of mantissa, as bitsandbytes reads them.

    Args:
        weight: float16, bfloat16 or float32, any shape, all finite.
        block_size: elements per scale, a power of two from 32 to 4096.
        name: of the tensor, for error messages.

    Returns:
        The quantized weight, on the device of ``weight``: 4.5 bits per parameter at block size 64.

    Raises:
        ConfigError, DtypeError, LayoutError, ShapeError: an argument is not as described.
        NonFiniteError: the weight holds NaN or infinity.

    Source: bitsandbytes 0.50.2, ``quantize_4bit(quant_type="fp4")``; codes and values are, bit for
    bit, those of its CPU code.
    """
    return _quantize_to(FP4_LEVELS, weight, block_size, name)


def quantize_e2m1(
    weight: Tensor, *, block_size: int = 64, name: str = "weight"
) -> ComparatorWeight:
    """Quantize to FP4 as the standard has it, whose smallest magnitude is a twelfth of the largest.

    Args, Returns, Raises: as `quantize_fp4`.

    Source: OCP Microscaling Formats (MX) 1.0, E2M1; the scales are those of this module.
    """
    return _quantize_to(E2M1_LEVELS, weight, block_size, name)


def quantize_int4(
    weight: Tensor, *, block_size: int = 64, name: str = "weight"
) -> ComparatorWeight:
    """Quantize to symmetric int4: ``code = round(7 / absmax * x) + 7``, fifteen even levels.

    Args, Returns, Raises: as `quantize_fp4`.

    Source: QLoRA, arXiv:2305.14314, equation 1, with four bits.
    """
    blocks, absmax = _blocks_and_scales(weight, block_size, name)
    codes = _round(blocks, absmax, _INT4_LARGEST).add_(_INT4_LARGEST).to(torch.uint8)
    packed = _pack(codes, weight.numel())
    levels = _even_levels(_INT4_LARGEST)
    return ComparatorWeight(packed, absmax, levels, weight.shape, block_size, weight.dtype)


def quantize_int8(
    weight: Tensor, *, block_size: int = 64, name: str = "weight"
) -> ComparatorWeight:
    """Quantize to int8: ``code = round(127 / absmax * x)``.

    With absmax = 256, x = 128.5 gets code round(63.75) = 64, which stands for 64 / 127 * 256, about
    129.0.

    Args, Raises: as `quantize_fp4`.

    Returns:
        The quantized weight, on the device of ``weight``: 8.5 bits per parameter at block size 64.

    Source: QLoRA, arXiv:2305.14314, equations 1 and 2.
    """
    blocks, absmax = _blocks_and_scales(weight, block_size, name)
    codes = _round(blocks, absmax, _INT8_LARGEST).to(torch.int8).view(-1)[: weight.numel()]
    levels = _even_levels(_INT8_LARGEST)
    return ComparatorWeight(codes, absmax, levels, weight.shape, block_size, weight.dtype)


def _quantize_to(
    levels: tuple[float, ...], weight: Tensor, block_size: int, name: str
) -> ComparatorWeight:
    """Give each value the code of the nearest of ``levels``, the lower one on a threshold."""
    blocks, absmax = _blocks_and_scales(weight, block_size, name)
    device = weight.device
    thresholds = torch.tensor(thresholds_between(levels), dtype=torch.float32, device=device)
    code_of_rank = torch.tensor(ascending_codes(levels), dtype=torch.uint8, device=device)
    codes = code_of_rank[torch.bucketize(blocks * reciprocal(absmax)[:, None], thresholds)]
    packed = _pack(codes, weight.numel())
    return ComparatorWeight(packed, absmax, levels, weight.shape, block_size, weight.dtype)


def _blocks_and_scales(weight: Tensor, block_size: int, name: str) -> tuple[Tensor, Tensor]:
    """Check a weight; give float32 [blocks, block_size], filled up with zeros, and its scales."""
    check_float(weight.dtype, name)
    check_values(weight, name)
    check_block_size(block_size)
    if weight.numel() == 0:
        raise ShapeError(f"{name} of shape {list(weight.shape)} has no elements")
    flat = weight.detach().reshape(-1).float()
    blocks = functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    check_scales_finite(absmax, name)
    return blocks, absmax


def _round(blocks: Tensor, absmax: Tensor, largest: int) -> Tensor:
    """Give ``round(largest / absmax * x)``, half to even, float32; zero in a block of zeros."""
    factors = (largest / absmax).clamp(max=torch.finfo(torch.float32).max)
    return torch.round(blocks * factors[:, None])


def _even_levels(largest: int) -> tuple[float, ...]:
    return tuple(level / largest for level in range(-largest, largest + 1))


def _pack(codes: Tensor, n: int) -> Tensor:
    """Give four-bit codes two per byte, the even element's in the high nibble: uint8 [ceil(n / 2)]."""
    flat = codes.view(-1)[: n + n % 2]
    return (flat[0::2] << 4) | flat[1::2]
