"""The chunked loss is held to the model's own loss over full logits, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, GPT2Config, GraniteConfig

from qlora_core.data import Batch
from qlora_core.nn import LoraConfig, add_lora, lora_modules
from qlora_core.train import loss as loss_module
from qlora_core.train.loss import SupervisedLoss
from tests.tiny_models import save_tiny_gemma2, save_tiny_llama, save_tiny_qwen2

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _saved(save: Callable[..., Path], **config: Any) -> Callable[[Path], Any]:
    return lambda folder: AutoModelForCausalLM.from_pretrained(
        save(folder, **config), dtype=torch.float32
    )


def _random(config: Any) -> Callable[[Path], Any]:
    return lambda _: AutoModelForCausalLM.from_config(config, dtype=torch.float32)


FAMILIES: dict[str, Callable[[Path], Any]] = {
    "llama": _saved(save_tiny_llama),
    "qwen2": _saved(save_tiny_qwen2),
    "gemma2": _saved(save_tiny_gemma2),
    # A cap this low bends even a random model's small logits.
    "gemma2 with a low cap": _saved(save_tiny_gemma2, final_logit_softcapping=0.5),
    "granite": _random(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "cohere": _random(CohereConfig(**SIZES, logit_scale=0.25)),
    "gpt2": _random(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
}


def _model(family: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family](folder)
    if family == "gpt2":  # its projections are of transformers' own Conv1D, which takes no LoRA
        model.get_output_embeddings().requires_grad_(False)
    else:
        add_lora(model, LoraConfig(r=4), seed=0)
        for adapter in lora_modules(model).values():
            torch.nn.init.normal_(adapter.lora_B, std=0.2)
    return model.eval()


def _batch() -> tuple[Batch, torch.Tensor]:
    """Two rows with padding; returns the batch and labels as transformers wants them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 97, (2, 13), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[0, 5:13] = ids[0, 5:13]
    labels[1, 3:9] = ids[1, 3:9]
    ids[1, 9:] = 0
    places = (labels != -100).view(-1).nonzero().squeeze(1)
    return Batch(ids, places - 1, ids.view(-1)[places], 22), labels


def _gradients(model: Any) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("chunk_tokens", [1024, 5, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(
    family: str, chunk_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_TOKENS", chunk_tokens)
    model = _model(family, tmp_path)
    batch, labels = _batch()
    mask = (batch.input_ids != 0).long()
    expected = model(input_ids=batch.input_ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    expected_gradients = _gradients(model)
    model.zero_grad()
    loss_of = SupervisedLoss(model)

    loss, _ = loss_of(batch)
    (loss / len(batch.targets)).backward()

    assert loss_of.chunked
    torch.testing.assert_close(loss / len(batch.targets), expected, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(_gradients(model), expected_gradients, strict=True):
        assert (actual - wanted).norm() <= 1e-4 * wanted.norm()


def test_accuracy_counts_the_likeliest_tokens(tmp_path: Path) -> None:
    model = _model("llama", tmp_path)
    batch, _ = _batch()
    logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
    best = logits.argmax(-1)
    targets = torch.where(torch.arange(len(best)) % 3 == 0, best, (best + 1) % 97)

    _, n_correct = SupervisedLoss(model)(Batch(batch.input_ids, batch.positions, targets, 22))

    assert int(n_correct) == (len(best) + 2) // 3


def test_a_head_that_nobody_knows_is_taken_as_it_is(tmp_path: Path) -> None:
    model = _model("llama", tmp_path)
    plain = model.forward

    def strange(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 2 + torch.arange(output.logits.shape[-1]) / 10
        return output

    model.forward = strange
    batch, _ = _batch()
    loss_of = SupervisedLoss(model)

    loss, _ = loss_of(batch)

    assert not loss_of.chunked
    logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
    torch.testing.assert_close(
        loss, functional.cross_entropy(logits, batch.targets, reduction="sum")
    )


def test_a_head_that_is_trained_gets_its_gradient(tmp_path: Path) -> None:
    model = _model("llama", tmp_path)
    model.get_output_embeddings().requires_grad_(True)
    batch, _ = _batch()
    loss_of = SupervisedLoss(model)

    loss_of(batch)[0].backward()

    assert not loss_of.chunked
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


def test_full_logits_never_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_TOKENS", 4)
    model = _model("llama", tmp_path)
    batch, _ = _batch()
    loss_of = SupervisedLoss(model)
    sizes: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _inputs, output: sizes.append(len(output)))

    loss_of(batch)[0].backward()

    assert sizes == [4, 4, 4, 2]


def test_finding_the_head_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = _model("llama", tmp_path).train()
    before = torch.random.get_rng_state()

    SupervisedLoss(model)

    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
