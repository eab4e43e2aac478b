"""A head gives the model's own logits from its decoder's hidden states, whatever the family does with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_core.train.head import find_head
from tests.qlora_core.models.families import FAMILIES as ALL_FAMILIES
from tests.qlora_core.models.families import tiny_config
from tests.qlora_core.train.families import CONFIGS, VOCABULARY, build

# transformers 5.23 cannot make these from a configuration, on a machine without images and downloads.
NOT_BUILT = {
    "gemma3n",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "musicgen",
    "musicgen_melody",
}
# It gives two predictions for each place, and its head takes them both.
NOT_SPLIT = {"prophetnet"}


def _ids() -> torch.Tensor:
    return torch.randint(3, 90, (1, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", CONFIGS)
def test_gives_the_models_logits_for_any_tokens_in_any_order(family: str) -> None:
    model = build(family)
    expected = model(input_ids=_ids(), use_cache=False).logits[0]
    head = find_head(model)
    assert head is not None
    hidden = head.decoder(input_ids=_ids(), use_cache=False).last_hidden_state[0]
    order = torch.tensor([7, 0, 10, 3, 7])

    actual = head(hidden[order])

    torch.testing.assert_close(actual, expected[order], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what old families do
@pytest.mark.parametrize("family", sorted(set(ALL_FAMILIES) - NOT_BUILT))
def test_every_family_but_one_has_a_head(family: str) -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)

    head = find_head(model.eval())

    assert (head is None) == (family in NOT_SPLIT)


def test_copies_no_weight_and_leaves_the_model_as_it_was() -> None:
    model = build("gemma2").train()
    children, state = dict(model.named_modules()), torch.random.get_rng_state()
    calls: list[int] = []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))

    head = find_head(model)
    calls.clear()
    assert head is not None
    head(torch.zeros(3, 32))

    assert calls == []
    assert all(model.get_submodule(path) is module for path, module in children.items() if path)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_follows_a_weight_that_is_trained() -> None:
    model = build("llama").requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    head = find_head(model)
    assert head is not None
    hidden = torch.randn(4, 32)
    before = head(hidden)

    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)

    torch.testing.assert_close(head(hidden), 2 * before)
    assert [tuple(parameter.shape) for parameter in head.parameters] == [(VOCABULARY, 32)]


class _MixesTokens(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden) + hidden.mean()


def test_a_head_that_mixes_tokens_is_none() -> None:
    model: Any = build("llama")
    model.lm_head = _MixesTokens(model.lm_head)

    assert find_head(model) is None


def test_a_model_that_does_more_than_its_class_says_has_none() -> None:
    model: Any = build("llama")
    plain = model.forward

    def strange(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 2 + torch.arange(VOCABULARY) / 10
        return output

    model.forward = strange

    assert find_head(model) is None
