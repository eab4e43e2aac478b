"""Double quantization in plain PyTorch: the specification of the 8-bit scales.

Source: QLoRA, arXiv:2305.14314, section 3, "Double Quantization"; the 8-bit data type is the
signed dynamic map (`codebook.dynamic_map`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qlora_core.quant.codebook import NESTED_BLOCK_SIZE, dynamic_levels, dynamic_thresholds
from qlora_core.quant.nf4.reference import reciprocal


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn scales into 8-bit codes of their distance from the mean, in nested blocks of 256.

    Args:
        absmax: float32 [blocks], finite.

    Returns:
        codes uint8 [blocks]; nested_absmax float32 [ceil(blocks / 256)]; offset float32 [], the
        mean as `torch.mean` gives it on the tensor's device (its order of summation is part of
        the result). A code is that of the nearest of the 256 levels, the lower one on a tie.
    """
    offset = absmax.mean()
    centred = absmax - offset
    n = centred.numel()
    blocks = functional.pad(centred, (0, -n % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * reciprocal(nested_absmax)[:, None]).view(-1)[:n]
    codes = torch.searchsorted(dynamic_thresholds(absmax.device), scaled, right=False)
    return codes.to(torch.uint8), nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Turn 8-bit codes back into scales: ``map[code] * nested_absmax[i // 256] + offset``.

    Multiplication and addition are rounded one after the other, never fused.

    Returns:
        float32 [blocks].
    """
    levels = dynamic_levels(codes.device)[codes.int()]
    return levels * nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()] + offset
