"""Launches the Triton kernels for NF4 on tensors that `ops` has checked.

Triton is imported at the first launch only, so that everything else works where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_core.quant.codebook import NESTED_BLOCK_SIZE, dynamic_levels, nf4_levels
from qlora_core.quant.devices import launching_on
from qlora_core.quant.launches import DEQUANTIZE_NF4, NF4_REST, QUANTIZE_NF4, Launch
from qlora_core.quant.nf4.bins import code_bins


def launch_quantize(
    flat: Tensor, *, block_size: int, launch: Launch = QUANTIZE_NF4
) -> tuple[Tensor, Tensor]:
    """Run the Triton kernels behind `ops.quantize_nf4`.

    Args:
        flat: float16, bfloat16 or float32 [n], contiguous.
        block_size: elements per scale.
        launch: how; the tile holds whole blocks.

    Returns:
        packed uint8 [ceil(n / 2)] and absmax float32 [ceil(n / block_size)]; absmax is not finite
        where the values are not.
    """
    from qlora_core.quant.nf4 import kernels

    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=flat.device)
    bins = code_bins(flat.device)
    tiles, rest = divmod(n, launch.tile)
    whole = n - rest
    with launching_on(flat.device):
        if tiles:
            kernels.quantize_nf4_kernel[(tiles,)](
                flat,
                packed,
                absmax,
                bins,
                BLOCK_SIZE=block_size,
                BLOCKS=launch.tile // block_size,
                **launch.options,
            )
        if rest:
            kernels.quantize_nf4_rest_kernel[(-(-rest // block_size),)](
                flat[whole:],
                packed[whole // 2 :],
                absmax[whole // block_size :],
                bins,
                rest,
                BLOCK_SIZE=block_size,
                **NF4_REST.options,
            )
    return packed, absmax


def launch_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    *,
    block_size: int,
    launch: Launch = DEQUANTIZE_NF4,
) -> None:
    """Run the Triton kernels behind `ops.dequantize_nf4`: one pass, also when doubly quantized.

    Args:
        packed: uint8 [ceil(n / 2)].
        absmax: [ceil(n / block_size)]: float32 scales, or uint8 codes when doubly quantized.
        nested_absmax: float32 [ceil(blocks / 256)] when doubly quantized, else None.
        offset: float32 [] when doubly quantized, else None.
        out: float16, bfloat16 or float32 [n], contiguous; written.
        block_size: elements per scale.
        launch: how; the tile holds whole blocks, and 256 blocks are whole tiles.
    """
    from qlora_core.quant.nf4 import kernels

    if packed.data_ptr() % 4:
        packed = packed.clone()  # a view into a file's bytes, say; the kernel reads 32-bit words
    nested = nested_absmax is not None
    n = out.numel()
    tiles, rest = divmod(n, launch.tile)
    whole = n - rest
    whole_blocks = whole // block_size
    tables = nf4_levels(packed.device), dynamic_levels(packed.device)
    with launching_on(packed.device):
        if tiles:
            kernels.dequantize_nf4_kernel[(tiles,)](
                packed,
                absmax,
                absmax if nested_absmax is None else nested_absmax,
                absmax if offset is None else offset,
                *tables,
                out,
                BLOCK_SIZE=block_size,
                BLOCKS=launch.tile // block_size,
                NESTED=nested,
                GATHER=launch.gather,
                **launch.options,
            )
        if rest:
            kernels.dequantize_nf4_rest_kernel[(-(-rest // block_size),)](
                packed[whole // 2 :],
                absmax[whole_blocks:],
                absmax
                if nested_absmax is None
                else nested_absmax[whole_blocks // NESTED_BLOCK_SIZE :],
                absmax if offset is None else offset,
                *tables,
                out[whole:],
                rest,
                BLOCK_SIZE=block_size,
                NESTED=nested,
                **NF4_REST.options,
            )
