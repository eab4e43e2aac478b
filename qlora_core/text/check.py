"""The check of a whole dataset file, line by line, in memory that does not grow with the file.

``scan_dataset`` is the one reader: the service's check counts with it and the trainer loads with it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from qlora_core.text.encoder import EncodedExample, TextEncoder
from qlora_core.text.example_error import ExampleError, shortened
from qlora_core.text.formats import ChatExample, parse_example
from qlora_core.text.report import DatasetFormat, DatasetProblem, DatasetReport, LineError
from qlora_core.text.template import TemplateError

Progress = Callable[[int, int], None]

# A line is held in memory, decoded and rendered; an example of the longest context is far shorter.
LONGEST_LINE_BYTES = 8 * 1024 * 1024
_PROGRESS_LINES = 64
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Deeper than any tool schema, far from where Python's own stack would end.
_DEEPEST_NESTING = 100
_SHOWN_REASON_CHARACTERS = 400
_FAILED = "The job failed due to an invalid training file."


def check_dataset(
    path: Path | str,
    encoder: TextEncoder,
    *,
    context_length: int,
    max_errors: int = 100,
    min_examples: int = 10,
    on_progress: Progress | None = None,
) -> DatasetReport:
    """Check every line of a file and count what would be trained on. Nothing in the file makes it raise.

    Args:
        path: a JSONL file.
        encoder: of the base model.
        context_length: tokens; longer examples are truncated and counted.
        max_errors: how many bad lines are described; all are counted.
        min_examples: fewer examples than this are a problem.
        on_progress: called now and then, and at the end, with (done_bytes, total_bytes).
    """
    return scan_dataset(
        path,
        encoder,
        context_length=context_length,
        max_errors=max_errors,
        min_examples=min_examples,
        on_progress=on_progress,
    )


def scan_dataset(
    path: Path | str,
    encoder: TextEncoder,
    *,
    context_length: int,
    max_errors: int = 100,
    min_examples: int = 1,
    on_progress: Progress | None = None,
    on_example: Callable[[EncodedExample], None] | None = None,
) -> DatasetReport:
    """Check a file as ``check_dataset`` does, and hand over every example that will be trained on."""
    scan = _Scan(encoder, context_length, max_errors, on_example)
    path = Path(path)
    total_bytes = path.stat().st_size
    with path.open("rb") as file:
        for line_number, line in _lines(file):
            scan.read(line_number, line)
            if on_progress is not None and line_number % _PROGRESS_LINES == 0:
                on_progress(file.tell(), total_bytes)
            if scan.hopeless:
                break
    if on_progress is not None:
        on_progress(total_bytes, total_bytes)
    return scan.report(min_examples)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Number the lines from 1; one that is too long is None, and never held in memory."""
    number = 0
    while line := file.readline(LONGEST_LINE_BYTES + 1):
        number += 1
        if len(line) <= LONGEST_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE_BYTES)
        yield number, None


@dataclass
class _Scan:
    """The counts while a file is read."""

    encoder: TextEncoder
    context_length: int
    max_errors: int
    on_example: Callable[[EncodedExample], None] | None
    format: DatasetFormat | None = None
    n_lines: int = 0
    n_examples: int = 0
    n_truncated: int = 0
    n_dropped: int = 0
    n_tokens: int = 0
    n_trained_tokens: int = 0
    longest_tokens: int = 0
    errors: list[LineError] = field(default_factory=list)
    n_errors: int = 0
    hopeless: bool = False

    def read(self, number: int, line: bytes | None) -> None:
        """Count one line: an example, a dropped one, or an error."""
        if line is not None and number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line is not None and not line.strip():
            return
        self.n_lines += 1
        try:
            encoded = self._encode(number, line)
        except ExampleError as error:
            message = error.message.replace("{example}", f"Example {number}", 1)
            if error.code not in ("not_jsonl", "unexpected_format"):
                message = f"Invalid file format. {message}"
            self._add_error(LineError(number, error.code, message, error.field))
        except TemplateError as error:
            # A template may quote a whole message.
            reason = shortened(error.message, _SHOWN_REASON_CHARACTERS)
            message = f"Invalid file format. Example {number}: {reason}"
            self._add_error(LineError(number, error.code, message, "messages"))
        except RecursionError:
            message = f"Invalid file format. Example {number} is nested too deeply."
            self._add_error(LineError(number, "nested_too_deeply", message))
        else:
            self._count(encoded)

    def report(self, min_examples: int) -> DatasetReport:
        """Return the figures, with the problem if there is one."""
        return DatasetReport(
            format=self.format,
            n_lines=self.n_lines,
            n_examples=self.n_examples,
            n_truncated=self.n_truncated,
            n_dropped=self.n_dropped,
            n_tokens=self.n_tokens,
            n_trained_tokens=self.n_trained_tokens,
            longest_tokens=self.longest_tokens,
            errors=tuple(self.errors),
            n_errors=self.n_errors,
            problem=self._problem(min_examples),
        )

    def _encode(self, number: int, line: bytes | None) -> EncodedExample:
        example = parse_example(self._decode(number, line))
        if self.format is None:
            self.format = example.format
        if example.format != self.format:
            raise ExampleError(
                "mixed_formats",
                f"{{example}} is in the {example.format} format, but the lines before it are in the "
                f"{self.format} format.",
            )
        if isinstance(example, ChatExample) and not self.encoder.has_chat_template:
            self.hopeless = True  # every line would say the same
        return self.encoder.encode(example, context_length=self.context_length)

    def _decode(self, number: int, line: bytes | None) -> dict[str, Any]:
        if line is None:
            raise ExampleError(
                "line_too_long",
                f"{{example}} is longer than {LONGEST_LINE_BYTES} bytes; split it into shorter examples.",
            )
        if number == 1 and line.startswith(_UTF16_MARKS):
            self.hopeless = True
            raise ExampleError("invalid_utf8", "The file is UTF-16; save it as UTF-8.")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ExampleError(
                "invalid_utf8",
                f"{{example}} is not valid UTF-8: byte {error.start + 1} of the line is "
                f"0x{line[error.start]:02x}.",
            ) from error
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
        except ValueError as error:
            raise _not_jsonl(number, text) from error
        if not isinstance(value, dict):
            raise _not_jsonl(number, text)
        if (
            text.count("[") + text.count("{") > _DEEPEST_NESTING
            and _depth(value) > _DEEPEST_NESTING
        ):
            raise ExampleError("nested_too_deeply", "{example} is nested too deeply.")
        return value

    def _add_error(self, error: LineError) -> None:
        self.n_errors += 1
        if len(self.errors) < self.max_errors:
            self.errors.append(error)

    def _count(self, encoded: EncodedExample) -> None:
        self.longest_tokens = max(self.longest_tokens, encoded.n_tokens_before)
        if encoded.n_trained_tokens == 0:
            self.n_dropped += 1
            return
        self.n_examples += 1
        self.n_truncated += encoded.truncated
        self.n_tokens += len(encoded.input_ids)
        self.n_trained_tokens += encoded.n_trained_tokens
        if self.on_example is not None:
            self.on_example(encoded)

    def _problem(self, min_examples: int) -> DatasetProblem | None:
        if self.errors:
            return DatasetProblem("invalid_training_file", f"{_FAILED} {_summary(self)}")
        if self.n_lines == 0:
            return DatasetProblem("invalid_training_file", f"{_FAILED} The file is empty.")
        if self.n_lines < min_examples:
            return DatasetProblem(
                "invalid_n_examples",
                f"Training file has {self.n_lines} example(s), but must have at least "
                f"{min_examples} examples",
            )
        if self.n_examples == 0:
            return DatasetProblem(
                "invalid_training_file",
                f"{_FAILED} None of its {self.n_lines} examples has anything to train on: every "
                f"assistant message has weight 0 or lies beyond the context length of "
                f"{self.context_length} tokens.",
            )
        return None


def _summary(scan: _Scan) -> str:
    """Give the first error in full and say where the next ones are."""
    first, *others = scan.errors
    if scan.n_errors == 1:
        return first.message
    lines = ", ".join(str(error.line) for error in others[:10])
    more = ", …" if scan.n_errors > 11 else ""
    return f"{first.message} ({scan.n_errors} bad lines in all; the next: {lines}{more})"


def _not_jsonl(number: int, text: str) -> ExampleError:
    start = text.strip()[:20]
    return ExampleError(
        "not_jsonl",
        "Expected file to have JSONL format, where every line is a JSON dictionary. "
        f'Line {number} is not a dictionary (HINT: line starts with: "{start}...").',
    )


def _depth(value: object) -> int:
    """Return how many lists and objects are inside one another, without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
