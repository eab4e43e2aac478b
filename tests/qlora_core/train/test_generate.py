"""Greedy answers are held to transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from qlora_core import TextEncoder
from qlora_core.nn import LoraConfig, add_lora, lora_disabled, lora_modules
from qlora_core.train.generate import answer_samples, generate


def _adapted(model: PreTrainedModel) -> PreTrainedModel:
    add_lora(model, LoraConfig(r=4, alpha=16), seed=0)
    torch.manual_seed(0)
    for adapter in lora_modules(model).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.3)
    return model


def test_writes_what_transformers_generates(
    load: Callable[[], PreTrainedModel], encoder: TextEncoder
) -> None:
    model = _adapted(load()).train()
    prompt = encoder.encode_prompt([{"role": "user", "content": "What is a nibble?"}])

    actual = generate(model, encoder, prompt, max_new_tokens=20)

    assert model.training
    expected = (
        model.eval()
        .generate(  # pyright: ignore[reportCallIssue]
            torch.tensor([prompt]),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=list(encoder.stop_ids),
        )[0, len(prompt) :]
        .tolist()
    )
    assert actual == [token for token in expected if token not in encoder.stop_ids]
    assert len(actual) > 1


def test_stops_at_a_stop_token_and_at_the_end_of_the_context(
    load: Callable[[], PreTrainedModel], encoder: TextEncoder
) -> None:
    model = _adapted(load())
    free = generate(model, encoder, [3, 4, 5], max_new_tokens=8)
    stopping = TextEncoder.from_folder(encoder.folder or "")
    stopping.stop_ids = frozenset({free[2]})

    stopped = generate(model, stopping, [3, 4, 5], max_new_tokens=8)
    at_the_end = generate(model, encoder, [3] * 126, max_new_tokens=8)

    assert stopped == free[: free.index(free[2])]
    assert len(at_the_end) <= 2


def test_the_base_answers_while_the_adapter_is_off(
    load: Callable[[], PreTrainedModel], encoder: TextEncoder
) -> None:
    prompts = [[{"role": "user", "content": "len?"}]]
    base = answer_samples(load(), encoder, prompts, max_new_tokens=10)
    model = _adapted(load())

    with lora_disabled(model):
        off = answer_samples(model, encoder, prompts, max_new_tokens=10)
    on = answer_samples(model, encoder, prompts, max_new_tokens=10)

    assert off == base
    assert on != base
    assert on[0]["messages"] == prompts[0]
