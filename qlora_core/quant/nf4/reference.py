"""NF4 in plain PyTorch: the specification that every faster path is held to, bit for bit.

Slow on purpose where slowness makes it plain. Source: QLoRA, arXiv:2305.14314, section 3 and
appendix E; packing and tie rules as in docs/formats/nf4.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qlora_core.quant.codebook import nf4_levels, nf4_thresholds

_LARGEST = torch.finfo(torch.float32).max


def quantize_nf4(values: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Turn floats into NF4 codes and one scale per block of consecutive elements.

    Args:
        values: float16, bfloat16 or float32 of any shape, taken row-major; n elements, all finite.
        block_size: elements per scale; the last block may be shorter.

    Returns:
        packed uint8 [ceil(n / 2)], element 2j in the high nibble of byte j (a missing last odd
        element counts as zero), and absmax float32 [ceil(n / block_size)].
    """
    flat = values.reshape(-1).float()
    n = flat.numel()
    blocks = functional.pad(flat, (0, -n % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)

    scaled = blocks * reciprocal(absmax)[:, None]
    below = scaled[..., None] > nf4_thresholds(values.device)
    codes = below.sum(dim=-1).to(torch.uint8).view(-1)[: n + n % 2]
    return (codes[0::2] << 4) | codes[1::2], absmax


def reciprocal(absmax: Tensor) -> Tensor:
    """Give ``1 / absmax``, at most the largest float32, so that a block of zeros stays zero."""
    return (1.0 / absmax).clamp(max=_LARGEST)


def unpack_codes(packed: Tensor, n: int) -> Tensor:
    """Give the n four-bit codes of ``packed`` as uint8 [n], in the order of the elements."""
    return torch.stack((packed >> 4, packed & 0x0F), dim=1).view(-1)[:n]


def dequantize_nf4(
    packed: Tensor, absmax: Tensor, *, n: int, block_size: int, dtype: torch.dtype
) -> Tensor:
    """Turn NF4 codes back into floats: ``out[i] = level[code[i]] * absmax[i // block_size]``.

    The product is taken in float32 and rounded once to ``dtype``.

    Args:
        packed: uint8 [ceil(n / 2)].
        absmax: float32 [ceil(n / block_size)].
        n: number of elements.
        block_size: elements per scale.
        dtype: of the result.

    Returns:
        dtype [n].
    """
    levels = nf4_levels(packed.device)[unpack_codes(packed, n).int()]
    return (levels * absmax.repeat_interleave(block_size)[:n]).to(dtype)
