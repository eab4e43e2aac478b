"""A process of its own that trains within a limit on its memory which system or driver hold, and prints what it told.

``python -m tests.qlora_core.train.memory.in_little_memory MODEL TRAIN.jsonl OUT CONTEXT MIB DEVICE`` with so many MiB beside what it
holds when the model is loaded; 0 for no limit.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from qlora_core import TextEncoder, TrainConfig, load_dataset, load_model, train
from qlora_core.errors import EngineError
from qlora_core.nn import LoraConfig
from qlora_core.train import Event


def main(model: str, data: str, out: str, context: str, mib: str, device: str) -> None:
    torch.set_num_threads(1)
    threading.stack_size(2**18)  # stacks count, too, and are not what this is about
    encoder = TextEncoder.from_folder(Path(model))
    dataset = load_dataset(Path(data), encoder, context_length=int(context))
    settings = TrainConfig(
        batch_size=8, n_epochs=1, context_length=int(context), gradient_checkpointing=False, lora=LoraConfig(r=4)
    )  # fmt: skip
    loaded = load_model(Path(model), device=device, compute_dtype=torch.float32)
    if int(mib):
        _limit(device, int(mib) * 2**20)
    try:
        train(loaded, encoder, dataset, settings, _tell, output_dir=Path(out))
    except EngineError as error:
        _say({"kind": "error", "code": error.code, "message": error.message})


def _tell(event: Event) -> None:
    _say(event.as_dict())


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _limit(device: str, nbytes: int) -> None:
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / total)
        return
    limit = _private_bytes() + nbytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _private_bytes() -> int:
    """Return what RLIMIT_DATA counts."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


if __name__ == "__main__":
    main(*sys.argv[1:])
