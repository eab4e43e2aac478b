"""One optimizer step: gradients of a window of examples added up, clipped, applied and reported.

A window is split into micro-batches that fit memory; their summed gradients are divided by the trained tokens
of the whole window, so that the gradient is that of one big batch however it is split. The optimizer divides
and clips on its way, and what is not finite it passes over itself: the host waits for the device once a step,
to read what to tell.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_core.errors import LossNotFiniteError
from qlora_core.optim import learning_rate_at
from qlora_core.train.events import Notice, StepMetrics
from qlora_core.train.flops import training_flops
from qlora_core.train.memory.recovery import until_it_fits
from qlora_core.train.progress import Progress
from qlora_core.train.run import Run

_NOT_FINITE_ALLOWED = 2
# So many of a step's examples are told by name.
_TOLD = 3


@dataclass(frozen=True)
class Accumulated:
    """What the forward passes over a window's examples have found, with numbers still on the device.

    Attributes:
        loss: float32 [], summed over the trained tokens, in nats.
        n_correct: int64 [], trained tokens that were predicted right.
        losses: float32 [examples], summed over each one's trained tokens.
        examples: which these are.
        n_trained: trained tokens, at least 1.
        n_tokens: real tokens, trained or not.
    """

    loss: Tensor
    n_correct: Tensor
    losses: Tensor
    examples: list[int]
    n_trained: int
    n_tokens: int


@dataclass(frozen=True)
class WindowSums:
    """A window's figures.

    Attributes:
        loss: summed over the trained tokens, in nats.
        grad_norm: of the mean loss per trained token, before it was clipped.
        n_correct: trained tokens that were predicted right.
        n_trained: trained tokens, at least 1.
        n_tokens: real tokens, trained or not.
        example_losses: of each example the mean per trained token, in nats.
    """

    loss: float
    grad_norm: float
    n_correct: int
    n_trained: int
    n_tokens: int
    example_losses: dict[int, float]

    @property
    def finite(self) -> bool:
        """Whether the step has changed anything."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def take_step(run: Run, progress: Progress) -> None:
    """Train on the next window, tell its figures, and move on; a step that is not finite changes nothing.

    Raises:
        LossNotFiniteError: it is the third in a row whose loss or gradient is not finite.
    """
    started = time.perf_counter()
    run.memory.begin_step()
    config = run.config
    window = run.window(progress)
    rate = learning_rate_at(
        progress.step,
        kind=config.lr_scheduler_type,
        peak=config.learning_rate,
        total_steps=run.total_steps,
        warmup_steps=config.warmup_length(run.total_steps),
    )
    found = until_it_fits(
        run,
        lambda: accumulate(run, window),
        step=progress.step + 1,
        during=f"in step {progress.step + 1:,}",
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step(divisor=found.n_trained, loss=found.loss)
    sums = _read(run, found)
    memory = run.memory.measure()
    run.optimizer.zero_grad(set_to_none=True)

    progress.step += 1
    progress.window += 1
    progress.seen_tokens += sums.n_tokens
    if sums.finite:
        _count(sums, progress)
    else:
        _report_skipped(run, progress, sums)
    step_time_s = time.perf_counter() - started
    run.sink(
        StepMetrics(
            step=progress.step,
            total_steps=run.total_steps,
            epoch=progress.epoch + progress.window / run.steps_per_epoch,
            train_loss=progress.step_loss if sums.finite else None,
            train_mean_token_accuracy=progress.step_accuracy if sums.finite else None,
            learning_rate=rate,
            grad_norm=sums.grad_norm if sums.finite else None,
            tokens_per_s=sums.n_tokens / step_time_s,
            mfu=_utilization(run, window, sums, step_time_s),
            trained_tokens=progress.trained_tokens,
            step_time_s=step_time_s,
            memory=memory,
            highest_losses=_highest(run, sums.example_losses),
        )
    )
    if progress.not_finite_in_a_row > _NOT_FINITE_ALLOWED:
        raise LossNotFiniteError(
            f"The loss or its gradient was not finite in {progress.not_finite_in_a_row} steps in a row, "
            f"up to step {progress.step}. Lower the learning rate, or look at the examples named in the "
            "warnings."
        )


def accumulate(run: Run, window: Sequence[int]) -> Accumulated:
    """Add the gradient of the window's summed loss to the parameters' ``.grad``.

    Summed, not averaged: what a token adds to a mean over thousands is too little for float16.
    """
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    of_examples: list[Tensor] = []
    examples: list[int] = []
    n_tokens = 0
    batches = list(run.batching.split(run.dataset, window))
    for number, batch in enumerate(batches, start=1):
        found = run.loss_of(batch.to(run.model.device))
        if number == len(batches):
            run.optimizer.prefetch()  # comes while the last backward runs
        found.loss.backward()
        losses.append(found.loss.detach())
        hits.append(found.n_correct)
        of_examples.append(found.example_losses)
        examples += batch.examples
        n_tokens += batch.n_tokens
    return Accumulated(
        loss=torch.stack(losses).sum(),
        n_correct=torch.stack(hits).sum(),
        losses=torch.cat(of_examples),
        examples=examples,
        n_trained=sum(run.dataset.trained_counts[index] for index in window),
        n_tokens=n_tokens,
    )


def _read(run: Run, found: Accumulated) -> WindowSums:
    """Read a window's figures, all at once: each reading waits for the device."""
    figures = (found.loss, run.optimizer.grad_norm, found.n_correct)
    # In float64, which holds every count.
    together = torch.cat((torch.stack([each.double() for each in figures]), found.losses.double()))
    loss, grad_norm, n_correct, *losses = together.tolist()
    return WindowSums(
        loss=loss,
        grad_norm=grad_norm,
        n_correct=int(n_correct),
        n_trained=found.n_trained,
        n_tokens=found.n_tokens,
        example_losses={
            index: value / run.dataset.trained_counts[index]
            for index, value in zip(found.examples, losses, strict=True)
        },
    )


def _count(sums: WindowSums, progress: Progress) -> None:
    progress.not_finite_in_a_row = 0
    progress.trained_tokens += sums.n_trained
    progress.epoch_loss_sum += sums.loss
    progress.epoch_tokens += sums.n_trained
    progress.step_loss = sums.loss / sums.n_trained
    progress.step_accuracy = sums.n_correct / sums.n_trained


def _utilization(
    run: Run, window: Sequence[int], sums: WindowSums, step_time_s: float
) -> float | None:
    """Return the share of the device's peak that the step's operations made use of."""
    if run.peak_flops_per_s is None:
        return None
    lengths = [run.dataset.lengths[index] for index in window]
    flops = training_flops(run.shapes, lengths, sums.n_trained)
    return flops / step_time_s / run.peak_flops_per_s


def _highest(run: Run, example_losses: dict[int, float]) -> list[dict[str, int | float]]:
    """Return the examples with the highest finite losses, the highest first."""
    finite = [(loss, -index) for index, loss in example_losses.items() if math.isfinite(loss)]
    return [
        {"example": -index, "line": run.dataset.lines[-index], "loss": loss}
        for loss, index in sorted(finite)[: -_TOLD - 1 : -1]
    ]


def _report_skipped(run: Run, progress: Progress, sums: WindowSums) -> None:
    progress.not_finite_in_a_row += 1
    culprits = [i for i, loss in sums.example_losses.items() if not math.isfinite(loss)]
    what, value = ("loss", sums.loss)
    if math.isfinite(sums.loss):
        what, value = ("gradient norm", sums.grad_norm)
    examples = sorted(culprits or sums.example_losses)
    run.sink(
        Notice(
            "warn",
            f"Step {progress.step} was skipped: its {what} is {value}.",
            {
                "step": progress.step,
                "examples": examples,
                "lines": [run.dataset.lines[index] for index in examples],
            },
        )
    )
