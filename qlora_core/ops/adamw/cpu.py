"""AdamW on CPUs: the reference's results in chunks that stay in the cache, with codes by look-ups.

A chunk holds whole blocks and touches no other's elements, so which thread takes which changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import cache

import torch
from torch import Tensor

from qlora_core.ops.adamw.codes import thresholds
from qlora_core.ops.adamw.moments import Moments8, Moments32
from qlora_core.ops.adamw.reference import adamw_step_encoding
from qlora_core.ops.adamw.settings import BLOCK_SIZE, AdamWSettings
from qlora_core.quant.nf4.reference import reciprocal
from qlora_core.quant.threads import share

_CPU = torch.device("cpu")
# Elements per part of the work: a multiple of the block size.
_CHUNK = 64 * 1024
_Part = tuple[Tensor, Tensor, Moments32 | Moments8]


def adamw_step(
    values: Tensor,
    gradients: Tensor,
    moments: Moments32 | Moments8,
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


def _split(moments: Moments32 | Moments8, n: int) -> list[Moments32 | Moments8]:
    parts = [getattr(moments, field.name) for field in fields(moments)]
    split = [part.split(_CHUNK if part.numel() == n else _CHUNK // BLOCK_SIZE) for part in parts]
    return [type(moments)(*chunk) for chunk in zip(*split, strict=True)]
