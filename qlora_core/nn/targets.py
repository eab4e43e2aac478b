"""Which layers of a model get an adapter, and by what name those that get none are called.

Paths are those of the model's own modules, as PEFT sees them: ``model.layers.0.self_attn.q_proj``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from qlora_core.errors import LoraTargetError
from qlora_core.nn.config import ALL_LINEAR, LoraConfig, matching, pattern_matches
from qlora_core.nn.kept_plain import paths_kept_plain
from qlora_core.nn.lora import LoraLinear, is_adaptable
from qlora_core.nn.nf4_experts import NF4Stack
from qlora_core.nn.saved_modules import SavedModule

_NO_TARGETS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)  # noqa: SLF001
_TRAINED = (LoraLinear, SavedModule)
_DIGITS = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # a layer's number in a path


def find_targets(model: nn.Module, config: LoraConfig, *, saved: Iterable[str] = ()) -> list[str]:
    """Give the paths of the linear layers that ``config`` wants adapted, in the model's order.

    Args:
        model: without adapters.
        config: its targets, excludes and patterns are read.
        saved: paths of modules that are trained whole instead.

    Raises:
        LoraTargetError: a target, an exclude or a pattern names no linear layer, nothing is left, or the output head
            is a target although it shares its matrix with the embeddings.
    """
    whole = set(saved)
    linears = [
        path for path, module in model.named_modules() if is_adaptable(module) and path not in whole
    ]
    wanted = _wanted(model, linears, config.target_modules)
    excluded = _excluded(linears, config.exclude_modules)
    targets = [path for path in linears if path in wanted and path not in excluded]
    if not targets:
        raise LoraTargetError(
            "exclude_modules leaves no linear layer to adapt"
            if wanted
            else "the model has no linear layers to adapt besides its output head"
        )
    for name, pattern in (
        ("rank_pattern", config.rank_pattern),
        ("alpha_pattern", config.alpha_pattern),
    ):
        _refuse_idle_patterns(name, pattern, targets)
    _refuse_tied_head(model, targets)
    return targets


def left_out(model: nn.Module) -> list[str]:
    """Name the weights that "all-linear" does not adapt, other than embeddings, convolutions and the output head.

    They are those of experts stacked in one tensor, of routers, of layers of an architecture's own kind, and of layers
    whose weight is used otherwise than by calling them (`kept_plain`).

    Args:
        model: with or without adapters.

    Returns:
        A phrase each, layers counted together: ``2 x model.layers.*.mlp.experts.down_proj [8, 64, 96]``.
    """
    plain, head = paths_kept_plain(model), output_head(model)
    bases = {adapter.base for adapter in model.modules() if isinstance(adapter, LoraLinear)}
    matrices = (
        matrix
        for path, module in model.named_modules()
        if module is not head
        and (path in plain or not is_adaptable(module))
        and module not in bases
        and not isinstance(module, (*_NO_TARGETS, *_TRAINED))
        for matrix in _own_matrices(path, module)
    )
    counts = Counter(f"{_DIGITS.sub('*', name)} {shape}" for name, shape in matrices)
    return [f"{count} x {what}" for what, count in counts.items()]


def output_head(model: nn.Module) -> nn.Module | None:
    """Give the layer that makes logits, or None where there is none or it is not known."""
    get_head = getattr(model, "get_output_embeddings", None)
    return None if get_head is None else get_head()


def _wanted(model: nn.Module, linears: list[str], targets: str | tuple[str, ...]) -> set[str]:
    if targets == ALL_LINEAR:
        plain, head = paths_kept_plain(model), output_head(model)
        return {p for p in linears if p not in plain and model.get_submodule(p) is not head}
    if isinstance(targets, str):
        found = {path for path in linears if re.fullmatch(targets, path)}
        if not found:
            raise LoraTargetError(
                f"the regular expression {targets!r} matches the whole path of no linear layer; paths are like "
                f"{_some(linears)} (to give a name, give a list of names)"
            )
        return found
    return _named(linears, targets, "no linear layer of the model can take LoRA under the name")


def _excluded(linears: list[str], excludes: str | tuple[str, ...]) -> set[str]:
    if not isinstance(excludes, str):
        return _named(
            linears, excludes, "exclude_modules: no linear layer of the model has the name"
        )
    found = {path for path in linears if re.fullmatch(excludes, path)}
    if not found:
        raise LoraTargetError(
            f"exclude_modules: the regular expression {excludes!r} matches the whole path of no linear layer; paths "
            f"are like {_some(linears)}"
        )
    return found


def _named(paths: list[str], names: tuple[str, ...], complaint: str) -> set[str]:
    found = {name: matching(paths, name) for name in names}
    missing = [name for name, those in found.items() if not those]
    if missing:
        known = sorted({path.rpartition(".")[2] for path in paths})
        raise LoraTargetError(f"{complaint} {', '.join(missing)}; it has {', '.join(known)}")
    return {path for those in found.values() for path in those}


def _refuse_idle_patterns(name: str, pattern: Mapping[str, object], targets: list[str]) -> None:
    idle = [key for key in pattern if not any(pattern_matches(key, path) for path in targets)]
    if idle:
        raise LoraTargetError(
            f"{name} has {', '.join(map(repr, idle))}, which matches no adapted layer; their paths are like "
            f"{_some(targets)}"
        )


def _refuse_tied_head(model: nn.Module, targets: list[str]) -> None:
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    shared = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    head = output_head(model)
    for path in targets:
        if path in shared and model.get_submodule(path) is head:
            raise LoraTargetError(
                f"{path} shares its matrix with the embeddings, which LoRA over one of them would part; leave it out, "
                "or train the matrix whole with modules_to_save"
            )


def _own_matrices(path: str, module: nn.Module) -> Iterator[tuple[str, list[int]]]:
    if isinstance(module, NF4Stack):
        yield path, [len(module), module.out_features, module.in_features]
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() >= 2 and sorted(parameter.shape)[-2] > 1:
            yield f"{path}.{name}", list(parameter.shape)


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:2])
