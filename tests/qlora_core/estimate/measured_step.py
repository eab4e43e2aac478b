"""One real step of the trainer on a small random model, with the bytes of its tensors counted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qlora_core import Dataset, TextEncoder, TrainConfig, load_model
from qlora_core.data.dataset import Examples
from qlora_core.quant.nf4 import cpu
from qlora_core.quant.scratch import _kept
from qlora_core.quant.workspace import _buffers
from qlora_core.text import EncodedExample
from qlora_core.train.progress import Progress
from qlora_core.train.run import Run, prepare
from qlora_core.train.step import take_step
from tests.qlora_core.estimate.live_tensors import (
    LiveTensors,
    distinct_bytes,
    frozen_tensors,
    moments,
)
from tests.tiny_models import save_tiny_tokenizer


@dataclass(frozen=True)
class Measured:
    """Bytes of tensors in a step after the first; names as in `MemoryEstimate`."""

    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    workspace_bytes: int
    total_bytes: int

    @property
    def activations_bytes(self) -> int:
        """What is left of the peak, as the trainer's own meter tells it."""
        kinds = (self.base_bytes, self.adapter_bytes, self.optimizer_bytes, self.gradients_bytes)
        return self.total_bytes - sum(kinds) - self.workspace_bytes


def measure_step(
    config: PreTrainedConfig,
    settings: TrainConfig,
    lengths: list[int],
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    inputs_on_host: bool = False,
) -> Measured:
    """Train two steps on examples of these lengths, all of whose tokens are trained, and measure the second.

    Args:
        config: of a random base model, which is written and loaded in NF4.
        settings: ``batch_size`` has to be the number of lengths.
        lengths: of the examples of every step.
        folder: for the model and what the run writes.
        dtype: of hidden states and of what is not quantized.
        inputs_on_host: whether what the backward pass needs is kept where it does not count.
    """
    run = prepared_run(config, settings, lengths, folder, dtype)
    progress = Progress()
    _forget_buffers()
    take_step(run, progress)
    dense = list(_buffers.idle.values())
    gradients = [one.grad for one in run.parameters if one.grad is not None]
    base, kept = frozen_tensors(run.model), moments(run.optimizer)
    live = LiveTensors(
        [*base, *run.parameters, *gradients, *kept, *dense],
        # Working memory that a thread keeps for dequantizing, and its table.
        apart=[*_kept.memory.values(), cpu._pair_table()],
    )
    elsewhere = _kept_elsewhere([*base, *run.parameters]) if inputs_on_host else nullcontext()
    with live, elsewhere:
        take_step(run, progress)
    return Measured(
        base_bytes=distinct_bytes(base),
        adapter_bytes=distinct_bytes(run.parameters),
        optimizer_bytes=distinct_bytes(kept),
        gradients_bytes=distinct_bytes(gradients),
        workspace_bytes=distinct_bytes(dense),
        total_bytes=live.peak_bytes,
    )


def prepared_run(
    config: PreTrainedConfig,
    settings: TrainConfig,
    lengths: list[int],
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """Save a random model, load it in NF4 and make a run of it ready."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    return prepare(
        load_model(folder, device="cpu", compute_dtype=dtype),
        TextEncoder.from_folder(folder),
        _examples(lengths, config.vocab_size),
        settings,
        lambda _: None,
        output_dir=folder / "run",
        validation=None,
        sample_prompts=(),
        base_model="tiny",
        adapter=None,
    )


def _examples(lengths: list[int], vocabulary: int) -> Dataset:
    """Two steps' examples, all of them trained but for the first token of each."""
    encoded = [
        EncodedExample(
            input_ids=[place * 7 % vocabulary for place in range(length)],
            trained=[False] + [True] * (length - 1),
            truncated=False,
            n_trained_tokens=length - 1,
            n_tokens_before=length,
        )
        for length in lengths * 2
    ]
    report: Any = None  # nothing in a step asks for it
    return Dataset(Examples.of(encoded), report)


def _kept_elsewhere(always_there: list[Tensor]) -> AbstractContextManager[object]:
    """Keep what autograd saves, but for the smallest, in memory that is not torch's."""
    there = {tensor.data_ptr() for tensor in always_there}

    def pack(tensor: Tensor) -> Tensor | Any:
        if tensor.nbytes < 64 * 1024 or tensor.untyped_storage().data_ptr() in there:
            return tensor
        return tensor.detach().numpy().copy()

    def unpack(kept: Tensor | Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.from_numpy(kept).clone()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _forget_buffers() -> None:
    """Drop what other tests' models left for dense weights."""
    _buffers.idle.clear()
