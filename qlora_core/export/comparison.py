"""Compares the answers of a model with adapters with those it would give with weights read from a folder.

The folder's weights take the place of the model's own, those of quantized and adapted layers one layer at a time, so
that no second model is in memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_core.export.base_weights import InFolder
from qlora_core.nn import LoraLinear, NF4Linear, SavedModule, saved_modules
from qlora_core.nn.lora import is_conv1d
from qlora_core.nn.nf4_experts import NF4Stack
from qlora_core.nn.nf4_linear import product_dtype

_DRAWN = (4, 32)


@dataclass(frozen=True)
class LogitDifference:
    """How far the answers of two models are apart.

    Attributes:
        max_abs: largest difference between two logits.
        mean_kl: mean over all places of KL(first || second) of the next token, in nats.
        same_top_share: share of places at which both find the same token likeliest.
        n_tokens: places compared.
    """

    max_abs: float
    mean_kl: float
    same_top_share: float
    n_tokens: int


def draw_sample(model: PreTrainedModel, *, seed: int = 0) -> Tensor:
    """Draw token ids, evenly among all, to compare answers on; int64 [4, 32] on the model's device."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(vocabulary, _DRAWN, generator=generator).to(model.device)


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    skeleton: PreTrainedModel,
    weights: InFolder,
    groups: Mapping[str, Sequence[str]],
    sample: Tensor,
) -> LogitDifference:
    """Compare a model's answers with those it gives with other weights; it is left as it was.

    Args:
        model: with or without adapters.
        skeleton: its architecture as transformers builds it, on the meta device.
        weights: of the same architecture.
        groups: which of them are read together.
        sample: int64 [texts, tokens].
    """
    uncached = "use_cache" in inspect.signature(model.forward).parameters
    options = {"use_cache": False} if uncached else {}
    was_training = model.training
    model.eval()
    try:
        first = model(input_ids=sample, **options).logits
        source = _Source(skeleton, weights, groups)
        with _dense_from(model, weights, groups), _answering_with(model, source):
            second = model(input_ids=sample, **options).logits
    finally:
        model.train(was_training)
    return _difference(first.flatten(0, 1), second.flatten(0, 1))


def _difference(first: Tensor, second: Tensor) -> LogitDifference:
    kl = torch.zeros((), dtype=torch.float64, device=first.device)
    max_abs = torch.zeros((), dtype=torch.float64, device=first.device)
    for some, others in zip(first.split(32), second.split(32), strict=True):
        max_abs = torch.maximum(max_abs, (some.double() - others.double()).abs().max())
        logs = [logits.double().log_softmax(-1) for logits in (others, some)]
        kl += functional.kl_div(*logs, reduction="sum", log_target=True)
    same = (first.argmax(-1) == second.argmax(-1)).double().mean()
    n_tokens = len(first)
    return LogitDifference(float(max_abs), max(0.0, float(kl) / n_tokens), float(same), n_tokens)


class _Source:
    """Gives single weights, keeping the group that the last one was read with."""

    def __init__(
        self, skeleton: PreTrainedModel, weights: InFolder, groups: Mapping[str, Sequence[str]]
    ) -> None:
        self._skeleton = skeleton
        self._weights = weights
        self._groups = groups
        self._group_of = {name: group for group, names in groups.items() for name in names}
        self._held_group: str | None = None
        self._held: Mapping[str, Tensor] = {}

    def weight(self, name: str) -> Tensor:
        """Give a parameter, by any of its names."""
        name = self._skeleton.all_tied_weights_keys.get(name, name)
        group = self._group_of[name]
        if group != self._held_group:
            self._held = {}  # first, so that two are never there
            self._held, self._held_group = self._weights.take(self._groups[group]), group
        return self._held[name]

    def linear(self, path: str, x: Tensor, compute_dtype: torch.dtype, *, bias: bool) -> Tensor:
        """Answer for the linear layer at ``path``."""
        weight = self.weight(f"{path}.weight")
        if is_conv1d(self._skeleton.get_submodule(path)):
            weight = weight.T
        return _product(x, weight, self.weight(f"{path}.bias") if bias else None, compute_dtype)

    def expert(
        self, path: str, expert: int, x: Tensor, bias: Tensor | None, stack: NF4Stack
    ) -> Tensor:
        """Answer for one of the experts whose weights are at ``path``."""
        owner = self._skeleton.get_submodule(path.rpartition(".")[0])
        weight = self.weight(path)[expert]
        weight = weight.T if getattr(owner, "is_transposed", False) else weight
        return _product(x, weight, bias, stack.compute_dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype) -> Tensor:
    dtype = product_dtype(compute_dtype, x.device)
    y = functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return y.to(x.dtype)


@contextmanager
def _dense_from(
    model: PreTrainedModel, weights: InFolder, groups: Mapping[str, Sequence[str]]
) -> Iterator[None]:
    """Give parameters and buffers that are dense and not trained other values inside the block, where they differ."""
    trained = {
        f"{path}.{name}" for path, one in saved_modules(model).items() for name in one.trained
    }
    dense = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for names in groups.values():
            for name, value in weights.take(names).items():
                tensor = dense.get(name)
                if tensor is None or name in trained:
                    continue
                other = value.to(tensor.dtype)
                if not torch.equal(other, tensor):
                    before.append((tensor, tensor.data))
                    tensor.data = other
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


@contextmanager
def _answering_with(model: PreTrainedModel, source: _Source) -> Iterator[None]:
    """Let other weights answer inside the block, where the model has quantized, adapted or trained ones."""
    replaced: list[tuple[nn.Module, str]] = []
    try:
        for path, module in model.named_modules():
            method = "apply_expert" if isinstance(module, NF4Stack) else "forward"
            answer = _answer(path, module, source)
            if answer is not None:
                setattr(module, method, answer)  # found before the class's own
                replaced.append((module, method))
        yield
    finally:
        for module, method in replaced:
            delattr(module, method)


def _answer(path: str, module: Any, source: _Source) -> Callable[..., Tensor] | None:  # noqa: ANN401
    """Give what answers in the place of a module's own method; None for one that keeps its weights.

    What is under an adapter gets an answer as well, but is not asked.
    """
    if isinstance(module, NF4Stack):
        return lambda expert, x, bias=None: source.expert(path, expert, x, bias, module)
    if isinstance(module, LoraLinear):
        base: Any = module.base
        dtype = base.compute_dtype if isinstance(base, NF4Linear) else base.weight.dtype
        return lambda x: source.linear(path, x, dtype, bias=base.bias is not None)
    if isinstance(module, NF4Linear):
        bias = module.bias is not None
        return lambda x: source.linear(path, x, module.compute_dtype, bias=bias)
    if isinstance(module, SavedModule):
        return _whole_answer(path, module, source)
    return None


def _whole_answer(path: str, module: SavedModule, source: _Source) -> Callable[..., Tensor]:
    original: Any = module.original
    if isinstance(original, NF4Linear):
        bias = "bias" in module.trained
        return lambda x: source.linear(path, x, original.compute_dtype, bias=bias)

    def answer(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - the original's own
        weights = {
            name: source.weight(f"{path}.{name}").to(original.get_parameter(name).dtype)
            for name in module.trained
        }
        return torch.func.functional_call(original, weights, args, kwargs)

    return answer
