"""`estimate`: what a run will take, from a model's config.json or a run's file, without loading the model."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_core.commands.devices import Device
from qlora_core.commands.endings import guarded
from qlora_core.commands.progress import byte_bar
from qlora_core.errors import ConfigError
from qlora_core.units import duration, read_size, size

if TYPE_CHECKING:
    from qlora_core.commands.run_file import RunFile
    from qlora_core.estimate import Estimate
    from qlora_core.text import DatasetReport

_KINDS = {
    "base_bytes": "base weights",
    "adapter_bytes": "adapter",
    "optimizer_resident_bytes": "optimizer",
    "gradients_bytes": "gradients",
    "activations_bytes": "activations",
    "workspace_bytes": "workspace: a weight made dense",
}


@dataclass(frozen=True)
class Asked:
    """What an estimate is asked for.

    Attributes:
        model: folder, or config.json.
        settings: of the run, by the names of `TrainConfig`.
        options: of `estimate`, beside the device.
        device: as the file has it.
        steps: of the whole run, None where the data is not known.
        assumed: what is taken for granted, in sentences.
    """

    model: Path
    settings: dict[str, Any]
    options: dict[str, Any]
    device: str
    steps: int | None
    assumed: tuple[str, ...]


@guarded
def estimate(
    source: Annotated[
        Path,
        typer.Argument(metavar="MODEL|CONFIG.toml", help="A model's folder, or a run's settings."),
    ],
    memory: Annotated[
        str | None,
        typer.Option(
            help="Whether it fits into so much, such as 24GiB: a GPU's, unless --device cpu."
        ),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(
            help="Where it would train; the file's, else a GPU with --memory, else what is here."
        ),
    ] = None,
    card: Annotated[str, typer.Option(help="The GPU that times are calculated for.")] = "H100",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Calculate the memory and the time of a run; nothing is loaded, and nothing of it is measured.

    With a run's file its data is read, too, if it is there: the length of the examples counts.
    """
    from qlora_core.estimate import estimate as estimate_run
    from qlora_core.estimate import largest_fitting

    asked = _of_file(source) if source.suffix == ".toml" else _of_model(source)
    where = device or Device(asked.device)
    room = None if memory is None else read_size(memory)
    if where is Device.AUTO:
        where = _device_here() if room is None else Device.CUDA
    on: Literal["cuda", "cpu"] = "cuda" if where is Device.CUDA else "cpu"
    options = {
        **asked.options,
        "device": on,
        "card": card,
        "cores": len(os.sched_getaffinity(0)),
    }
    found = estimate_run(asked.model, asked.settings, **options)
    if room is None and on == "cuda":
        room = _free_on_the_gpu()
    fitting = None
    if room is not None and not found.fits(room):
        fitting = largest_fitting(asked.model, asked.settings, room_bytes=room, **options)
    if as_json:
        document = found.as_dict() | {"device": on, "room_bytes": room, "steps": asked.steps}
        document["fits"] = None if room is None else found.fits(room)
        document["would_fit"] = None if fitting is None else fitting.as_dict()
        document["assumed"] = [*asked.assumed, *found.assumed]
        typer.echo(json.dumps(document, indent=1))
    else:
        _print(found, asked, source, on, room)
        if fitting is not None:
            Console(highlight=False).print(Text(fitting.sentence), soft_wrap=True)


def _of_model(folder: Path) -> Asked:
    from qlora_core.estimate.reading import read_model_config
    from qlora_core.estimate.settings import TrainSettings

    config, _ = read_model_config(folder)
    inner = config.get("text_config")
    most = (inner if isinstance(inner, dict) else config).get("max_position_embeddings")
    context = TrainSettings().context_length
    if isinstance(most, int) and 2 <= most < context:
        context = most
    return Asked(folder, {"context_length": context}, {}, Device.AUTO, None, ())


def _of_file(file: Path) -> Asked:
    from qlora_core.commands.run_file import read_run_file
    from qlora_core.text import TextEncoder

    run = read_run_file(file)
    if not run.model.quantize:
        raise ConfigError(f"{file}: model.quantize is false, but estimates are of models in NF4")
    encoder = TextEncoder.from_folder(run.model.path)
    config = run.with_context(encoder.context_length)
    options: dict[str, Any] = {
        "block_size": run.model.block_size,
        "double_quant": run.model.double_quant,
    }
    if run.model.compute_dtype != "auto":
        options["compute_dtype"] = run.model.compute_dtype
    assumed: list[str] = []
    if run.model.skip_modules != ("lm_head",):
        assumed.append("all linear layers but the output head are taken to be in NF4")
    steps = None
    if run.data.train.is_file():
        report = _read_data(run, encoder, config.context_length)
        options |= _lengths(report)
        steps = math.ceil(report.n_examples / config.batch_size) * config.n_epochs
        steps = min(steps, config.max_steps or steps)
    else:
        assumed.append(f"{run.data.train} is not there: nothing is known of the examples")
    return Asked(run.model.path, config.as_dict(), options, run.model.device, steps, tuple(assumed))


def _read_data(run: RunFile, encoder: Any, context_length: int) -> DatasetReport:  # noqa: ANN401 - a TextEncoder
    """Count the tokens of the training file; raises DatasetError where it could not be trained on."""
    from qlora_core.errors import DatasetError
    from qlora_core.text import check_dataset
    from qlora_core.text.check import FAILED

    path = run.data.train
    with byte_bar() as start:
        report = check_dataset(
            path,
            encoder,
            context_length=context_length,
            min_examples=1,
            train_on_inputs=run.config.train_on_inputs,
            on_progress=start(f"reading {path.name}"),
        )
    if report.problem is not None:
        reason = report.problem.message.removeprefix(FAILED).lstrip()
        raise DatasetError(f"{path}: {reason}", code=report.problem.code)
    return report


def _lengths(report: DatasetReport) -> dict[str, Any]:
    return {
        "longest_tokens": max(2, report.longest_tokens),
        "mean_tokens": report.n_tokens / report.n_examples,
        "trained_share": report.n_trained_tokens / report.n_tokens,
    }


def _device_here() -> Device:
    from qlora_core.commands.devices import choose_device

    return Device(choose_device(Device.AUTO).type)


def _free_on_the_gpu() -> int | None:
    """Give what a GPU here has free for tensors; a context is made for asking, and is not counted."""
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def _print(found: Estimate, asked: Asked, source: Path, device: str, room: int | None) -> None:
    table = Table(show_header=False)
    kinds = found.memory.as_dict()
    total = kinds["total_bytes"]
    for kind, name in _KINDS.items():
        table.add_row(name, size(kinds[kind]))
    table.add_row("memory at the peak", size(total), end_section=True)
    if room is not None:
        left = room - total
        said = f"yes, {size(left)} are left" if left >= 0 else f"no, {size(-left)} are missing"
        table.add_row(f"fits into {size(room)}", said, end_section=True)
    table.add_row("parameters", f"{found.parameters.total:,}")
    table.add_row("  trained", f"{found.parameters.adapter:,}")
    paged_out = kinds["optimizer_bytes"] - kinds["optimizer_resident_bytes"]
    if paged_out > 0:
        table.add_row("optimizer in host memory meanwhile", size(paged_out))
    table.add_row("the adapter on disk", size(found.adapter_file_bytes))
    table.add_row("each resume point on disk", size(found.resume_point_bytes), end_section=True)
    table.add_row("tokens per step", f"{found.tokens_per_step:,}")
    table.add_row("forward passes per step", f"{found.passes_per_step:,}")
    time = found.step_time
    table.add_row("step time", f"{time.low_s:,.2g} to {time.high_s:,.2g} s")
    if asked.steps is not None:
        run = f"{duration(time.low_s * asked.steps)} to {duration(time.high_s * asked.steps)}"
        table.add_row(f"{asked.steps:,} steps", run)
    console = Console(highlight=False)
    title = f"{source}, on {'a GPU' if device == 'cuda' else 'a CPU'}"
    console.print(Text(title, "italic"), soft_wrap=True)
    console.print(table)
    for sentence in (*asked.assumed, *found.assumed):
        console.print(Text(f"Assumed: {sentence}."), soft_wrap=True)
