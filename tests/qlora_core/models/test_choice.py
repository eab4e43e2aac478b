"""Which layers of an architecture go into NF4, on the sizes that its real models have; nothing is loaded."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from qlora_core.errors import ConfigError, ModelUnsupported
from qlora_core.models.choice import choose_layers


def architecture(family: str, **settings: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings))


def dense_linears(model: PreTrainedModel, *skip: str) -> set[str]:
    chosen = choose_layers(model, skip).linears
    return {path for path, one in model.named_modules() if isinstance(one, nn.Linear)} - chosen


def test_every_linear_layer_is_chosen_but_the_skipped_ones() -> None:
    model = architecture("llama", num_hidden_layers=2, tie_word_embeddings=False)

    assert dense_linears(model, "lm_head") == {"lm_head"}
    assert dense_linears(model) == set()
    assert dense_linears(model, "layers.0.mlp") == {
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    }


@pytest.mark.parametrize(
    ("family", "head"),
    [("whisper", "proj_out"), ("git", "output"), ("bert", "cls.predictions.decoder")],
)
def test_the_output_head_is_meant_whatever_it_is_called(family: str, head: str) -> None:
    model = architecture(family, num_hidden_layers=1, tie_word_embeddings=False)

    assert dense_linears(model, "lm_head") == {head}


def test_a_head_that_is_tied_is_not_chosen_even_if_it_is_not_skipped() -> None:
    assert dense_linears(architecture("qwen2", tie_word_embeddings=True)) == {"lm_head"}


def test_layers_that_hold_the_transposed_weight_are_chosen() -> None:
    chosen = choose_layers(architecture("gpt2", n_layer=1), ("lm_head",)).linears

    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert chosen == {f"transformer.h.0.{name}" for name in names}


def test_what_a_mamba_mixer_multiplies_by_itself_stays_dense() -> None:
    model = architecture("mamba", num_hidden_layers=1)

    assert dense_linears(model) == {"lm_head", "backbone.layers.0.mixer.dt_proj"}


def test_what_the_architecture_wants_in_float32_stays_dense() -> None:
    model = architecture("llama", num_hidden_layers=1, tie_word_embeddings=False)
    model._keep_in_fp32_modules = {"o_proj"}
    model._keep_in_fp32_modules_strict = {"up_proj"}

    assert dense_linears(model) == {
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.up_proj",
    }


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("rwkv", r"rwkv \(RwkvModel\) writes into the weights"),
        ("deepseek_v4", r"self_attn.o_a_proj .* its own kind \(DeepseekV4GroupedLinear\)"),
        ("xlnet", r"rel_attn.q \(XLNetRelativeAttention\) and others like it are 35% of the model"),
        ("zamba", r"layers.\d+.shared_transf.* are linear layers that share their weight"),
        (
            "jetmoe",
            r"weight of shape \[8, 11264, 2048\] .* several experts .*JetMoeParallelExperts",
        ),
        ("dbrx", r"ffn.experts.mlp.w1 .* several experts .*DbrxExpertGLU"),
    ],
)
def test_a_model_that_would_stay_dense_in_part_is_refused_by_the_parts_name(
    family: str, told: str
) -> None:
    settings = {"attn_config": {"rope_theta": 1e4}} if family == "dbrx" else {}

    with pytest.raises(ModelUnsupported, match=told) as refused:
        choose_layers(architecture(family, **settings), ("lm_head",))
    assert not re.search(r"\n", str(refused.value))


def test_a_model_with_every_layer_skipped_is_refused() -> None:
    model = architecture("llama", num_hidden_layers=1)

    with pytest.raises(ModelUnsupported, match="no linear layers"):
        choose_layers(model, ("model", "lm_head"))


@pytest.mark.parametrize("family", ["gemma3", "recurrent_gemma", "falcon_h1", "gemma3n_text"])
def test_odd_parameters_that_are_next_to_nothing_may_stay_dense(family: str) -> None:
    assert choose_layers(architecture(family), ("lm_head",)).linears


@pytest.mark.parametrize(
    ("name", "nearby"),
    [
        ("mpl", r"it has .*\bmlp\b"),
        ("self_atn", r"it has .*\bself_attn\b"),
        ("model.layers.7.mlp", r"it has .*\bmodel\.layers\.0\.mlp\b"),
        ("layers.*", "has nothing of that name"),
        ("", "it has down_proj, gate_proj, k_proj, lm_head"),
    ],
)
def test_a_name_to_skip_that_names_nothing_is_refused_with_those_nearby(
    name: str, nearby: str
) -> None:
    model = architecture("llama", num_hidden_layers=1, tie_word_embeddings=False)

    with pytest.raises(ConfigError, match=nearby):
        choose_layers(model, ("lm_head", name))


@pytest.mark.parametrize("names", ["mlp", (3,), "lm_head"], ids=repr)
def test_names_to_skip_are_a_list_and_never_one_text(names: Any) -> None:
    model = architecture("llama", num_hidden_layers=1)

    with pytest.raises(ConfigError, match="are a list of names"):
        choose_layers(model, names)


def test_the_head_may_be_skipped_where_none_has_that_name() -> None:
    model = architecture("whisper", num_hidden_layers=1)

    assert choose_layers(model, ("lm_head",)).linears
