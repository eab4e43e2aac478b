"""What stays the same from step to step of a run, and how it is made ready."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_core.data import Dataset
from qlora_core.nn import add_lora
from qlora_core.optim import build_optimizer
from qlora_core.text import TextEncoder
from qlora_core.train.checkpointing import checkpoint_activations
from qlora_core.train.config import TrainConfig
from qlora_core.train.events import Notice, Sink
from qlora_core.train.loss import SupervisedLoss

# Settings that change memory and speed, never the result: a run may resume with others.
_NOT_IDENTITY = ("micro_batch_tokens", "gradient_checkpointing")


@dataclass
class Run:
    """A model with its adapter and everything that trains it."""

    model: PreTrainedModel
    encoder: TextEncoder
    dataset: Dataset
    config: TrainConfig
    sink: Sink
    output_dir: Path
    validation: Dataset | None
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss_of: SupervisedLoss
    steps_per_epoch: int
    base_model: str
    sample_prompts: Sequence[Sequence[dict[str, Any]]] = ()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.config.n_epochs

    @property
    def identity(self) -> dict[str, Any]:
        """What a resume point must agree with."""
        settings = self.config.as_dict()
        kept = {name: value for name, value in settings.items() if name not in _NOT_IDENTITY}
        return {"config": kept, "n_examples": len(self.dataset)}


def prepare(
    model: PreTrainedModel,
    encoder: TextEncoder,
    dataset: Dataset,
    config: TrainConfig,
    sink: Sink,
    output_dir: Path,
    validation: Dataset | None,
) -> Run:
    """Add the adapter and build what trains it; the arguments are those of `train`.

    Raises:
        ConfigError: the model has adapters already, or a LoRA target is not there.
    """
    add_lora(model, config.lora, seed=config.seed)
    loss_of = SupervisedLoss(model)
    if not loss_of.chunked:
        sink(
            Notice(
                "warn",
                f"The output head of {type(model).__name__} is not one that the engine can run in chunks: "
                "the loss is computed from full logits, which takes more memory.",
            )
        )
    if config.gradient_checkpointing and not checkpoint_activations(model):
        sink(Notice("warn", f"{type(model).__name__} does not support gradient checkpointing."))
    torch.manual_seed(config.seed)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Run(
        model=model,
        encoder=encoder,
        dataset=dataset,
        config=config,
        sink=sink,
        output_dir=output_dir,
        validation=validation,
        parameters=parameters,
        optimizer=build_optimizer(
            config.optimizer,
            parameters,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
        ),
        loss_of=loss_of,
        steps_per_epoch=math.ceil(len(dataset) / config.batch_size),
        base_model=model.name_or_path,
    )
