"""Refuses to save what transformers and bitsandbytes would not read, by the rules they replace layers by.

They replace plain linear layers, and leave dense those that a list in config.json names, by matching rules of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_core.errors import ConfigError, ModelUnsupported
from qlora_core.models.checkpoint_folder import refuse_target
from qlora_core.models.choice import choose_layers
from qlora_core.models.dtypes import DTYPE_OF
from qlora_core.models.files import find_weights, read_config
from qlora_core.models.prequantized import group_tensors, refuse_other_formats
from qlora_core.models.skeleton import build_skeleton
from qlora_core.quant.checks import FLOATS


def refuse_beforehand(
    source: Path, folder: Path, *, skip_modules: Sequence[str], overwrite: bool
) -> torch.dtype:
    """Refuse, before any weight is read, what could not be quantized from ``source`` and saved to ``folder``.

    Returns:
        The dtype that most of the weights have: the one for what stays dense.

    Raises:
        ConfigError: the folder has files in it, or the model is in NF4 already.
        ModelError: the model cannot be loaded, quantized or saved.
    """
    declared = refuse_other_formats(source, read_config(source))
    refuse_target(folder, source, overwrite=overwrite)
    places = find_weights(source).places
    if declared or group_tensors(places):
        raise ConfigError(f"the model in {source} is in NF4 already")
    nbytes: Counter[str] = Counter()
    for place in places.values():
        nbytes[place.dtype] += place.nbytes
    found = DTYPE_OF.get(nbytes.most_common(1)[0][0])
    dtype = found if found in FLOATS else torch.float32
    skeleton = build_skeleton(source, dtype)
    choice = choose_layers(skeleton, skip_modules)
    refuse_layers(skeleton, choice.linears, choice.experts)
    return dtype


def refuse_layers(
    skeleton: PreTrainedModel, quantized: Collection[str], experts: Collection[str]
) -> None:
    """Refuse layers in NF4 that transformers and bitsandbytes would not replace.

    Args:
        skeleton: the architecture as transformers builds it.
        quantized: paths of the linear layers in NF4.
        experts: paths of modules or parameters that hold experts in NF4.

    Raises:
        ModelUnsupported: by the path of the first such layer.
    """
    for path in experts:
        raise ModelUnsupported(
            f"{path} holds experts in NF4, for which bitsandbytes has no form; such a model cannot be "
            "saved, unless its experts are skipped and stay dense"
        )
    skipped = [
        *dense_layers(skeleton, quantized),
        *(skeleton._keep_in_fp32_modules or ()),  # noqa: SLF001
    ]
    for path in quantized:
        kind = type(skeleton.get_submodule(path))
        if kind not in (nn.Linear, Conv1D):
            raise ModelUnsupported(
                f"{path} is a {kind.__name__}, which transformers does not load in 4 bits; "
                "such a model cannot be saved"
            )
        if not should_convert_module(path, skipped):
            raise ModelUnsupported(
                f"{path} is in NF4, but by transformers' matching of names it counts to a layer that "
                "stays dense; quantize both, or skip both"
            )


def dense_layers(skeleton: PreTrainedModel, quantized: Collection[str]) -> list[str]:
    """Give the paths of the layers that transformers would replace, but that are not in NF4."""
    return [
        path
        for path, module in skeleton.named_modules()
        if type(module) in (nn.Linear, Conv1D) and path not in quantized
    ]
