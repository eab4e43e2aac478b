from typing import Any

import pytest

from nibble.endings import Ending, ExitCode
from nibble.submission import Submission, hyperparameters, number_or_auto, pairs


def test_what_is_left_open_is_not_sent() -> None:
    body = Submission(model="tiny", training_file="file-1").body()

    assert body == {"model": "tiny", "training_file": "file-1", "method": {"type": "supervised"}}


def test_everything_that_is_given_is_sent() -> None:
    submission = Submission(
        model="tiny",
        training_file="file-1",
        validation_file="file-2",
        suffix="ci",
        seed=0,
        hyperparameters={"n_epochs": 2, "lora_r": 8},
        metadata={"team": "search"},
        sample_prompts=("Hello?",),
    )

    body = submission.body()

    assert body == {
        "model": "tiny",
        "training_file": "file-1",
        "validation_file": "file-2",
        "suffix": "ci",
        "seed": 0,
        "metadata": {"team": "search"},
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "lora_r": 8}},
        },
        "extra_body": {"sample_prompts": [[{"role": "user", "content": "Hello?"}]]},
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("optimizer=adamw", "adamw"),
        ("n_evals=3", 3),
        ("packing=true", True),
        ('lora_target_modules=["q_proj"]', ["q_proj"]),
        ("note=a=b", "a=b"),
        ("early=NaN", "NaN"),
        ("empty=", ""),
    ],
)
def test_another_hyperparameter_is_json_or_else_text(given: str, expected: object) -> None:
    merged = hyperparameters({"n_epochs": 2, "lora_r": None}, [given])

    assert merged == {"n_epochs": 2, given.partition("=")[0]: expected}


@pytest.mark.parametrize("given", ["packing", "=1", ""])
def test_a_pair_without_a_name_or_a_value_is_refused(given: str) -> None:
    with pytest.raises(Ending, match="NAME=VALUE") as refusal:
        pairs("--metadata", [given])

    assert refusal.value.code is ExitCode.REFUSED


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(Ending, match="'team' twice"):
        pairs("--metadata", ["team=a", "team=b"])


def test_a_hyperparameter_given_in_both_ways_is_refused() -> None:
    with pytest.raises(Ending, match="n_epochs"):
        hyperparameters({"n_epochs": 1}, ["n_epochs=2"])


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("2e-4", 2e-4), ("0.5", 0.5), ("auto", "auto"), ("-1", -1)]
)
def test_an_amount_is_a_number_or_auto(text: str, value: Any) -> None:
    assert number_or_auto(text) == value
    assert type(number_or_auto(text)) is type(value)


@pytest.mark.parametrize("text", ["", "three", "nan", "inf", "1e999"])
def test_nothing_else_is_an_amount(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        number_or_auto(text)
