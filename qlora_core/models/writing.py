"""Writes tensors into safetensors files, in shards with an index, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qlora_core.models.header import BITS_OF, write_header

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    shard_bytes: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write tensors as transformers names its files; give the files.

    Args:
        folder: to write in.
        tensors: by key, on any device; a file is filled in their order.
        shard_bytes: at most so many bytes of tensors go into a file, unless one tensor alone is larger.
        on_progress: called with (bytes done, bytes in all) after each tensor.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards = _fill_shards(tensors, shard_bytes)
    done = 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress is not None:
            on_progress(done, total)

    written: list[Path] = []
    for number, names in enumerate(shards, start=1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        _write_file(folder / file, {name: tensors[name] for name in names}, wrote)
        written.append(folder / file)
    if len(shards) > 1:
        _write_index(folder, written, shards, total)
    return written


def _fill_shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: dict[str, Tensor], wrote: Callable[[int], None]) -> None:
    # The largest elements first, so that each tensor is aligned to the size of its own.
    ordered = sorted(tensors, key=lambda name: -BITS_OF[_NAMES[tensors[name].dtype]])
    header = write_header(
        (name, _NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in ordered
    )
    with path.open("wb") as file:
        file.write(header)
        for name in ordered:
            flat = tensors[name].detach().cpu().contiguous().view(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))
            wrote(tensors[name].nbytes)


def _write_index(folder: Path, files: list[Path], shards: list[list[str]], total: int) -> None:
    weight_map = {
        name: file.name for file, names in zip(files, shards, strict=True) for name in names
    }
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
