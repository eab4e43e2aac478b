"""The header of a safetensors file: which tensors it holds and where. Reads no tensor and needs no torch.

A file is eight bytes with the header's length, the header as JSON, and the tensors' bytes without gaps. Everything the
header says is held against the file's length here, since readers take the offsets on trust.

Source: the format's description in the README of huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.quoting import quoted

BITS_OF = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Bits of an element, by the format's own name of the dtype."""

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
_MOST_NAME_CHARACTERS = 500
_MOST_DIMENSIONS = 64  # torch's own limit


class HeaderError(ValueError):
    """A file is no safetensors file, or not all of one; the message ends a sentence."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor's bytes are.

    Attributes:
        path: of the file.
        dtype: the format's name of it, such as ``BF16``.
        shape: sizes, row-major.
        start: the first byte's offset in the file.
        nbytes: how many there are.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Give the tensors of a safetensors file, by name, in the order of their bytes.

    Raises:
        HeaderError: the file is truncated or malformed.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        file_bytes = path.stat().st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        data_start = _LENGTH_BYTES + length
        if file_bytes < _LENGTH_BYTES or data_start > file_bytes:
            raise HeaderError(f"its header ends behind the file's {file_bytes} bytes")
        if length > _MOST_HEADER_BYTES:
            raise HeaderError(f"its header is {length} bytes long")
        text = file.read(length)
    entries = _parse(text)
    entries.pop("__metadata__", None)
    for name in entries:
        if quoted(name, _MOST_NAME_CHARACTERS) != name:
            raise HeaderError(f"its header has a name that cannot be shown, {quoted(name)}")
    places = [_read_entry(path, name, entry, data_start) for name, entry in entries.items()]
    ordered = sorted(places, key=lambda named: (named[1].start, named[1].nbytes))
    _check_gapless([place for _, place in ordered], data_start, file_bytes)
    return dict(ordered)


def write_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Give the first bytes of a file with these tensors (name, dtype, shape), stored one after the other.

    A caller that orders them by falling size of their elements keeps each aligned to that size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, dtype, shape in tensors:
        start, stop = stop, stop + math.prod(shape) * BITS_OF[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _parse(text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is not readable JSON: {error}") from error
    if not isinstance(entries, dict):
        raise HeaderError("its header is no JSON object")
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise HeaderError(f"its header names {quoted(twice)} twice")
    return found


def _read_entry(path: Path, name: str, entry: object, data_start: int) -> tuple[str, TensorPlace]:
    if not isinstance(entry, dict):
        raise HeaderError(f"its header does not describe {name}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS_OF:
        raise HeaderError(f"{name} has the unknown dtype {quoted(dtype)}")
    shape, offsets = _read_counts(shape), _read_counts(offsets)
    if shape is None:
        raise HeaderError(f"{name} has no readable shape")
    if offsets is None or len(offsets) != 2:
        raise HeaderError(f"{name} has no readable offsets")
    bits = math.prod(shape) * BITS_OF[dtype]
    start, stop = offsets
    if bits != 8 * (stop - start):
        raise HeaderError(
            f"{name} of dtype {dtype} and shape {shape} does not fill bytes {start} to {stop}"
        )
    return name, TensorPlace(path, dtype, tuple(shape), data_start + start, stop - start)


def _read_counts(value: object) -> list[int] | None:
    """Give the list if it is one of whole numbers that can be sizes or offsets."""
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        return None
    fine = all(type(one) is int and 0 <= one < 2**63 for one in value)
    return value if fine else None


def _check_gapless(places: list[TensorPlace], data_start: int, file_bytes: int) -> None:
    reached = data_start
    for place in places:
        if place.start != reached:
            raise HeaderError(
                f"its tensors overlap or leave a gap at byte {min(place.start, reached)}"
            )
        reached += place.nbytes
    if reached != file_bytes:
        raise HeaderError(f"its tensors end at byte {reached}, the file at byte {file_bytes}")
