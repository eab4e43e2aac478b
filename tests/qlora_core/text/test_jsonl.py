"""What a line is told that holds no JSON object: OpenAI's sentence, or where the JSON breaks off."""

from __future__ import annotations

import pytest

from qlora_core.text.jsonl import LineUnreadable, check_start, read_object


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"{}", {}),
        (b' \t{"a": [1, "\\u00e9"]} \r\n', {"a": [1, "é"]}),
        ('{"ä": "ö"}\n'.encode(), {"ä": "ö"}),
        (b'{\r"a": 1\r}\n', {"a": 1}),  # white space that JSON allows
    ],
    ids=repr,
)
def test_an_object_is_returned(line: bytes, value: object) -> None:
    assert read_object(line) == value


NO_DICTIONARIES = [
    b"plain text\n",
    b"[1, 2]\n",
    b'"text"\n',
    b"null\n",
    b"1" * 10_000,
    b"NaN",
    b"[" * 200_000,
]


@pytest.mark.parametrize("line", NO_DICTIONARIES, ids=lambda line: repr(line[:12]))
def test_what_is_no_dictionary_is_told_so_in_openais_words(line: bytes) -> None:
    with pytest.raises(LineUnreadable) as raised:
        read_object(line)

    start = line.decode().strip()[:20]
    assert raised.value.code == "not_jsonl"
    assert raised.value.reason == f'is not a dictionary (HINT: line starts with: "{start}...").'


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"{'a': 1}", "at column 2, a name in double quotes is expected."),
        (b'{"a" 1}', "at column 6, a colon is expected."),
        (b'{"a": 1 "b": 2}', "at column 9, a comma is expected."),
        (b'{"a": }', "at column 7, a value is expected."),
        (b'{"messages": [', "at column 15, a value is expected."),
        (b'{"a": "b\r\n', "at column 7, the string that begins there has no end."),
        (b'{"a": "b\tc"}', "at column 9, a control character has to be escaped, such as \\n or \\t."),
        (b'{"a": "\\x"}', "at column 8, there is an escape that JSON does not have."),
        (b'{"a": "\\u12"}', "four hexadecimal digits have to follow \\u."),
        (b'{"a": 1} {"b": 2}', "at column 10, something follows the end of the dictionary."),
        (b'{"a": NaN}', "is not valid JSON, which has no NaN."),
        (b'{"a": -Infinity}', "is not valid JSON, which has no -Infinity."),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number has too many digits."),
        (b'{"a": 1}\r{"a": 2}\r', "has carriage returns alone where lines end; end every line with a line feed"),
    ],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_a_dictionary_that_breaks_off_is_told_where(line: bytes, told: str) -> None:
    with pytest.raises(LineUnreadable) as raised:
        read_object(line)

    assert raised.value.code == "not_jsonl"
    assert told in raised.value.reason
    assert "sys." not in raised.value.reason


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"a": "\xff"}', "is not valid UTF-8: byte 8 of the line is 0xff."),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 but UTF-16"),
    ],
)
def test_another_encoding_is_named(line: bytes, told: str) -> None:
    with pytest.raises(LineUnreadable) as raised:
        read_object(line)

    assert raised.value.code == "invalid_utf8"
    assert told in raised.value.reason


def test_a_hint_shows_only_what_can_be_printed() -> None:
    with pytest.raises(LineUnreadable) as raised:
        read_object(b"PK\x03\x04")

    assert '"PK\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}..."' in raised.value.reason


def test_the_start_of_a_long_line_is_enough_to_see_what_it_cannot_be() -> None:
    check_start(b'{"messages": "' + b"x" * 100 + b"\xc3")  # cut within a character

    with pytest.raises(LineUnreadable, match="is not a dictionary"):
        check_start(b"x" * 100)
    with pytest.raises(LineUnreadable, match="carriage returns"):
        check_start(b'{"a": {}}\r{"a": {}}\r{"a"')
