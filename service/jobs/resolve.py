"""Every "auto" becomes a number here, once, when the training file has been counted.

Pure: what was asked, the number of examples and the model's context length go in, and the job's hyperparameters come
out. The training child gets exactly these, and the job shows them.
"""

from collections.abc import Mapping
from typing import Any, Protocol

BASE_LEARNING_RATE = 2e-4
DEFAULT_CONTEXT_LENGTH = 2048
DEFAULT_LORA_R = 16

DEFAULTS: dict[str, Any] = {
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "lora_use_rslora": False,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optimizer": "adamw",
    "train_on_inputs": False,
    "packing": True,
    "eval_steps": 0,
    "early_stopping_patience": 0,
}
"""What does not depend on the data or on each other."""
DEFAULT_WARMUP_RATIO = 0.03
ONLY_IF_GIVEN = ("max_steps", "max_time_s", "warmup_steps", "lora_exclude_modules")
"""What has no value that means "none"."""

_TARGET_EPOCHS = 3
_MIN_TARGET_EXAMPLES, _MAX_TARGET_EXAMPLES = 100, 25_000
_MAX_AUTO_EPOCHS = 25
_MAX_AUTO_BATCH = 32


class Counted(Protocol):
    """What is needed of a dataset's report."""

    @property
    def n_examples(self) -> int:
        """Examples that will be trained on."""
        ...


def auto_epochs(n_examples: int) -> int:
    """OpenAI's rule: three, but enough that small sets see 100 examples and large ones at most 25,000.

    Source: openai-cookbook, `examples/Chat_finetuning_data_prep.ipynb`.
    """
    n = max(1, n_examples)
    if n * _TARGET_EPOCHS < _MIN_TARGET_EXAMPLES:
        return min(_MAX_AUTO_EPOCHS, max(1, _MIN_TARGET_EXAMPLES // n))
    if n * _TARGET_EPOCHS > _MAX_TARGET_EXAMPLES:
        return max(1, _MAX_TARGET_EXAMPLES // n)
    return _TARGET_EPOCHS


def auto_batch_size(n_examples: int) -> int:
    """About one percent of the examples, as a power of two from 1 to 32.

    So an epoch has at least a hundred steps where there are that many examples, and large sets fill the device.
    """
    batch = 1
    while batch < _MAX_AUTO_BATCH and batch * 2 * 100 <= n_examples:
        batch *= 2
    return batch


def resolve_context_length(requested: Mapping[str, Any], model_context_length: int | None) -> int:
    """How many tokens of an example are used: what was asked, else 2048, and never more than the model was made for.

    Needed before the others, since counting the examples needs it.
    """
    asked = _given(requested, "context_length")
    wanted = DEFAULT_CONTEXT_LENGTH if asked is None else int(asked)
    return wanted if model_context_length is None else min(wanted, model_context_length)


def resolve_hyperparameters(
    requested: Mapping[str, Any], report: Counted, model_context_length: int | None
) -> dict[str, Any]:
    """Return all hyperparameters, every one a concrete value.

    Args:
        requested: as sent (`Job.spec["hyperparameters"]`): absent, None and "auto" are the same.
        report: of the training file.
        model_context_length: `max_position_embeddings` of the base model, None where it does not say.

    Returns:
        Those of docs/contracts.md; of `warmup_ratio` and `warmup_steps` the one that counts. `learning_rate` is 2e-4 times the multiplier unless it was given; then the
        multiplier is what it amounts to. `lora_alpha` is twice `lora_r` unless given (a scale of 2, QLoRA's practice).
    """
    lora_r = _given(requested, "lora_r") or DEFAULT_LORA_R
    lora_alpha = _given(requested, "lora_alpha") or 2 * lora_r
    learning_rate = _given(requested, "learning_rate")
    if learning_rate is None:
        multiplier = float(_given(requested, "learning_rate_multiplier") or 1.0)
        learning_rate = BASE_LEARNING_RATE * multiplier
    else:
        multiplier = learning_rate / BASE_LEARNING_RATE
    resolved = {
        "n_epochs": _given(requested, "n_epochs") or auto_epochs(report.n_examples),
        "batch_size": _given(requested, "batch_size") or auto_batch_size(report.n_examples),
        "learning_rate_multiplier": multiplier,
        "learning_rate": learning_rate,
        "lora_r": lora_r,
        "lora_alpha": int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha,
        "context_length": resolve_context_length(requested, model_context_length),
    }
    for name, default in DEFAULTS.items():
        resolved[name] = _given_or(requested, name, default)
    given = {name: _given(requested, name) for name in ONLY_IF_GIVEN}
    resolved |= {name: value for name, value in given.items() if value is not None}
    if "warmup_steps" not in resolved:
        resolved["warmup_ratio"] = _given_or(requested, "warmup_ratio", DEFAULT_WARMUP_RATIO)
    stops_early = resolved["early_stopping_patience"] > 0
    resolved["load_best_at_end"] = _given_or(requested, "load_best_at_end", stops_early)
    return resolved


def as_shown(requested: Mapping[str, Any]) -> dict[str, Any]:
    """The job's hyperparameters before they are resolved: OpenAI's three always there, and what else was given."""
    three = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), "auto")
    return {**three, **requested}


def _given_or(requested: Mapping[str, Any], name: str, default: Any) -> Any:  # noqa: ANN401
    given = _given(requested, name)
    return default if given is None else given


def _given(requested: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401  (a hyperparameter's own type)
    value = requested.get(name)
    return None if value == "auto" else value
