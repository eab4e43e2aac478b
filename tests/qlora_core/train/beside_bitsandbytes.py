"""One run twice: by bitsandbytes and peft in a plain loop, and by the engine, from one checkpoint in NF4."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from transformers import AutoModelForCausalLM

from qlora_core import (
    Dataset,
    TextEncoder,
    TrainConfig,
    load_dataset,
    load_model,
    save_quantized,
    train,
)
from qlora_core.train import Event, StepMetrics
from tests.qlora_core.train.plain_loop import adapted_by_peft, plain_loop, settings

_ANSWERS = ("Four bits.", "Half a byte, that is four bits of it.", "A byte has eight.", "Yes, and more", "No.")  # fmt: skip


def two_curves(
    dense: Path, folder: Path, *, dtype: torch.dtype, rate: float
) -> tuple[list[float], list[float]]:
    """Return the loss of each of twenty steps, theirs and ours.

    Args:
        dense: a base model whose rows are whole blocks of 64: bitsandbytes 0.50.2 is wrong on a CPU where a block spans
            two rows.
        folder: empty; gets the checkpoint in NF4, the training file and the run.
        dtype: what both compute in, but for the adapters, which are float32.
        rate: the highest learning rate, of a linear schedule.
    """
    nf4 = folder / "nf4"
    save_quantized(load_model(dense, device="cpu", compute_dtype=dtype), nf4)
    encoder = TextEncoder.from_folder(dense)
    dataset, events = _dataset(folder, encoder), list[Event]()
    theirs = adapted_by_peft(
        _by_bitsandbytes(nf4, dtype), load_model(nf4, device="cpu", compute_dtype=dtype)
    )
    expected = [loss for loss, _ in plain_loop(theirs, dataset, kind="linear", rate=rate)]
    config = TrainConfig(**settings(kind="linear", rate=rate), context_length=64)
    ours = load_model(nf4, device="cpu", compute_dtype=dtype)
    train(ours, encoder, dataset, config, events.append, output_dir=folder / "run")
    steps = [event for event in events if isinstance(event, StepMetrics)]
    return expected, [
        float("nan") if step.train_loss is None else step.train_loss for step in steps
    ]


def worst(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of two curves."""
    return max(abs(loss / other - 1) for loss, other in zip(losses, expected, strict=True))


def _dataset(folder: Path, encoder: TextEncoder) -> Dataset:
    lines = [
        {"messages": [{"role": "user", "content": f"What does {i * 7 % 31} hold?"},
                      {"role": "assistant", "content": _ANSWERS[i % len(_ANSWERS)]}]}
        for i in range(11)
    ]  # fmt: skip
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return load_dataset(path, encoder, context_length=64)


def _by_bitsandbytes(folder: Path, dtype: torch.dtype) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bitsandbytes on a CPU
        # In evaluation on a CPU with AVX512-BF16 it would multiply in bfloat16, whatever the dtype.
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    n_quantized = sum(isinstance(module, Linear4bit) for module in model.modules())
    assert n_quantized == 7 * model.config.num_hidden_layers
    return model
