"""What a checkpoint that bitsandbytes has quantized already says about itself, and which of its tensors belong together.

A layer is in NF4 if its weight's state is in the files. The module lists of config.json are not asked: "dynamic"
checkpoints leave some layers 16-bit, and the lists follow transformers' own matching rules.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_core.errors import ModelUnsupported, ModelWeightsInvalid
from qlora_core.quant.bitsandbytes import FP4_STATE_SUFFIX, STATE_SUFFIX, SUFFIXES
from qlora_core.quoting import quoted

_START_ANEW = (
    "start from its 16- or 32-bit weights, or from a checkpoint in bitsandbytes' NF4 (load_in_4bit)"
)


def refuse_other_formats(folder: Path, config: dict[str, Any]) -> bool:
    """Say whether config.json declares a bitsandbytes 4-bit checkpoint; refuse every other quantized one.

    Raises:
        ModelUnsupported: the weights are in a format that cannot be loaded.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return False
    if not isinstance(settings, dict):
        raise ModelUnsupported(
            f"{folder / 'config.json'} has a quantization_config that is no JSON object"
        )
    method = settings.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise ModelUnsupported(
            f"the model in {folder} is quantized already, by the method '{quoted(method)}'; {_START_ANEW}"
        )
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        raise ModelUnsupported(
            f"the model in {folder} is quantized already, to int8 (load_in_8bit); {_START_ANEW}"
        )
    if not (settings.get("load_in_4bit") or settings.get("_load_in_4bit")):
        return False
    # transformers' own default is fp4.
    quant_type = settings.get("bnb_4bit_quant_type", "fp4")
    if quant_type != "nf4":
        raise ModelUnsupported(
            f"the model in {folder} is quantized already, to {quoted(quant_type)} (bnb_4bit_quant_type); "
            f"{_START_ANEW}"
        )
    return True


def group_tensors(names: Iterable[str]) -> dict[str, list[str]]:
    """Give the keys of every weight that is in NF4, its own first, by the weight's name.

    Raises:
        ModelUnsupported: a weight is in FP4.
        ModelWeightsInvalid: a weight's state is there, but not the weight.
    """
    names = set(names)
    grouped: dict[str, list[str]] = {}
    for key in sorted(names):
        if key.endswith(FP4_STATE_SUFFIX):
            raise ModelUnsupported(
                f"{key.removesuffix(FP4_STATE_SUFFIX)} is quantized already, to fp4; {_START_ANEW}"
            )
        if not key.endswith(STATE_SUFFIX):
            continue
        weight = key.removesuffix(STATE_SUFFIX)
        if weight not in names:
            raise ModelWeightsInvalid(f"the checkpoint has {key}, but not {weight} itself")
        grouped[weight] = [
            weight,
            *(weight + suffix for suffix in SUFFIXES if weight + suffix in names),
        ]
    return grouped
