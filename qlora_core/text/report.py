"""What the check of a dataset file found. All frozen, all turned into JSON by ``as_dict``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

DatasetFormat = Literal["chat", "completion", "text"]


@dataclass(frozen=True)
class LineError:
    """One bad line.

    Attributes:
        line: its number, counted from 1, blank lines included.
        code: snake_case, for programs.
        message: one sentence, for people; it names the line.
        field: where in the line, indices counted from 0 (``messages[2].role``); None for the whole line.
    """

    line: int
    code: str
    message: str
    field: str | None = None


@dataclass(frozen=True)
class DatasetProblem:
    """Why a file cannot be trained on: a job's ``error``, ready to serve."""

    code: Literal["invalid_training_file", "invalid_n_examples"]
    message: str


@dataclass(frozen=True)
class DatasetReport:
    """The figures of a whole file.

    Attributes:
        format: of its lines; None where not a single line was read.
        n_lines: lines that are not blank.
        n_examples: examples that will be trained on.
        n_truncated: of these, the ones cut at their end to fit the context length.
        n_dropped: good lines left out because nothing in them is trained (after truncation).
        n_dropped_truncated: of these, the ones that were cut.
        n_tokens: over ``n_examples``, after truncation.
        n_trained_tokens: of these, the ones that carry loss.
        longest_tokens: the longest example before truncation.
        errors: the first bad lines, in order.
        n_errors: how many bad lines there are in all.
        problem: why the file is refused, or None: it can be trained on.
    """

    format: DatasetFormat | None
    n_lines: int
    n_examples: int
    n_truncated: int
    n_dropped: int
    n_dropped_truncated: int
    n_tokens: int
    n_trained_tokens: int
    longest_tokens: int
    errors: tuple[LineError, ...]
    n_errors: int
    problem: DatasetProblem | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return asdict(self)
