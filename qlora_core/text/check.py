"""The check of a whole dataset file, in memory that does not grow with the file.

``scan_dataset`` is the one reader: the service's check counts with it and the trainer loads with it. A large file
is read by several processes at once; what is found is the same on any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from qlora_core.text.encoder import TextEncoder
from qlora_core.text.processes import TokenizerProcesses, usual_processes
from qlora_core.text.report import DatasetProblem, DatasetReport, LineError
from qlora_core.text.scanning import Scanned, ScanSettings, scan_part, skip_line

Progress = Callable[[int, int], None]

# What one process reads at a time.
_PART_BYTES = 1 << 20
FAILED = "The job failed due to an invalid training file."
"""How a problem's message begins: OpenAI's words."""


def check_dataset(
    path: Path | str,
    encoder: TextEncoder,
    *,
    context_length: int,
    max_errors: int = 100,
    min_examples: int = 10,
    train_on_inputs: bool = False,
    processes: int | None = None,
    on_progress: Progress | None = None,
) -> DatasetReport:
    """Check every line of a file and count what would be trained on. Nothing in the file makes it raise.

    Args:
        path: a JSONL file.
        encoder: of the base model.
        context_length: tokens; longer examples are truncated and counted.
        max_errors: how many bad lines are described; all are counted.
        min_examples: fewer examples than this are a problem.
        train_on_inputs: whether prompts would be trained, too.
        processes: how many read the file; None for as many as the machine and the file's size suggest.
        on_progress: called now and then, and at the end, with (done_bytes, total_bytes).

    Raises:
        MemoryError: there was not enough memory.
    """
    settings = ScanSettings(context_length, train_on_inputs, max_errors)
    return scan_dataset(
        path,
        encoder,
        settings,
        min_examples=min_examples,
        processes=processes,
        on_progress=on_progress,
    )


def scan_dataset(
    path: Path | str,
    encoder: TextEncoder,
    settings: ScanSettings,
    *,
    min_examples: int = 1,
    processes: int | None = None,
    on_progress: Progress | None = None,
    on_part: Callable[[Scanned], None] | None = None,
) -> DatasetReport:
    """Check a file as ``check_dataset`` does, and hand over what was found part by part, in order.

    ``on_part``: gets each part with lines numbered as in the file.
    """
    path = Path(path)
    total_bytes = path.stat().st_size
    count = usual_processes(total_bytes) if processes is None else processes
    whole = _Whole(settings)
    told = (lambda _: None) if on_progress is None else lambda done: on_progress(done, total_bytes)
    with path.open("rb") as file:
        parts = _parts(file, total_bytes)
        found = _scan(path, file, parts, encoder, settings, count=count, on_bytes=told)
        with closing(found):  # it ends its processes
            for end, scanned in found:
                whole.add(scanned)
                if on_part is not None:
                    on_part(scanned)
                told(end)
    told(total_bytes)
    return whole.report(min_examples)


def _parts(file: BinaryIO, total_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut the file into parts of whole lines."""
    start = 0
    while start < total_bytes:
        end = min(start + _PART_BYTES, total_bytes)
        if end < total_bytes:
            file.seek(end - 1)
            skip_line(file)
            end = file.tell()
        yield start, end
        start = end


def _scan(
    path: Path,
    file: BinaryIO,
    parts: Iterator[tuple[int, int]],
    encoder: TextEncoder,
    settings: ScanSettings,
    *,
    count: int,
    on_bytes: Callable[[int], None],
) -> Generator[tuple[int, Scanned]]:
    """Yield what is found in each part and where it ends; alone until a line has said the file's format."""
    scanned = Scanned()
    for start, end in parts:
        scanned = scan_part(
            file, start, end, encoder, settings, format=scanned.format, on_bytes=on_bytes
        )
        yield end, scanned
        if scanned.is_hopeless:
            return
        if scanned.format is not None and count > 1 and encoder.folder is not None:
            with TokenizerProcesses(path, encoder, settings, count=count) as helpers:
                yield from helpers.scan(parts, scanned.format)


@dataclass
class _Whole:
    """The figures of the parts read so far."""

    settings: ScanSettings
    found: Scanned = field(default_factory=Scanned)

    def add(self, part: Scanned) -> None:
        """Add a part's figures, and number its lines as in the file."""
        whole, before = self.found, self.found.n_numbered
        part.errors = [_numbered(error, before + error.line) for error in part.errors]
        for index, line in enumerate(part.lines):
            part.lines[index] = before + line
        whole.format = whole.format or part.format
        whole.longest_tokens = max(whole.longest_tokens, part.longest_tokens)
        whole.errors += part.errors[: self.settings.max_errors - len(whole.errors)]
        for name in (
            "n_numbered", "n_lines", "n_examples", "n_truncated", "n_dropped", "n_dropped_truncated",
            "n_tokens", "n_trained_tokens", "n_errors",
        ):  # fmt: skip
            setattr(whole, name, getattr(whole, name) + getattr(part, name))

    def report(self, min_examples: int) -> DatasetReport:
        """Return the figures, with the problem if there is one."""
        found = self.found
        return DatasetReport(
            format=found.format,
            n_lines=found.n_lines,
            n_examples=found.n_examples,
            n_truncated=found.n_truncated,
            n_dropped=found.n_dropped,
            n_dropped_truncated=found.n_dropped_truncated,
            n_tokens=found.n_tokens,
            n_trained_tokens=found.n_trained_tokens,
            longest_tokens=found.longest_tokens,
            errors=tuple(found.errors),
            n_errors=found.n_errors,
            problem=self._problem(min_examples),
        )

    def _problem(self, min_examples: int) -> DatasetProblem | None:
        found = self.found
        if found.errors:
            return DatasetProblem("invalid_training_file", f"{FAILED} {_summary(found)}")
        if found.n_lines == 0:
            return DatasetProblem("invalid_training_file", f"{FAILED} The file is empty.")
        if found.n_lines < min_examples:
            return DatasetProblem(
                "invalid_n_examples",
                f"Training file has {found.n_lines} example(s), but must have at least "
                f"{min_examples} examples",
            )
        if found.n_examples == 0:
            return DatasetProblem(
                "invalid_training_file",
                f"{FAILED} {_none_of(found.n_lines)} anything to train on: every assistant message "
                f"has weight 0 or lies beyond the context length of {self.settings.context_length} "
                "tokens.",
            )
        return None


def _numbered(error: LineError, line: int) -> LineError:
    # The first: what follows may be the file's own words.
    return replace(error, line=line, message=error.message.replace("{number}", str(line), 1))


def _none_of(n_lines: int) -> str:
    if n_lines == 1:
        return "Its only example does not have"
    return f"None of its {n_lines} examples has"


def _summary(found: Scanned) -> str:
    """Give the first error in full and say where the next ones are."""
    first, *others = found.errors
    if found.n_errors == 1:
        return first.message
    lines = ", ".join(str(error.line) for error in others[:10])
    more = ", …" if found.n_errors > 11 else ""
    return f"{first.message} ({found.n_errors} bad lines in all; the next: {lines}{more})"
