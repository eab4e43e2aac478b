"""What a run tells while it runs: frozen, JSON-able, in the order things happen.

The trainer calls ``sink(event)``; whoever runs it decides where the events go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Event:
    """One thing that happened; ``kind`` names the class in JSON."""

    kind: ClassVar[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and ``kind`` as JSON-able values."""
        return {"kind": self.kind, **asdict(self)}


Sink = Callable[[Event], None]


@dataclass(frozen=True)
class DatasetProgress(Event):
    """A large file is being read; told before the run starts (`reading.tell_reading`)."""

    kind = "dataset_progress"
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class RunStarted(Event):
    """The model is ready and the first step is next; ``start_step`` steps are done already."""

    kind = "run_started"
    total_steps: int
    start_step: int
    n_examples: int
    n_epochs: int
    trainable_parameters: int
    base_bytes: int
    device: str
    n_truncated: int
    n_dropped: int


@dataclass(frozen=True)
class StepMetrics(Event):
    """One optimizer step, counted from 1.

    Attributes:
        epoch: passes over the data done after this step, as a fraction.
        train_loss: mean over the step's trained tokens, in nats; None for a step that was skipped
            because its loss or gradient was not finite, and so are the two figures beside it.
        train_mean_token_accuracy: share of the trained tokens that were predicted right.
        learning_rate: of this step.
        grad_norm: before clipping.
        tokens_per_s: real tokens of the step, trained or not, per second.
        mfu: model FLOPs utilization, the share of the device's 16-bit peak that the step's operations
            made use of (`flops`); None where the peak is not known, as on a CPU.
        trained_tokens: of the whole run so far.
        memory: bytes by kind (`memory.meter.MemoryMeter`).
        highest_losses: the step's three examples with the highest mean loss per trained token, highest
            first: each ``{"example": its number in the dataset, from 0, "line": in the file, from 1, "loss":
            in nats}``.
    """

    kind = "step_metrics"
    step: int
    total_steps: int
    epoch: float
    train_loss: float | None
    train_mean_token_accuracy: float | None
    learning_rate: float
    grad_norm: float | None
    tokens_per_s: float
    mfu: float | None
    trained_tokens: int
    step_time_s: float
    memory: Mapping[str, int]
    highest_losses: Sequence[Mapping[str, int | float]] = ()


@dataclass(frozen=True)
class ValidationMetrics(Event):
    """The whole validation set after ``step`` steps; step 0 is the base model.

    ``is_best``: no validation after a step of training had a smaller loss so far.
    """

    kind = "validation_metrics"
    step: int
    full_valid_loss: float
    full_valid_mean_token_accuracy: float
    is_best: bool = False


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """An adapter was kept at an epoch's end or the run's, with that step's figures.

    ``epoch``: passes over the data, the last one perhaps not whole.
    """

    kind = "checkpoint_saved"
    step: int
    epoch: int
    folder: str
    train_loss: float | None
    train_mean_token_accuracy: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


@dataclass(frozen=True)
class ResumePointSaved(Event):
    """From here the run can go on exactly."""

    kind = "resume_point_saved"
    step: int
    folder: str


@dataclass(frozen=True)
class ResumeNotExact(Event):
    """A run goes on after ``step``, but perhaps not to the bit as it would have without a stop; told before `RunStarted`.

    ``reasons``: what is not as it was, a sentence each.
    """

    kind = "resume_not_exact"
    step: int
    reasons: Sequence[str]

    @property
    def message(self) -> str:
        """The event in words."""
        return (
            f"The run goes on after step {self.step:,}, but perhaps not to the bit as it would have without a stop. "
            f"{' '.join(self.reasons)}"
        )


@dataclass(frozen=True)
class OutOfMemoryRecovered(Event):
    """Memory has ended; the run is more frugal from here on, and what was begun is done again.

    Attributes:
        step: that it was in; of the rehearsal and of a validation, the steps done before it.
        where: in words, such as "in step 3, in a pass of one example and 812 tokens".
        change: "recompute", "smaller_passes" or "inputs_on_host".
        words: what is done from now on.
        cost: in words.
        slower: about how many times as long a step takes, by calculation; None where nothing is known.
        micro_batch_tokens: of a forward pass at most, from now on.
        memory: bytes when it had ended (`memory.meter.measured_memory`).
    """

    kind = "out_of_memory_recovered"
    step: int
    where: str
    change: Literal["recompute", "smaller_passes", "inputs_on_host"]
    words: str
    cost: str
    slower: float | None
    micro_batch_tokens: int
    memory: Mapping[str, int]

    @property
    def message(self) -> str:
        """The event in words."""
        return f"Memory ended {self.where}. From now on {self.words}. {self.cost}"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ``kind`` and the message."""
        return {**super().as_dict(), "message": self.message}


@dataclass(frozen=True)
class SamplesGenerated(Event):
    """Answers to the sample prompts, by the base model or with the adapter.

    ``samples``: each ``{"messages": [...], "answer": str}``.
    """

    kind = "samples_generated"
    step: int
    stage: Literal["base", "adapter"]
    samples: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Notice(Event):
    """Something a person should read."""

    kind = "notice"
    level: Literal["info", "warn", "error"]
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFinished(Event):
    """The run is done and the adapter is written.

    Attributes:
        steps: optimizer steps done.
        trained_tokens: that carried loss, over the whole run.
        train_loss: mean over the trained tokens of the last epoch, or of what was done of it.
        full_valid_loss: of the adapter that was written.
        adapter_step: the step that this adapter is of.
        best_step: after which the validation loss was smallest, None where there was none.
        best_valid_loss: that loss.
        stopped_early: whether the run ended because the validation loss did not improve.
    """

    kind = "run_finished"
    steps: int
    trained_tokens: int
    train_loss: float
    full_valid_loss: float | None
    adapter_step: int
    best_step: int | None
    best_valid_loss: float | None
    stopped_early: bool
