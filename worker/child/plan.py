"""spec.json in the engine's own terms."""

import json
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


_MICRO_BATCH_TOKENS = 4096
_KEPT_ACTIVATIONS_BYTES = 1 << 30  # what a CPU's memory may spend to save a third of the time


def train_config(spec: dict[str, Any], model_folder: Path) -> "TrainConfig":
    """Return the engine's settings from the job's resolved hyperparameters and seed, and how to run them here.

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
        micro_batch_tokens=_MICRO_BATCH_TOKENS,
        gradient_checkpointing=str(spec["device"]) != "cpu"
        or activation_bytes(model_folder, _MICRO_BATCH_TOKENS) > _KEPT_ACTIVATIONS_BYTES,
        lora=LoraConfig(
            r=resolved["lora_r"],
            alpha=resolved["lora_alpha"],
            dropout=resolved["lora_dropout"],
            target_modules="all-linear" if targets == "all-linear" else tuple(targets),
        ),
    )


def activation_bytes(model_folder: Path, tokens: int) -> int:
    """Return about how many bytes a forward pass over `tokens` keeps in float32 when nothing is recomputed.

    Per layer and token: some sixteen vectors of the hidden width (norms, projections, attention, residuals) and four
    of the feed-forward's. A config that does not say its sizes counts as large.
    """
    config = json.loads((model_folder / "config.json").read_text())
    config = config.get("text_config", config)
    try:
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    except (KeyError, TypeError):
        return _KEPT_ACTIVATIONS_BYTES + 1
    feed_forward = int(config.get("intermediate_size") or 4 * hidden)
    return 4 * tokens * layers * (16 * hidden + 4 * feed_forward)
