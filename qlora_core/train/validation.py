"""Validation within a run: when it is due, which one was best, and that one's adapter kept.

The base model's own figures at step 0 are told but never the best: an adapter that was not trained
is not worth offering.
"""

from __future__ import annotations

import math

from qlora_core.train.evaluate import evaluate
from qlora_core.train.events import Notice, ValidationMetrics
from qlora_core.train.memory.recovery import until_it_fits
from qlora_core.train.progress import Progress
from qlora_core.train.run import Run
from qlora_core.train.weights import copied_weights


def is_due(run: Run, progress: Progress) -> bool:
    """Whether the validation set is measured after the step just taken."""
    every = run.config.eval_steps
    return run.ends_epoch(progress) or (every > 0 and progress.step % every == 0)


def validate(run: Run, progress: Progress) -> None:
    """Measure the whole validation set, tell its figures, and note whether they are the best so far."""
    dataset = run.validation
    if dataset is None:
        return
    loss, accuracy = until_it_fits(
        run,
        lambda: evaluate(run.model, run.loss_of, dataset, batching=run.batching),
        step=progress.step,
        during=f"in the validation after step {progress.step:,}",
        trains=False,
    )
    finite = math.isfinite(loss)
    progress.valid_loss, progress.valid_accuracy = (loss, accuracy) if finite else (None, None)
    is_best = False
    if progress.step > 0:
        best = progress.best_valid_loss
        is_best = finite and (best is None or loss < best)
        _note(run, progress, is_best=is_best)
    if finite:
        run.sink(ValidationMetrics(progress.step, loss, accuracy, is_best=is_best))
    else:
        run.sink(Notice("warn", f"The validation loss after step {progress.step} is {loss}."))


def _note(run: Run, progress: Progress, *, is_best: bool) -> None:
    if not is_best:
        progress.validations_without_improvement += 1
        return
    progress.validations_without_improvement = 0
    progress.best_valid_loss, progress.best_step = progress.valid_loss, progress.step
    if run.config.keeps_best:
        run.best = copied_weights(run.model)
