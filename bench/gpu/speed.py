"""Times quantizing and dequantizing beside a copy of as many bytes, and beside bitsandbytes."""

from __future__ import annotations

from functools import partial

import torch

from bench.gpu import rivals
from bench.gpu.groups import Group, Rows
from bench.gpu.measuring import Action, time_all
from qlora_core import NF4Weight, quantize_nf4
from qlora_core.quant.launches import (
    DEQUANTIZE_NF4,
    DEQUANTIZE_NF4_CANDIDATES,
    QUANTIZE_NF4,
    QUANTIZE_NF4_CANDIDATES,
    Launch,
)
from qlora_core.quant.nf4 import launch

SHAPES = ((4096, 4096), (14336, 4096))
BLOCK_SIZES = (64, 128, 4096)


def groups(device: str) -> list[Group]:
    """Give the groups of both parts, one for each shape and block size."""
    shapes = SHAPES if device == "cuda" else ((64, 128),)
    sizes = BLOCK_SIZES if device == "cuda" else (64,)
    found = [
        Group(f"{name} {shape[0]}x{shape[1]} block {size}", partial(run, shape, size, device))
        for name, run in (("dequantize", _dequantize), ("quantize", _quantize))
        for shape in shapes
        for size in sizes
    ]
    rows, columns = shapes[0]
    searching = partial(_quantize_searching, shapes[0], device)
    return [*found, Group(f"quantize {rows}x{columns} searching for scales", searching)]


def _dequantize(shape: tuple[int, int], block_size: int, device: str) -> Rows:
    """To bfloat16: ours doubly quantized, in every candidate launch, and plain; theirs."""
    values = torch.randn(shape, device=device, dtype=torch.bfloat16)
    nested = quantize_nf4(values, block_size=block_size)
    plain = quantize_nf4(values, block_size=block_size, double_quant=False)
    out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    moved = {
        name: weight.nbytes + out.nbytes for name, weight in (("nested", nested), ("plain", plain))
    }
    actions: dict[str, Action] = {
        f"ours nested, {_told(candidate)}": partial(_launch, nested, out, candidate)
        for candidate in DEQUANTIZE_NF4_CANDIDATES
    }
    actions["ours plain"] = partial(_launch, plain, out, DEQUANTIZE_NF4)
    actions["ours nested, public call"] = nested.dequantize
    if rivals.why_absent(device) is None:
        theirs = rivals.state_of(nested)
        actions["bitsandbytes nested, public call"] = theirs.dequantize
        if device == "cuda":  # its CPU code has neither
            actions["bitsandbytes nested, public call into out"] = partial(theirs.dequantize, out)
            actions["bitsandbytes plain, its kernel"] = partial(
                rivals.dequantize_raw, plain.packed, plain.absmax, out, block_size=block_size
            )
    rival = "bitsandbytes plain, its kernel"
    return _rows(actions, moved["nested"], moved["plain"], device, rival=rival)


def _launch(weight: NF4Weight, out: torch.Tensor, candidate: Launch) -> None:
    launch.launch_dequantize(
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.offset,
        out.view(-1),
        block_size=weight.block_size,
        launch=candidate,
    )


def _quantize(shape: tuple[int, int], block_size: int, device: str) -> Rows:
    """From bfloat16: our kernel in every candidate launch, and both public calls."""
    values = torch.randn(shape, device=device, dtype=torch.bfloat16)
    flat = values.view(-1)
    plain = quantize_nf4(values, block_size=block_size, double_quant=False)
    moved = values.nbytes + plain.nbytes
    actions: dict[str, Action] = {
        f"ours plain, {_told(candidate)}": partial(
            launch.launch_quantize, flat, block_size=block_size, launch=candidate
        )
        for candidate in QUANTIZE_NF4_CANDIDATES
    }
    actions["ours nested, public call"] = partial(quantize_nf4, values, block_size=block_size)
    if rivals.why_absent(device) is None:
        for double_quant in (False, True):
            kind = "nested" if double_quant else "plain"
            actions[f"bitsandbytes {kind}, public call"] = partial(
                rivals.quantize, values, block_size=block_size, double_quant=double_quant
            )
    return _rows(actions, moved, moved, device, rival="bitsandbytes plain, public call")


def _quantize_searching(shape: tuple[int, int], device: str) -> Rows:
    """From bfloat16 with ``scale="mse"``, beside the same without."""
    values = torch.randn(shape, device=device, dtype=torch.bfloat16)
    moved = values.nbytes + quantize_nf4(values).nbytes
    actions: dict[str, Action] = {
        "ours nested, public call": partial(quantize_nf4, values),
        "ours nested, searching, public call": partial(quantize_nf4, values, scale="mse"),
    }
    return _rows(actions, moved, moved, device)


def _rows(
    actions: dict[str, Action], nested_bytes: int, plain_bytes: int, device: str, *, rival: str = ""
) -> Rows:
    """Time everything together with a copy of the same bytes; half are read, half written."""
    source = torch.empty(nested_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timings = time_all(actions | {"copy": partial(target.copy_, source)}, device)
    copy_bytes_per_ms = 2 * source.numel() / timings["copy"].ms
    rows: Rows = []
    for name, timing in timings.items():
        moved = plain_bytes if " plain" in name else nested_bytes
        row = {
            "what": name,
            "ms": timing.ms,
            "low_ms": timing.low_ms,
            "high_ms": timing.high_ms,
            "gb_per_s": moved / timing.ms / 1e6,
            "share_of_copy": moved / timing.ms / copy_bytes_per_ms,
        }
        if rival in timings:
            row["times_as_fast_as_theirs"] = timings[rival].ms / timing.ms
        rows.append(row)
    return rows


def _told(candidate: Launch) -> str:
    default = " (launched)" if candidate in (DEQUANTIZE_NF4, QUANTIZE_NF4) else ""
    lookup = "gather" if candidate.gather else "L1"
    return f"tile {candidate.tile}, {candidate.num_warps} warps, {lookup}{default}"
