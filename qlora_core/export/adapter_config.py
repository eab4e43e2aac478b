"""adapter_config.json: what a model's adapters are, in PEFT's words, and back.

It is written from the adapters themselves, so that it says what the tensors beside it are. Of what others write,
everything that would change the result and cannot be applied here is refused by name.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qlora_core.errors import AdapterError, ConfigError
from qlora_core.nn import LoraConfig, lora_modules, saved_modules
from qlora_core.nn.lora import is_conv1d

CONFIG = "adapter_config.json"

_PEFT_VERSION = "0.21.2"

# What PEFT can do and this engine cannot apply, with the values that mean "not used".
_UNUSED: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
# These starts change the base model's weights too, so that the adapter fits no base but the changed one.
_STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What says nothing about the result: tensors tell which layers are adapted.
_HARMLESS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out"}
    | {"inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config"}
    | {"lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "task_type"}
)  # fmt: skip
_APPLIED = frozenset(
    {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "rank_pattern"}
    | {"alpha_pattern", "modules_to_save"}
)  # fmt: skip


def describe(
    model: nn.Module, *, base_model_name_or_path: str, fold_rslora: bool = False
) -> dict[str, Any]:
    """Give the content of adapter_config.json for a model's adapters.

    Args:
        model: with adapters.
        base_model_name_or_path: what the adapters belong to.
        fold_rslora: write rsLoRA's scale as an alpha that means the same without rsLoRA.

    Raises:
        AdapterError: the model has no adapters.
    """
    adapters = lora_modules(model)
    if not adapters:
        raise AdapterError("The model has no LoRA adapters to save.")
    one = next(iter(adapters.values()))
    fold = fold_rslora and one.use_rslora
    ranks = {path: adapter.r for path, adapter in adapters.items()}
    alphas = {
        path: _as_short(adapter.alpha * math.sqrt(adapter.r) if fold else adapter.alpha)
        for path, adapter in adapters.items()
    }
    r, rank_pattern = _default_and_pattern(ranks)
    alpha, alpha_pattern = _default_and_pattern(alphas)
    saved = saved_modules(model)
    n_masters = len({id(p) for module in saved.values() for p in module.trained.values()})
    return {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "ensure_weight_tying": n_masters < sum(len(module.trained) for module in saved.values()),
        "exclude_modules": None,
        "fan_in_fan_out": any(is_conv1d(adapter.base) for adapter in adapters.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": one.dropout,
        "modules_to_save": _names(model, list(saved), _ends_with) or None,
        "peft_type": "LORA",
        "peft_version": _PEFT_VERSION,
        "r": r,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": _names(model, list(adapters), _ends_with_part),
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": one.use_rslora and not fold,
    }


def read_config(path: Path) -> LoraConfig:
    """Read adapter_config.json as PEFT or `save_adapter` wrote it.

    Raises:
        AdapterError: the file is not there or malformed, describes another kind of adapter, or uses something that
            cannot be applied here.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"The adapter folder {path.parent} has no {path.name}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} does not describe a LoRA adapter.")
    _refuse_what_cannot_be_applied(path, config)
    for name in ("r", "lora_alpha", "target_modules"):
        if config.get(name) is None:
            raise AdapterError(f"{path} does not give {name}.")
    try:
        return LoraConfig.from_dict(
            {
                name: value
                for name, value in config.items()
                if name in _APPLIED and value is not None
            }
        )
    except ConfigError as error:
        raise AdapterError(f"{path}: {error.message}") from error


def _refuse_what_cannot_be_applied(path: Path, config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name in _UNUSED:
            refused = value not in _UNUSED[name]
        else:
            # Whatever a newer PEFT has may change the result, unless it is off.
            refused = name not in _APPLIED and name not in _HARMLESS and bool(value)
        if refused:
            raise AdapterError(
                f"{path} uses {name} ({json.dumps(value)[:60]}), which this engine cannot apply."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_STARTS_THAT_CHANGE_THE_BASE):
        raise AdapterError(
            f"{path}: the adapter was started with {start}, which changes the base model's weights too; convert it to a "
            "plain LoRA adapter with PEFT first."
        )


def _default_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the most frequent value, and the others by the shortest names that mean just their modules."""
    default = Counter(values.values()).most_common(1)[0][0]
    of_name: dict[str, set[Any]] = {}
    for path, value in values.items():
        of_name.setdefault(path.rpartition(".")[2], set()).add(value)
    pattern: dict[str, Any] = {}
    for path, value in values.items():
        name = path.rpartition(".")[2]
        if value != default:
            # A dot in a path is any character to a pattern; nothing else in a path is special.
            pattern[name if len(of_name[name]) == 1 else path] = value
    return default, pattern


def _names(model: nn.Module, paths: list[str], means: Callable[[str, str], bool]) -> list[str]:
    """Name modules by their last part; in full where that part would mean another module too.

    Args:
        model: with adapters.
        paths: of modules that were put in.
        means: whether a path is meant by a name.
    """
    inside = tuple(f"{path}." for path in [*lora_modules(model), *saved_modules(model)])
    others = [
        path
        for path, _ in model.named_modules()
        if path not in paths and not path.startswith(inside)
    ]
    named: set[str] = set()
    for path in paths:
        name = path.rpartition(".")[2]
        named.add(path if any(means(other, name) for other in others) else name)
    return sorted(named)


def _ends_with_part(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _ends_with(path: str, name: str) -> bool:
    """Whether PEFT takes the path for one of modules_to_save: it looks at letters, not at whole parts."""
    return path.endswith(name)


def _as_short(value: float) -> float:
    return int(value) if float(value).is_integer() else value
