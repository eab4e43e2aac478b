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
            "Invalid 'model': must be a string.",
        ),
        (
            {"model": "a", "n_epochs": 99},
            "n_epochs",
            "invalid_value",
            "Invalid 'n_epochs': must be 'auto'; or must be 50 or less.",
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
            "Invalid 'tags.int': must be a string.",
        ),
        (
            {"model": "a", "messages": "none"},
            "messages",
            "invalid_value",
            "Invalid 'messages': must be a list.",
        ),
        (
            {"model": "a", "messages": [3]},
            "messages[0]",
            "invalid_value",
            "Invalid 'messages[0]': must be a JSON object.",
        ),
        (
            {"model": "a", "tags": "none"},
            "tags",
            "invalid_value",
            "Invalid 'tags': must be a JSON object.",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_problem_names_the_field_s_path(
    body: dict[str, Any], param: str, code: str, message: str
) -> None:
    assert problem_of(body) == Problem(message, param, code)


class Every(BaseModel):
    """One field of each kind that a request has, and a few more."""

    whole: int = 0
    number: float = 0
    switch: bool = False
    text: Annotated[str, Field(min_length=2, max_length=3)] = "ab"
    few: Annotated[int, Field(gt=0, lt=9)] = 1
    many: Annotated[int, Field(ge=0, le=9)] = 1
    choice: Literal["asc", "desc"] = "asc"
    inner: Message | None = None


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("whole", "many", "must be a whole number"),
        ("whole", 1.5, "must be a whole number"),
        ("whole", None, "must be a whole number"),
        ("whole", "9" * 5000, "must be a whole number of fewer digits"),
        ("number", "x", "must be a number"),
        ("number", [], "must be a number"),
        ("switch", "maybe", "must be true or false"),
        ("switch", {}, "must be true or false"),
        ("text", "a", "must have at least 2 characters"),
        ("text", "abcd", "must have at most 3 characters"),
        ("few", 0, "must be more than 0"),
        ("few", 9, "must be less than 9"),
        ("many", -1, "must be 0 or more"),
        ("many", 10, "must be 9 or less"),
        ("choice", "up", "must be 'asc' or 'desc'"),
        ("inner", "x", "must be a JSON object"),
    ],
)
def test_what_is_wanted_is_said_in_the_users_words(field: str, value: object, wanted: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Every.model_validate({field: value})
    errors = [error | {"loc": ("body", *error["loc"])} for error in caught.value.errors()]

    problem = explain(RequestValidationError(errors, body={field: value}))

    assert problem == Problem(f"Invalid '{field}': {wanted}.", field, "invalid_value")


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
