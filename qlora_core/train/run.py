"""What stays the same from step to step of a run, and how it is made ready."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_core.data import Batching, Dataset, epoch_order, pass_tokens, windows
from qlora_core.errors import ConfigError
from qlora_core.export import load_adapter, serving_warnings
from qlora_core.export.adapter_folder import WEIGHTS
from qlora_core.nn import add_lora, lora_modules
from qlora_core.nn.config import ALL_LINEAR
from qlora_core.nn.targets import left_out
from qlora_core.optim import build_optimizer
from qlora_core.optim.flat_adamw import FlatAdamW
from qlora_core.text import TextEncoder
from qlora_core.train.config import TrainConfig
from qlora_core.train.device_peaks import peak_flops_per_s
from qlora_core.train.events import Notice, Sink
from qlora_core.train.flops import ModelShapes, count_shapes
from qlora_core.train.loss import SupervisedLoss
from qlora_core.train.memory.checkpointing import checkpoint_activations, keep_activations
from qlora_core.train.memory.meter import MemoryMeter
from qlora_core.train.packing import Packing, alone_above, choose_packing
from qlora_core.train.plan import OF_SETTINGS, ExecutionPlan, device_name, followed, plan_of
from qlora_core.train.progress import Progress
from qlora_core.train.surroundings import surround
from qlora_core.train.vocabulary import known_pad_id, refuse_unknown_examples
from qlora_core.train.weights import Weights
from qlora_core.train.working_copies import copy_dtype_of, give_working_copies

# Settings that change memory and speed, never the result: a run may resume with others.
_NOT_IDENTITY = (*OF_SETTINGS, "resume_point_every_s")
_NO_CHECKPOINTING = "{} does not support gradient checkpointing."


@dataclass
class Run:
    """A model with its adapter and everything that trains it.

    Attributes:
        plan: how it is executed; changed by `adopt` alone.
        memory: tells where a step's memory went.
        shapes: what the model multiplies by.
        peak_flops_per_s: of the device, None where it is not known.
        start: a sum over the adapter that training goes on from, None where it begins anew.
        best: copies of the adapter's tensors at the best validation; empty where none are kept.
        resume_point_at: when the last resume point was written, or the run began; of `time.monotonic`.
        freeing: what removes the resume points that the last one has made superfluous.
        before_writing: called before a resume point or an adapter is written; what it raises ends the run.
    """

    model: PreTrainedModel
    encoder: TextEncoder
    dataset: Dataset
    config: TrainConfig
    sink: Sink
    output_dir: Path
    validation: Dataset | None
    parameters: list[nn.Parameter]
    optimizer: FlatAdamW
    loss_of: SupervisedLoss
    batching: Batching
    plan: ExecutionPlan
    memory: MemoryMeter
    shapes: ModelShapes
    peak_flops_per_s: float | None
    base_model: str
    sample_prompts: Sequence[Sequence[dict[str, Any]]]
    start: str | None
    best: Weights = field(default_factory=dict)
    resume_point_at: float = field(default_factory=time.monotonic)
    freeing: Future[None] | None = None
    before_writing: Callable[[], None] = lambda: None
    _epoch: int | None = None
    _windows: Sequence[list[int]] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a pass over the data."""
        return math.ceil(len(self.dataset) / self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, unless it stops early."""
        steps = self.steps_per_epoch * self.config.n_epochs
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    def stopped_early(self, progress: Progress) -> bool:
        """Whether so many validations have not improved that the run ends before its last step."""
        patience = self.config.early_stopping_patience
        has_run_out = 0 < patience <= progress.validations_without_improvement
        return has_run_out and progress.step < self.total_steps

    def is_over(self, progress: Progress) -> bool:
        """Whether no step is left to do."""
        return progress.step >= self.total_steps or self.stopped_early(progress)

    def ends_epoch(self, progress: Progress) -> bool:
        """Whether the last step ended a pass over the data, or the run within one."""
        return progress.window == self.steps_per_epoch or self.is_over(progress)

    def can_be_at(self, progress: Progress) -> bool:
        """Whether step, epoch and the steps done of it agree, as they do in every resume point of this run."""
        whole, rest = divmod(progress.step, self.steps_per_epoch)
        places = [(whole, rest)]
        if self.is_over(progress):  # what was begun of an epoch counts as one there
            places.append((whole + (rest > 0), 0))
        return progress.step <= self.total_steps and (progress.epoch, progress.window) in places

    def window(self, progress: Progress) -> list[int]:
        """Return the examples of the next step."""
        if self._epoch != progress.epoch:
            order = epoch_order(len(self.dataset), seed=self.config.seed, epoch=progress.epoch)
            self._epoch, self._windows = progress.epoch, windows(order, self.config.batch_size)
        return self._windows[progress.window]

    def follow(self, plan: ExecutionPlan) -> list[str]:
        """Go on by the plan of a resume point; returns a sentence for each thing that cannot be as it was.

        Sets torch's threads and determinism, too.
        """
        plan, reasons = followed(plan, self.plan)
        reasons += self.adopt(plan)
        surround(self.plan)
        if torch.get_num_threads() != plan.threads:
            reasons.append(f"torch does not take {plan.threads} threads here.")
        return reasons

    def adopt(self, plan: ExecutionPlan) -> list[str]:
        """Set model, loss and batching to what the plan says; returns a sentence for what cannot be."""
        reasons: list[str] = []
        if plan.recompute and not checkpoint_activations(self.model):
            reasons.append(_NO_CHECKPOINTING.format(type(self.model).__name__))
            plan = replace(plan, recompute=False)
        elif not plan.recompute and self.plan.recompute:
            keep_activations(self.model)
        self.loss_of.inputs_on_host = plan.inputs_on_host
        self.loss_of.chunk_tokens = plan.loss_chunk_tokens or self.loss_of.chunk_tokens
        self.batching = replace(
            self.batching,
            max_tokens=plan.micro_batch_tokens,
            packed=plan.packing != Packing.NONE.value,
            pass_tokens=plan.pass_tokens,
            alone_above=plan.alone_above,
        )
        self.plan = plan
        return reasons

    @property
    def identity(self) -> dict[str, Any]:
        """What a resume point must agree with."""
        settings = self.config.as_dict()
        kept = {name: value for name, value in settings.items() if name not in _NOT_IDENTITY}
        return {"config": kept, "n_examples": len(self.dataset), "start": self.start}


def prepare(
    model: PreTrainedModel,
    encoder: TextEncoder,
    dataset: Dataset,
    config: TrainConfig,
    sink: Sink,
    *,
    output_dir: Path,
    validation: Dataset | None,
    sample_prompts: Sequence[Sequence[dict[str, Any]]],
    base_model: str | None,
    adapter: Path | None,
) -> Run:
    """Put the adapter over the model and build what trains it; the arguments are those of `train`.

    Raises:
        AdapterError: ``adapter`` is not one that fits the model and ``config.lora``.
        ConfigError: the model has adapters already, a LoRA target is not there, or a setting needs a
            validation set and there is none.
        ModelUnsupported: the data holds token ids that the model has no embedding for.
    """
    refuse_unknown_examples(model, [dataset, validation])
    if validation is None:
        _refuse_without_validation(config)
    if adapter is None:
        add_lora(model, config.lora, seed=config.seed)
    else:
        load_adapter(model, adapter, expected=config.lora)
    _say_what_the_adapter_lacks(model, config, sink)
    loss_of = SupervisedLoss(model)
    if not loss_of.chunked:
        sink(
            Notice(
                "warn",
                f"The output head of {type(model).__name__} is not one that the engine can run in chunks: "
                "the loss is computed from full logits, which takes more memory.",
            )
        )
    packing = _packing(model, config, sink)
    batching = Batching(
        max_tokens=config.micro_batch_tokens,
        packed=packing is not Packing.NONE,
        pad_id=known_pad_id(model, encoder),
        pass_tokens=pass_tokens(model.device),
        alone_above=alone_above(model),
    )
    recompute = config.gradient_checkpointing and checkpoint_activations(model)
    if config.gradient_checkpointing and not recompute:
        sink(Notice("warn", _NO_CHECKPOINTING.format(type(model).__name__)))
    torch.manual_seed(config.seed)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = list(lora_modules(model).values())
    optimizer = build_optimizer(
        config.optimizer,
        parameters,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        copy_dtype=copy_dtype_of(layers, n_trained=len(parameters)),
    )
    give_working_copies(layers, optimizer)
    if optimizer.notice is not None:
        sink(Notice("info", optimizer.notice))
    run = Run(
        model=model,
        encoder=encoder,
        dataset=dataset,
        config=config,
        sink=sink,
        output_dir=output_dir,
        validation=validation,
        parameters=parameters,
        optimizer=optimizer,
        loss_of=loss_of,
        batching=batching,
        plan=plan_of(
            model,
            config,
            batching=batching,
            packing=packing,
            recompute=recompute,
            loss_chunk_tokens=loss_of.chunk_tokens if loss_of.chunked else None,
        ),
        memory=MemoryMeter(model, parameters, optimizer, model.device),
        shapes=count_shapes(model),
        peak_flops_per_s=peak_flops_per_s(device_name(model.device)),
        base_model=base_model or model.name_or_path,
        sample_prompts=sample_prompts,
        start=None if adapter is None else fingerprint(adapter),
    )
    warmup = config.warmup_length(run.total_steps)
    if warmup > run.total_steps:
        message = f"The run has {run.total_steps} steps and its warm-up {warmup}: the learning rate"
        sink(Notice("warn", f"{message} never reaches its peak."))
    return run


def fingerprint(adapter: Path) -> str:
    """Return the sha256 of an adapter's weights."""
    with (adapter / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say_what_the_adapter_lacks(model: PreTrainedModel, config: TrainConfig, sink: Sink) -> None:
    others = left_out(model) if config.lora.target_modules == ALL_LINEAR else []
    if others:
        sink(Notice("warn", f"These layers get no adapter: {'; '.join(others)}."))
    for warning in serving_warnings(config.lora):
        sink(Notice("info", warning))


def _packing(model: PreTrainedModel, config: TrainConfig, sink: Sink) -> Packing:
    """Decide how examples are put together, and say so where it is not as wished."""
    packing = choose_packing(model) if config.packing else Packing.NONE
    if config.packing and packing is Packing.NONE:
        sink(
            Notice(
                "info",
                f"{type(model).__name__} does not keep the examples of a packed row apart: they are padded instead.",
            )
        )
    return packing


def _refuse_without_validation(config: TrainConfig) -> None:
    for name in ("eval_steps", "early_stopping_patience", "load_best_at_end"):
        if getattr(config, name):
            raise ConfigError(f"{name} needs a validation set, and none was given")
