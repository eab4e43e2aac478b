"""Rendering is held to `transformers` on every template fixture and every conversation."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_core.text import ChatTemplate, TemplateError, TextEncoder
from tests.qlora_core.text.conftest import TAGGED

CONVERSATIONS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "conversations.json").read_text(encoding="utf-8")
)
FAMILIES = ["chatml", "headers", "inst", "turns", "thinking", "opened_thinking", "next_header", "channels",
            "plain", "turns_only_at_the_end"]  # fmt: skip


def _expected(folder: Path, conversation: dict[str, Any], **options: Any) -> Any:
    """Render with transformers; the error where its template refuses."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        return tokenizer.apply_chat_template(
            conversation["messages"], tools=conversation.get("tools"), **options
        )
    except Exception as error:  # noqa: BLE001 - whatever a template raises
        return error


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
def test_renders_as_transformers_does(
    family: str, name: str, prompt: bool, make_folder: Any
) -> None:
    folder = make_folder(family)
    conversation = CONVERSATIONS[name]
    encoder = TextEncoder.from_folder(folder)

    expected = _expected(folder, conversation, tokenize=False, add_generation_prompt=prompt)

    if isinstance(expected, Exception):
        with pytest.raises(TemplateError):
            encoder.render(
                conversation["messages"],
                tools=conversation.get("tools"),
                add_generation_prompt=prompt,
            )
        return
    actual = encoder.render(
        conversation["messages"], tools=conversation.get("tools"), add_generation_prompt=prompt
    )
    assert actual == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", TAGGED)
def test_generation_tags_change_nothing_that_is_rendered(
    family: str, name: str, make_folder: Any
) -> None:
    conversation = CONVERSATIONS[name]
    encoders = [
        TextEncoder.from_folder(make_folder(family, tagged=tagged)) for tagged in (False, True)
    ]

    texts: list[str | None] = []
    for encoder in encoders:
        try:
            texts.append(encoder.render(conversation["messages"], tools=conversation.get("tools")))
        except TemplateError:
            texts.append(None)

    assert texts[0] == texts[1]


def test_the_time_stands_still(make_folder: Any) -> None:
    folder = make_folder("headers")
    messages = [{"role": "user", "content": "hi"}]

    then = TextEncoder.from_folder(folder, now=1_700_000_000.0)
    now = TextEncoder.from_folder(folder)

    date = time.strftime("%d %b %Y", time.localtime(1_700_000_000.0))
    assert f"Today: {date}" in then.render(messages)
    assert TextEncoder.from_folder(folder, now=now.now).render(messages) == now.render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
        "{{ {'b': 1, 'a': '<é>'} | tojson }}{{ [1, 2] | tojson(separators=(',', ':')) }}",
        "{% set d = dict(a=1) %}{{ d.a }}{% set ns = namespace(n=2) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}",
        "  {% if true %}\n    indented\n  {% endif %}\n\nlast line\n",
        "{{ documents is none }}{{ tools is none }}{{ bos_token is defined }}{{ messages[0].missing }}",
    ],
)
def test_dialect_is_that_of_transformers(source: str, make_folder: Any) -> None:
    folder = make_folder("plain")
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    conversation = CONVERSATIONS["one turn"]

    actual = TextEncoder.from_folder(folder).render(conversation["messages"])

    assert actual == _expected(folder, conversation, tokenize=False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('not like this') }}",
        "{% for i in range(100000000) %}x{% endfor %}",
        "{{ messages[99].content }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_hostile_or_broken_template_is_one_kind_of_error(source: str) -> None:
    template = ChatTemplate(source, {})

    with pytest.raises(TemplateError):
        template.render([{"role": "user", "content": "hi"}])


def test_a_template_that_does_not_parse_says_so() -> None:
    with pytest.raises(TemplateError, match="not valid jinja"):
        ChatTemplate("{% if %}", {})
