"""Writes tensors into safetensors files, in shards with an index, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlora_core.models.dtypes import NAME_OF
from qlora_core.models.header import BITS_OF, write_header


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
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    shards = fill_shards(sizes, shard_bytes)
    total = sum(sizes.values())
    done = 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress is not None:
            on_progress(done, total)

    files = [folder / name for name in shard_names(len(shards))]
    for file, names in zip(files, shards, strict=True):
        write_file(file, {name: tensors[name] for name in names}, wrote)
    write_index(files, shards, total)
    return files


def shard_names(count: int) -> list[str]:
    """Give the names that transformers has for ``count`` weight files of a model."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def fill_shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Divide what has these sizes in bytes among files, in order; at most ``shard_bytes`` each, or one thing alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_file(
    path: Path, tensors: Mapping[str, Tensor], wrote: Callable[[int], None] = lambda _: None
) -> None:
    """Write one file, with a copy for each name of a tensor that has several; ``wrote`` is called with the bytes of each.

    Raises:
        OSError: the disk is full, or refuses to be written to. (The library's own writer raises no OSError.)
    """
    header, parts = file_parts(tensors)
    with path.open("wb") as file:
        file.write(header)
        for part in parts:
            file.write(part)
            wrote(part.nbytes)


def file_parts(tensors: Mapping[str, Tensor]) -> tuple[bytes, Iterator[memoryview]]:
    """Give what a file of these tensors is made of: its header, and each tensor's bytes, brought to the CPU when it is their turn."""
    # The largest elements first, so that each tensor is aligned to the size of its own.
    ordered = sorted(tensors, key=lambda name: -BITS_OF[NAME_OF[tensors[name].dtype]])
    header = write_header(
        (name, NAME_OF[tensors[name].dtype], tuple(tensors[name].shape)) for name in ordered
    )
    return header, (_bytes_of(tensors[name]) for name in ordered)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def write_index(files: Sequence[Path], shards: Sequence[Sequence[str]], total: int) -> None:
    """Write which file holds which tensor, beside the files, if there are several."""
    if len(files) == 1:
        return
    weight_map = {
        name: file.name for file, names in zip(files, shards, strict=True) for name in names
    }
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (files[0].parent / "model.safetensors.index.json").write_text(text, encoding="utf-8")
