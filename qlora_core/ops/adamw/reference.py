"""AdamW in plain PyTorch: the specification of a step over a flat buffer.

The moments of a step are used before they are rounded to 8 bits. Weight decay comes first, as in
`torch.optim.AdamW`. Every operation is rounded on its own, so that kernels can give the same bits.

Source: AdamW, arXiv:1711.05101; moments in 8 bits, arXiv:2110.02861.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qlora_core.ops.adamw import codes
from qlora_core.ops.adamw.moments import Moments8, Moments32
from qlora_core.ops.adamw.settings import BLOCK_SIZE, AdamWSettings
from qlora_core.quant.nf4.reference import reciprocal


class Encoder(Protocol):
    """What `encode` does, by whatever means."""

    def __call__(self, moment: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
        """Give what `encode` gives."""
        ...


def adamw_step_encoding(
    values: Tensor,
    gradients: Tensor,
    moments: Moments32 | Moments8,
    scalars: Tensor,
    settings: AdamWSettings,
    *,
    encode: Encoder,
) -> None:
    """Update values and moments in place, or nothing where the third scalar is NaN.

    Args:
        values: float32 [n].
        gradients: float32 [n].
        moments: of n elements.
        scalars: what `settings.begin_step` gave.
        settings: of the step.
        encode: what turns 8-bit moments into codes.
    """
    rate, root_scale, factor = scalars
    if factor.isnan():
        return
    old_mean, old_square = _decoded(moments)
    gradient = gradients * factor
    mean = old_mean * settings.beta1 + gradient * (1 - settings.beta1)
    square = old_square * settings.beta2 + gradient * gradient * (1 - settings.beta2)
    # On CPUs `torch.sqrt` of float32 may be wrong in its last bit; through float64 it is not.
    root = square.double().sqrt().float() * root_scale + settings.eps
    values.copy_(values * settings.decay - mean / root * rate)
    _store(moments, mean, square, encode)


def adamw_step(
    values: Tensor,
    gradients: Tensor,
    moments: Moments32 | Moments8,
    scalars: Tensor,
    settings: AdamWSettings,
) -> None:
    """Do what `adamw_step_encoding` says, with `encode`."""
    adamw_step_encoding(values, gradients, moments, scalars, settings, encode=encode)


def decode(moment_codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """Turn codes [n] and scales [n / 256] into numbers: ``level[code] * absmax``."""
    found = codes.levels(moment_codes.device, signed=signed)[moment_codes.int()]
    return (found.view(-1, BLOCK_SIZE) * absmax[:, None]).view(-1)


def encode(moment: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Turn numbers float32 [n] into codes uint8 [n] and scales float32 [n / 256].

    A code is that of the nearest level, the lower one on a tie; in the unsigned map a number above
    zero never gets the code of zero. A second moment of zero under a first one that is none would be
    a step of ``mean / eps``, ten thousand times too long, as soon as the element has no gradient.
    """
    blocks = moment.view(-1, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * reciprocal(absmax)[:, None]).view(-1)
    bounds = codes.thresholds(moment.device, signed=signed)
    found = torch.searchsorted(bounds, scaled, right=False)
    if not signed:
        found = torch.maximum(found, (moment > 0).long())
    return found.to(torch.uint8), absmax


def _decoded(moments: Moments32 | Moments8) -> tuple[Tensor, Tensor]:
    if isinstance(moments, Moments32):
        return moments.mean, moments.square
    mean = decode(moments.mean, moments.mean_absmax, signed=True)
    return mean, decode(moments.square, moments.square_absmax, signed=False)


def _store(moments: Moments32 | Moments8, mean: Tensor, square: Tensor, encode: Encoder) -> None:
    if isinstance(moments, Moments32):
        moments.mean.copy_(mean)
        moments.square.copy_(square)
        return
    mean_codes, mean_absmax = encode(mean, signed=True)
    square_codes, square_absmax = encode(square, signed=False)
    moments.mean.copy_(mean_codes)
    moments.mean_absmax.copy_(mean_absmax)
    moments.square.copy_(square_codes)
    moments.square_absmax.copy_(square_absmax)
