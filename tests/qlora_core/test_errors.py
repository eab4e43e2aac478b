"""The tree of errors: drawn, coded, picklable, and what callers catch it by."""

import pickle

import pytest

from qlora_core import errors
from qlora_core.errors import DatasetError, EngineError


def subclasses(root: type[EngineError]) -> list[type[EngineError]]:
    found: list[type[EngineError]] = []
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            found += [child, *subclasses(child)]
    return found


def test_every_error_is_drawn_in_the_tree_with_its_code() -> None:
    drawing = errors.__doc__ or ""

    for error in subclasses(EngineError):
        line = next(line for line in drawing.splitlines() if f"── {error.__name__} " in f"{line} ")
        if error not in (errors.ModelError, DatasetError):
            assert line.split()[-1] == error.code


def test_codes_are_snake_case_and_no_two_errors_share_one() -> None:
    codes = [error.code for error in subclasses(EngineError) if error is not DatasetError]

    assert len(set(codes)) == len(codes)
    assert all(code == code.lower() and code.replace("_", "").isalpha() for code in codes)


@pytest.mark.parametrize("error", subclasses(EngineError), ids=lambda error: error.__name__)
def test_an_error_keeps_its_message_and_code_across_processes(error: type[EngineError]) -> None:
    copied = pickle.loads(pickle.dumps(error("what was wrong")))  # noqa: S301 - our own

    assert type(copied) is error
    assert (copied.message, str(copied), copied.code) == ("what was wrong",) * 2 + (error("").code,)


def test_a_dataset_error_keeps_its_problems_code_and_its_report() -> None:
    error = DatasetError("too few", code="invalid_n_examples", report={"n_lines": 3})

    copied = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own

    assert (copied.message, copied.code, copied.report) == (
        "too few",
        "invalid_n_examples",
        {"n_lines": 3},
    )


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.ShapeError, ValueError),
        (errors.DtypeError, TypeError),
        (errors.LayoutError, ValueError),
        (errors.NonFiniteError, ValueError),
    ],
)
def test_wrong_arguments_can_be_caught_as_pythons_own_errors(
    error: type[EngineError], builtin: type[Exception]
) -> None:
    assert issubclass(error, builtin)
