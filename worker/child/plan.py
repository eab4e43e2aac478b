"""spec.json in the engine's own terms."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.models.catalog import BaseModel

if TYPE_CHECKING:
    from qlora_core.train import TrainConfig


def base_model(spec: dict[str, Any]) -> BaseModel:
    """Return the catalog's entry as it stood when the attempt began."""
    model = spec["model"]
    return BaseModel(
        id=model["id"],
        path=None if model["path"] is None else Path(model["path"]),
        hub=model["hub"],
        revision=model["revision"],
        created=model["created"],
    )


def train_config(spec: dict[str, Any]) -> "TrainConfig":
    """Return the engine's settings from the job's resolved hyperparameters and seed.

    Raises:
        ConfigError: the engine refuses a value.
    """
    from qlora_core.nn import LoraConfig
    from qlora_core.train import TrainConfig

    resolved: dict[str, Any] = spec["hyperparameters"]
    targets = resolved["lora_target_modules"]  # "all-linear", or a list of names
    return TrainConfig(
        n_epochs=resolved["n_epochs"],
        batch_size=resolved["batch_size"],
        learning_rate=resolved["learning_rate"],
        lr_scheduler_type=resolved["lr_scheduler_type"],
        warmup_ratio=resolved["warmup_ratio"],
        weight_decay=resolved["weight_decay"],
        max_grad_norm=resolved["max_grad_norm"],
        context_length=resolved["context_length"],
        seed=spec["seed"],
        optimizer=resolved["optimizer"],
        lora=LoraConfig(
            r=resolved["lora_r"],
            alpha=resolved["lora_alpha"],
            dropout=resolved["lora_dropout"],
            target_modules="all-linear" if targets == "all-linear" else tuple(targets),
        ),
    )
