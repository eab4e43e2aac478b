"""Dataset: every example of a file, tokenized once; its tokens may be on disk, so a file may be larger than memory."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from torch import Tensor

from qlora_core.data.tokens import IN_MEMORY_BYTES, TokenStore
from qlora_core.errors import DatasetError
from qlora_core.text import DatasetReport, EncodedExample, TextEncoder
from qlora_core.text.check import Progress, scan_dataset
from qlora_core.text.scanning import Scanned, ScanSettings


class Examples:
    """Collects examples part by part, in flat arrays, so that a big file does not become millions of lists."""

    def __init__(self, store: TokenStore | None = None) -> None:
        self.store = store or TokenStore()
        self.lengths = array("i")
        self.trained_counts = array("i")
        self.lines = array("q")

    @classmethod
    def of(cls, encoded: Iterable[EncodedExample]) -> Self:
        """Collect examples that come from no file; as if each had a line of its own."""
        part = Scanned()
        for line, example in enumerate(encoded, start=1):
            part.add(line, example, keeps_tokens=True)
        examples = cls()
        examples.add(part)
        return examples

    def add(self, part: Scanned) -> None:
        """Append what was found in the next part of the file."""
        self.store.append(part.tokens)
        self.lengths.extend(part.lengths)
        self.trained_counts.extend(part.trained_counts)
        self.lines.extend(part.lines)


class Dataset:
    """Tokenized examples, in the order of their file; 24 bytes of memory for each, beside its tokens.

    Args:
        examples: at least one; taken over, so add no more to them.
        report: of the file they came from.

    Attributes:
        report: the figures of the file, as the check gives them.
        lengths: tokens of each example.
        trained_counts: trained tokens of each example, at least 1.
        lines: where in the file each example stands, counted from 1.
    """

    def __init__(self, examples: Examples, report: DatasetReport) -> None:
        self.report = report
        self.lengths: Sequence[int] = examples.lengths
        self.trained_counts: Sequence[int] = examples.trained_counts
        self.lines: Sequence[int] = examples.lines
        self._store = examples.store
        self._starts = array("q", itertools.accumulate(examples.lengths, initial=0))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def largest_id(self) -> int:
        """The largest id of all tokens."""
        return self._store.largest_id

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one example: ids int32 [tokens] and the loss mask bool [tokens], newly read."""
        return self._store.read(self._starts[index], self.lengths[index])


def load_dataset(
    path: Path | str,
    encoder: TextEncoder,
    *,
    context_length: int,
    train_on_inputs: bool = False,
    processes: int | None = None,
    folder: Path | None = None,
    in_memory_bytes: int = IN_MEMORY_BYTES,
    on_progress: Progress | None = None,
) -> Dataset:
    """Read, check and tokenize a dataset file; what ``check_dataset`` accepts is what is loaded.

    Args:
        path: a JSONL file.
        encoder: of the base model.
        context_length: tokens; longer examples are cut at their end.
        train_on_inputs: train the prompts, too (`TextEncoder.encode`).
        processes: how many read the file; None for as many as the machine and the file's size suggest.
        folder: where the tokens go that do not stay in memory, about as much as the file; the system's for
            temporary files if not given. Nothing is left there.
        in_memory_bytes: how much of them may stay in memory.
        on_progress: called with (done_bytes, total_bytes).

    Raises:
        DatasetError: a line is bad or nothing is left to train on; it carries the report. How few
            examples are too few is the caller's rule: here one is enough.
        MemoryError: there was not enough memory.
    """
    examples = Examples(TokenStore(folder=folder, in_memory_bytes=in_memory_bytes))
    report = scan_dataset(
        path,
        encoder,
        ScanSettings(context_length, train_on_inputs, keeps_tokens=True),
        processes=processes,
        on_progress=on_progress,
        on_part=examples.add,
    )
    if report.problem is not None:
        raise DatasetError(report.problem.message, code=report.problem.code, report=report)
    return Dataset(examples, report)
