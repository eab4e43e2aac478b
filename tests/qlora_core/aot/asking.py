"""Launches every kernel as the engine does, and prints what Triton is asked to compile but `entries` has not.

Nothing is compiled and nothing runs: a driver stands in for the GPU's, and Triton's own hook ends
each launch where its compiler would begin. A process of its own, started by `gate`.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from qlora_core.ops.adamw.launch import launch_adamw
from qlora_core.ops.adamw.moments import Moments8, Moments32
from qlora_core.ops.adamw.settings import TILE, AdamWSettings
from qlora_core.quant.codebook import BLOCK_SIZES
from qlora_core.quant.double_quant.launch import launch_quantize as launch_quantize_absmax
from qlora_core.quant.launches import DEQUANTIZE_NF4, QUANTIZE_NF4
from qlora_core.quant.nf4.launch import launch_dequantize, launch_quantize
from tests.qlora_core.aot.entries import Entry, manifest

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class NoGpu:
    """What a launch asks of a driver until the compiler's turn."""

    def get_current_target(self) -> GPUTarget:
        """Say that this is an H100."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Say that it is the first."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """Give the default stream."""
        return 0


def launches() -> Iterator[Callable[[], object]]:
    """Every launch of the engine, with tensors that hold a whole tile and a rest; new ones go here."""
    for dtype, block_size in product(_DTYPES, BLOCK_SIZES):
        values = torch.zeros(QUANTIZE_NF4.tile + 33, dtype=dtype)
        yield partial(launch_quantize, values, block_size=block_size)
        for nested in (False, True):
            yield partial(_dequantize, dtype, block_size, nested=nested)
    yield partial(launch_quantize_absmax, torch.zeros(300))
    for moments, dtype in product((_moments_32(), _moments_8()), (None, *_DTYPES[:2])):
        buffers = [torch.zeros(TILE), torch.zeros(TILE)]
        copies = None if dtype is None else torch.zeros(TILE, dtype=dtype)
        yield partial(launch_adamw, *buffers, moments, torch.zeros(3), AdamWSettings(1e-3), copies)
    # Slices begin anywhere.
    values = torch.zeros(5000, dtype=torch.bfloat16)[1:]
    yield partial(launch_quantize, values, block_size=64)
    yield partial(_dequantize, torch.bfloat16, 64, nested=True, skipped=1)


def _moments_32() -> Moments32:
    return Moments32(torch.zeros(TILE), torch.zeros(TILE))


def _moments_8() -> Moments8:
    codes = [torch.zeros(TILE, dtype=torch.uint8) for _ in range(2)]
    return Moments8(*codes, *[torch.zeros(TILE // 256) for _ in range(2)])


def _dequantize(dtype: torch.dtype, block_size: int, *, nested: bool, skipped: int = 0) -> None:
    """Dequantize codes and into an output that begin some bytes and elements into their memory."""
    n = DEQUANTIZE_NF4.tile + 33
    blocks = -(-n // block_size)
    launch_dequantize(
        torch.zeros((n + 1) // 2 + 4 * skipped, dtype=torch.uint8)[4 * skipped :],
        torch.zeros(blocks, dtype=torch.uint8 if nested else torch.float32),
        torch.zeros(-(-blocks // 256)) if nested else None,
        torch.zeros(()) if nested else None,
        torch.zeros(n + skipped, dtype=dtype)[skipped:],
        block_size=block_size,
    )


def asked(name: str, compile_info: dict[str, Any], names: list[str]) -> str:
    """Spell what a launch asks for, in the same words as `offered`."""
    types = {key: kind for key, kind in compile_info["signature"].items() if kind != "constexpr"}
    constants = {names[key[0]]: value for key, value in compile_info["constants"].items()}
    (attributes,) = compile_info["configs"]
    aligned = [names[key[0]] for key, value in attributes.items() if value]
    options = {key: compile_info[key] for key in ("num_warps", "enable_fp_fusion")}
    return _spelled(name, types, constants, aligned, options)


def offered(entry: Entry) -> str:
    """Spell what the gate compiles for an entry."""
    name = entry.kernel.__name__
    return _spelled(name, entry.types, entry.constants, entry.aligned, entry.launch.options)


def _spelled(
    name: str,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: list[str],
    options: dict[str, Any],
) -> str:
    parts = [sorted(part.items()) for part in (types, constants, options)]
    return f"{name} {parts} aligned {sorted(aligned)}"


def main() -> None:
    """Print as JSON what was asked for, and what of it the gate does not compile."""
    found: set[str] = set()

    def end_launch(*, fn: Any, compile: Any, **_: object) -> bool:  # noqa: A002 - Triton's name
        found.add(asked(fn.name.rpartition(".")[2], compile, fn.jit_function.arg_names))
        return True

    driver.set_active(NoGpu())  # pyright: ignore[reportArgumentType]
    knobs.runtime.jit_cache_hook = end_launch
    for launch in launches():
        launch()
    missing = found - {offered(entry) for entry in manifest()}
    sys.stdout.write(json.dumps({"asked": sorted(found), "missing": sorted(missing)}))


if __name__ == "__main__":
    main()
