"""Gradient checkpointing: activations of a layer are computed again in the backward pass."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> bool:
    """Turn it on, in its non-reentrant form; returns whether the model's family supports it."""
    # transformers renamed it in 5.23; the old name warns there, and is the only one before.
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        options = {"activation_checkpointing_kwargs": {"use_reentrant": False}}
    else:
        enable = model.gradient_checkpointing_enable
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    try:
        enable(**options)
    except ValueError:
        return False
    return True


def keep_activations(model: PreTrainedModel) -> None:
    """Turn it off."""
    disable: Any = getattr(model, "activation_checkpointing_disable", None)
    (disable or model.gradient_checkpointing_disable)()
