"""Decides which of a model's layers go into NF4, and refuses models in which too much would stay 16-bit.

A layer that multiplies by a matrix in a way not known here cannot be replaced. Leaving it dense without a word would
cost the memory that quantizing promises to save, so what stays dense is one of few things: embeddings and the output
head, convolutions, routers (a wrong expert costs more than the bits), what the caller or the architecture asks for, and
odd parameters that together are next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_core.errors import ConfigError, ModelUnsupported
from qlora_core.nn.kept_plain import ROUTER, is_named, paths_kept_plain
from qlora_core.quoting import quoted

HEAD = "lm_head"
"""Stands for the output head in ``skip_modules``, whatever the architecture calls it."""

EXPERT_STACKS = frozenset({"gate_up_proj", "up_proj", "down_proj"})
"""Names of the parameters [experts, out, in] of a module of experts."""

MOST_ODD_SHARE = 0.02
"""Of all elements, so many may be in parameters of no known kind, which stay dense."""

_NAMES_SHOWN = 4
# A subclass of nn.Linear whose own forward computes just what nn.Linear's does.
_PLAIN_LINEARS = frozenset({"Linear", "FalconLinear"})
_LOOKED_UP_OR_SLID = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)  # noqa: SLF001
# A state of a few numbers per channel, such as Mamba's, is no matrix to multiply by.
_THIN = 32
# What transformers' `use_experts_implementation` sets on the modules under it.
_EXPERTS_CONTRACT = (
    "has_gate",
    "has_bias",
    "is_transposed",
    "_apply_gate",
    "config",
)
_REWRITES_WEIGHTS = frozenset({"RwkvModel"})
# Raw parameters of these names are added, not multiplied by.
_ADDED = re.compile(r"bias|pos_|position|_pos|rel_")


@dataclass(frozen=True)
class Choice:
    """What becomes of a model's matrices.

    Attributes:
        linears: paths of the layers whose weight goes into NF4.
        experts: paths of the modules whose stacks of matrices do.
    """

    linears: frozenset[str]
    experts: frozenset[str]


def choose_layers(model: PreTrainedModel, skip_modules: Sequence[str]) -> Choice:
    """Choose the layers that go into NF4.

    Args:
        model: its parameters may be on the meta device.
        skip_modules: short names or paths of linear layers that stay dense; `HEAD` stands for the output head.

    Raises:
        ConfigError: ``skip_modules`` is no list of names, or one of them names nothing in the model.
        ModelUnsupported: a part of the model can neither be quantized nor be left dense, or nothing can be quantized.
    """
    _check_names(model, skip_modules)
    _refuse_shared_layers(model)
    dense = _paths_kept_dense(model, skip_modules)
    linears: set[str] = set()
    experts: set[str] = set()
    odd: dict[str, int] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind in _REWRITES_WEIGHTS:
            raise ModelUnsupported(
                f"{path or 'the model'} ({kind}) writes into the weights of its linear layers, which "
                "cannot be quantized therefore"
            )
        if is_plain_linear(module):
            if path not in dense:
                linears.add(path)
        elif are_known_experts(module):
            if path not in dense:
                experts.add(path)
        elif ROUTER.search(kind) or isinstance(module, _LOOKED_UP_OR_SLID):
            continue
        elif isinstance(module, nn.Linear) and not _is_in_attention(model, path):
            raise ModelUnsupported(
                f"{path} is a linear layer of its own kind ({kind}), which cannot be quantized"
            )
        else:
            odd |= {f"{path}.{name}": size for name, size in _odd_parameters(path, module)}
    if not linears and not experts:
        raise ModelUnsupported(
            f"{type(model).__name__} has no linear layers that could be quantized"
        )
    _refuse_many_odd(model, odd)
    return Choice(frozenset(linears), frozenset(experts))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module computes ``x W^T + bias`` and nothing else."""
    if isinstance(module, Conv1D):
        return True
    return isinstance(module, nn.Linear) and type(module).__name__ in _PLAIN_LINEARS


def are_known_experts(module: nn.Module) -> bool:
    """Whether the module holds experts' matrices and computes as `experts_forward` does."""
    if not all(hasattr(module, name) for name in _EXPERTS_CONTRACT):
        return False
    stacks = {name for name, one in module.named_parameters(recurse=False) if one.dim() > 2}
    return "down_proj" in stacks and stacks <= EXPERT_STACKS


def _check_names(model: PreTrainedModel, names: Sequence[str]) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"the modules to skip are a list of names, not {quoted(repr(names))}")
    paths = [path for path, _ in model.named_modules() if path]
    for name in names:
        # A head may be tied, or have any name.
        if name == HEAD or any(is_named(path, (name,)) for path in paths):
            continue
        short = {
            path.rpartition(".")[2] for path in paths if is_plain_linear(model.get_submodule(path))
        }
        parts = {part for path in paths for part in path.split(".") if not part.isdecimal()}
        near = get_close_matches(name, [*parts, *paths], _NAMES_SHOWN)
        raise ConfigError(
            f"{quoted(repr(name))} is to be skipped, but a {type(model).__name__} has nothing of that name; it has "
            f"{', '.join(near or sorted(short)[:_NAMES_SHOWN])}"
        )


def _paths_kept_dense(model: PreTrainedModel, skip_modules: Sequence[str]) -> set[str]:
    """Give the paths of linear layers that stay dense, as skipped, tied, wanted in float32, or read by others."""
    tied = model.all_tied_weights_keys
    shared = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    paths = {path for path, _ in model.named_modules() if is_named(path, skip_modules)}
    paths |= paths_kept_plain(model)
    head = model.get_output_embeddings() if HEAD in skip_modules else None
    return paths | shared | {path for path, module in model.named_modules() if module is head}


def _refuse_shared_layers(model: PreTrainedModel) -> None:
    """Refuse layers that share one weight among them: what is tied stays dense, which is meant for heads."""
    for target, source in model.all_tied_weights_keys.items():
        paths = [name.rpartition(".")[0] for name in (target, source)]
        if all(is_plain_linear(model.get_submodule(path)) for path in paths):
            raise ModelUnsupported(
                f"{paths[0]} and {paths[1]} are linear layers that share their weight, which cannot "
                "be quantized"
            )


def _is_in_attention(model: nn.Module, path: str) -> bool:
    """Whether the layer belongs to a `torch.nn.MultiheadAttention`, which reads its weight directly."""
    return isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)


def _odd_parameters(path: str, module: nn.Module) -> Iterator[tuple[str, int]]:
    """Give name and size of the module's own parameters that look like matrices.

    Raises:
        ModelUnsupported: they are experts' weights.
    """
    kind = type(module).__name__
    for name, parameter in module.named_parameters(recurse=False):
        sizes = sorted(parameter.shape)
        if len(sizes) < 2 or sizes[-2] < _THIN or _ADDED.search(name):
            continue
        if "Expert" in kind:
            raise ModelUnsupported(
                f"{path}.{name} of shape {list(parameter.shape)} holds the weights of several experts "
                f"in one tensor, in a way that is not known here ({kind}); it cannot be quantized"
            )
        yield name, parameter.numel()


def _refuse_many_odd(model: nn.Module, odd: dict[str, int]) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    if not odd or sum(odd.values()) <= MOST_ODD_SHARE * total:
        return
    name = max(odd, key=odd.__getitem__)
    kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
    share = sum(odd.values()) / total
    raise ModelUnsupported(
        f"{name} ({kind}) and others like it are {share:.0%} of the model and no layers that can be "
        "quantized; they would stay 16-bit"
    )
