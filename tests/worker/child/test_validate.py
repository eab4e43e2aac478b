from dataclasses import replace

from qlora_core.text import DatasetProblem, DatasetReport
from worker.child.validate import problem_of

GOOD = DatasetReport(
    format="chat",
    n_lines=10,
    n_examples=10,
    n_truncated=0,
    n_dropped=0,
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


def test_the_validation_files_problem_names_it() -> None:
    problem = problem_of(GOOD, BAD)

    assert problem == {
        "code": "invalid_validation_file",
        "message": "The job failed due to an invalid validation file. The file is empty.",
        "param": "validation_file",
    }
