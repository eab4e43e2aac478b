"""The chunked loss is held to the model's own loss over full logits, gradients included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_core.data import Batch
from qlora_core.nn import LoraConfig, add_lora, lora_modules
from qlora_core.train import loss as loss_module
from qlora_core.train.loss import SupervisedLoss
from tests.qlora_core.train.families import VOCABULARY, build

FAMILIES = ["llama", "qwen2, tied", "gemma2 with a low cap", "gemma3", "mixtral", "granite", "cohere",
            "gpt2", "opt", "falcon"]  # fmt: skip


def _model(family: str) -> Any:
    model = build(family)
    if family == "gpt2":  # its projections are of transformers' own Conv1D
        return model.requires_grad_(False)
    add_lora(model, LoraConfig(r=4), seed=0)
    for adapter in lora_modules(model).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.2)
    return model


def _batch() -> tuple[Batch, torch.Tensor]:
    """Two rows with padding; returns the batch and labels as transformers wants them."""
    ids = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(3))
    labels = torch.full_like(ids, -100)
    labels[0, 5:13] = ids[0, 5:13]
    labels[1, 3:9] = ids[1, 3:9]
    ids[1, 9:] = 0
    places = (labels != -100).view(-1).nonzero().squeeze(1)
    batch = Batch(
        input_ids=ids,
        positions=places - 1,
        targets=ids.view(-1)[places],
        examples=(0, 1),
        trained_ends=torch.tensor([8, 14]),
        n_tokens=22,
    )
    return batch, labels


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _assert_same_gradients(actual: Any, expected: Any) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (actual[name] - wanted).norm() <= 1e-4 * wanted.norm(), name


def _expected(model: Any, *, scale: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean loss and gradients of transformers, over full logits."""
    batch, labels = _batch()
    mask = (batch.input_ids != 0).long()
    loss = model(input_ids=batch.input_ids, attention_mask=mask, labels=labels).loss
    (scale * loss).backward()
    gradients = _gradients(model)
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


@pytest.mark.parametrize("chunk_tokens", [1024, 5, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(
    family: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_TOKENS", chunk_tokens)
    model, (batch, _) = _model(family), _batch()
    if family == "gpt2":
        model.get_submodule("transformer.h.0.ln_1").weight.requires_grad_(True)
    expected, gradients = _expected(model, scale=3.0)
    loss_of = SupervisedLoss(model)

    loss = loss_of(batch).loss
    (3 * loss / len(batch.targets)).backward()

    assert loss_of.chunked
    torch.testing.assert_close(loss / len(batch.targets), expected, rtol=1e-5, atol=1e-5)
    _assert_same_gradients(_gradients(model), gradients)


@pytest.mark.parametrize("family", ["llama", "qwen2, tied", "gemma2 with a low cap", "phi"])
def test_a_trained_head_gets_its_gradient_from_the_chunks(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_TOKENS", 5)
    model, (batch, _) = _model(family), _batch()
    # Where the matrix is tied, its gradient has a part from the embedding too; where the head has a
    # bias, that is trained with it.
    model.get_output_embeddings().requires_grad_(True)
    _, gradients = _expected(model)
    loss_of = SupervisedLoss(model)

    loss = loss_of(batch).loss
    (loss / len(batch.targets)).backward()

    assert loss_of.chunked
    _assert_same_gradients(_gradients(model), gradients)


def test_a_head_alone_can_be_trained() -> None:
    model, (batch, _) = build("llama").requires_grad_(False), _batch()
    model.get_output_embeddings().requires_grad_(True)
    _, gradients = _expected(model)

    (SupervisedLoss(model)(batch).loss / len(batch.targets)).backward()

    _assert_same_gradients(_gradients(model), gradients)


def test_a_bfloat16_head_sums_its_gradient_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_TOKENS", 1)
    model, (batch, _) = build("llama").requires_grad_(False), _batch()
    head = model.get_output_embeddings().requires_grad_(True)
    exact = _expected(model)[1]["lm_head.weight"]
    head.to(torch.bfloat16)
    model.model.norm.register_forward_hook(lambda *args: args[2].to(torch.bfloat16))

    (SupervisedLoss(model)(batch).loss / len(batch.targets)).backward()

    # Fourteen terms; each rounded to bfloat16 once, and their sum once.
    assert (head.weight.grad.float() - exact).norm() <= 0.01 * exact.norm()
    assert head.weight.grad.dtype == torch.bfloat16


def test_accuracy_counts_the_likeliest_tokens() -> None:
    model, (batch, _) = _model("llama"), _batch()
    logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
    best = logits.argmax(-1)
    targets = torch.where(torch.arange(len(best)) % 3 == 0, best, (best + 1) % VOCABULARY)

    found = SupervisedLoss(model)(replace(batch, targets=targets))

    assert int(found.n_correct) == (len(best) + 2) // 3


@pytest.mark.parametrize("chunk_tokens", [1024, 3])
def test_tells_the_loss_of_each_example(chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_TOKENS", chunk_tokens)
    model, (batch, labels) = _model("llama"), _batch()
    expected = [
        functional.cross_entropy(logits[:-1], row[1:], ignore_index=-100, reduction="sum")
        for logits, row in zip(model(input_ids=batch.input_ids).logits, labels, strict=True)
    ]

    found = SupervisedLoss(model)(batch)

    torch.testing.assert_close(found.example_losses, torch.stack(expected))
    assert not found.example_losses.requires_grad


def test_a_head_that_cannot_be_told_from_its_decoder_is_taken_with_full_logits() -> None:
    model, (batch, _) = _model("llama"), _batch()
    plain = model.forward

    def strange(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 2 + torch.arange(VOCABULARY) / 10
        return output

    model.forward = strange
    loss_of = SupervisedLoss(model)

    loss = loss_of(batch).loss

    assert not loss_of.chunked
    logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
    torch.testing.assert_close(
        loss, functional.cross_entropy(logits, batch.targets, reduction="sum")
    )


class _LogitRows(TorchDispatchMode):
    """Notes of how many tokens at once there were logits, in any operation's result."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            rows = tensor.numel() // VOCABULARY if tensor.dim() else 0
            # The head's own matrix, transposed, has as many rows as the head is wide.
            if tensor.shape[-1:] == (VOCABULARY,) and rows != self.head_width:
                self.most = max(self.most, rows)
        return found


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, list | tuple):
        for item in found:
            yield from _tensors(item)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("training", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize("family", ["llama", "qwen2, tied", "gemma2 with a low cap", "opt"])
def test_full_logits_never_exist(
    family: str, training: bool, trained_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_TOKENS", 4)
    model, (batch, _) = _model(family).train(training), _batch()
    head = model.get_output_embeddings().requires_grad_(trained_head)
    loss_of = SupervisedLoss(model)

    with torch.set_grad_enabled(training), _LogitRows(head.weight.shape[1]) as logits:
        loss = loss_of(batch).loss
        if training:
            loss.backward()

    assert logits.most == 4
