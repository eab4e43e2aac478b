"""A step of AdamW on any device: checks the tensors and picks the device's path.

CPU tensors take `cpu`, others take `kernels` (Triton), whose module is only imported then. From the same
scalars both give the bits of `reference`, but for moments in 32 bits on CPUs: see there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import Tensor

from qlora_core.errors import DtypeError, ShapeError
from qlora_core.ops.adamw import cpu
from qlora_core.ops.adamw.launch import launch_adamw
from qlora_core.ops.adamw.moments import Moments8, Moments32
from qlora_core.ops.adamw.settings import BLOCK_SIZE, TILE, AdamWSettings, begin_step
from qlora_core.quant.checks import check_dtype, check_layout

_COPY_DTYPES = (torch.float16, torch.bfloat16)


def adamw_step(
    values: Tensor,
    gradients: Tensor,
    moments: Moments32 | Moments8,
    steps: Tensor,
    settings: AdamWSettings,
    *,
    loss: Tensor | None = None,
    copies: Tensor | None = None,
) -> Tensor:
    """Take a step in place, and wait for nothing.

    A gradient whose norm or loss is not finite changes nothing: no value, no moment, no count. Float32 holds
    the sum of its squares, so this includes finite gradients beyond some 1e19.

    Args:
        values: float32 [n], contiguous, n a multiple of 1024.
        gradients: float32 [n]; they are divided and clipped on the way, and of no use afterwards.
        moments: of n elements.
        steps: float32 [k], how many steps there were, all equal; one is added.
        settings: of the step.
        loss: float [] on their device, whose gradient it is; None where it is known to be finite.
        copies: float16 or bfloat16 [n], contiguous, which become what the new values are rounded to;
            where nothing changes they are left alone.

    Returns:
        float32 []: the norm of the divided gradient before it is clipped.

    Raises:
        DtypeError, LayoutError, ShapeError: a tensor is not as described.
    """
    _check(values, gradients, moments, steps)
    whole = [(slice(0, values.numel()), moments)]
    return adamw_step_in_pieces(values, gradients, whole, steps, settings, loss=loss, copies=copies)


def adamw_step_in_pieces(
    values: Tensor,
    gradients: Tensor,
    pieces: Iterable[tuple[slice, Moments32 | Moments8]],
    steps: Tensor,
    settings: AdamWSettings,
    *,
    loss: Tensor | None = None,
    copies: Tensor | None = None,
) -> Tensor:
    """Do what `adamw_step` does, to the bit, with moments that come piece by piece.

    Args:
        values: as there.
        gradients: as there.
        pieces: which elements, a multiple of 1024 each, and their moments; each is done with when the
            next one is asked for.
        steps: as there.
        settings: as there.
        loss: as there.
        copies: as there.

    Returns, Raises: what it does; a piece that is not as described leaves those before it updated.
    """
    _check_copies(copies, values)
    norm = torch.linalg.vector_norm(gradients) / settings.gradient_divisor
    scalars = begin_step(steps, norm, settings, loss=loss)
    for place, moments in pieces:
        part, gradient = values[place], gradients[place]
        copy = None if copies is None else copies[place]
        _check(part, gradient, moments, steps)
        if values.device.type != "cpu":
            launch_adamw(part, gradient, moments, scalars, settings, copy)
        elif isinstance(moments, Moments8):
            cpu.adamw_step_8(part, gradient, moments, scalars, settings)
        else:
            cpu.adamw_step_32(part, gradient, moments, steps, scalars, settings)
        if copy is not None and values.device.type == "cpu" and not scalars[2].isnan():
            copy.copy_(part)
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


def _check_copies(copies: Tensor | None, values: Tensor) -> None:
    if copies is None:
        return
    if copies.dtype not in _COPY_DTYPES:
        raise DtypeError(f"copies must be float16 or bfloat16, not {copies.dtype}")
    check_layout(values=values, copies=copies)
    if copies.shape != values.shape:
        raise ShapeError(f"copies must be {list(values.shape)}, not {list(copies.shape)}")
