"""The training loop, whole and from the top: read `train` first, then what it calls in order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_core.data import Dataset, collate, epoch_order, group_by_tokens, pass_tokens, windows
from qlora_core.errors import LossNotFiniteError
from qlora_core.export import save_adapter, save_tokenizer_files
from qlora_core.nn import lora_disabled
from qlora_core.optim import learning_rate_at
from qlora_core.text import TextEncoder
from qlora_core.train.config import TrainConfig
from qlora_core.train.evaluate import evaluate
from qlora_core.train.events import (
    CheckpointSaved,
    Notice,
    ResumePointSaved,
    RunFinished,
    RunStarted,
    SamplesGenerated,
    Sink,
    StepMetrics,
    ValidationMetrics,
)
from qlora_core.train.folders import step_folder, written_whole
from qlora_core.train.generate import answer_samples
from qlora_core.train.memory import base_bytes, measured_memory, out_of_memory_named
from qlora_core.train.resume import Progress, load_resume_point, save_resume_point
from qlora_core.train.run import Run, prepare

_NOT_FINITE_ALLOWED = 2


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: optimizer steps done.
        trained_tokens: tokens that carried loss, over all epochs.
        train_loss: mean over the last epoch's trained tokens.
        valid_loss: over the whole validation set at the end, None where there is none.
        adapter: the final adapter's folder; None where the run was stopped.
        stopped: whether ``should_stop`` ended it; then there is a resume point.
    """

    steps: int
    trained_tokens: int
    train_loss: float
    valid_loss: float | None
    adapter: Path | None
    stopped: bool


def train(
    model: PreTrainedModel,
    encoder: TextEncoder,
    dataset: Dataset,
    config: TrainConfig,
    sink: Sink,
    *,
    output_dir: Path | str,
    validation: Dataset | None = None,
    sample_prompts: Sequence[Sequence[dict[str, Any]]] = (),
    resume_from: Path | str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    base_model_name_or_path: str | None = None,
) -> TrainResult:
    """Train a LoRA adapter over a frozen model.

    Args:
        model: without adapters, as ``load_model`` gives it; the adapter is added here.
        encoder: of this model.
        dataset: what to train on.
        config: the settings.
        sink: called with every event, in this thread; what it raises ends the run.
        output_dir: gets ``checkpoints/step-N`` (an adapter per epoch), ``resume/step-N`` and ``adapter``.
        validation: evaluated before the first step and after each epoch.
        sample_prompts: conversations that base and adapter answer, before and after.
        resume_from: a folder of resume points (or one of them); without a whole point in it the run
            begins at the beginning and says so.
        should_stop: asked before every step.
        base_model_name_or_path: written into the adapter's config; where the model was loaded from
            if not given.

    Raises:
        ConfigError: the model has adapters already, or a LoRA target is not there.
        LossNotFiniteError: three steps in a row had a loss or gradient that is NaN or infinite.
        OutOfMemoryError: the device ran out of memory.
        ResumePointError: the resume point belongs to another run.
    """
    with out_of_memory_named(model.device):
        run = prepare(model, encoder, dataset, config, sink, Path(output_dir), validation)
        run.base_model = base_model_name_or_path or run.base_model
        run.sample_prompts = sample_prompts
        progress = _resume(run, resume_from)
        _say_started(run, progress)
        if progress.step == 0:
            _look_at_the_base(run, progress)

        for epoch in range(progress.epoch, config.n_epochs):
            order = epoch_order(len(dataset), seed=config.seed, epoch=epoch)
            for window in windows(order, config.batch_size)[progress.window :]:
                if should_stop():
                    _save_resume_point(run, progress)
                    return _result(progress, adapter=None)
                _step(run, window, progress)
            _end_epoch(run, progress)

        return _finish(run, progress)


def _resume(run: Run, resume_from: Path | str | None) -> Progress:
    """Go to the newest whole resume point, or to the beginning."""
    if resume_from is None:
        return Progress()
    progress = load_resume_point(
        Path(resume_from),
        model=run.model,
        optimizer=run.optimizer,
        identity=run.identity,
        on_refused=lambda reason: run.sink(Notice("warn", reason)),
    )
    if progress is not None:
        return progress
    run.sink(Notice("warn", f"There is no whole resume point in {resume_from}: starting anew."))
    return Progress()


def _say_started(run: Run, progress: Progress) -> None:
    device = run.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run.sink(
        RunStarted(
            total_steps=run.total_steps,
            start_step=progress.step,
            n_examples=len(run.dataset),
            n_epochs=run.config.n_epochs,
            trainable_parameters=sum(parameter.numel() for parameter in run.parameters),
            base_bytes=base_bytes(run.model),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            n_truncated=run.dataset.report.n_truncated,
            n_dropped=run.dataset.report.n_dropped,
        )
    )


def _look_at_the_base(run: Run, progress: Progress) -> None:
    """Measure the base model before it is adapted."""
    _validate(run, progress)
    if run.sample_prompts:
        with lora_disabled(run.model):
            samples = answer_samples(run.model, run.encoder, run.sample_prompts)
        run.sink(SamplesGenerated(0, "base", samples))


def _step(run: Run, window: Sequence[int], progress: Progress) -> None:
    """One optimizer step over the examples of ``window``."""
    started = time.perf_counter()
    config = run.config
    rate = learning_rate_at(
        progress.step,
        kind=config.lr_scheduler_type,
        peak=config.learning_rate,
        total_steps=run.total_steps,
        warmup_ratio=config.warmup_ratio,
    )
    n_trained = sum(run.dataset.trained_counts[index] for index in window)
    loss_sum, n_correct, n_tokens = _accumulate(run, window, n_trained)
    grad_norm = float(nn.utils.clip_grad_norm_(run.parameters, config.max_grad_norm))
    finite = math.isfinite(loss_sum) and math.isfinite(grad_norm)
    if finite:
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)

    progress.step += 1
    progress.window += 1
    if not finite:
        _skip_step(run, window, progress, loss_sum, grad_norm)
        return
    progress.not_finite_in_a_row = 0
    progress.trained_tokens += n_trained
    progress.epoch_loss_sum += loss_sum
    progress.epoch_tokens += n_trained
    progress.step_loss = loss_sum / n_trained
    progress.step_accuracy = n_correct / n_trained
    step_time_s = time.perf_counter() - started
    run.sink(
        StepMetrics(
            step=progress.step,
            total_steps=run.total_steps,
            epoch=progress.epoch + progress.window / run.steps_per_epoch,
            train_loss=progress.step_loss,
            train_mean_token_accuracy=progress.step_accuracy,
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens_per_s=n_tokens / step_time_s,
            trained_tokens=progress.trained_tokens,
            step_time_s=step_time_s,
            memory=measured_memory(run.model.device),
        )
    )


def _accumulate(run: Run, window: Sequence[int], n_trained: int) -> tuple[float, int, int]:
    """Add up the gradients of a window; returns its summed loss, hits and real tokens.

    Every micro-batch's loss is divided by the trained tokens of the whole window, so that the
    gradient is that of one big batch however the window is split.
    """
    losses: list[torch.Tensor] = []
    hits: list[torch.Tensor] = []
    n_tokens = 0
    for group in group_by_tokens(
        window,
        run.dataset.lengths,
        max_tokens=run.config.micro_batch_tokens,
        pass_tokens=pass_tokens(run.model.device),
    ):
        batch = collate(run.dataset, group, pad_id=run.encoder.pad_id).to(run.model.device)
        loss, n_correct = run.loss_of(batch)
        (loss / n_trained).backward()
        losses.append(loss.detach())
        hits.append(n_correct)
        n_tokens += batch.n_tokens
    return float(torch.stack(losses).sum()), int(torch.stack(hits).sum()), n_tokens


def _skip_step(
    run: Run, window: Sequence[int], progress: Progress, loss_sum: float, grad_norm: float
) -> None:
    """Report a step whose loss or gradient is not a number; the adapter was not touched."""
    progress.not_finite_in_a_row += 1
    what = "loss" if not math.isfinite(loss_sum) else "gradient norm"
    value = loss_sum if what == "loss" else grad_norm
    run.sink(
        Notice(
            "warn",
            f"Step {progress.step} was skipped: its {what} is {value}.",
            {"step": progress.step, "examples": sorted(window)},
        )
    )
    if progress.not_finite_in_a_row > _NOT_FINITE_ALLOWED:
        raise LossNotFiniteError(
            f"The {what} was not finite in {progress.not_finite_in_a_row} steps in a row, up to step "
            f"{progress.step}. Lower the learning rate, or look at the examples named in the warnings."
        )


def _end_epoch(run: Run, progress: Progress) -> None:
    """Validate, keep the adapter, and write a resume point at the next epoch's start."""
    if progress.epoch_tokens:
        progress.train_loss = progress.epoch_loss_sum / progress.epoch_tokens
    progress.epoch += 1
    progress.window = 0
    progress.epoch_loss_sum, progress.epoch_tokens = 0.0, 0
    _validate(run, progress)
    folder = step_folder(run.output_dir / "checkpoints", progress.step)
    _save_adapter(run, folder)
    run.sink(
        CheckpointSaved(
            step=progress.step,
            epoch=progress.epoch,
            folder=str(folder),
            train_loss=progress.step_loss,
            train_mean_token_accuracy=progress.step_accuracy,
            full_valid_loss=progress.valid_loss,
            full_valid_mean_token_accuracy=progress.valid_accuracy,
        )
    )
    _save_resume_point(run, progress)


def _validate(run: Run, progress: Progress) -> None:
    if run.validation is None:
        return
    loss, accuracy = evaluate(
        run.model,
        run.loss_of,
        run.validation,
        micro_batch_tokens=run.config.micro_batch_tokens,
        pad_id=run.encoder.pad_id,
    )
    if not math.isfinite(loss):
        progress.valid_loss = progress.valid_accuracy = None
        run.sink(Notice("warn", f"The validation loss after step {progress.step} is {loss}."))
        return
    progress.valid_loss, progress.valid_accuracy = loss, accuracy
    run.sink(ValidationMetrics(progress.step, loss, accuracy))


def _save_adapter(run: Run, folder: Path) -> None:
    """Write the adapter with the tokenizer it was trained with."""
    with written_whole(folder) as unfinished:
        save_adapter(run.model, unfinished, base_model_name_or_path=run.base_model)
        if run.encoder.folder is not None:
            save_tokenizer_files(run.encoder.folder, unfinished)


def _save_resume_point(run: Run, progress: Progress) -> None:
    folder = save_resume_point(
        run.output_dir / "resume",
        model=run.model,
        optimizer=run.optimizer,
        progress=progress,
        identity=run.identity,
    )
    run.sink(ResumePointSaved(progress.step, str(folder)))


def _finish(run: Run, progress: Progress) -> TrainResult:
    adapter = run.output_dir / "adapter"
    _save_adapter(run, adapter)
    if run.sample_prompts:
        samples = answer_samples(run.model, run.encoder, run.sample_prompts)
        run.sink(SamplesGenerated(progress.step, "adapter", samples))
    run.sink(
        RunFinished(
            progress.step, progress.trained_tokens, progress.train_loss, progress.valid_loss
        )
    )
    return _result(progress, adapter=adapter)


def _result(progress: Progress, *, adapter: Path | None) -> TrainResult:
    return TrainResult(
        steps=progress.step,
        trained_tokens=progress.trained_tokens,
        train_loss=progress.train_loss,
        valid_loss=progress.valid_loss,
        adapter=adapter,
        stopped=adapter is None,
    )
