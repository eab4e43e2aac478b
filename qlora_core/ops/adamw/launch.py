"""Launches the Triton kernels for AdamW on tensors that `ops` has checked.

Triton is imported at the first launch only, so that everything else works where there is none.
"""

from __future__ import annotations

from torch import Tensor

from qlora_core.ops.adamw.codes import code_table, levels, thresholds
from qlora_core.ops.adamw.moments import Moments8, Moments32
from qlora_core.ops.adamw.settings import TILE, AdamWSettings
from qlora_core.quant.devices import launching_on
from qlora_core.quant.launches import Launch

ADAMW_32 = Launch(tile=TILE, num_warps=4)
ADAMW_8 = Launch(tile=TILE, num_warps=4)


def launch_adamw(
    values: Tensor,
    gradients: Tensor,
    moments: Moments32 | Moments8,
    scalars: Tensor,
    settings: AdamWSettings,
    copies: Tensor | None = None,
) -> None:
    """Do what `reference.adamw_step` does in one launch; its arguments, contiguous and of whole tiles.

    ``copies``, float16 or bfloat16 [n], become what the values are rounded to.
    """
    from qlora_core.ops.adamw import kernels

    grid = (values.numel() // TILE,)
    numbers = (
        settings.decay,
        settings.beta1,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        settings.eps,
    )
    with launching_on(values.device):
        if isinstance(moments, Moments32):
            kernels.adamw_32_kernel[grid](
                values,
                gradients,
                moments.mean,
                moments.square,
                copies,
                scalars,
                *numbers,
                TILE=TILE,
                **ADAMW_32.options,
            )
            return
        kernels.adamw_8_kernel[grid](
            values,
            gradients,
            moments.mean,
            moments.square,
            moments.mean_absmax,
            moments.square_absmax,
            *_tables(values, signed=True),
            *_tables(values, signed=False),
            copies,
            scalars,
            *numbers,
            TILE=TILE,
            **ADAMW_8.options,
        )


def _tables(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    device = values.device
    return (
        levels(device, signed=signed),
        thresholds(device, signed=signed),
        code_table(device, signed=signed),
    )
