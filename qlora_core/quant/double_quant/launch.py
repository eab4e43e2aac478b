"""Launches the Triton kernel for double quantization on scales that `ops` has checked.

Triton is imported at the first launch only, so that everything else works where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_core.quant.codebook import NESTED_BLOCK_SIZE, dynamic_thresholds
from qlora_core.quant.devices import launching_on
from qlora_core.quant.launches import QUANTIZE_ABSMAX


def launch_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the Triton kernel behind `ops.quantize_absmax`.

    Args:
        absmax: float32 [n], contiguous, finite.

    Returns:
        codes uint8 [n], nested_absmax float32 [ceil(n / 256)], offset float32 [].
    """
    from qlora_core.quant.double_quant.kernels import quantize_absmax_kernel

    offset = absmax.mean()
    n = absmax.numel()
    codes = torch.empty(n, dtype=torch.uint8, device=absmax.device)
    nested_absmax = torch.empty(
        -(-n // NESTED_BLOCK_SIZE), dtype=torch.float32, device=absmax.device
    )
    with launching_on(absmax.device):
        quantize_absmax_kernel[(-(-n // QUANTIZE_ABSMAX.tile),)](
            absmax,
            offset,
            dynamic_thresholds(absmax.device),
            codes,
            nested_absmax,
            n,
            BLOCKS=QUANTIZE_ABSMAX.tile // NESTED_BLOCK_SIZE,
            **QUANTIZE_ABSMAX.options,
        )
    return codes, nested_absmax, offset
