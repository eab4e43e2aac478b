"""A step of AdamW on any device: checks the tensors and picks the device's path.

CPU tensors take `cpu` (tables), others take `kernels` (Triton), whose module is only imported then; both
give the bits of `reference` from the same scalars.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from qlora_core.errors import ShapeError
from qlora_core.ops.adamw import cpu
from qlora_core.ops.adamw.launch import launch_adamw
from qlora_core.ops.adamw.moments import Moments8, Moments32
from qlora_core.ops.adamw.settings import BLOCK_SIZE, TILE, AdamWSettings, begin_step
from qlora_core.quant.checks import check_dtype, check_layout


def adamw_step(
    values: Tensor,
    gradients: Tensor,
    moments: Moments32 | Moments8,
    steps: Tensor,
    settings: AdamWSettings,
) -> Tensor:
    """Take a step in place, and wait for nothing.

    A gradient whose norm is not finite changes nothing: no value, no moment, no count. Float32 holds
    the sum of its squares, so this includes finite gradients beyond some 1e19.

    Args:
        values: float32 [n], contiguous, n a multiple of 1024.
        gradients: float32 [n], unchanged: they are clipped on the way.
        moments: of n elements.
        steps: float32 [k], how many steps there were, all equal; one is added.
        settings: of the step.

    Returns:
        float32 []: the gradient's norm before it is clipped.

    Raises:
        DtypeError, LayoutError, ShapeError: a tensor is not as described.
    """
    _check(values, gradients, moments, steps)
    norm = torch.linalg.vector_norm(gradients)
    scalars = begin_step(steps, norm, settings)
    on_cpu = values.device.type == "cpu"
    take = cpu.adamw_step if on_cpu else launch_adamw
    take(values, gradients, moments, scalars, settings)
    return norm


def _check(values: Tensor, gradients: Tensor, moments: Moments32 | Moments8, steps: Tensor) -> None:
    parts = {field.name: getattr(moments, field.name) for field in fields(moments)}
    scales = {name: part for name, part in parts.items() if name.endswith("absmax")}
    whole = {name: part for name, part in parts.items() if name not in scales}
    check_dtype(torch.float32, values=values, gradients=gradients, steps=steps, **scales)
    check_dtype(torch.uint8 if isinstance(moments, Moments8) else torch.float32, **whole)
    check_layout(values=values, gradients=gradients, steps=steps, **parts)
    n = values.numel()
    if n == 0 or n % TILE:
        raise ShapeError(f"values must be of a multiple of {TILE} elements, not {n}")
    for name, part in {"gradients": gradients, **whole}.items():
        if part.shape != values.shape:
            raise ShapeError(f"{name} must be {list(values.shape)}, not {list(part.shape)}")
    for name, part in scales.items():
        if list(part.shape) != [n // BLOCK_SIZE]:
            raise ShapeError(f"{name} must be {[n // BLOCK_SIZE]}, not {list(part.shape)}")
    if steps.numel() == 0:
        raise ShapeError("steps must hold at least one count")
