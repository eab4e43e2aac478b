"""Every "auto" becomes a number, and what was asked stays."""

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.jobs.hyperparameters import ALIASES, Hyperparameters
from service.jobs.resolve import (
    as_shown,
    auto_batch_size,
    auto_epochs,
    resolve_context_length,
    resolve_hyperparameters,
)

ALWAYS = {
    "n_epochs",
    "batch_size",
    "learning_rate_multiplier",
    "learning_rate",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_use_rslora",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "context_length",
    "train_on_inputs",
    "packing",
    "eval_steps",
    "early_stopping_patience",
    "load_best_at_end",
    "optimizer",
}
WARM_UP = {"warmup_ratio", "warmup_steps"}  # one of them
NAMES = {*ALWAYS, *WARM_UP, "max_steps", "max_time_s", "lora_exclude_modules"}


@dataclass(frozen=True)
class Report:
    n_examples: int


@pytest.mark.parametrize(
    ("n_examples", "epochs"),
    # By hand, after the cookbook's rule.
    [(1, 25), (3, 25), (4, 25), (10, 10), (33, 3), (34, 3), (8_333, 3), (8_334, 2), (12_501, 1)],
)
def test_epochs_follow_openais_rule(n_examples: int, epochs: int) -> None:
    assert auto_epochs(n_examples) == epochs


@pytest.mark.parametrize(
    ("n_examples", "batch_size"),
    [(0, 1), (10, 1), (199, 1), (200, 2), (1_500, 8), (3_200, 32), (10**7, 32)],
)
def test_a_batch_is_about_a_hundredth_of_the_examples(n_examples: int, batch_size: int) -> None:
    assert auto_batch_size(n_examples) == batch_size


def test_nothing_asked_gives_the_documented_defaults() -> None:
    resolved = resolve_hyperparameters({}, Report(1_500), 4_096)

    assert resolved == {
        "n_epochs": 3,
        "batch_size": 8,
        "learning_rate_multiplier": 1.0,
        "learning_rate": 2e-4,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "lora_use_rslora": False,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "context_length": 2_048,
        "train_on_inputs": False,
        "packing": True,
        "eval_steps": 0,
        "early_stopping_patience": 0,
        "load_best_at_end": False,
        "optimizer": "adamw",
    }


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"warmup_steps": 0}, {"warmup_steps": 0}),
        ({"warmup_steps": 7, "warmup_ratio": "auto"}, {"warmup_steps": 7}),
        ({"warmup_ratio": 0.2, "warmup_steps": "auto"}, {"warmup_ratio": 0.2}),
    ],
    ids=str,
)
def test_the_warm_up_stays_as_it_was_given(asked: dict[str, Any], expected: dict[str, Any]) -> None:
    resolved = resolve_hyperparameters(asked, Report(100), None)

    assert {name: resolved[name] for name in WARM_UP if name in resolved} == expected


@pytest.mark.parametrize(
    ("asked", "best"),
    [
        ({"early_stopping_patience": 2}, True),
        ({"early_stopping_patience": 2, "load_best_at_end": False}, False),
        ({"load_best_at_end": True}, True),
        ({"early_stopping_patience": 0, "load_best_at_end": "auto"}, False),
    ],
    ids=str,
)
def test_a_job_that_may_stop_early_offers_its_best_adapter_unless_told_otherwise(
    asked: dict[str, Any], best: bool
) -> None:
    assert resolve_hyperparameters(asked, Report(100), None)["load_best_at_end"] is best


def test_what_has_no_value_for_none_is_there_only_if_given() -> None:
    asked = {"max_steps": 9, "max_time_s": 60, "lora_exclude_modules": ["o_proj"]}

    resolved = resolve_hyperparameters(asked, Report(100), None)

    assert {name: resolved[name] for name in asked} == asked
    assert (
        set(resolve_hyperparameters({"max_steps": "auto"}, Report(9), None)) & set(asked) == set()
    )


def test_zeros_that_were_asked_stay_zeros() -> None:
    asked = {"warmup_ratio": 0.0, "weight_decay": 0.0, "lora_dropout": 0.0}

    resolved = resolve_hyperparameters(asked, Report(100), None)

    assert {name: resolved[name] for name in asked} == asked


def test_the_multiplier_scales_the_base_rate_and_an_absolute_rate_wins() -> None:
    scaled = resolve_hyperparameters({"learning_rate_multiplier": 0.5}, Report(100), None)
    absolute = resolve_hyperparameters(
        {"learning_rate_multiplier": 9.0, "learning_rate": 1e-4}, Report(100), None
    )

    assert scaled["learning_rate"] == pytest.approx(1e-4)
    assert absolute["learning_rate"] == 1e-4
    assert absolute["learning_rate_multiplier"] == pytest.approx(0.5)


def test_alpha_follows_the_rank_unless_given() -> None:
    assert resolve_hyperparameters({"lora_r": 4}, Report(9), None)["lora_alpha"] == 8
    assert resolve_hyperparameters({"lora_alpha": 4.0}, Report(9), None)["lora_alpha"] == 4
    assert resolve_hyperparameters({"lora_alpha": 0.5}, Report(9), None)["lora_alpha"] == 0.5


@pytest.mark.parametrize(
    ("asked", "model", "expected"),
    [
        ({}, None, 2_048),
        ({}, 512, 512),
        ({}, 131_072, 2_048),
        ({"context_length": 8_192}, 131_072, 8_192),
        ({"context_length": 8_192}, 4_096, 4_096),
        ({"context_length": 64}, 4_096, 64),
        ({"context_length": "auto"}, 1_024, 1_024),
    ],
)
def test_the_context_is_never_longer_than_the_models(
    asked: dict[str, Any], model: int | None, expected: int
) -> None:
    assert resolve_context_length(asked, model) == expected


def test_before_validation_openais_three_are_shown_with_what_was_asked() -> None:
    assert as_shown({"n_epochs": 2, "lora_r": 8}) == {
        "n_epochs": 2,
        "batch_size": "auto",
        "learning_rate_multiplier": "auto",
        "lora_r": 8,
    }


def _auto(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | st.just("auto") | values


requests = st.fixed_dictionaries(
    {},
    optional={
        "n_epochs": _auto(st.integers(1, 50)),
        "batch_size": _auto(st.integers(1, 256)),
        "learning_rate_multiplier": _auto(st.floats(1e-6, 5_000)),
        "learning_rate": _auto(st.floats(1e-9, 1)),
        "lora_r": _auto(st.integers(1, 256)),
        "lora_alpha": _auto(st.floats(0.01, 4_096)),
        "lora_dropout": _auto(st.floats(0, 0.9)),
        "lora_target_modules": _auto(
            st.just("all-linear")
            | st.lists(st.sampled_from(["q_proj", "k_proj", "v_proj"]), min_size=1)
        ),
        "lora_exclude_modules": _auto(st.lists(st.sampled_from(["o_proj", "v"]), min_size=1)),
        "lora_use_rslora": _auto(st.booleans()),
        "warmup_ratio": _auto(st.floats(0, 1)),
        "warmup_steps": _auto(st.integers(0, 1_000_000)),
        "max_steps": _auto(st.integers(1, 10_000_000)),
        "max_time_s": _auto(st.integers(1, 31_536_000)),
        "train_on_inputs": _auto(st.booleans()),
        "packing": _auto(st.booleans()),
        "eval_steps": _auto(st.integers(0, 1_000_000)),
        "early_stopping_patience": _auto(st.integers(0, 1_000)),
        "load_best_at_end": _auto(st.booleans()),
        "lr_scheduler_type": _auto(st.sampled_from(["linear", "cosine", "constant"])),
        "weight_decay": _auto(st.floats(0, 1)),
        "max_grad_norm": _auto(st.floats(0.001, 1_000)),
        "context_length": _auto(st.integers(16, 1_048_576)),
        "optimizer": _auto(
            st.sampled_from(["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
        ),
    },
)


@given(requests, st.integers(0, 10**9), st.none() | st.integers(16, 2**20))
def test_whatever_is_allowed_resolves_to_allowed_values_and_then_to_itself(
    asked: dict[str, Any], n_examples: int, model_context: int | None
) -> None:
    sent = Hyperparameters.model_validate(asked).as_sent()

    resolved = resolve_hyperparameters(sent, Report(n_examples), model_context)

    assert ALWAYS <= set(resolved) <= NAMES
    assert len(WARM_UP & set(resolved)) == 1
    assert not [name for name, value in resolved.items() if value in (None, "auto")]
    assert Hyperparameters.model_validate(
        {k: v for k, v in resolved.items() if k not in {"learning_rate_multiplier", "lora_alpha"}}
    )
    again = resolve_hyperparameters(resolved, Report(1), model_context)
    assert again == {
        **resolved,
        "learning_rate_multiplier": pytest.approx(again["learning_rate"] / 2e-4),
    }
    for name, value in sent.items():
        # The last is refused before it comes here.
        overruled = (
            name == "context_length"
            or (name == "learning_rate_multiplier" and sent.get("learning_rate", "auto") != "auto")
            or (name == "warmup_ratio" and sent.get("warmup_steps", "auto") != "auto")
        )
        if value != "auto" and not overruled:
            assert resolved[name] == value


odd_values = (
    st.integers()
    | st.floats()
    | st.none()
    | st.booleans()
    | st.sampled_from(["auto", "", "1", "nan"])
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.just("a"), st.integers(), max_size=1)
)


@given(st.dictionaries(st.sampled_from([*sorted(NAMES), *ALIASES, "other"]), odd_values))
def test_no_request_breaks_the_check(body: dict[str, Any]) -> None:
    with contextlib.suppress(ValidationError):
        sent = Hyperparameters.model_validate(body).as_sent()

        assert set(sent) <= NAMES
        json.dumps(sent, allow_nan=False)
