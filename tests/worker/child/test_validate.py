from dataclasses import replace
from pathlib import Path

import pytest

from qlora_core.text import DatasetProblem, DatasetReport
from worker.child.report import Report
from worker.child.validate import problem_of, tell
from worker.relay import Tail

GOOD = DatasetReport(
    format="chat",
    n_lines=10,
    n_examples=10,
    n_truncated=0,
    n_dropped=0,
    n_dropped_truncated=0,
    n_tokens=100,
    n_trained_tokens=50,
    longest_tokens=10,
    errors=(),
    n_errors=0,
    problem=None,
)
BAD = replace(
    GOOD,
    problem=DatasetProblem(
        "invalid_training_file",
        "The job failed due to an invalid training file. The file is empty.",
    ),
)


def test_two_good_files_have_no_problem() -> None:
    assert problem_of(GOOD, GOOD) is None
    assert problem_of(GOOD, None) is None


def test_the_training_files_problem_comes_first() -> None:
    problem = problem_of(BAD, BAD)

    assert problem is not None
    assert (problem["code"], problem["param"]) == ("invalid_training_file", "training_file")


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({}, []),
        (
            {"n_truncated": 1},
            ["1 example is longer than the context length of 64 tokens and is cut at its end"],
        ),
        (
            {"n_truncated": 2},
            ["2 examples are longer than the context length of 64 tokens and are cut at their end"],
        ),
        (
            {"n_dropped": 1},
            ["1 example is left out, since nothing in it would be trained"],
        ),
        (
            {"n_dropped": 3, "n_dropped_truncated": 3},
            [
                "3 examples are left out, since nothing in them would be trained: all of them are too long for the"
                " context length of 64 tokens"
            ],
        ),
        (
            {"n_dropped": 1, "n_dropped_truncated": 1},
            [
                "1 example is left out, since nothing in it would be trained: it is too long for the context length of"
                " 64 tokens"
            ],
        ),
        (
            {"n_dropped": 5, "n_dropped_truncated": 2},
            [
                "5 examples are left out, since nothing in them would be trained: 2 of them are too long for the"
                " context length of 64 tokens"
            ],
        ),
        ({"n_errors": 1}, ["1 more bad line is not listed"]),
        ({"n_errors": 2}, ["2 more bad lines are not listed"]),
    ],
)
def test_what_is_cut_or_left_out_is_told_with_its_number(
    tmp_path: Path, counts: dict[str, int], told: list[str]
) -> None:
    with Report(tmp_path / "events.jsonl") as report:
        tell(report, "training_file", replace(GOOD, **counts), context_length=64)

    lines = Tail(tmp_path / "events.jsonl").read()
    assert [line.message for line in lines] == [f"Training file: {text}" for text in told]


def test_the_validation_files_problem_names_it() -> None:
    problem = problem_of(GOOD, BAD)

    assert problem == {
        "code": "invalid_validation_file",
        "message": "The job failed due to an invalid validation file. The file is empty.",
        "param": "validation_file",
    }
