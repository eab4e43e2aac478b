"""Holds an adapter's folder against a model and against what somebody expects it to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from qlora_core.errors import AdapterError, LoraTargetError
from qlora_core.export.adapter_folder import AdapterFolder
from qlora_core.nn import LoraConfig, NF4Linear, find_saved, find_targets
from qlora_core.nn.config import scaling_of
from qlora_core.nn.lora import is_adaptable, linear_shape


def check_fits(model: nn.Module, adapter: AdapterFolder) -> list[str]:
    """Refuse an adapter that was made for another model.

    Args:
        model: without adapters.
        adapter: what is to be put over it.

    Returns:
        The paths of the modules that the adapter has trained whole.

    Raises:
        AdapterError: a tensor has no place in the model, another shape than the model and the rank need, or one is
            missing.
    """
    modules = dict(model.named_modules())
    for path, (lora_a, lora_b) in adapter.pairs.items():
        out_features, in_features = _shape_of(path, modules.get(path))
        r = adapter.config.rank_of(path)
        wanted = ([r, in_features], [out_features, r])
        found = (list(lora_a.shape), list(lora_b.shape))
        if found != wanted:
            raise AdapterError(
                f"The adapter's tensors for {path} are {found[0]} and {found[1]}, but the model and "
                f"the rank {r} need {wanted[0]} and {wanted[1]}."
            )
    for path, copy in adapter.base_copies.items():
        if copy.shape != _shape_of(path, modules.get(path)):
            raise AdapterError(
                f"The adapter's base model has {list(copy.shape)} weights in {path}, this one "
                f"{list(_shape_of(path, modules.get(path)))}; its vocabulary was resized."
            )
    return _check_whole(model, modules, adapter)


def refuse_differences(
    model: nn.Module, adapter: AdapterFolder, saved: Sequence[str], expected: LoraConfig
) -> None:
    """Refuse an adapter that is another than ``expected``; its dropout, which is no part of it, may differ.

    Args:
        model: without adapters.
        adapter: fits the model.
        saved: as `check_fits` gave them.
        expected: what the adapter should be.

    Raises:
        AdapterError: with everything that differs.
        LoraTargetError: ``expected`` itself does not fit the model.
    """
    expected_saved = find_saved(model, expected.modules_to_save)
    targets = find_targets(model, expected, saved=expected_saved)
    differences = [
        *_one_sided("adapts", adapter.pairs, targets),
        *_one_sided("has trained whole", saved, expected_saved),
    ]
    changed: dict[tuple[str, str], list[str]] = {}
    for path in targets:
        found, wanted = _size(adapter.config, path), _size(expected, path)
        if path in adapter.pairs and found != wanted:
            changed.setdefault((found, wanted), []).append(path)
    differences += [
        f"over {_some(paths)} it has {found}, the config {wanted}"
        for (found, wanted), paths in changed.items()
    ]
    if differences:
        raise AdapterError(
            f"The adapter in {adapter.folder} is not the one that the config describes: {'; '.join(differences)}."
        )


def _size(config: LoraConfig, path: str) -> str:
    """Give what makes a layer's adapter the one it is; equal text for equal adapters."""
    r = config.rank_of(path)
    scaling = scaling_of(r, config.alpha_of(path), use_rslora=config.use_rslora)
    return f"rank {r} and scale {scaling:.6g}"


def _one_sided(verb: str, found: Iterable[str], wanted: Iterable[str]) -> list[str]:
    found, wanted = list(found), list(wanted)
    only_found = [path for path in found if path not in wanted]
    only_wanted = [path for path in wanted if path not in found]
    return [
        *([f"it {verb} {_some(only_found)}, the config does not"] if only_found else []),
        *([f"the config {verb} {_some(only_wanted)}, it does not"] if only_wanted else []),
    ]


def _some(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def _shape_of(path: str, module: nn.Module | None) -> tuple[int, int]:
    if module is None or not is_adaptable(module):
        raise AdapterError(f"The model has no linear layer {path}; the adapter is for another one.")
    return linear_shape(module)


def _check_whole(
    model: nn.Module, modules: Mapping[str, nn.Module], adapter: AdapterFolder
) -> list[str]:
    owners = dict.fromkeys(name.rpartition(".")[0] for name in adapter.whole)
    for path in owners:
        if path not in modules:
            raise AdapterError(f"The model has no module {path}; the adapter is for another one.")
    for name in adapter.config.modules_to_save:
        if not any(path.endswith(name) for path in owners):
            raise AdapterError(f"The adapter in {adapter.folder} lacks the weights of {name}.")
    try:
        saved = find_saved(model, tuple(owners))
    except LoraTargetError as error:
        raise AdapterError(
            f"The adapter in {adapter.folder} does not fit: {error.message}."
        ) from error
    parameters = [
        (f"{path}.{name}", parameter)
        for path in saved
        for name, parameter in _own_parameters(modules[path])
    ]
    first_of: dict[int, str] = {}  # names of shared parameters
    for name, parameter in parameters:
        _check_parameter(adapter, name, parameter, first_of.setdefault(id(parameter), name))
    return saved


def _check_parameter(
    adapter: AdapterFolder, name: str, parameter: torch.Tensor, shared_with: str
) -> None:
    """Hold a parameter that was trained whole against the model's, and against another name of the same matrix."""
    owner = name.rpartition(".")[0]
    found = adapter.whole.get(name)
    if found is None and any(other.startswith(f"{owner}.") for other in adapter.whole):
        raise AdapterError(f"The adapter in {adapter.folder} lacks the tensor {name}.")
    if found is not None and found.shape != parameter.shape:
        raise AdapterError(
            f"The adapter's {name} is {list(found.shape)}, but the model needs {list(parameter.shape)}."
        )
    shared = adapter.whole.get(shared_with)
    if found is None or shared is None or not torch.equal(found, shared):
        raise AdapterError(
            f"In this model {name} is the same matrix as others, but the adapter in {adapter.folder} was trained with "
            f"{' and '.join(adapter.whole)} apart; it needs a base model that does not tie them."
        )


def _own_parameters(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Give the parameters that training the module whole needs, as tensors of their dense shape."""
    own: list[tuple[str, torch.Tensor]] = list(module.named_parameters(recurse=False))
    if isinstance(module, NF4Linear):
        own.append(("weight", torch.empty(linear_shape(module), device="meta")))
    return own
