"""What turns the decoder's hidden states into logits: the model's own forward pass, with its decoder left out.

Families scale their logits, cap them softly, add a bias or project twice. Nothing of that is repeated
here: the class's own ``forward`` runs over a shallow copy of the model whose decoder answers with hidden
states that are already known. It is tried once, on a few tokens, against the model's own logits.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_PROBE_TOKENS = 8
# What a model may raise whose forward pass is made another way than this expects.
_OTHERWISE_BUILT = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    TypeError,
    ValueError,
)


class Head:
    """The part of a model after its decoder.

    Attributes:
        decoder: gives the hidden states; its ``last_hidden_state`` is what the head takes.
        parameters: those of the head that are trained: its LoRA factors, or its own weight (which may be the
            embedding's too).
    """

    def __init__(self, model: PreTrainedModel, path: str, answer: type[Any]) -> None:
        self.decoder: Any = model.get_submodule(path)
        self._shell, self._stub = _without_decoder(model, path, answer)
        inside = {id(module) for module in self.decoder.modules()}
        self.parameters: list[nn.Parameter] = list(
            {
                id(parameter): parameter
                for module in model.modules()
                if id(module) not in inside
                for parameter in module.parameters(recurse=False)
                if parameter.requires_grad
            }.values()
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits [tokens, vocabulary] of hidden states [tokens, width], each token by itself."""
        self._stub.hidden = hidden[None]
        try:
            nothing = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
            return self._shell(input_ids=nothing, use_cache=False).logits[0]
        finally:
            self._stub.hidden = None


def find_head(model: PreTrainedModel) -> Head | None:
    """Return the head, or None where the model's logits are not those of its decoder's hidden states."""
    ids = torch.arange(_PROBE_TOKENS, device=model.device)
    ids = ids.remainder(model.config.get_text_config().vocab_size)[None]
    with _in_eval(model), torch.no_grad():
        try:
            expected = model(input_ids=ids, use_cache=False).logits[0]
        except _OTHERWISE_BUILT:
            return None
        for path in _decoder_paths(model):
            try:
                output = model.get_submodule(path)(input_ids=ids, use_cache=False)
                head, hidden = Head(model, path, type(output)), output.last_hidden_state[0]
                # Twice, in other company: a head that mixes tokens cannot be run in chunks.
                found = torch.cat([head(hidden[:3]), head(hidden[3:])])
            except _OTHERWISE_BUILT:
                continue
            if _same(found, expected):
                return head
    return None


def _decoder_paths(model: PreTrainedModel) -> list[str]:
    """Return where the decoder may be, the innermost first."""
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    paths = [names.get(id(module), "") for module in (model.get_decoder(), *inner)]
    return [path for path in dict.fromkeys(paths) if path]


def _same(found: Tensor, expected: Tensor) -> bool:
    """Compare within the rounding of the dtype: chunks of another size may round otherwise."""
    if found.shape != expected.shape:
        return False
    tolerance = 1e-4 if expected.dtype == torch.float32 else 2e-2
    difference, size = (found.float() - expected.float()).norm(), expected.float().norm()
    return bool(difference <= tolerance * size)


class _Stub(nn.Module):
    """Stands where the decoder was, and answers with the hidden states that it is given."""

    def __init__(self, decoder: nn.Module, answer: type[Any]) -> None:
        super().__init__()
        self._answer = answer
        self._decoder = [decoder]  # in a list, so that it is no submodule
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the decoder has
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_decoder"][0], name)

    def forward(self, *_args: object, **_kwargs: object) -> Any:  # noqa: ANN401 - a transformers output
        return self._answer(last_hidden_state=self.hidden)


def _without_decoder(model: PreTrainedModel, path: str, answer: type[Any]) -> tuple[Any, _Stub]:
    """Copy the modules on the way to the decoder, sharing all others, and put a stub in its place."""
    *parents, last = path.split(".")
    shell = module = _shallow(model)
    for name in parents:
        copied = _shallow(module.get_submodule(name))
        module.add_module(name, copied)
        module = copied
    stub = _Stub(module.get_submodule(last), answer)
    module.add_module(last, stub)
    return shell, stub


def _shallow(module: nn.Module) -> nn.Module:
    """Return another module with the same parameters and children, without its hooks."""
    other = copy.copy(module)
    for name, value in module.__dict__.items():
        if name == "_modules":
            other.__dict__[name] = dict(value)
        elif name.endswith("_hooks") and isinstance(value, OrderedDict):
            other.__dict__[name] = OrderedDict()
    return other


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
