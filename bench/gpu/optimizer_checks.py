"""Holds the optimizer's kernels to their reference bit for bit, and to torch's own AdamW, on the device they run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor, nn

from bench.gpu.groups import Group, Rows
from bench.gpu.measuring import Action
from qlora_core.ops.adamw import reference
from qlora_core.ops.adamw.launch import launch_adamw
from qlora_core.ops.adamw.moments import Moments8, Moments32
from qlora_core.ops.adamw.settings import BLOCK_SIZE, TILE, AdamWSettings, begin_step
from qlora_core.optim import build_optimizer

Moments = Moments8 | Moments32
# Relative, after so many steps in 32 bits.
_STEPS = 200
_TOLERANCE = 1e-6


def groups(device: str) -> list[Group]:
    """Give the groups of checks; the names' first word is the part they belong to."""
    return [
        *(
            Group(f"optimizer checks {bits} bits", partial(_against_reference, bits, device))
            for bits in (32, 8)
        ),
        Group("optimizer checks against torch", partial(_against_torch, device)),
        Group("optimizer checks gradients that are not finite", partial(_not_finite, device)),
    ]


def _against_reference(bits: int, device: str) -> Rows:
    """Three steps each from the same state and the same scalars: values, their copies in 16 bits, moments and scales."""
    largest = 2**20 if device == "cuda" else 8 * TILE
    cases = {
        "drawn": (3 * TILE, _drawn, 1.0),
        "many tiles": (largest, _drawn, 1.0),
        "huge": (2 * TILE, _drawn, 1e15),
        "tiny": (2 * TILE, _drawn, 1e-30),
        "zeros": (TILE, lambda n, _: torch.zeros(n), 1.0),
    }
    return [
        {"gradients": name, "n": n, "copies": str(dtype)}
        | _differences(bits, n, lambda step, n=n, make=make, size=size: make(n, step) * size, dtype, device)
        for name, (n, make, size) in cases.items()
        for dtype in (torch.bfloat16, torch.float16)
    ]  # fmt: skip


def _differences(
    bits: int, n: int, gradients_of: Callable[[int], Tensor], dtype: torch.dtype, device: str
) -> dict[str, int]:
    """Count what is another number after three steps of the kernel than after three of the reference."""
    values, moments, steps = _drawn(n, 0), _zeros(n, bits), torch.zeros(1)
    there, moments_there = values.to(device, copy=True), _on(moments, device)
    copies = torch.full((n,), torch.nan, dtype=dtype, device=device)
    settings = AdamWSettings(1e-2, weight_decay=0.1, max_grad_norm=1.0, gradient_divisor=3.0)
    for step in range(1, 4):
        gradients = gradients_of(step)
        norm = torch.linalg.vector_norm(gradients) / settings.gradient_divisor
        scalars = begin_step(steps, norm, settings)
        reference.adamw_step(values, gradients, moments, scalars, settings)
        launch_adamw(
            there, gradients.to(device), moments_there, scalars.to(device), settings, copies
        )
    return {
        "wrong_values": _differing(there, values),
        "wrong_copies": _differing(copies, values.to(dtype)),
    } | {
        f"wrong_{field.name}": _differing(
            getattr(moments_there, field.name), getattr(moments, field.name)
        )
        for field in fields(moments)
    }


def _against_torch(device: str) -> Rows:
    """Many steps of the whole optimizer in 32 bits, over tensors of odd sizes, beside torch's fused one."""
    steps = _STEPS if device == "cuda" else 20
    shapes = ((7, 5), (1,), (256,), (3, 100), (16, 1024), (33, 65))
    start = [
        _drawn(torch.Size(shape).numel(), index).view(shape) + 1
        for index, shape in enumerate(shapes)
    ]
    ours, theirs = ([nn.Parameter(value.to(device)) for value in start] for _ in range(2))
    flat = build_optimizer("adamw", ours, learning_rate=1e-3, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.1, fused=True)
    for step in range(steps):
        for params, optimizer in ((ours, flat), (theirs, other)):
            optimizer.zero_grad()
            for index, param in enumerate(params):
                gradient = _drawn(param.numel(), 100 * step + index).view(param.shape)
                param.grad = gradient.to(device)
            optimizer.step()
    relative = torch.cat(
        [
            ((mine - other) / other).detach().abs().view(-1)
            for mine, other in zip(ours, theirs, strict=True)
        ]
    )
    return [
        {
            "steps": steps,
            "largest_relative_difference": float(relative.max()),
            "wrong_values": int((relative > _TOLERANCE).sum()),
        }
    ]


def _not_finite(device: str) -> Rows:
    """A gradient with a NaN or an infinity in it changes nothing, not even the count."""
    rows: Rows = []
    n = 2 * TILE
    for bits in (32, 8):
        for bad in (torch.nan, torch.inf):
            values, moments = _drawn(n, 0).to(device), _on(_zeros(n, bits), device)
            steps = torch.zeros(1, device=device)
            _launch(values, _drawn(n, 1), moments, steps)
            before = values.clone(), _on(moments, "cpu")
            gradients = _drawn(n, 2)
            gradients[n // 2 + 3] = bad
            _launch(values, gradients, moments, steps)
            differing = (
                _differing(getattr(moments, field.name), getattr(before[1], field.name))
                for field in fields(moments)
            )
            rows.append(
                {
                    "bits": bits,
                    "gradient": str(bad),
                    "wrong_values": _differing(values, before[0]),
                    "wrong_moments": sum(differing),
                    "wrong_counts": int(steps.item() != 1),
                }
            )
    return rows


def _launch(values: Tensor, gradients: Tensor, moments: Moments, steps: Tensor) -> None:
    settings, there = AdamWSettings(1e-2), gradients.to(values.device)
    scalars = begin_step(steps, torch.linalg.vector_norm(there), settings)
    launch_adamw(values, there, moments, scalars, settings)


def kernel_alone(elements: int, bits: int, device: str, *, copies: bool) -> Action:
    """Give a launch of the kernel over so many elements, rounded up to whole tiles, with copies in bfloat16 or without."""
    n = -(-elements // TILE) * TILE
    values, gradients = (torch.randn(n, device=device) for _ in range(2))
    settings, moments = AdamWSettings(1e-4), _on(_zeros(n, bits), device)
    scalars = begin_step(torch.zeros(1, device=device), gradients.norm(), settings)
    written = torch.empty_like(values, dtype=torch.bfloat16) if copies else None
    return partial(launch_adamw, values, gradients, moments, scalars, settings, written)


def _drawn(n: int, seed: int) -> Tensor:
    """Numbers of very different sizes, as gradients are: float32 [n]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) * 10 ** (-6 * torch.rand(n, generator=generator))


def _zeros(n: int, bits: int) -> Moments:
    if bits == 32:
        return Moments32(torch.zeros(n), torch.zeros(n))
    scales = (torch.zeros(n // BLOCK_SIZE) for _ in range(2))
    return Moments8(*(torch.zeros(n, dtype=torch.uint8) for _ in range(2)), *scales)


def _on(moments: Moments, device: str) -> Moments:
    """Give a copy on a device."""
    parts = (getattr(moments, field.name).to(device, copy=True) for field in fields(moments))
    return type(moments)(*parts)


def _differing(actual: Tensor, expected: Tensor) -> int:
    """Count elements that are not equal; a NaN is equal to nothing."""
    return int((actual.cpu() != expected.cpu()).sum())
