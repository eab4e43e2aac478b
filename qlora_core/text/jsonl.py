"""One line of a JSONL file: the object it holds, or why it holds none, in words that say what to do.

The upload looks at a file's first line with it, the check of a whole file at every line.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, NoReturn

EXPECTED = "Expected file to have JSONL format, where every line is a JSON dictionary."
"""OpenAI's sentence, which clients look for; the line's number and its fault follow."""

_HINT_CHARACTERS = 20
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_OLD_LINE_ENDS = (
    "has carriage returns alone where lines end; end every line with a line feed (\\n)."
)
# What Python's decoder says, and what that means.
_FAULTS = {
    "Expecting property name enclosed in double quotes": "a name in double quotes is expected",
    "Illegal trailing comma before end of object": "there is a comma too many",
    "Illegal trailing comma before end of array": "there is a comma too many",
    "Expecting ':' delimiter": "a colon is expected",
    "Expecting ',' delimiter": "a comma is expected",
    "Expecting value": "a value is expected",
    "Unterminated string starting at": "the string that begins there has no end",
    "Invalid control character at": "a control character has to be escaped, such as \\n or \\t",
    "Invalid \\escape": "there is an escape that JSON does not have",
    "Invalid \\uXXXX escape": "four hexadecimal digits have to follow \\u",
    "Extra data": "something follows the end of the dictionary",
}


class LineUnreadable(ValueError):
    """A line holds no JSON object.

    Attributes:
        code: ``invalid_utf8`` or ``not_jsonl``.
        reason: completes the sentence "Line 3 …".
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def read_object(line: bytes) -> dict[str, Any]:
    """Decode one line, whose byte order mark is off already.

    Raises:
        LineUnreadable: it is not UTF-8, not JSON, or another value than an object.
        RecursionError: it is nested very deeply.
    """
    text = _decode(line).rstrip(
        "\r\n"
    )  # else a string without an end would seem to hold the line's
    if not text.lstrip().startswith("{"):
        raise LineUnreadable("not_jsonl", _no_dictionary(text))
    try:
        value: dict[str, Any] = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise LineUnreadable("not_jsonl", _fault(error)) from error
    except LineUnreadable:
        raise
    except ValueError as error:  # Python's own limit
        reason = "is not valid JSON that can be read: a number has too many digits."
        raise LineUnreadable("not_jsonl", reason) from error
    return value


def check_start(start: bytes) -> None:
    """Look at the start of a line that is too long to be decoded: might it be an object?

    Raises:
        LineUnreadable: no.
    """
    text = start.decode("utf-8", "replace")
    if not text.lstrip().startswith("{"):
        raise LineUnreadable("not_jsonl", _no_dictionary(text))
    if re.search(r"\}[ \t]*\r[ \t]*\{", text):  # nowhere in JSON
        raise LineUnreadable("not_jsonl", _OLD_LINE_ENDS)


def _decode(line: bytes) -> str:
    if line.startswith(UTF16_MARKS):
        raise LineUnreadable("invalid_utf8", "is not UTF-8 but UTF-16; save the file as UTF-8.")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineUnreadable(
            "invalid_utf8",
            f"is not valid UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}.",
        ) from error


def _no_dictionary(text: str) -> str:
    """Return OpenAI's words for a line that is another value than an object, or none."""
    start = text.strip()[:_HINT_CHARACTERS]
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in start)
    return f'is not a dictionary (HINT: line starts with: "{shown}...").'


def _fault(error: json.JSONDecodeError) -> str:
    before = error.doc[: error.pos]
    if error.msg == "Extra data" and "\r" in before[len(before.rstrip()) :]:
        return _OLD_LINE_ENDS
    fault = _FAULTS.get(error.msg, error.msg[:1].lower() + error.msg[1:])
    return f"is not valid JSON: at column {error.pos + 1}, {fault}."


def _refuse_constant(name: str) -> NoReturn:
    raise LineUnreadable("not_jsonl", f"is not valid JSON, which has no {name}.")
