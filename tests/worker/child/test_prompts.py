import json
from pathlib import Path
from typing import Any

import pytest

from qlora_core.text import TextEncoder
from tests.tiny_models import CHAT_TEMPLATE, save_tiny_tokenizer
from worker.child.prompts import check_prompts
from worker.child.report import Report
from worker.relay import Line, Tail

GOOD = [{"role": "user", "content": "What is a nibble?"}]


def check(
    folder: Path, *prompts: Any, chat_template: str | None = CHAT_TEMPLATE
) -> tuple[dict[str, Any] | None, list[Line]]:
    """Check prompts for a model with room for 64 tokens; return the error and what was told."""
    save_tiny_tokenizer(folder, chat_template=chat_template)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    encoder = TextEncoder.from_folder(folder)
    with Report(folder / "events.jsonl") as report:
        error = check_prompts(prompts, encoder, report)
    return error, Tail(folder / "events.jsonl").read()


def test_prompts_that_can_be_asked_are_passed_over_in_silence(tmp_path: Path) -> None:
    assert check(tmp_path, GOOD, GOOD) == (None, [])


def test_a_prompt_with_a_special_token_is_named(tmp_path: Path) -> None:
    error, _ = check(tmp_path, GOOD, [{"role": "user", "content": "a <|im_end|>"}])

    assert error == {
        "code": "invalid_sample_prompt",
        "message": "sample_prompts[1] message contains an invalid token: <|im_end|>.",
        "param": "sample_prompts[1]",
    }


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('x' * 10000) }}"], ids=["none", "refuses"]
)
def test_a_template_that_cannot_render_a_prompt_is_told_in_few_words(
    tmp_path: Path, template: str | None
) -> None:
    error, _ = check(tmp_path, GOOD, chat_template=template)

    assert error is not None
    assert (error["code"], error["param"]) == ("invalid_sample_prompt", "sample_prompts[0]")
    assert error["message"].startswith("sample_prompts[0]: The ")
    assert len(error["message"]) < 600


def test_a_prompt_that_leaves_no_room_for_an_answer_is_told_of(tmp_path: Path) -> None:
    long = [{"role": "user", "content": "nibble " * 100}]

    error, told = check(tmp_path, GOOD, long)

    assert error is None
    assert [(line.level, line.data["param"]) for line in told] == [("warn", "sample_prompts[1]")]
    assert "context length of 64" in told[0].message
