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


# The job's names that are the engine's, too; what the job leaves out is as the engine has it.
SETTING_NAMES = (
    "n_epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "eval_steps",
    "early_stopping_patience",
    "load_best_at_end",
    "context_length",
    "train_on_inputs",
    "packing",
    "optimizer",
)
LORA_NAMES = {
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "lora_exclude_modules": "exclude_modules",
    "lora_use_rslora": "use_rslora",
}
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
    lora = {ours: resolved[name] for name, ours in LORA_NAMES.items() if name in resolved}
    return TrainConfig(
        **{name: resolved[name] for name in SETTING_NAMES if name in resolved},
        seed=spec["seed"],
        resume_point_every_s=spec["resume_point_every_s"],
        micro_batch_tokens=_MICRO_BATCH_TOKENS,
        gradient_checkpointing=str(spec["device"]) != "cpu"
        or activation_bytes(model_folder, _MICRO_BATCH_TOKENS) > _KEPT_ACTIVATIONS_BYTES,
        lora=LoraConfig.from_dict(lora),
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
