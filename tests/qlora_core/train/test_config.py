"""Every setting is checked when the config is made, and the message names it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_core.errors import ConfigError
from qlora_core.nn import LoraConfig
from qlora_core.train import TrainConfig

BAD: list[tuple[str, Any]] = [
    ("n_epochs", 0), ("n_epochs", 1.0), ("n_epochs", True), ("n_epochs", "3"), ("n_epochs", None),
    ("batch_size", -1), ("context_length", 1), ("seed", -1), ("seed", 2**31), ("micro_batch_tokens", 0),
    ("learning_rate", 0), ("learning_rate", float("nan")), ("learning_rate", float("inf")),
    ("learning_rate", -1e-4), ("learning_rate", "auto"), ("learning_rate", True),
    ("max_steps", 0), ("max_steps", 2.0), ("warmup_steps", -1), ("warmup_steps", 0.5), ("eval_steps", -1),
    ("eval_steps", None), ("early_stopping_patience", -1), ("early_stopping_patience", True),
    ("load_best_at_end", 1), ("load_best_at_end", "auto"), ("train_on_inputs", None), ("packing", 0),
    ("warmup_ratio", 1.5), ("warmup_ratio", -0.1), ("weight_decay", -1), ("max_grad_norm", 0),
    ("lr_scheduler_type", "step"), ("lr_scheduler_type", ["linear"]), ("optimizer", "sgd"),
    ("resume_point_every_s", -1), ("resume_point_every_s", None), ("gradient_checkpointing", 1), ("lora", {"r": 4}), ("lora", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        TrainConfig(**{name: value})


def test_the_two_ways_to_give_a_warm_up_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="warmup_ratio and warmup_steps are both given"):
        TrainConfig(warmup_ratio=0.0, warmup_steps=0)


@pytest.mark.parametrize(
    ("given", "steps"),
    [({}, 6), ({"warmup_ratio": 0.1}, 20), ({"warmup_ratio": 0.0}, 0), ({"warmup_steps": 7}, 7)],
    ids=str,
)
def test_the_warm_up_is_a_share_of_the_steps_or_a_number_of_them(
    given: dict[str, Any], steps: int
) -> None:
    assert TrainConfig(**given).warmup_length(200) == steps


@pytest.mark.parametrize(
    ("patience", "asked", "keeps"),
    [(0, None, False), (1, None, True), (0, True, True), (1, False, False)],
)
def test_the_best_is_kept_where_asked_and_where_runs_may_stop_early(
    patience: int, asked: bool | None, keeps: bool
) -> None:
    config = TrainConfig(early_stopping_patience=patience, load_best_at_end=asked)

    assert config.keeps_best is keeps


def test_survives_json() -> None:
    lora = LoraConfig(r=2, target_modules=("q_proj", "v_proj"), rank_pattern={"v_proj": 4})
    config = TrainConfig(n_epochs=5, train_on_inputs=True, max_steps=9, lora=lora)

    again = TrainConfig.from_dict(json.loads(json.dumps(config.as_dict())))

    assert again == config


def test_left_out_fields_keep_their_defaults() -> None:
    config = TrainConfig.from_dict({"seed": 9, "lora": {"r": 2}})

    assert config == TrainConfig(seed=9, lora=LoraConfig(r=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 3}, "unknown setting epochs"),
        ({"lora": {"rank": 3}}, "LoRA has no setting rank"),
        ({"lora": {"r": 0}}, "r must be"),
        ({"lora": {"r": "8"}}, "r must be"),
        ({"lora": [1]}, "lora must be a LoraConfig"),
        ({"n_epochs": 0}, "n_epochs must be"),
    ],
)
def test_from_dict_refuses_what_it_does_not_know(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)
