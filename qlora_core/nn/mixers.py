"""State-space mixers that, in training, hand the weight of their last layer to a kernel instead of calling the layer.

That goes past the layer's quantization and its adapter. The same mixers call the layer when they are not in training, and
compute the same; so that is the way they are sent.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def call_layers_in_training(model: nn.Module) -> None:
    """Let Mamba's mixers, of whichever family, call their layers in training, too.

    Their own flag ``training`` alone is taken back, before each of their forward passes; the layers inside keep theirs, and
    with it their dropout.

    Args:
        model: changed in place.
    """
    for module in model.modules():
        if _is_mixer(module):
            module.register_forward_pre_hook(_leave_training)


def _is_mixer(module: nn.Module) -> bool:
    """Tell by what transformers' Mamba-like families have in common: the state's decay, a convolution, a last layer."""
    return all(hasattr(module, name) for name in ("A_log", "conv1d", "out_proj"))


def _leave_training(mixer: nn.Module, _: tuple[Any, ...]) -> None:
    mixer.training = False
