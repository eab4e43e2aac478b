"""qlora_core: fine-tunes causal language models with QLoRA, alone or inside Nibble's worker.

Names are imported on first use (PEP 562): `import qlora_core` loads neither torch nor transformers, so that
a process that only renders or counts text stays small.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_core.data import Dataset, load_dataset
    from qlora_core.errors import (
        AdapterError,
        ConfigError,
        DatasetError,
        DeviceError,
        DtypeError,
        EngineError,
        LayoutError,
        LoraTargetError,
        LossNotFiniteError,
        ModelError,
        NonFiniteError,
        OutOfMemoryError,
        ResumePointError,
        ShapeError,
    )
    from qlora_core.estimate import Estimate, estimate
    from qlora_core.export import (
        LogitDifference,
        MergeResult,
        load_adapter,
        merge,
        save_adapter,
        serving_warnings,
    )
    from qlora_core.models import load_model, save_quantized
    from qlora_core.nn import LoraConfig, NF4Linear, add_lora, lora_disabled
    from qlora_core.quant import NF4Weight, quantize_nf4
    from qlora_core.text import (
        DatasetProblem,
        DatasetReport,
        EncodedExample,
        LineError,
        TextEncoder,
        check_dataset,
    )
    from qlora_core.train import TrainConfig, TrainResult, train

_HOMES = {
    "qlora_core.errors": (
        "AdapterError",
        "ConfigError",
        "DatasetError",
        "DeviceError",
        "DtypeError",
        "EngineError",
        "LayoutError",
        "LoraTargetError",
        "LossNotFiniteError",
        "ModelError",
        "NonFiniteError",
        "OutOfMemoryError",
        "ResumePointError",
        "ShapeError",
    ),
    "qlora_core.estimate": ("Estimate", "estimate"),
    "qlora_core.quant": ("NF4Weight", "quantize_nf4"),
    "qlora_core.nn": ("LoraConfig", "NF4Linear", "add_lora", "lora_disabled"),
    "qlora_core.models": ("load_model", "save_quantized"),
    "qlora_core.text": (
        "DatasetProblem",
        "DatasetReport",
        "EncodedExample",
        "LineError",
        "TextEncoder",
        "check_dataset",
    ),
    "qlora_core.data": ("Dataset", "load_dataset"),
    "qlora_core.train": ("TrainConfig", "TrainResult", "train"),
    "qlora_core.export": (
        "LogitDifference",
        "MergeResult",
        "load_adapter",
        "merge",
        "save_adapter",
        "serving_warnings",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterError",
    "ConfigError",
    "Dataset",
    "DatasetError",
    "DatasetProblem",
    "DatasetReport",
    "DeviceError",
    "DtypeError",
    "EncodedExample",
    "EngineError",
    "Estimate",
    "LayoutError",
    "LineError",
    "LogitDifference",
    "LoraConfig",
    "LoraTargetError",
    "LossNotFiniteError",
    "MergeResult",
    "ModelError",
    "NF4Linear",
    "NF4Weight",
    "NonFiniteError",
    "OutOfMemoryError",
    "ResumePointError",
    "ShapeError",
    "TextEncoder",
    "TrainConfig",
    "TrainResult",
    "add_lora",
    "check_dataset",
    "estimate",
    "load_adapter",
    "load_dataset",
    "load_model",
    "lora_disabled",
    "merge",
    "quantize_nf4",
    "save_adapter",
    "save_quantized",
    "serving_warnings",
    "train",
]


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(home)
    # Importing `qlora_core.train` has bound its name already: that package can be called itself.
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
