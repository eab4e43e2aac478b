"""Divides a model's parameters by layer, so that one layer at a time is dense in memory.

What a checkpoint has in one tensor, or in several for one parameter, is always of one layer.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def by_layer(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of parameters by the layer they belong to, in their order.

    Args:
        model: the architecture.
        names: of its parameters and buffers.

    Returns:
        The names by the layer's path, such as ``model.layers.3``; under "" what belongs to none, such as embeddings.
    """
    layers = _layers(model)
    groups: dict[str, list[str]] = {}
    for name in names:
        path = name
        while path and path not in layers:
            path = path.rpartition(".")[0]
        groups.setdefault(path, []).append(name)
    return groups


def _layers(model: nn.Module) -> set[str]:
    """Give the paths of the members of the outermost lists of modules."""
    lists: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(
            tuple(f"{one}." for one in lists)
        ):
            lists.append(path)
    return {
        f"{path}.{name}" for path in lists for name, _ in model.get_submodule(path).named_children()
    }
