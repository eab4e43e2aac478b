"""One pass over part of a dataset file: what is wrong with its lines, and what would be trained on.

A part is given by the bytes where its lines begin and end, so that several processes can each take some:
what one part finds does not depend on the others, but for the file's format, which its first good line sets.
"""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import neg, xor
from typing import Any, BinaryIO

from qlora_core.text.encoder import EncodedExample, TextEncoder
from qlora_core.text.example_error import ExampleError, shortened
from qlora_core.text.formats import ChatExample, parse_example
from qlora_core.text.jsonl import EXPECTED, UTF16_MARKS, LineUnreadable, read_object
from qlora_core.text.report import DatasetFormat, LineError
from qlora_core.text.template import TemplateError

# A line is held in memory, decoded and rendered; an example of the longest context is far shorter.
LONGEST_LINE_BYTES = 8 * 1024 * 1024
_PROGRESS_LINES = 64
# Of a template's own words, which may quote a whole message.
_SHOWN_REASON_CHARACTERS = 200
# Deeper than any tool schema, far from where Python's own stack would end.
_DEEPEST_NESTING = 100


@dataclass(frozen=True)
class ScanSettings:
    """What every part of a file is read with.

    Attributes:
        context_length: tokens; longer examples are cut at their end.
        train_on_inputs: train the prompts, too.
        max_errors: how many bad lines of a part are described; all are counted.
        keeps_tokens: whether the examples are kept, and not only counted.
    """

    context_length: int
    train_on_inputs: bool = False
    max_errors: int = 100
    keeps_tokens: bool = False


@dataclass
class Scanned:
    """What was found in one part of a file. Lines are numbered from 1 within the part.

    Attributes:
        format: of the file, as far as this part knows.
        n_numbered: lines of the part, blank ones included.
        n_lines, n_examples, n_truncated, n_dropped, n_dropped_truncated, n_tokens, n_trained_tokens,
            longest_tokens, errors, n_errors: as in ``DatasetReport``; ``{number}`` stands in a message where the line's belongs.
        is_hopeless: whether the rest of the file need not be read.
        tokens: int32, one example after the other; the complement of the id where it is trained (`~id`, so below 0).
        lengths, trained_counts: int32, of each example, in tokens.
        lines: int64, where in the part each example was.
    """

    format: DatasetFormat | None = None
    n_numbered: int = 0
    n_lines: int = 0
    n_examples: int = 0
    n_truncated: int = 0
    n_dropped: int = 0
    n_dropped_truncated: int = 0
    n_tokens: int = 0
    n_trained_tokens: int = 0
    longest_tokens: int = 0
    errors: list[LineError] = field(default_factory=list[LineError])
    n_errors: int = 0
    is_hopeless: bool = False
    tokens: array[int] = field(default_factory=lambda: array("i"))
    lengths: array[int] = field(default_factory=lambda: array("i"))
    trained_counts: array[int] = field(default_factory=lambda: array("i"))
    lines: array[int] = field(default_factory=lambda: array("q"))

    def add(self, number: int, encoded: EncodedExample, *, keeps_tokens: bool) -> None:
        """Count an example, or leave it out if nothing in it is trained."""
        self.longest_tokens = max(self.longest_tokens, encoded.n_tokens_before)
        if encoded.n_trained_tokens == 0:
            self.n_dropped += 1
            self.n_dropped_truncated += encoded.truncated
            return
        self.n_examples += 1
        self.n_truncated += encoded.truncated
        self.n_tokens += len(encoded.input_ids)
        self.n_trained_tokens += encoded.n_trained_tokens
        if keeps_tokens:
            # token ^ -1 is ~token, and token ^ 0 is the token; per token, so in C.
            self.tokens.extend(map(xor, encoded.input_ids, map(neg, encoded.trained)))
            self.lengths.append(len(encoded.input_ids))
            self.trained_counts.append(encoded.n_trained_tokens)
            self.lines.append(number)


def scan_part(
    file: BinaryIO,
    start: int,
    end: int,
    encoder: TextEncoder,
    settings: ScanSettings,
    *,
    format: DatasetFormat | None = None,  # noqa: A002 - the report's word
    on_bytes: Callable[[int], None] | None = None,
) -> Scanned:
    """Read the lines of a file that begin from ``start`` on and before ``end``.

    Args:
        file: opened for reading bytes.
        start: where a line begins.
        end: where another line begins, or the file ends.
        encoder: of the base model.
        settings: the same for all parts.
        format: of the file, if a line before this part has set it.
        on_bytes: called now and then with how far the file has been read.
    """
    scan = _Scan(encoder, settings, Scanned(format=format), begins_file=start == 0)
    file.seek(start)
    for number, line in _lines(file, end):
        scan.read(number, line)
        if on_bytes is not None and number % _PROGRESS_LINES == 0:
            on_bytes(file.tell())
        if scan.found.is_hopeless:
            break
    return scan.found


def _lines(file: BinaryIO, end: int) -> Iterator[tuple[int, bytes | None]]:
    """Number the lines from 1; one that is too long is None, and never held in memory."""
    number = 0
    while file.tell() < end and (line := file.readline(LONGEST_LINE_BYTES + 1)):
        number += 1
        if len(line) <= LONGEST_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        skip_line(file)
        yield number, None


def skip_line(file: BinaryIO) -> None:
    """Go to the beginning of the next line, or the file's end, in little memory."""
    while (piece := file.readline(1 << 20)) and not piece.endswith(b"\n"):
        pass


@dataclass(frozen=True)
class _Scan:
    """The reading of one part."""

    encoder: TextEncoder
    settings: ScanSettings
    found: Scanned
    begins_file: bool

    def read(self, number: int, line: bytes | None) -> None:
        """Count one line: an example, a dropped one, or an error."""
        self.found.n_numbered = number
        is_first = self.begins_file and number == 1
        if line is not None and is_first:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line is not None and not line.strip():
            return
        self.found.n_lines += 1
        try:
            encoded = self._encode(line, is_first=is_first)
        except ExampleError as error:
            message = error.message.replace("{example}", "Example {number}", 1)
            if error.code not in ("not_jsonl", "unexpected_format"):
                message = f"Invalid file format. {message}"
            self._add_error(LineError(number, error.code, message, error.field))
        except TemplateError as error:
            reason = shortened(error.message, _SHOWN_REASON_CHARACTERS)
            message = f"Invalid file format. Example {{number}}: {reason}"
            self._add_error(LineError(number, error.code, message, "messages"))
        except RecursionError:
            message = "Invalid file format. Example {number} is nested too deeply."
            self._add_error(LineError(number, "nested_too_deeply", message))
        else:
            self.found.add(number, encoded, keeps_tokens=self.settings.keeps_tokens)

    def _encode(self, line: bytes | None, *, is_first: bool) -> EncodedExample:
        example = parse_example(self._decode(line, is_first=is_first))
        if self.found.format is None:
            self.found.format = example.format
        if example.format != self.found.format:
            raise ExampleError(
                "mixed_formats",
                f"{{example}} is in the {example.format} format, but the lines before it are in the "
                f"{self.found.format} format.",
            )
        if isinstance(example, ChatExample) and not self.encoder.has_chat_template:
            self.found.is_hopeless = True  # every line would say the same
        return self.encoder.encode(
            example,
            context_length=self.settings.context_length,
            train_on_inputs=self.settings.train_on_inputs,
        )

    def _decode(self, line: bytes | None, *, is_first: bool) -> dict[str, Any]:
        if line is None:
            raise ExampleError(
                "line_too_long",
                f"{{example}} is longer than {LONGEST_LINE_BYTES} bytes; split it into shorter examples.",
            )
        try:
            value = read_object(line)
        except LineUnreadable as error:
            if is_first and line.startswith(UTF16_MARKS):
                self.found.is_hopeless = True  # every line would say the same
            subject = "{example}" if error.code == "invalid_utf8" else f"{EXPECTED} Line {{number}}"
            raise ExampleError(error.code, f"{subject} {error.reason}") from error
        if (
            line.count(b"[") + line.count(b"{") > _DEEPEST_NESTING
            and _depth(value) > _DEEPEST_NESTING
        ):
            raise ExampleError("nested_too_deeply", "{example} is nested too deeply.")
        return value

    def _add_error(self, error: LineError) -> None:
        self.found.n_errors += 1
        if len(self.found.errors) < self.settings.max_errors:
            self.found.errors.append(error)


def _depth(value: object) -> int:
    """Return how many lists and objects are inside one another, without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth
