"""Fine-tunes tiny-llama on the demo's data with the engine alone."""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu.groups import Group, Rows
from operations.demo.docstrings import write_demo_files
from qlora_core import LoraConfig, TextEncoder, TrainConfig, load_dataset, load_model
from qlora_core.train import StepMetrics, ValidationMetrics, train

_MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"


def groups(device: str) -> list[Group]:
    """Give the one group of this part."""
    return [Group("finetune tiny-llama", partial(_finetune, device))]


def _finetune(device: str) -> Rows:
    """Say what the first steps and the end looked like."""
    encoder = TextEncoder.from_folder(_MODEL)
    size = 1600 if device == "cuda" else 32
    with tempfile.TemporaryDirectory() as scratch:
        files = write_demo_files(Path(scratch), max_train=size, max_validation=size // 8)
        data = [
            load_dataset(path, encoder, context_length=1024)
            for path in (files.train, files.validation)
        ]
        compute_dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = load_model(_MODEL, device=device, compute_dtype=compute_dtype)
        config = TrainConfig(n_epochs=2, learning_rate=1e-3, context_length=1024, lora=LoraConfig())
        events: list[Any] = []
        train(
            model, encoder, data[0], config, events.append, output_dir=scratch, validation=data[1]
        )
    steps = [event for event in events if isinstance(event, StepMetrics)]
    valid = [event.full_valid_loss for event in events if isinstance(event, ValidationMetrics)]
    return [
        {
            "steps": len(steps),
            "train_loss_first": steps[0].train_loss,
            "train_loss_last": steps[-1].train_loss,
            "valid_loss_first": valid[0],
            "valid_loss_last": valid[-1],
            "tokens_per_s": statistics.median(step.tokens_per_s for step in steps),
            **steps[-1].memory,
        }
    ]
