"""LoRA put into whole models: how A and B start, what is trainable, and the base model's own answers."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_core import ConfigError, LoraConfig, NF4Linear, add_lora, load_model, lora_disabled
from qlora_core.nn import LoraLinear, lora_modules
from tests.tiny_models import save_tiny_llama

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return load_model(folder, device="cpu", compute_dtype=torch.float32)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def test_all_linear_means_every_linear_layer_but_the_head(model: PreTrainedModel) -> None:
    paths = add_lora(model, LoraConfig(r=4))

    expected = [
        *(f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ATTENTION),
        *(f"model.layers.{i}.mlp.{name}" for i in range(2) for name in MLP),
    ]
    assert sorted(paths) == sorted(expected)
    assert list(lora_modules(model)) == paths
    assert isinstance(model.get_output_embeddings(), nn.Linear)


def test_only_the_adapters_are_trainable(model: PreTrainedModel) -> None:
    model.requires_grad_(True)

    add_lora(model, LoraConfig(r=4, target_modules=("q_proj",)))

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {
        f"model.layers.{i}.self_attn.q_proj.lora_{matrix}" for i in range(2) for matrix in "AB"
    }
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_the_models_answers_do_not_change_at_first(
    model: PreTrainedModel, ids: torch.Tensor
) -> None:
    before = model(ids).logits

    add_lora(model, LoraConfig(r=4))

    assert torch.equal(model(ids).logits, before)
    assert all(adapter.lora_B.eq(0).all() for adapter in lora_modules(model).values())


def test_a_starts_uniform_between_one_over_the_root_of_the_width() -> None:
    model = nn.Sequential(nn.Linear(400, 8))

    add_lora(model, LoraConfig(r=64))

    a = lora_modules(model)["0"].lora_A
    bound = 400**-0.5
    assert a.shape == (64, 400)
    assert a.abs().max() <= bound
    assert a.abs().max() > 0.99 * bound
    assert a.mean().abs() < 0.01 * bound
    assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_a_depends_on_the_seed_and_the_path_and_on_nothing_else(model: PreTrainedModel) -> None:
    again, other_seed, fewer = (copy.deepcopy(model) for _ in range(3))
    torch.manual_seed(1)
    add_lora(model, LoraConfig(r=4), seed=7)
    torch.manual_seed(2)
    add_lora(again, LoraConfig(r=4), seed=7)
    add_lora(other_seed, LoraConfig(r=4), seed=8)
    add_lora(fewer, LoraConfig(r=4, target_modules=("up_proj",)), seed=7)

    path = "model.layers.1.mlp.up_proj"
    a = lora_modules(model)[path].lora_A
    assert torch.equal(a, lora_modules(again)[path].lora_A)
    assert torch.equal(a, lora_modules(fewer)[path].lora_A)
    assert not torch.equal(a, lora_modules(other_seed)[path].lora_A)
    assert not torch.equal(a, lora_modules(model)["model.layers.0.mlp.up_proj"].lora_A)


def test_adding_leaves_the_global_generator_alone(model: PreTrainedModel) -> None:
    before = torch.random.get_rng_state()

    add_lora(model, LoraConfig(r=4))

    assert torch.equal(torch.random.get_rng_state(), before)


def test_adapters_are_not_added_twice(model: PreTrainedModel) -> None:
    add_lora(model, LoraConfig(r=4, target_modules=("q_proj",)))

    with pytest.raises(ConfigError, match="has LoRA adapters already"):
        add_lora(model, LoraConfig(r=4, target_modules=("v_proj",)))


def test_disabling_gives_the_base_models_answers_and_enabling_the_adapters_again(
    model: PreTrainedModel, ids: torch.Tensor
) -> None:
    base = model(ids).logits
    add_lora(model, LoraConfig(r=4))
    for adapter in lora_modules(model).values():
        adapter.lora_B.data.normal_()
    adapted = model(ids).logits

    with lora_disabled(model):
        disabled = model(ids).logits
    with pytest.raises(RuntimeError, match="inside"), lora_disabled(model):
        raise RuntimeError("inside")

    assert torch.equal(disabled, base)
    assert not torch.equal(adapted, base)
    assert torch.equal(model(ids).logits, adapted)


def test_an_adapter_shows_the_sizes_of_the_layer_under_it(model: PreTrainedModel) -> None:
    add_lora(model, LoraConfig(r=4, alpha=6))

    adapter = model.get_submodule("model.layers.0.mlp.up_proj")

    assert isinstance(adapter, LoraLinear)
    assert isinstance(adapter.base, NF4Linear)
    assert (adapter.in_features, adapter.out_features, adapter.r) == (64, 96, 4)
    assert adapter.scaling == 1.5


def test_patterns_give_single_layers_other_ranks_and_scales(model: PreTrainedModel) -> None:
    config = LoraConfig(
        r=4,
        alpha=8,
        rank_pattern={r"layers\.1\.mlp\..*_proj": 2, "q_proj": 3},
        alpha_pattern={"layers.0.self_attn.q_proj": 30},
    )

    add_lora(model, config)

    sizes = {path: (one.r, one.scaling) for path, one in lora_modules(model).items()}
    assert sizes["model.layers.0.self_attn.q_proj"] == (3, 10)
    assert sizes["model.layers.1.self_attn.q_proj"] == (3, 8 / 3)
    assert sizes["model.layers.0.mlp.up_proj"] == (4, 2)
    assert sizes["model.layers.1.mlp.up_proj"] == (2, 4)


def test_rslora_divides_by_the_root_of_each_layers_rank(model: PreTrainedModel) -> None:
    add_lora(model, LoraConfig(r=16, alpha=8, use_rslora=True, rank_pattern={"q_proj": 4}))

    scalings = {path: one.scaling for path, one in lora_modules(model).items()}
    assert scalings["model.layers.0.self_attn.k_proj"] == 2
    assert scalings["model.layers.0.self_attn.q_proj"] == 4


def test_what_all_linear_leaves_out_is_told(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 6))

    for layer in (0, 1):
        model.get_submodule(f"model.layers.{layer}.mlp").add_module("experts", Experts())

    with caplog.at_level(logging.WARNING, "qlora_core"):
        add_lora(model, LoraConfig(r=4))

    (told,) = caplog.messages
    assert told == "all-linear leaves out 2 x model.layers.*.mlp.experts.gate_up_proj [4, 8, 6]"
