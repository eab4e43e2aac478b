"""The estimate takes the settings of a run by their own names, and refuses others in a sentence."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from qlora_core import TrainConfig
from qlora_core.errors import ConfigError
from qlora_core.estimate.settings import LoraSettings, TrainSettings, read_settings
from qlora_core.nn import LoraConfig

_MAY_DIFFER = {"lora"}


def test_every_setting_of_a_run_is_accepted() -> None:
    config = TrainConfig(batch_size=3, lora=LoraConfig(r=5, alpha=7, rank_pattern={"q_proj": 2}))

    by_object, by_mapping = read_settings(config), read_settings(config.as_dict())

    assert by_object == by_mapping
    assert (by_object.batch_size, by_object.lora.r) == (3, 5)
    assert by_object.lora.rank_of("model.layers.1.self_attn.q_proj") == 2


@pytest.mark.parametrize(
    ("ours", "theirs"), [(TrainSettings, TrainConfig), (LoraSettings, LoraConfig)]
)
def test_the_defaults_are_those_of_a_run(ours: type, theirs: type) -> None:
    names = [one.name for one in fields(ours) if one.name not in _MAY_DIFFER]

    assert names
    for name in names:
        assert getattr(ours(), name) == getattr(theirs(), name), name


def test_left_out_settings_have_their_defaults() -> None:
    assert read_settings(None) == read_settings({}) == read_settings(TrainConfig())


def test_pefts_spelling_is_taken_too() -> None:
    assert read_settings({"lora": {"lora_alpha": 4, "lora_dropout": 0.5}}).lora.dropout == 0.5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"batchsize": 3}, "batchsize"),
        ({"lora": {"rank": 3}}, "rank"),
        ({"lora": {"dropout": 0.1, "lora_dropout": 0.1}}, "given twice"),
        ({"lora": 16}, "a table of settings"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1"),
        ({"batch_size": 10**9}, "batch_size must be a whole number from 1"),
        ({"batch_size": True}, "batch_size must be a whole number from 1"),
        ({"micro_batch_tokens": -5}, "micro_batch_tokens must be a whole number"),
        ({"context_length": 1.5}, "context_length must be a whole number"),
        ({"packing": "yes"}, "packing must be true or false"),
        ({"gradient_checkpointing": None}, "gradient_checkpointing must be true or false"),
        ({"lora": {"r": 0}}, "LoRA's r must be a whole number"),
        ({"lora": {"dropout": 1.0}}, "dropout must be in"),
        ({"lora": {"dropout": float("nan")}}, "dropout must be in"),
        ({"lora": {"target_modules": []}}, "target_modules must not be empty"),
        ({"load_best_at_end": 1}, "load_best_at_end must be true or false"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adamw_8bit"),
        ({"optimizer": ["adamw"]}, "optimizer must be one of adamw, adamw_8bit"),
        ("batch_size=3", "must be a table"),
        ({"lora": {"target_modules": 3}}, "target_modules must be a list of names"),
        ({"lora": {"target_modules": [""]}}, "target_modules must be a list of names"),
        ({"lora": {"target_modules": "(q"}}, "no regular expression"),
        ({"lora": {"modules_to_save": "lm_head"}}, "modules_to_save must be a list of names"),
        ({"lora": {"rank_pattern": {"q": 0}}}, "rank_pattern for 'q'"),
        ({"lora": {"rank_pattern": ["q"]}}, "rank_pattern must map"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(config: Any, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_settings(config)

    assert words in raised.value.message
