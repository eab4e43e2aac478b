"""Checks paged moments on a GPU: that they come, go and stay what they are, and what paging costs a training step.

Managed memory beyond what is free can hang a GPU: what is taken here is a few hundred megabytes, and only
where many times as much is free. Pages are put out by an explicit prefetch to the host.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu.groups import Group, Rows
from bench.loading import make_model
from operations.demo.docstrings import write_demo_files
from qlora_core import LoraConfig, TextEncoder, TrainConfig, load_dataset, load_model
from qlora_core.errors import DeviceError
from qlora_core.ops.adamw.settings import TILE
from qlora_core.optim import OPTIMIZERS
from qlora_core.optim.pinned_memory import PinnedMemory
from qlora_core.optim.state_memory import moment_bytes
from qlora_core.optim.unified_memory import UnifiedMemory
from qlora_core.train import StepMetrics, train

_TINY_LLAMA = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
_WARM_UPS = 3
# So many times the state has to be free before it is taken.
_FREE_TIMES = 8
# Of the state's size, which the driver rounds up to pages and others may take from.
_SHARE = 0.95


def groups(device: str) -> list[Group]:
    """Give the groups of this part."""
    return [
        Group("paging unified memory", partial(_there_and_back, UnifiedMemory, device)),
        Group("paging pinned memory", partial(_there_and_back, PinnedMemory, device)),
        Group("paging in a training step", partial(_training, device)),
    ]


def _there_and_back(kind: type[UnifiedMemory | PinnedMemory], device: str) -> Rows:
    """Take memory, bring it, add one on the device, put it out, look at it, and give it back."""
    n = 2**25 if device == "cuda" else 3 * TILE
    state_bytes = moment_bytes(n, 32)
    if _free(device) < _FREE_TIMES * state_bytes:
        return [{"state_bytes": state_bytes, "skipped": "too little memory of the GPU is free"}]
    row: dict[str, Any] = {"state_bytes": state_bytes}
    free = {"before": _free(device)}
    try:
        memory = kind(n, 32, torch.device(device))
    except DeviceError as error:
        return [row | {"skipped": error.message}]
    memory.settle()
    expected = torch.arange(n, dtype=torch.float32).remainder_(1000)
    memory.home.mean.copy_(expected)
    memory.prefetch()
    free["with it on the device"], row["resident_bytes"] = _free(device), memory.resident_bytes
    _add_one(memory)
    memory.settle()
    free["with it on the host"], row["resident_bytes_after"] = _free(device), memory.resident_bytes
    row["wrong_values"] = sum(
        int((moment != expected + 1).sum()) for moment in (memory.home.mean, memory.home.square)
    )
    row["wrong_residence"] = int(memory.resident_bytes != 0)
    if isinstance(memory, UnifiedMemory):
        came = free["before"] - free["with it on the device"]
        went = free["with it on the host"] - free["with it on the device"]
        row["wrong_room"] = int(min(came, went) < _SHARE * state_bytes)
    del memory
    gc.collect()
    free["after"] = _free(device)
    return [row | {f"free_{when.replace(' ', '_')}": amount for when, amount in free.items()}]


def _add_one(memory: UnifiedMemory | PinnedMemory) -> None:
    for _, moments in memory.visit():
        moments.square.add_(moments.mean.add_(1))


def _free(device: str) -> int:
    """Give the bytes of the device's memory that nobody has, when all that it was told is done."""
    if device != "cuda":
        return 2**40
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _training(device: str) -> Rows:
    """Steps of the engine with each optimizer, forth and back, over an adapter of 40 million elements."""
    times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    memory: dict[str, Mapping[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = _TINY_LLAMA
        if device == "cuda":
            folder = Path(scratch) / "model"
            make_model(folder, "llama", 8, 2048)
        for name in [*OPTIMIZERS, *reversed(OPTIMIZERS)]:
            steps = _train(folder, name, Path(scratch), device)
            times[name] += [step.step_time_s for step in steps[_WARM_UPS:]]
            memory[name] = steps[-1].memory
    rows: Rows = []
    for name, taken in times.items():
        row: dict[str, Any] = {"optimizer": name, "step_s": statistics.median(taken)}
        unpaged = name.removeprefix("paged_")
        if name != unpaged:
            row["times_unpaged"] = row["step_s"] / statistics.median(times[unpaged])
        rows.append(row | {"low_s": min(taken), "high_s": max(taken), **memory[name]})
    return rows


def _train(folder: Path, optimizer: str, scratch: Path, device: str) -> list[StepMetrics]:
    encoder = TextEncoder.from_folder(_TINY_LLAMA)
    n_steps, batch_size, rank = (15, 8, 128) if device == "cuda" else (2 + _WARM_UPS, 1, 8)
    files = write_demo_files(scratch, max_train=n_steps * batch_size, max_validation=2)
    data = load_dataset(files.train, encoder, context_length=1024)
    model = load_model(
        folder,
        device=device,
        compute_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
    )
    config = TrainConfig(
        n_epochs=1, batch_size=batch_size, context_length=1024, micro_batch_tokens=2048, optimizer=optimizer,
        lora=LoraConfig(r=rank),
    )  # fmt: skip
    events: list[Any] = []
    # A folder of its own: in that of another run it would go on from there.
    output_dir = tempfile.mkdtemp(dir=scratch)
    train(model, encoder, data, config, events.append, output_dir=output_dir)
    return [event for event in events if isinstance(event, StepMetrics)]
