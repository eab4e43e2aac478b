"""`merge`: a base model and an adapter in, one plain checkpoint out, with how far its answers are from theirs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_core.commands.devices import Device, choose_compute_dtype, choose_device
from qlora_core.commands.endings import guarded
from qlora_core.commands.progress import byte_bar
from qlora_core.commands.quantization import (
    BlockSize,
    DoubleQuant,
    Quantize,
    QuantizeHead,
    Scale,
    ScaleSearch,
    SkipModule,
    load_base,
)
from qlora_core.units import size

if TYPE_CHECKING:
    from qlora_core.export import MergeResult


class Onto(StrEnum):
    """The base that the adapter is added to."""

    DEQUANTIZED = "dequantized"
    ORIGINAL = "original"


class Dtype(StrEnum):
    """Of the merged weights."""

    AUTO = "auto"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


@guarded
def merge(
    model: Annotated[Path, typer.Argument(help="Folder of the base model.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter, in PEFT's format.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; new, or empty.")],
    onto: Annotated[
        Onto,
        typer.Option(
            help="dequantized: the weights in NF4 that the adapter was trained over. original: the 16-bit weights, "
            "without NF4's errors, which the adapter may have learned to make good."
        ),
    ],
    original: Annotated[
        Path | None,
        typer.Option(help="Folder of the original weights, where MODEL itself is in NF4."),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Of the merged weights; auto keeps the base's, or what it is computed in with --no-quantize."
        ),
    ] = Dtype.AUTO,
    quantize: Quantize = True,
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = True,
    skip_module: SkipModule = None,
    quantize_head: QuantizeHead = False,
    scale: ScaleSearch = Scale.ABSMAX,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.AUTO,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT if it has files in it.")
    ] = False,
) -> None:
    """Merge an adapter into a plain checkpoint of its base model.

    Onto which base is yours to choose; how far the answers move by it is measured and printed.
    """
    import torch

    from qlora_core.export import load_adapter
    from qlora_core.export import merge as merge_adapter
    from qlora_core.export.adapter_folder import read_adapter
    from qlora_core.models.checkpoint_folder import refuse_target

    inputs = (adapter,) if original is None else (adapter, original)
    refuse_target(out, model, overwrite=force, inputs=inputs)
    read_adapter(adapter)  # what is wrong with it is told before the base is loaded
    target = choose_device(device)
    base = load_base(
        model,
        target,
        choose_compute_dtype(target),
        quantize=quantize,
        block_size=block_size,
        double_quant=double_quant,
        skip_module=skip_module,
        quantize_head=quantize_head,
        scale=scale,
    )
    load_adapter(base, adapter)
    with byte_bar() as start:
        result = merge_adapter(
            base,
            onto=onto.value,
            output_folder=out,
            original_folder=(original or model) if onto is Onto.ORIGINAL else original,
            source=model,
            dtype=None if dtype is Dtype.AUTO else getattr(torch, dtype),
            overwrite=force,
            on_progress=start("writing"),
        )
    _print_summary(result)


def _print_summary(result: MergeResult) -> None:
    apart = result.difference
    table = Table(show_header=False)
    table.add_row("merged onto", f"the {result.onto} weights")
    table.add_row("weights", f"{size(result.weight_bytes)} in {result.dtype}")
    table.add_row("compared with", "the model with the adapter beside it")
    table.add_row("  tokens", f"{apart.n_tokens:,} drawn at random")
    table.add_row("  largest difference of logits", f"{apart.max_abs:.3g}")
    table.add_row("  mean KL divergence", f"{apart.mean_kl:.3g} nats")
    table.add_row("  same likeliest token", f"{apart.same_top_share:.1%}")
    console = Console(highlight=False)
    console.print(Text(str(result.folder), "italic"), soft_wrap=True)
    console.print(table)
