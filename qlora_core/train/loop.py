"""The training loop, whole and from the top: read `train` first, then what it calls in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qlora_core.data import Dataset
from qlora_core.errors import ConfigError
from qlora_core.nn import lora_disabled
from qlora_core.text import TextEncoder
from qlora_core.train.config import TrainConfig
from qlora_core.train.events import Notice, RunFinished, RunStarted, SamplesGenerated, Sink
from qlora_core.train.generate import answer_samples
from qlora_core.train.memory.meter import base_bytes, out_of_memory_named
from qlora_core.train.memory.rehearsal import rehearse
from qlora_core.train.plan import device_name
from qlora_core.train.progress import Progress
from qlora_core.train.resume.resuming import resume
from qlora_core.train.run import Run, prepare
from qlora_core.train.saving import (
    keep_adapter,
    keep_checkpoint,
    keep_resume_point,
    resume_point_is_due,
    settle_resume_points,
)
from qlora_core.train.step import take_step
from qlora_core.train.surroundings import callers_kept, surround
from qlora_core.train.validation import is_due, validate
from qlora_core.train.weights import put_back


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: optimizer steps done.
        seen_tokens: every token of every pass, trained or not.
        trained_tokens: tokens that carried loss, over all epochs.
        train_loss: mean over the trained tokens of the last epoch, or of what was done of it.
        valid_loss: of the adapter over the whole validation set, None where there is none.
        adapter: the offered adapter's folder; None where the run was stopped.
        adapter_step: the step that it is of.
        stopped: whether ``should_stop`` ended it; then there is a resume point.
        stopped_early: whether it ended because the validation loss did not improve.
    """

    steps: int
    seen_tokens: int
    trained_tokens: int
    train_loss: float
    valid_loss: float | None
    adapter: Path | None
    adapter_step: int
    stopped: bool
    stopped_early: bool


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
    adapter: Path | str | None = None,
    resume_from: Path | str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    before_writing: Callable[[], None] = lambda: None,
    base_model_name_or_path: str | None = None,
) -> TrainResult:
    """Train a LoRA adapter over a frozen model.

    Args:
        model: without adapters, as ``load_model`` gives it; the adapter is added here.
        encoder: of this model.
        dataset: what to train on.
        config: the settings.
        sink: called with every event, in this thread; what it raises ends the run.
        output_dir: gets ``checkpoints/step-N`` (an adapter per epoch), ``resume/step-N`` and ``adapter``,
            the one offered: the last step's, or the best (``TrainConfig.load_best_at_end``).
        validation: evaluated before the first step, after each epoch, at the end, and after every
            ``eval_steps``.
        sample_prompts: conversations that base and adapter answer, before and after.
        adapter: a PEFT folder whose adapter is trained on, instead of one that begins anew;
            ``config.lora`` has to be what it is, but for the dropout.
        resume_from: a folder of resume points (or one of them); without a whole point in it the run
            begins at the beginning and says so.
        should_stop: asked before every step.
        before_writing: called before a resume point or an adapter is written, to refuse it where there is no room;
            what it raises ends the run.
        base_model_name_or_path: written into the adapter's config; where the model was loaded from
            if not given.

    Returns:
        How it ended, with the offered adapter's folder; the model keeps that adapter.

    Raises:
        AdapterError: ``adapter`` is not one that fits the model and ``config.lora``.
        ConfigError: ``config`` is no TrainConfig, the model has adapters already, a LoRA target is not
            there, or a setting needs a validation set and there is none.
        LossNotFiniteError: three steps in a row had a loss or gradient that is NaN or infinite.
        ModelUnsupported: the data holds token ids that the model has no embedding for.
        OutOfMemoryError: the device ran out of memory.
        ResumePointError: the resume point belongs to another run.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"config must be a TrainConfig, not {type(config).__name__}")
    with out_of_memory_named(model.device), callers_kept():
        run = prepare(
            model,
            encoder,
            dataset,
            config,
            sink,
            output_dir=Path(output_dir),
            validation=validation,
            sample_prompts=sample_prompts,
            base_model=base_model_name_or_path,
            adapter=None if adapter is None else Path(adapter),
        )
        run.before_writing = before_writing
        surround(run.plan)
        progress = resume(run, None if resume_from is None else Path(resume_from))
        rehearse(run, step=progress.step)
        _say_started(run, progress)
        if progress.step == 0:
            _look_at_the_base(run, progress)

        while not run.is_over(progress):
            if should_stop():
                keep_resume_point(run, progress)
                settle_resume_points(run)
                return _result(run, progress, adapter=None)
            take_step(run, progress)
            if is_due(run, progress):
                validate(run, progress)
            if run.ends_epoch(progress):
                _end_epoch(run, progress)
            elif resume_point_is_due(run):
                keep_resume_point(run, progress)

        return _finish(run, progress)


def _say_started(run: Run, progress: Progress) -> None:
    run.sink(
        RunStarted(
            total_steps=run.total_steps,
            start_step=progress.step,
            n_examples=len(run.dataset),
            n_epochs=run.config.n_epochs,
            trainable_parameters=sum(parameter.numel() for parameter in run.parameters),
            base_bytes=base_bytes(run.model),
            device=device_name(run.model.device),
            n_truncated=run.dataset.report.n_truncated,
            n_dropped=run.dataset.report.n_dropped,
        )
    )


def _look_at_the_base(run: Run, progress: Progress) -> None:
    """Measure the base model before it is adapted."""
    validate(run, progress)
    if run.sample_prompts:
        with lora_disabled(run.model):
            samples = answer_samples(run.model, run.encoder, run.sample_prompts)
        run.sink(SamplesGenerated(0, "base", samples))


def _end_epoch(run: Run, progress: Progress) -> None:
    """Keep the adapter, and a resume point at the next epoch's start."""
    if progress.epoch_tokens:
        progress.train_loss = progress.epoch_loss_sum / progress.epoch_tokens
    progress.epoch += 1
    progress.window = 0
    progress.epoch_loss_sum, progress.epoch_tokens = 0.0, 0
    keep_checkpoint(run, progress)
    keep_resume_point(run, progress)


def _finish(run: Run, progress: Progress) -> TrainResult:
    """Write the adapter that the run offers, and tell what came of it."""
    if run.stopped_early(progress):
        run.sink(_early_stop(progress))
    if run.best:
        put_back(run.model, run.best)
    adapter = run.output_dir / "adapter"
    keep_adapter(run, adapter)
    settle_resume_points(run)
    result = _result(run, progress, adapter=adapter)
    if run.sample_prompts:
        samples = answer_samples(run.model, run.encoder, run.sample_prompts)
        run.sink(SamplesGenerated(result.adapter_step, "adapter", samples))
    run.sink(
        RunFinished(
            steps=result.steps,
            trained_tokens=result.trained_tokens,
            train_loss=result.train_loss,
            full_valid_loss=result.valid_loss,
            adapter_step=result.adapter_step,
            best_step=progress.best_step,
            best_valid_loss=progress.best_valid_loss,
            stopped_early=result.stopped_early,
        )
    )
    return result


def _early_stop(progress: Progress) -> Notice:
    since = f"{progress.validations_without_improvement} validations"
    best = "No validation loss was finite."
    if progress.best_step is not None:
        best = f"The best was {progress.best_valid_loss:.4f} after step {progress.best_step}."
    return Notice("info", f"Stopped early: the validation loss has not improved in {since}. {best}")


def _result(run: Run, progress: Progress, *, adapter: Path | None) -> TrainResult:
    offers_best = bool(run.best) and adapter is not None
    best_step = progress.best_step if offers_best else None
    return TrainResult(
        steps=progress.step,
        seen_tokens=progress.seen_tokens,
        trained_tokens=progress.trained_tokens,
        train_loss=progress.train_loss,
        valid_loss=progress.best_valid_loss if offers_best else progress.valid_loss,
        adapter=adapter,
        adapter_step=progress.step if best_step is None else best_step,
        stopped=adapter is None,
        stopped_early=run.stopped_early(progress),
    )
