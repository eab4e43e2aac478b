"""`quantize`: a model's folder in, a folder with its linear layers in NF4 out, for transformers and bitsandbytes."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_core.commands.devices import Device, choose_device
from qlora_core.commands.endings import guarded
from qlora_core.commands.progress import byte_bar
from qlora_core.commands.quantization import Scale, skipped_modules
from qlora_core.units import size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_core.models.census import Census


@guarded
def quantize(
    model: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors weights.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; new, or empty.")],
    block_size: Annotated[
        int, typer.Option(help="Elements per scale, a power of two from 32 to 4096.")
    ] = 64,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Quantize the scales too.")
    ] = True,
    skip_module: Annotated[
        list[str] | None,
        typer.Option(
            help="A layer, or a part of the model, that stays as it is besides the output head; repeat."
        ),
    ] = None,
    quantize_head: Annotated[
        bool, typer.Option("--quantize-head", help="Quantize the output head too.")
    ] = False,
    scale: Annotated[
        Scale, typer.Option(help="mse searches for the scales with the least squared error.")
    ] = Scale.ABSMAX,
    device: Annotated[Device, typer.Option(help="Where to quantize.")] = Device.AUTO,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT if it has files in it.")
    ] = False,
) -> None:
    """Store a model's linear layers in NF4, at about 4 bits per parameter.

    The result is loaded by transformers with bitsandbytes, and by this engine without quantizing again.
    """
    import torch

    from qlora_core.models import load_model, save_quantized
    from qlora_core.models.census import take_census
    from qlora_core.models.files import find_weights
    from qlora_core.models.readable import refuse_beforehand

    began = time.monotonic()
    target = choose_device(device)
    skipped = skipped_modules(skip_module, quantize_head=quantize_head)
    dtype = refuse_beforehand(model, out, skip_modules=skipped, overwrite=force)
    with byte_bar() as start:
        loaded = load_model(
            model,
            device=target,
            compute_dtype=dtype,
            skip_modules=skipped,
            block_size=block_size,
            double_quant=double_quant,
            scale=scale.value,
            on_progress=start("quantizing"),
        )
        written = save_quantized(
            loaded, out, source=model, overwrite=force, on_progress=start("writing")
        )
    before, after = find_weights(model).total_bytes, _weight_bytes(written)
    on_gpu = torch.cuda.max_memory_allocated(target) if target.type == "cuda" else None
    _print_summary(
        out, take_census(loaded), before, after, seconds=time.monotonic() - began, on_gpu=on_gpu
    )
    if quantize_head and _is_head_tied(loaded):
        typer.echo("The output head is the embeddings' own weight, which stays as it is.", err=True)


def _is_head_tied(model: PreTrainedModel) -> bool:
    from torch import nn

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embeddings, nn.Embedding):
        return False
    return head.weight is embeddings.weight


def _weight_bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.suffix == ".safetensors")


def _print_summary(
    out: Path, census: Census, before: int, after: int, *, seconds: float, on_gpu: int | None
) -> None:
    table = Table(show_header=False)
    table.add_row("parameters", _count(census.parameters))
    table.add_row("  in NF4", f"{_count(census.quantized)} at {census.quantized_bits:.3f} bits")
    table.add_row("  embeddings and head", _count(census.embeddings))
    table.add_row("  other", _count(census.others))
    table.add_row("size", f"{size(before)} before, {size(after)} now ({after / before:.0%})")
    table.add_row("bits per parameter", f"{census.bits:.3f}")
    table.add_row("time", f"{seconds:.1f} s")
    # Linux gives the peak in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    table.add_row("peak memory", size(peak))
    if on_gpu is not None:
        table.add_row("peak on the GPU", size(on_gpu))
    console = Console(highlight=False)
    console.print(Text(str(out), "italic"), soft_wrap=True)
    console.print(table)


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.2f} M"
