"""`train`: a TOML file in; a folder with the adapter, its checkpoints, resume points, events and loss curve out."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_core.commands.endings import guarded
from qlora_core.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_core.commands.run_display import RunDisplay
    from qlora_core.commands.run_file import ModelSettings, RunFile
    from qlora_core.commands.run_folder import RunFolder
    from qlora_core.data import Dataset
    from qlora_core.text import TextEncoder
    from qlora_core.train import Event, TrainConfig, TrainResult


@guarded
def train(
    config: Annotated[Path, typer.Argument(help="A run's settings, in TOML.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write, instead of the file's output.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the folder's last resume point, if it has one."),
    ] = False,
) -> None:
    """Train a LoRA adapter over a base model in NF4.

    Ctrl-C ends the run after its step and leaves a resume point.
    """
    from qlora_core.commands.lasting_console import LastingConsole
    from qlora_core.commands.run_display import RunDisplay
    from qlora_core.commands.run_file import read_run_file
    from qlora_core.commands.run_folder import RunFolder
    from qlora_core.commands.run_summary import print_summary

    display = RunDisplay(LastingConsole(stderr=True))
    run = read_run_file(config)
    folder = RunFolder(_output(run, out), resume=resume)
    result, stopped_by = _train(run, folder, display)
    picture = _draw(folder, display)
    if result.adapter is None:
        again = shlex.join(
            ["train", str(config), "--resume", *(["--out", str(out)] if out else [])]
        )
        display.say(
            f"Stopped after step {result.steps:,}. Go on with: python -m qlora_core {again}"
        )
        raise typer.Exit(128 + (stopped_by or signal.SIGINT))
    print_summary(folder, result, picture)


def _output(run: RunFile, out: Path | None) -> Path:
    output = out or run.output
    if output is None:
        raise ConfigError(f"{run.path}: output is missing; name a folder there, or by --out")
    return output


def _train(run: RunFile, folder: RunFolder, display: RunDisplay) -> tuple[TrainResult, int | None]:
    """Load everything and train; give the result and the signal that stopped it."""
    import transformers

    from qlora_core.commands.devices import choose_compute_dtype, choose_device
    from qlora_core.commands.interruption import StopWish
    from qlora_core.text import TextEncoder
    from qlora_core.train import Notice
    from qlora_core.train import train as train_adapter

    transformers.logging.disable_progress_bar()
    device = choose_device(run.model.device)
    dtype = choose_compute_dtype(device, run.model.compute_dtype)
    inputs = folder.settled(_inputs(run, str(dtype)), _versions())
    # The time the run began: a template that prints the date prints the same one when the run goes on.
    encoder = TextEncoder.from_folder(run.model.path, now=inputs["began"])
    config = run.with_context(encoder.context_length)
    samples = _samples(run, encoder)
    folder.path.mkdir(parents=True, exist_ok=True)
    train_set = _dataset(run.data.train, encoder, config, folder.path, display)
    valid_set = run.data.validation and _dataset(
        run.data.validation, encoder, config, folder.path, display
    )
    model = _load(run.model, device, dtype)

    def sink(event: Event) -> None:
        folder.tell(event)
        display.tell(event)

    with folder.begun(run.content, inputs), display.shown(), StopWish() as wish:
        if folder.changed_versions:
            changed = "; ".join(folder.changed_versions)
            sink(Notice("warn", f"Other libraries than when the run began: {changed}."))
        result = train_adapter(
            model,
            encoder,
            train_set,
            config,
            sink,
            output_dir=folder.path,
            validation=valid_set,
            sample_prompts=samples,
            adapter=run.model.adapter,
            resume_from=folder.path / "resume" if folder.is_begun else None,
            should_stop=wish,
            base_model_name_or_path=run.model.name,
        )
    return result, wish.signal


def _inputs(run: RunFile, dtype: str) -> dict[str, Any]:
    """Name what the result depends on beside the trainer's own settings, which the resume points keep."""
    from qlora_core.commands.run_folder import (
        fingerprint,
        text_fingerprints,
        weights_fingerprint,
    )

    model, data = run.model, run.data
    return {
        "data.train": fingerprint(data.train),
        "data.validation": data.validation and fingerprint(data.validation),
        "model.config": fingerprint(model.path / "config.json"),
        **text_fingerprints(model.path),
        "model.weights": weights_fingerprint(model.path),
        "model.compute_dtype": dtype,
        "model.quantize": model.quantize,
        "model.block_size": model.block_size,
        "model.double_quant": model.double_quant,
        "model.scale": model.scale,
        "model.skip_modules": list(model.skip_modules),
    }


def _versions() -> dict[str, str]:
    """Name the library that the tokens come from; a resume point knows those of the numbers."""
    return {"tokenizers": version("tokenizers")}


def _samples(run: RunFile, encoder: TextEncoder) -> list[list[dict[str, str]]]:
    """Make a conversation of each question, and encode it once: what cannot be asked is refused before the training."""
    from qlora_core.commands.prompts import encode_prompt

    conversations = [[{"role": "user", "content": question}] for question in run.data.samples]
    for question in conversations:
        encode_prompt(encoder, question, name="data.samples")
    return conversations


def _dataset(
    path: Path, encoder: TextEncoder, config: TrainConfig, tokens_in: Path, display: RunDisplay
) -> Dataset:
    from qlora_core.commands.progress import byte_bar
    from qlora_core.data import load_dataset
    from qlora_core.text.check import FAILED
    from qlora_core.train import tell_reading

    with byte_bar() as start:
        show = start(f"tokenizing {path.name}")
        tell = tell_reading(display.tell)
        try:
            return load_dataset(
                path,
                encoder,
                context_length=config.context_length,
                train_on_inputs=config.train_on_inputs,
                folder=tokens_in,  # of a large file they are many, and the system's folder may be in memory
                on_progress=_both(show, tell),
            )
        except DatasetError as error:
            reason = error.message.removeprefix(FAILED).lstrip()
            raise DatasetError(f"{path}: {reason}", code=error.code) from error


def _both(
    one: Callable[[int, int], None], other: Callable[[int, int], None]
) -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        one(done, total)
        other(done, total)

    return tell


def _load(settings: ModelSettings, device: Any, dtype: Any) -> PreTrainedModel:  # noqa: ANN401 - torch's
    from qlora_core.commands.progress import byte_bar
    from qlora_core.models import load_model

    with byte_bar() as start:
        return load_model(
            settings.path,
            device=device,
            compute_dtype=dtype,
            skip_modules=settings.skip_modules,
            quantize=settings.quantize,
            block_size=settings.block_size,
            double_quant=settings.double_quant,
            scale=settings.scale,
            on_progress=start("loading the model"),
        )


def _draw(folder: RunFolder, display: RunDisplay) -> Path | None:
    """Draw the loss curve; a run without one is as good."""
    from qlora_core.commands.history import read_history
    from qlora_core.commands.loss_curve import draw_loss_curve

    path = folder.path / "loss.png"
    try:
        if draw_loss_curve(read_history(folder.events()), path):
            return path
    except OSError as error:
        display.say(f"No loss curve was drawn: {path}: {error.strerror or error}")
        return None
    display.say("No loss curve was drawn: that takes matplotlib, and one step at least.")
    return None
