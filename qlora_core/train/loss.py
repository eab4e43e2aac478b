"""Cross-entropy over the trained tokens only, in chunks: the full logits never exist.

The decoder's hidden states are taken where a trained token is predicted; the output head then runs
over a few hundred of them at a time, and their gradient is computed in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_core.data import Batch

Head = Callable[[Tensor], Tensor]

# Float32 logits of a chunk: 128 MiB.
_CHUNK_ELEMENTS = 2**25
_CHUNK_TOKENS = 1024
_PROBE_TOKENS = 8


class SupervisedLoss:
    """Sums the loss of a batch's trained tokens under a causal language model of transformers.

    Families differ in what they do with the head's output (scale it, cap it softly). The variants that
    config.json can ask for are tried once, on a few tokens, against the model's own logits; if none of
    them gives those, or the head itself is trained, ``chunked`` is False and the model's plain forward
    pass is used, full logits and all.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder: Any = model.get_decoder()
        self._head = _find_head(model, self._decoder)
        self.chunked = self._head is not None
        vocabulary = model.config.get_text_config().vocab_size
        self._chunk_tokens = max(1, min(_CHUNK_TOKENS, _CHUNK_ELEMENTS // vocabulary))

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed loss (float32, differentiable) and how many tokens were predicted right."""
        if self._head is None:
            logits = self._model(input_ids=batch.input_ids, use_cache=False).logits
            return _sums(logits.flatten(0, 1)[batch.positions], batch.targets)
        hidden = _hidden(self._decoder, batch.input_ids).flatten(0, 1)[batch.positions]
        loss, n_correct = _ChunkedLossFn.apply(
            hidden, batch.targets, self._head, self._chunk_tokens
        )  # pyright: ignore[reportGeneralTypeIssues]
        return loss, n_correct


class _ChunkedLossFn(torch.autograd.Function):
    """Loss and its gradient for hidden [tokens, width], chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if needs_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        n_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for start in range(0, len(targets), chunk_tokens):
            place = slice(start, start + chunk_tokens)
            with torch.set_grad_enabled(needs_grad):
                chunk = hidden[place].detach().requires_grad_(needs_grad)
                chunk_loss, chunk_correct = _sums(head(chunk), targets[place])
            if grad is not None:
                (grad[place],) = torch.autograd.grad(chunk_loss, chunk)
            loss += chunk_loss.detach()
            n_correct += chunk_correct
        ctx.grad = grad
        ctx.mark_non_differentiable(n_correct)
        return loss, n_correct

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        *grads: Tensor,
    ) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None
        return None if grad is None else grad.mul_(grads[0].to(grad.dtype)), None, None, None


def _sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return summed cross-entropy in float32, and how often the largest logit is the target's."""
    loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
    return loss, (logits.detach().argmax(-1) == targets).sum()


def _hidden(decoder: Any, input_ids: Tensor) -> Tensor:  # noqa: ANN401 - any family's decoder
    output = decoder(input_ids=input_ids, use_cache=False)
    return output.last_hidden_state


def _find_head(model: PreTrainedModel, decoder: Any) -> Head | None:  # noqa: ANN401
    """Return what turns hidden states into this model's logits, or None where that is not known."""
    linear = model.get_output_embeddings()
    if linear is None or decoder is model:
        return None
    if any(parameter.requires_grad for parameter in linear.parameters()):
        return None  # the chunks give no gradient to the head itself
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            vocabulary = model.config.get_text_config().vocab_size
            ids = torch.arange(_PROBE_TOKENS, device=model.device).remainder(vocabulary)[None]
            expected = model(input_ids=ids, use_cache=False).logits.float()
            hidden = _hidden(decoder, ids)
            for head in _head_variants(model, linear):
                actual = head(hidden).float()
                if torch.allclose(actual, expected, rtol=1e-4, atol=1e-5):
                    return head
    except (AttributeError, TypeError):
        return None  # a decoder with another signature
    finally:
        model.train(was_training)
    return None


def _head_variants(model: PreTrainedModel, linear: Any) -> list[Head]:  # noqa: ANN401
    """Return the heads that the config may ask for, the most particular first."""
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        return [lambda hidden: torch.tanh(linear(hidden) / cap) * cap]
    variants: list[Head] = []
    scale = getattr(config, "logit_scale", None)
    if isinstance(scale, int | float):
        variants.append(lambda hidden: linear(hidden) * scale)
    divisor = getattr(config, "logits_scaling", None)
    if isinstance(divisor, int | float):
        variants.append(lambda hidden: linear(hidden) / divisor)
    return [*variants, linear]
