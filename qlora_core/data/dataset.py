"""Dataset: every example of a file, tokenized once and kept flat: five bytes per token."""

from __future__ import annotations

import itertools
from array import array
from pathlib import Path

import torch
from torch import Tensor

from qlora_core.errors import DatasetError
from qlora_core.text import DatasetReport, EncodedExample, TextEncoder, scan_dataset
from qlora_core.text.check import Progress


class FlatTokens:
    """Collects examples in flat arrays, so that a big file does not become millions of lists."""

    def __init__(self) -> None:
        self.ids = array("i")
        self.trained = array("b")
        self.lengths = array("q")
        self.trained_counts = array("q")

    def add(self, example: EncodedExample) -> None:
        """Append one example."""
        self.ids.extend(example.input_ids)
        self.trained.extend(example.trained)
        self.lengths.append(len(example.input_ids))
        self.trained_counts.append(example.n_trained_tokens)


class Dataset:
    """Tokenized examples, in the order of their file.

    Args:
        tokens: at least one example; their memory is taken over, so add no more to them.
        report: of the file they came from.

    Attributes:
        report: the figures of the file, as the check gives them.
        lengths: tokens of each example.
        trained_counts: trained tokens of each example, at least 1.
    """

    def __init__(self, tokens: FlatTokens, report: DatasetReport) -> None:
        self.report = report
        self.lengths: list[int] = list(tokens.lengths)
        self.trained_counts: list[int] = list(tokens.trained_counts)
        self._ids = torch.frombuffer(tokens.ids, dtype=torch.int32)  # [all tokens]
        self._trained = torch.frombuffer(tokens.trained, dtype=torch.bool)  # [all tokens]
        self._starts = [0, *itertools.accumulate(self.lengths)]

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one example: ids int32 [tokens] and the loss mask bool [tokens], both views."""
        place = slice(self._starts[index], self._starts[index + 1])
        return self._ids[place], self._trained[place]


def load_dataset(
    path: Path | str,
    encoder: TextEncoder,
    *,
    context_length: int,
    on_progress: Progress | None = None,
) -> Dataset:
    """Read, check and tokenize a dataset file; what ``check_dataset`` accepts is what is loaded.

    Args:
        path: a JSONL file.
        encoder: of the base model.
        context_length: tokens; longer examples are cut at their end.
        on_progress: called with (done_bytes, total_bytes).

    Raises:
        DatasetError: a line is bad or nothing is left to train on; it carries the report. How few
            examples are too few is the caller's rule: here one is enough.
    """
    tokens = FlatTokens()
    report = scan_dataset(
        path,
        encoder,
        context_length=context_length,
        on_progress=on_progress,
        on_example=tokens.add,
    )
    if report.problem is not None:
        raise DatasetError(report.problem.message, code=report.problem.code, report=report)
    return Dataset(tokens, report)
