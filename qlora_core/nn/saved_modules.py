"""Modules that are trained whole beside the adapters: embeddings, the output head, norms (PEFT's ``modules_to_save``).

The trained copy is in float32; the original stays, frozen, so that the base model can still answer. Modules that share
a matrix go on sharing it: there is one copy, and each of them is a `SavedModule` over it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_core.errors import LoraTargetError
from qlora_core.nn.config import matching
from qlora_core.nn.masters import apply_but_keep_float32
from qlora_core.nn.nf4_linear import NF4Linear, product_dtype


class SavedModule(nn.Module):
    """A module whose parameters are trained whole; they are this module's own, under their own names.

    Args:
        original: frozen; its ``forward`` is run with the trained parameters in place of its own.
        trained: float32, by the original's names (``weight``, ``bias``).

    Attributes:
        enabled: False while the base model alone should answer (`lora_disabled`).
    """

    def __init__(self, original: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in trained.items():
            self.register_parameter(name, parameter)
        self.original = original  # last: its attributes seem to be this module's own
        self.enabled = True

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return dict(self.named_parameters(recurse=False))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the original has
        """Give what this module has not from the original, such as an embedding's ``num_embeddings``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original" or name.startswith("__"):
                raise
            return getattr(self.original, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the original's own
        """Do what the original does, with the trained parameters; in the original's dtype."""
        if not self.enabled:
            return self.original(*args, **kwargs)
        if isinstance(self.original, NF4Linear):
            return _linear(args[0], self.trained, self.original.compute_dtype)
        if isinstance(self.original, nn.Embedding):
            # Looked up in float32 and rounded after, so that the gradient of a frequent token is summed in float32.
            found = torch.func.functional_call(self.original, self.trained, args, kwargs)
            return found.to(self.original.weight.dtype)
        cast = {
            name: parameter.to(self.original.get_parameter(name).dtype)
            for name, parameter in self.trained.items()
        }
        return torch.func.functional_call(self.original, cast, args, kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SavedModule:
        """Move everything where ``fn`` moves things, but never cast the trained parameters."""
        apply_but_keep_float32(self, lambda: super(SavedModule, self)._apply(fn, recurse))
        return self


def find_saved(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Give the paths of the modules that ``names`` mean and of those that share a matrix with them, in order.

    Raises:
        LoraTargetError: a name means no module, or one that cannot be trained whole.
    """
    modules = dict(model.named_modules())
    wanted: set[str] = set()
    for name in names:
        found = matching(modules, name)
        if not found:
            raise LoraTargetError(
                f"modules_to_save: no module of the model has the name {name}; embeddings and output head are called "
                f"{_embeddings_of(model)}"
            )
        wanted |= set(found)
    for path in sorted(wanted):
        _check_trainable(path, modules[path])
    shared = {id(p) for path in wanted for p in modules[path].parameters(recurse=False)}
    return [
        path
        for path, module in modules.items()
        if path in wanted or any(id(p) in shared for p in module.parameters(recurse=False))
    ]


def save_modules(model: nn.Module, paths: list[str]) -> None:
    """Put a `SavedModule` in the place of each module; shared parameters stay shared.

    Args:
        model: without adapters; its parameters are frozen.
        paths: as `find_saved` gives them.
    """
    masters: dict[int, nn.Parameter] = {}
    for path in paths:
        original = model.get_submodule(path)
        trained: dict[str, nn.Parameter] = {}
        for name, parameter in original.named_parameters(recurse=False):
            if id(parameter) not in masters:
                masters[id(parameter)] = _master_of(parameter)
            trained[name] = masters[id(parameter)]
        if isinstance(original, NF4Linear):
            trained["weight"] = _master_of(original.nf4.dequantize(torch.float32))
        saved = SavedModule(original, trained)
        saved.train(original.training)
        model.set_submodule(path, saved)


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """Give the modules that are trained whole, by path, in the model's order."""
    return {path: one for path, one in model.named_modules() if isinstance(one, SavedModule)}


def _master_of(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(torch.float32, copy=True))


def _linear(x: Tensor, trained: Mapping[str, Tensor], compute_dtype: torch.dtype) -> Tensor:
    dtype = product_dtype(compute_dtype, x.device)
    bias = trained.get("bias")
    y = functional.linear(
        x.to(dtype), trained["weight"].to(dtype), None if bias is None else bias.to(dtype)
    )
    return y.to(x.dtype)


def _check_trainable(path: str, module: nn.Module) -> None:
    own = list(module.parameters(recurse=False))
    if any(True for _ in module.children()):
        raise LoraTargetError(
            f"modules_to_save: {path} is a {type(module).__name__}, which has layers of its own; name these layers"
        )
    if isinstance(module, NF4Linear) or (own and all(p.is_floating_point() for p in own)):
        return
    raise LoraTargetError(
        f"modules_to_save: {path} is a {type(module).__name__}, whose weights are quantized or which has none; it "
        "cannot be trained whole"
    )


def _embeddings_of(model: nn.Module) -> str:
    paths = [
        path
        for path, module in model.named_modules()
        for get in ("get_input_embeddings", "get_output_embeddings")
        if hasattr(model, get) and module is getattr(model, get)()
    ]
    return (
        " and ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths)) or "by no known name"
    )
