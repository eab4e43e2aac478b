"""Greedy answers are held to transformers' own generation."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from qlora_core import TextEncoder
from qlora_core.nn import LoraConfig, add_lora, lora_disabled, lora_modules
from qlora_core.train.generate import answer_samples, choose_token, continue_prompt, generate


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


def test_what_is_drawn_is_the_same_from_the_same_seed(
    load: Callable[[], PreTrainedModel], encoder: TextEncoder
) -> None:
    model = _adapted(load())

    def draw(seed: int) -> list[int]:
        return [*continue_prompt(model, encoder, [3, 4, 5], max_new_tokens=12, temperature=2.0, seed=seed)]  # fmt: skip

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(4)}) > 1


def test_an_answer_that_is_left_halfway_leaves_the_mode_as_it_was(
    load: Callable[[], PreTrainedModel], encoder: TextEncoder
) -> None:
    model = _adapted(load()).train()
    answer = continue_prompt(model, encoder, [3, 4, 5], max_new_tokens=12)

    begun = [*itertools.islice(answer, 2)]
    assert not model.training
    answer.close()  # type: ignore[attr-defined]

    assert model.training
    assert begun == generate(model, encoder, [3, 4, 5], max_new_tokens=2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    n = 4000

    drawn = [choose_token(logits, temperature, generator) for _ in range(n)]

    weights = [2.718281828459045 ** (value / temperature) for value in logits.tolist()]
    for token, weight in enumerate(weights):
        share = weight / sum(weights)
        # five standard deviations of a count of n
        assert abs(drawn.count(token) - n * share) < 5 * (n * share * (1 - share)) ** 0.5


def test_at_temperature_0_the_likeliest_is_taken() -> None:
    generator = torch.Generator().manual_seed(0)

    assert {choose_token(torch.tensor([0.0, 0.1, -1.0]), 0.0, generator) for _ in range(20)} == {1}
