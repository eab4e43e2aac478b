"""AdamW on CPUs: with moments in 32 bits torch's own kernel, with 8 bits the reference's results by look-ups.

torch's kernel goes through memory once, some four times as fast as a chain of its operations over chunks
that stay in the cache. It contracts products and sums where the processor can, so its bits are not the
reference's; they do not depend on the number of threads, nor on where the buffer is cut.

A chunk of 8-bit moments holds whole blocks and touches no other's elements, so which thread takes which
changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import cache

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from qlora_core.ops.adamw.codes import thresholds
from qlora_core.ops.adamw.moments import Moments8, Moments32
from qlora_core.ops.adamw.reference import adamw_step_encoding
from qlora_core.ops.adamw.settings import BLOCK_SIZE, AdamWSettings
from qlora_core.quant.nf4.reference import reciprocal
from qlora_core.quant.threads import share

_CPU = torch.device("cpu")
# Elements per part of the work: a multiple of the block size.
_CHUNK = 64 * 1024
_Part = tuple[Tensor, Tensor, Moments8]


def adamw_step_32(
    values: Tensor,
    gradients: Tensor,
    moments: Moments32,
    steps: Tensor,
    scalars: Tensor,
    settings: AdamWSettings,
) -> None:
    """Do what `reference.adamw_step` does up to rounding, with tensors on the CPU.

    Args:
        values: float32 [n].
        gradients: float32 [n]; what they were divided and clipped to afterwards.
        moments: of n elements.
        steps: float32 [k], the counts that `settings.begin_step` has added one to.
        scalars: what it gave.
        settings: of the step.
    """
    factor = scalars[2]
    if factor.isnan():
        return
    adamw(
        [values],
        [gradients],
        [moments.mean],
        [moments.square],
        [],
        [steps[0] - 1],  # which it counts for itself
        fused=True,
        # What it divides gradients by; it takes no scale without a place for what is not finite.
        grad_scale=None if factor == 1 else 1 / factor,
        found_inf=None if factor == 1 else torch.zeros(()),
        amsgrad=False,
        beta1=settings.beta1,
        beta2=settings.beta2,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        maximize=False,
    )


def adamw_step_8(
    values: Tensor,
    gradients: Tensor,
    moments: Moments8,
    scalars: Tensor,
    settings: AdamWSettings,
) -> None:
    """Do what `reference.adamw_step` does, with tensors on the CPU."""

    def take(parts: Iterator[_Part]) -> None:
        for part_values, part_gradients, part_moments in parts:
            adamw_step_encoding(
                part_values, part_gradients, part_moments, scalars, settings, encode=encode
            )

    parts = zip(
        values.split(_CHUNK), gradients.split(_CHUNK), _split(moments, values.numel()), strict=True
    )
    share(list(parts), take)


def encode(moment: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Give what `reference.encode` gives.

    A code is found from the upper half of a number's bits and one exact comparison, because no two
    thresholds share such an upper half.
    """
    blocks = moment.view(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * reciprocal(absmax)[:, None]).view(-1)
    upper = scaled.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    found = _code_table(signed=signed).index_select(0, upper)
    found.add_(scaled > thresholds(_CPU, signed=signed).index_select(0, found))
    if not signed:
        found = torch.maximum(found, moment > 0)
    return found.to(torch.uint8), absmax


@cache
def _code_table(*, signed: bool) -> Tensor:
    """For each upper half of a float32's bits, the code of the lowest value with it: int32 [65536]."""
    upper = torch.arange(2**16, dtype=torch.int32, device=_CPU)
    # Of negative values the lowest is the one with the largest bits.
    lower = torch.where(upper < 2**15, 0, 2**16 - 1).to(torch.int32)
    lowest = torch.bitwise_left_shift(upper, 16).bitwise_or(lower).view(torch.float32)
    return torch.bucketize(lowest, thresholds(_CPU, signed=signed)[:-1], out_int32=True)


def _split(moments: Moments8, n: int) -> list[Moments8]:
    parts = [getattr(moments, field.name) for field in fields(moments)]
    split = [part.split(_CHUNK if part.numel() == n else _CHUNK // BLOCK_SIZE) for part in parts]
    return [Moments8(*chunk) for chunk in zip(*split, strict=True)]
