"""What cannot be estimated is refused in a sentence, and what is taken for granted is said."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core import estimate
from qlora_core.errors import ConfigError, EngineError, ModelNotFound, ModelUnsupported
from qlora_core.estimate.families import FAMILIES

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "it has no hidden_size"),
        ({"hidden_size": -64}, "hidden_size must be a whole number from 1"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be a whole number from 1 to 1,000"),
        ({"num_attention_heads": 5}, "do not go into a width of 64"),
        ({"num_key_value_heads": 3}, "do not go into a width of 64"),
        ({"text_config": {"hidden_size": 8}}, "multimodal model"),
        ({"model_type": "new", "kv_lora_rank": 8}, "it has kv_lora_rank"),
        ({"model_type": "new", "swiglu_limit": 7.0}, "it has swiglu_limit"),
        ({"model_type": "new", "num_experts": 4, "n_shared_experts": 1}, "it has n_shared_experts"),
        ({"model_type": "mixtral"}, "num_local_experts must be a whole number"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelUnsupported) as raised:
        estimate({**LLAMA, **changes})

    assert words in raised.value.message


def test_another_kind_of_model_is_refused_by_name() -> None:
    with pytest.raises(ModelUnsupported, match=r"gpt2.*no hidden_size, intermediate_size"):
        estimate({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "vocab_size": 10})


@pytest.mark.parametrize("text", ["{", "[]", "7", "\ufeff{}", "[" * 100_000])
def test_a_file_without_a_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")

    with pytest.raises(ModelUnsupported, match=r"config\.json"):
        estimate(tmp_path)


def test_a_missing_config_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="there is no"):
        estimate(tmp_path)


def test_a_config_may_be_a_file_a_folder_or_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8")

    assert estimate(path) == estimate(tmp_path) == estimate(str(tmp_path)) == estimate(LLAMA)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "device must be"),
        ({"card": "H1000"}, "no figures are known of the card 'H1000'"),
        ({"compute_dtype": "int8"}, "compute_dtype must be one of"),
        ({"longest_tokens": 1}, "longest_tokens must be a whole number"),
        ({"mean_tokens": 0}, "mean_tokens must be a number"),
        ({"mean_tokens": float("nan")}, "mean_tokens must be a number"),
        ({"trained_share": 0}, "trained_share must be above 0"),
        ({"block_size": 48}, "block_size must be a power of two"),
        ({"device": "cpu", "cores": 0}, "cores must be a whole number"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        estimate(LLAMA, **options)

    assert words in raised.value.message


def test_a_family_that_is_not_known_is_taken_for_llama_and_it_is_said() -> None:
    known, unknown = estimate(LLAMA), estimate({**LLAMA, "model_type": "brand_new"})

    assert any("brand_new is not known" in sentence for sentence in unknown.assumed)
    assert not any("not known" in sentence for sentence in known.assumed)
    assert unknown.memory == known.memory


def test_dropout_inside_the_model_is_named_as_left_out() -> None:
    found = estimate({**LLAMA, "attention_dropout": 0.1})

    assert any("own attention_dropout keeps is not counted" in one for one in found.assumed)


def test_it_can_be_sent_as_json() -> None:
    found = estimate(LLAMA)

    answer = json.loads(json.dumps(found.as_dict()))

    assert answer["memory"]["total_bytes"] == found.memory.total_bytes
    assert answer["parameters"]["total"] == found.parameters.total
    assert answer["step_time"]["low_s"] < answer["step_time"]["expected_s"]
    assert answer["assumed"]


def test_it_fits_what_is_as_large_as_its_peak() -> None:
    found = estimate(LLAMA)

    assert found.fits(found.memory.total_bytes)
    assert not found.fits(found.memory.total_bytes - 1)


_FIELDS = (
    "hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "tie_word_embeddings", "sliding_window", "use_sliding_window", "sliding_window_pattern", "layer_types",
    "max_window_layers", "rope_parameters", "rope_scaling", "partial_rotary_factor", "attention_chunk_size",
    "attention_bias", "mlp_bias", "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "attention_dropout", "text_config",
)  # fmt: skip
_NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31 - 1, 2**80]) | st.floats() | st.booleans()
_VALUES = (
    st.none() | _NUMBERS | st.text(max_size=3)
    | st.lists(_NUMBERS | st.sampled_from(["sliding_attention", "full_attention"]), max_size=3)
    | st.dictionaries(st.sampled_from(["rope_type", "partial_rotary_factor", "x"]), _NUMBERS | st.just("dynamic"))
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from([*FAMILIES, "new"]),
    changes=st.dictionaries(st.sampled_from(_FIELDS), _VALUES, max_size=6),
)
def test_whatever_a_config_holds_is_estimated_or_refused_in_a_sentence(
    family: str, changes: dict[str, Any]
) -> None:
    config = {**LLAMA, "num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
    config |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 16}

    with suppress(EngineError):
        found = estimate({**config, "model_type": family, **changes}, {"context_length": 64})

        assert found.memory.total_bytes > 0
        assert all(value >= 0 for value in found.memory.as_dict().values())
