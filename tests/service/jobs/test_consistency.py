"""What fits each by itself, but not together, is refused in a sentence that names one of them."""

from typing import Any

import pytest

from service.errors import InvalidRequest
from service.jobs.consistency import check_together
from service.jobs.spec import CreateJob


def body(*, validation_file: str | None = None, **hyperparameters: Any) -> CreateJob:
    return CreateJob.model_validate(
        {
            "model": "tiny",
            "training_file": "file-t",
            "validation_file": validation_file,
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": hyperparameters},
            },
        }
    )


def test_a_warm_up_is_given_in_one_way() -> None:
    with pytest.raises(InvalidRequest, match="both given; keep one") as refusal:
        check_together(body(warmup_ratio=0.0, warmup_steps=0))

    assert refusal.value.param == "method.supervised.hyperparameters.warmup_steps"
    assert refusal.value.code == "invalid_hyperparameters"


def test_the_older_and_the_newer_place_are_looked_at_together() -> None:
    both = CreateJob.model_validate(
        {
            "model": "tiny",
            "training_file": "file-t",
            "hyperparameters": {"warmup_steps": 5},
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": {"warmup_ratio": 0.1}},
            },
        }
    )

    with pytest.raises(InvalidRequest) as refusal:
        check_together(both)

    assert refusal.value.param == "hyperparameters.warmup_steps"


@pytest.mark.parametrize(
    "asked",
    [{"eval_steps": 1}, {"early_stopping_patience": 1}, {"load_best_at_end": True}],
    ids=str,
)
def test_what_needs_a_validation_file_says_so(asked: dict[str, Any]) -> None:
    (name,) = asked

    with pytest.raises(InvalidRequest, match=f"^{name} needs a validation file") as refusal:
        check_together(body(**asked))
    check_together(body(validation_file="file-v", **asked))

    assert refusal.value.param == f"method.supervised.hyperparameters.{name}"


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"warmup_ratio": "auto", "warmup_steps": 5},
        {"warmup_ratio": None, "warmup_steps": 5},
        {"eval_steps": 0, "early_stopping_patience": 0, "load_best_at_end": False},
        {"eval_steps": "auto", "early_stopping_patience": "auto", "load_best_at_end": "auto"},
    ],
    ids=str,
)
def test_what_asks_for_nothing_needs_nothing(asked: dict[str, Any]) -> None:
    check_together(body(**asked))
