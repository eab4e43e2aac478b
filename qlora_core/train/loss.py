"""Cross-entropy over the trained tokens only, in chunks: the full logits never exist.

The decoder's hidden states are taken where a trained token is predicted; the output head then runs
over a few hundred of them at a time, and the gradients of the chunk are computed in the same pass:
those of the hidden states, and those of the head itself where it is trained.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_core.data import Batch
from qlora_core.train.head import Head, find_head
from qlora_core.train.memory.host_memory import saved_on_host
from qlora_core.train.packed_attention import packed_row

# Float32 logits of a chunk: 128 MiB.
_CHUNK_ELEMENTS = 2**25
_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class BatchLoss:
    """What one forward pass over a batch found.

    Attributes:
        loss: float32 scalar, differentiable: cross-entropy summed over the trained tokens, in nats.
        n_correct: int64 scalar: trained tokens that were predicted right.
        example_losses: float32 [examples], without gradient: the same sum for each of ``batch.examples``.
    """

    loss: Tensor
    n_correct: Tensor
    example_losses: Tensor


class SupervisedLoss:
    """Sums the loss of a batch's trained tokens under a causal language model of transformers.

    Attributes:
        chunked: False for a model whose head cannot be told from its decoder (`find_head`): then its plain
            forward pass is used, full logits and all.
        chunk_tokens: over which the head runs at a time.
        inputs_on_host: whether what the decoder keeps for its backward pass is kept on the host.
        last_pass: which examples the last batch had, and how many tokens, padding counted; None before the first.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._head = find_head(model)
        self.chunked = self._head is not None
        self.inputs_on_host = False
        self.last_pass: tuple[tuple[int, ...], int] | None = None
        vocabulary = model.config.get_text_config().vocab_size
        self.chunk_tokens = max(1, min(_CHUNK_TOKENS, _CHUNK_ELEMENTS // vocabulary))

    def __call__(self, batch: Batch) -> BatchLoss:
        """Return the loss of a batch on the model's device; a packed one needs a model set up by `choose_packing`."""
        self.last_pass = batch.examples, batch.input_ids.numel()
        options: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        row: AbstractContextManager[None] = nullcontext()
        if batch.lengths is not None:
            options["position_ids"], row = batch.position_ids, packed_row(batch.lengths)
        if self._head is None:
            with row, self._saved():
                logits = self._model(**options).logits.flatten(0, 1)[batch.positions]
            losses, n_correct = _losses(logits, batch.targets)
            return BatchLoss(losses.sum(), n_correct, _by_example(losses.detach(), batch))
        with row, self._saved():
            hidden = self._head.decoder(**options).last_hidden_state
        loss, losses, n_correct = _ChunkedLossFn.apply(
            hidden.flatten(0, 1)[batch.positions],
            batch.targets,
            self._head,
            self.chunk_tokens,
            *self._head.parameters,
        )  # pyright: ignore[reportGeneralTypeIssues]
        return BatchLoss(loss, n_correct, _by_example(losses, batch))

    def _saved(self) -> AbstractContextManager[None]:
        if not self.inputs_on_host:
            return nullcontext()
        return saved_on_host([*self._model.parameters(), *self._model.buffers()])


class _ChunkedLossFn(torch.autograd.Function):
    """Loss and its gradients for hidden [tokens, width] and the head's parameters, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        chunk_tokens: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = [
            p for p, needed in zip(parameters, ctx.needs_input_grad[4:], strict=True) if needed
        ]
        grads = _Gradients(hidden if ctx.needs_input_grad[0] else None, wanted)
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        n_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for start in range(0, len(targets), chunk_tokens):
            place = slice(start, start + chunk_tokens)
            with torch.set_grad_enabled(grads.needed):
                chunk = hidden[place].detach().requires_grad_(ctx.needs_input_grad[0])
                chunk_losses, chunk_correct = _losses(head(chunk), targets[place])
                chunk_loss = chunk_losses.sum()
            if grads.needed:
                grads.add(chunk_loss, chunk, place)
            losses[place] = chunk_losses.detach()
            n_correct += chunk_correct
        ctx.grads, ctx.needed = grads, ctx.needs_input_grad
        ctx.mark_non_differentiable(losses, n_correct)
        return losses.sum(), losses, n_correct

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        *outer: Tensor,
    ) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        of_parameters = iter(grads.scaled_parameters(outer[0]))
        return (
            grads.scaled_hidden(outer[0]), None, None, None,
            *(next(of_parameters) if needed else None for needed in ctx.needed[4:]),
        )  # fmt: skip


class _Gradients:
    """The gradients of a summed loss, gathered chunk by chunk.

    Args:
        hidden: [tokens, width], None where its gradient is not wanted.
        parameters: of the head, whose gradients are wanted; summed in float32.
    """

    def __init__(self, hidden: Tensor | None, parameters: list[Tensor]) -> None:
        self._hidden = None if hidden is None else torch.empty_like(hidden)
        self._parameters = parameters
        self._sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        self.needed = hidden is not None or bool(parameters)

    def add(self, loss: Tensor, chunk: Tensor, place: slice) -> None:
        """Take in the gradients of one chunk's loss."""
        inputs = self._parameters if self._hidden is None else [chunk, *self._parameters]
        found = list(torch.autograd.grad(loss, inputs, allow_unused=True))
        if self._hidden is not None:
            self._hidden[place] = found.pop(0)
        for total, grad in zip(self._sums, found, strict=True):
            if grad is not None:
                total.add_(grad)

    def scaled_hidden(self, factor: Tensor) -> Tensor | None:
        """Return the hidden states' gradient times what comes from outside; this once."""
        return None if self._hidden is None else self._hidden.mul_(factor.to(self._hidden.dtype))

    def scaled_parameters(self, factor: Tensor) -> list[Tensor]:
        """Return the parameters' gradients likewise, in their own dtypes."""
        return [
            total.mul_(factor).to(parameter.dtype)
            for total, parameter in zip(self._sums, self._parameters, strict=True)
        ]


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's cross-entropy in float32, and how often the largest logit is the target's."""
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    return losses, (logits.detach().argmax(-1) == targets).sum()


def _by_example(losses: Tensor, batch: Batch) -> Tensor:
    """Sum each example's tokens, in float64 and in an order that is the same on every device each time."""
    # Not by differences of a running sum, which torch has no deterministic kernel for on a GPU.
    places = torch.arange(len(losses), device=losses.device)
    owners = torch.searchsorted(batch.trained_ends, places, right=True)
    sums = torch.zeros(len(batch.examples), dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, owners, losses.double()).float()
