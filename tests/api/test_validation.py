"""How a body that does not fit its schema is explained: the field's own path, one sentence each."""

from typing import Annotated, Any, Literal

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api.validation import Problem, explain


class Message(BaseModel):
    role: Literal["user", "assistant"]
    content: str


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=50)] = "auto"
    messages: list[Message] = []
    tags: dict[str, str] = {}


def problem_of(body: Any) -> Problem:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate(body)
    errors = [error | {"loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return explain(RequestValidationError(errors, body=body))


@pytest.mark.parametrize(
    ("body", "param", "code", "message"),
    [
        (
            {},
            "model",
            "missing_required_parameter",
            "Missing required parameter: 'model'.",
        ),
        (
            {"model": "a", "colour": 1},
            "colour",
            "unknown_parameter",
            "Unknown parameter: 'colour'.",
        ),
        (
            {"model": 3},
            "model",
            "invalid_value",
            "Invalid 'model': input should be a valid string.",
        ),
        (
            {"model": "a", "n_epochs": 99},
            "n_epochs",
            "invalid_value",
            "Invalid 'n_epochs': input should be 'auto'; or input should be less than or equal to 50.",
        ),
        (
            {"model": "a", "messages": [{"role": "user", "content": ""}, {"role": "user"}]},
            "messages[1].content",
            "missing_required_parameter",
            "Missing required parameter: 'messages[1].content'.",
        ),
        (
            {"model": "a", "tags": {"int": 1}},
            "tags.int",
            "invalid_value",
            "Invalid 'tags.int': input should be a valid string.",
        ),
        (
            {"model": "a", "messages": "none"},
            "messages",
            "invalid_value",
            "Invalid 'messages': input should be a valid list.",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_problem_names_the_field_s_path(
    body: dict[str, Any], param: str, code: str, message: str
) -> None:
    assert problem_of(body) == Problem(message, param, code)


def test_several_problems_are_told_at_once() -> None:
    problem = problem_of({"n_epochs": 0, "colour": 1})

    assert problem.param == "model"
    assert problem.message.startswith("Missing required parameter: 'model'. Invalid 'n_epochs': ")
    assert problem.message.endswith("Unknown parameter: 'colour'.")


def test_a_flood_of_problems_is_cut_short() -> None:
    problem = problem_of({"model": "a", **{f"x{i}": 1 for i in range(1000)}})

    assert problem.message.endswith("Unknown parameter: 'x4'. And 995 more.")


def test_a_body_that_is_missing_is_told_as_such() -> None:
    missing = {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}

    problem = explain(RequestValidationError([missing], body=None))

    assert problem.message == "The body is missing: send a JSON object."
    assert problem.param is None
