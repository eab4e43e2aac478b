"""The options of commands that load a model as it was trained over: what `quantize` and a run's ``[model]`` can be told."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Scale(StrEnum):
    """How a block's scale is found."""

    ABSMAX = "absmax"
    MSE = "mse"


Quantize = Annotated[
    bool,
    typer.Option("--quantize/--no-quantize", help="Whether the adapter was trained over NF4."),
]
BlockSize = Annotated[
    int, typer.Option(help="Elements per scale, as the adapter was trained over.")
]
DoubleQuant = Annotated[
    bool, typer.Option("--double-quant/--no-double-quant", help="Quantize the scales too.")
]
SkipModule = Annotated[
    list[str] | None,
    typer.Option(help="A layer that stays as it is besides the output head; repeat."),
]
QuantizeHead = Annotated[
    bool, typer.Option("--quantize-head", help="Quantize the output head too.")
]
ScaleSearch = Annotated[Scale, typer.Option(help="As the adapter was trained over.")]


def skipped_modules(skip_module: list[str] | None, *, quantize_head: bool) -> list[str]:
    """Give the layers that stay dense: those that are named, and the output head unless it is asked for."""
    return [*(skip_module or ()), *(() if quantize_head else ("lm_head",))]


def load_base(
    model: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    quantize: bool,
    block_size: int,
    double_quant: bool,
    skip_module: list[str] | None,
    quantize_head: bool,
    scale: Scale,
) -> PreTrainedModel:
    """Load a model, in NF4 or dense, with a bar on stderr; raises what `load_model` does."""
    from qlora_core.commands.progress import byte_bar
    from qlora_core.models import load_model

    with byte_bar() as start:
        return load_model(
            model,
            device=device,
            compute_dtype=dtype,
            quantize=quantize,
            skip_modules=skipped_modules(skip_module, quantize_head=quantize_head),
            block_size=block_size,
            double_quant=double_quant,
            scale=scale.value,
            on_progress=start("loading the model"),
        )
