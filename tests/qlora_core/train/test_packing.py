"""Packed examples get the logits, losses and gradients that they get alone, whatever the family; or are padded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPTJConfig

from qlora_core.data import Batch, Dataset, collate, pack
from qlora_core.data.dataset import Examples
from qlora_core.nn import LoraConfig, add_lora, lora_modules
from qlora_core.text import EncodedExample, TextEncoder
from qlora_core.train import Event, Notice, StepMetrics, ValidationMetrics, packed_attention, train
from qlora_core.train.loss import SupervisedLoss
from qlora_core.train.memory.checkpointing import checkpoint_activations
from qlora_core.train.packed_attention import packed_row
from qlora_core.train.packing import Packing, alone_above, choose_packing
from tests.qlora_core.models.families import FAMILIES as ALL_FAMILIES
from tests.qlora_core.models.families import tiny_config
from tests.qlora_core.train.families import VOCABULARY, build

PACKED = ["llama", "mistral with a window", "qwen2, tied", "qwen3", "gemma2", "gemma3", "gemma3 with eyes", "phi3",
          "mixtral", "granite", "cohere2", "gpt_neox", "gpt2", "opt", "llama4"]  # fmt: skip
PADDED = ["falcon", "falcon with alibi", "bloom", "mamba", "jamba"]
# transformers 5.23 cannot make these from a configuration, on a machine without images and downloads.
NOT_BUILT = {
    "gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody",
}  # fmt: skip
# Shorter and longer than the families' windows (5 and 6), two of the least tokens that can be trained on.
LENGTHS = (9, 2, 23, 2, 14)


def _dataset() -> Dataset:
    generator = torch.Generator().manual_seed(5)
    examples: list[EncodedExample] = []
    for length in LENGTHS:
        ids = torch.randint(3, VOCABULARY - 6, (length,), generator=generator).tolist()
        trained = [i % 3 != 0 for i in range(length)]
        examples.append(EncodedExample(ids, trained, False, sum(trained), length))
    report: Any = None
    return Dataset(Examples.of(examples), report)


def _packed() -> Batch:
    return pack(_dataset(), range(len(LENGTHS)))


def _with_lora(family: str) -> Any:
    model = build(family)
    if family == "gpt2":  # its projections are of transformers' own Conv1D
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("weight") and ".ln_" in name)
        return model
    add_lora(
        model,
        LoraConfig(r=4, target_modules=r".*(q|k|v|o)_proj|.*(qkv_proj|query_key_value|dense)"),
    )
    for adapter in lora_modules(model).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.2)
    return model


@pytest.mark.parametrize("family", PACKED)
def test_packed_logits_are_those_of_each_example_alone(family: str) -> None:
    model, batch = build(family), _packed()
    alone = [model(input_ids=ids).logits[0] for ids in batch.input_ids.split(LENGTHS, dim=1)]

    packing = choose_packing(model)
    with packed_row(LENGTHS):
        found = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)

    assert packing is Packing.BY_EXAMPLE
    for actual, expected in zip(found.logits[0].split(LENGTHS), alone, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what old families do
@pytest.mark.parametrize("family", sorted(set(ALL_FAMILIES) - NOT_BUILT))
def test_what_is_chosen_for_any_family_is_exact(family: str) -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    batch = _packed()
    ids = batch.input_ids.remainder(40)

    if choose_packing(model) is Packing.NONE:
        return
    with torch.no_grad(), packed_row(LENGTHS):
        found = model(input_ids=ids, position_ids=batch.position_ids, use_cache=False).logits[0]

    with torch.no_grad():
        alone = [model(input_ids=one, use_cache=False).logits[0] for one in ids.split(LENGTHS, 1)]
    for actual, expected in zip(found.split(LENGTHS), alone, strict=True):
        assert (actual - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", PACKED)
def test_packed_loss_and_gradients_are_those_of_padded_rows(family: str, recomputed: bool) -> None:
    model = _with_lora(family)
    loss_of = SupervisedLoss(model)
    padded = loss_of(collate(_dataset(), range(len(LENGTHS)), pad_id=0))
    padded.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    if recomputed:
        assert checkpoint_activations(model)
        model.train()

    choose_packing(model)
    packed = loss_of(_packed())
    packed.loss.backward()

    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.example_losses, padded.example_losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(packed.n_correct, padded.n_correct)
    assert gradients
    for name, expected in gradients.items():
        actual = model.get_parameter(name).grad
        assert (actual - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("family", ["llama", "mistral with a window", "gemma2"])
def test_an_example_does_not_see_another_in_a_single_bit(family: str) -> None:
    model, batch = build(family), _packed()
    choose_packing(model)

    def logits(input_ids: torch.Tensor) -> list[torch.Tensor]:
        with packed_row(LENGTHS):
            found = model(input_ids=input_ids, position_ids=batch.position_ids, use_cache=False)
        return list(found.logits[0].split(LENGTHS))

    before = logits(batch.input_ids)
    changed = batch.input_ids.clone()
    changed[0, LENGTHS[0] + LENGTHS[1] + 4] = 3  # in the third

    after = logits(changed)

    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert same == [True, True, False, True, True]


@pytest.mark.parametrize("family", PADDED)
def test_a_family_that_cannot_keep_examples_apart_is_padded(family: str) -> None:
    model = build(family)
    ids = _packed().input_ids
    before = model(input_ids=ids).logits

    packing = choose_packing(model)

    assert packing is Packing.NONE
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_family_outside_of_the_attention_interface_is_packed_with_a_mask() -> None:
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    loss_of = SupervisedLoss(model)
    padded = loss_of(collate(_dataset(), range(len(LENGTHS)), pad_id=0))

    packing = choose_packing(model)

    assert packing is Packing.BY_MASK
    torch.testing.assert_close(loss_of(_packed()).loss, padded.loss)


class _Squares(TorchDispatchMode):
    """Notes results as large as a row's tokens squared."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.shape[-2:] == (sum(LENGTHS),) * 2:
            self.found.append(str(func))
        return found


@pytest.mark.parametrize("family", ["llama", "mistral with a window", "gemma2"])
def test_nothing_is_computed_across_examples(family: str) -> None:
    model = build(family)
    choose_packing(model)
    loss_of = SupervisedLoss(model)

    with _Squares() as squares:
        loss_of(_packed())

    assert squares.found == []


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_outside_of_packed_rows_the_model_is_as_it_was(family: str) -> None:
    model = build(family)
    ids = _packed().input_ids
    before, answer = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=5)

    choose_packing(model)

    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=5), answer)
    # Positions that begin anew keep examples apart even where nobody said that the row is packed.
    positions, lengths = _packed().position_ids, LENGTHS
    told = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    with packed_row(lengths):
        said = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(told, said, rtol=1e-4, atol=1e-4)


def test_choosing_leaves_mode_and_random_states() -> None:
    model, state = build("llama").train(), torch.random.get_rng_state()

    choose_packing(model)

    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_example_that_changes_the_frequencies_of_others_is_alone() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    longrope = build("phi3")
    longrope.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 40, **factors}  # fmt: skip
    dynamic = build("llama")
    dynamic.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}

    assert alone_above(longrope) == 40
    assert alone_above(dynamic) == 64
    assert alone_above(build("llama")) is None
    assert alone_above(build("gemma3")) is None
    assert alone_above(build("llama4")) == 6


def test_a_packed_run_is_a_padded_run(
    load: Any, encoder: TextEncoder, config: Any, make_dataset: Any, tmp_path: Path
) -> None:
    runs: list[list[Event]] = [[], []]

    for packing, events in zip((True, False), runs, strict=True):
        train(
            load(), encoder, make_dataset(11), config(packing=packing, micro_batch_tokens=90),
            events.append, output_dir=tmp_path / str(packing), validation=make_dataset(7),
        )  # fmt: skip

    for one, other in zip(*runs, strict=True):
        if isinstance(one, StepMetrics) and isinstance(other, StepMetrics):
            assert one.train_loss == pytest.approx(other.train_loss, rel=1e-5)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
            assert one.train_mean_token_accuracy == other.train_mean_token_accuracy
            assert one.trained_tokens == other.trained_tokens
        if isinstance(one, ValidationMetrics) and isinstance(other, ValidationMetrics):
            assert one.full_valid_loss == pytest.approx(other.full_valid_loss, rel=1e-5)


def test_a_run_tells_that_it_pads(
    encoder: TextEncoder, config: Any, make_dataset: Any, tmp_path: Path
) -> None:
    events: list[Event] = []
    model = build("bloom", vocab_size=encoder.vocab_size)

    train(model, encoder, make_dataset(5), config(n_epochs=1), events.append, output_dir=tmp_path)

    notices = [event.message for event in events if isinstance(event, Notice)]
    assert any("BloomForCausalLM" in notice and "padded" in notice for notice in notices)


def _varlen_in_pytorch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    starts_of_keys: torch.Tensor,
    longest: int,
    longest_of_keys: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What the documentation of `torch.nn.attention.varlen` says, on any device."""
    assert starts.dtype == torch.int32
    assert starts is starts_of_keys
    assert window_size[1] == 0
    assert longest == longest_of_keys == int(starts.diff().max())
    found: list[torch.Tensor] = []
    for start, end in itertools.pairwise(starts.tolist()):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
        reach = window_size[0] if window_size[0] >= 0 else end - start
        mask = (back >= 0) & (back <= reach)
        one = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        found.append(one[0].transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("family", ["llama", "mistral with a window", "gpt_neox"])
def test_the_one_kernel_is_asked_for_what_the_examples_need(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(family), _packed()
    alone = [model(input_ids=ids).logits[0] for ids in batch.input_ids.split(LENGTHS, dim=1)]
    choose_packing(model)
    monkeypatch.setattr(varlen, "varlen_attn", _varlen_in_pytorch)
    monkeypatch.setattr(packed_attention, "_takes_varlen", lambda *_: True)

    with packed_row(LENGTHS):
        found = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)

    for actual, expected in zip(found.logits[0].split(LENGTHS), alone, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_this_torch_knows_the_kernel_by_the_same_names() -> None:
    query = torch.empty(1, 4, 6, 16, dtype=torch.bfloat16, device="meta")
    key = torch.empty(1, 2, 6, 16, dtype=torch.bfloat16, device="meta")
    settings = {"device": "meta", "config": None, "local_size": 3}
    mask = packed_attention.PackedMask("sdpa", (4, 2), settings)

    found = packed_attention._varlen(query, key, key, mask, 0.25)

    assert found.shape == (1, 6, 4, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral with a window", "gpt_neox"])
def test_one_kernel_for_the_row_is_one_example_after_the_other(family: str) -> None:
    model: Any = build(family).to("cuda", torch.bfloat16)
    batch = _packed().to(torch.device("cuda"))
    alone = [model(input_ids=ids).logits[0] for ids in batch.input_ids.split(LENGTHS, dim=1)]

    packing = choose_packing(model)
    with packed_row(LENGTHS):
        found = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)

    assert packing is Packing.BY_EXAMPLE
    for actual, expected in zip(found.logits[0].split(LENGTHS), alone, strict=True):
        assert (actual - expected).norm() <= 0.03 * expected.norm()
