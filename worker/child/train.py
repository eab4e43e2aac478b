"""Trains: the base model, the files and the settings of spec.json go into `qlora_core`, events and an adapter come out.

Importing this module imports torch and transformers, which is what a spare child does ahead of time; nothing
here touches a GPU before `run`.
"""

import resource
import signal
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import transformers

from qlora_core.data import Dataset, load_dataset
from qlora_core.models import load_model
from qlora_core.models.placement import usual_compute_dtype
from qlora_core.text import TextEncoder
from qlora_core.train import TrainConfig, TrainResult, tell_reading, train
from service.models.actions import resolve_folder
from worker.child.lease import wait_until_ours
from worker.child.plan import base_model, train_config
from worker.child.report import Report, sink
from worker.child.room import disk_need
from worker.folder import AttemptFolder
from worker.room import check_room

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


class _StopWish:
    """SIGTERM, noted: the engine asks after each step and leaves a resume point."""

    def __init__(self) -> None:
        self.came = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True


def run(folder: AttemptFolder, spec: dict[str, Any], report: Report) -> dict[str, Any]:
    """Train and return what result.json will hold.

    Raises:
        EngineError, ModelUnavailable, MemoryError, OSError: see `worker.child.failures`.
    """
    wish = _StopWish()
    transformers.logging.disable_progress_bar()

    def should_stop() -> bool:
        wait_until_ours(folder)
        return wish.came

    device = str(spec["device"])
    if device == "cpu" and spec["memory_bytes"] is not None:
        _limit_memory(int(spec["memory_bytes"]))
    model_folder = resolve_folder(base_model(spec), Path(spec["model_cache"]))
    config = train_config(spec, model_folder)
    # The job's own time: a template that prints the date prints the same one in every attempt.
    encoder = TextEncoder.from_folder(model_folder, now=spec["now"])
    dataset = _dataset(spec["training_file"], encoder, config, folder, report)
    validation = spec["validation_file"]
    need, kept_free = disk_need(model_folder, config, dataset.lengths), int(spec["min_free_bytes"])
    check_room(folder.run, needed_bytes=need.all_bytes, kept_free_bytes=kept_free)
    model = load_model(model_folder, device=device, compute_dtype=usual_compute_dtype(device))
    result = train(
        model,
        encoder,
        dataset,
        config,
        sink(report),
        output_dir=folder.run,
        validation=None
        if validation is None
        else _dataset(validation, encoder, config, folder, report),
        sample_prompts=spec["sample_prompts"],
        resume_from=spec["resume_from"],
        should_stop=should_stop,
        before_writing=lambda: check_room(
            folder.run, needed_bytes=need.next_bytes, kept_free_bytes=kept_free
        ),
        base_model_name_or_path=public_name(spec),
    )
    return _as_result(folder, result)


def _limit_memory(memory_bytes: int) -> None:
    """Cap what this process may allocate, files that it maps apart. Where it ends, the engine first tries more frugally.

    Not where there is a GPU: its driver maps far more than it uses.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))


def public_name(spec: dict[str, Any]) -> str:
    """Return the base model's name for the adapter's config: never a path of this machine."""
    return str(spec["model"]["hub"] or spec["base_model"])


def _dataset(
    path: str, encoder: TextEncoder, config: TrainConfig, folder: AttemptFolder, report: Report
) -> Dataset:
    return load_dataset(
        Path(path),
        encoder,
        context_length=config.context_length,
        train_on_inputs=config.train_on_inputs,
        folder=folder.path,  # many tokens go on disk, and to that of the attempts
        on_progress=tell_reading(sink(report)),
    )


def _as_result(folder: AttemptFolder, result: TrainResult) -> dict[str, Any]:
    versions = {name: version(name) for name in _PACKAGES}
    if result.stopped or result.adapter is None:
        return {"outcome": "stopped", "error": None, "versions": versions, "steps": result.steps}
    return {
        "outcome": "succeeded",
        "error": None,
        "versions": versions,
        "steps": result.steps,
        # OpenAI's meaning, every token of every epoch; the metrics count those that carried loss.
        "trained_tokens": result.seen_tokens,
        "train_loss": result.train_loss,
        "valid_loss": result.valid_loss,
        "adapter": str(result.adapter.relative_to(folder.path)),
        "adapter_step": result.adapter_step,
    }
