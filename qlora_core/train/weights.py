"""The tensors that training changes, taken out of a model and put back."""

from __future__ import annotations

from torch import Tensor, nn

Weights = dict[str, Tensor]


def trained_weights(model: nn.Module) -> Weights:
    """Return the trainable parameters by name; they are the model's own, not copies."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def copied_weights(model: nn.Module) -> Weights:
    """Return copies of the trainable parameters on the CPU."""
    return {name: value.to("cpu", copy=True) for name, value in trained_weights(model).items()}


def fits(model: nn.Module, weights: Weights) -> bool:
    """Whether ``weights`` are of this model's trainable parameters, by name and shape."""
    own = {name: value.shape for name, value in trained_weights(model).items()}
    return own == {name: value.shape for name, value in weights.items()}


def put_back(model: nn.Module, weights: Weights) -> None:
    """Overwrite the trainable parameters with ``weights``, which must fit."""
    for name, value in trained_weights(model).items():
        value.copy_(weights[name])
