"""Kernels that are wrong on purpose in one place: what the gate must complain about.

A process of its own, started by `gate`: compiles a changed copy of a kernel's file for each, as the
engine's own would be, and prints what became of it as JSON: ``mutants.py SHARE SHARES overflowing|"otherwise wrong" 90``.
"""

import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_core.quant.double_quant import kernels as double_quant
from qlora_core.quant.launches import Launch
from qlora_core.quant.nf4 import kernels as nf4
from tests.qlora_core.aot.compiling import measure
from tests.qlora_core.aot.entries import Entry, manifest

_QUANTIZE = "quantize_nf4 bf16 block 64, tile 4096 of 4 warps"
_DEQUANTIZE = "dequantize_nf4 bf16 block 64 nested, tile 4096 of 4 warps"
_TILE_STARTS = "first = tl.program_id(0).to(tl.int64) * BLOCKS"

_STORE_VALUES = "tl.store(out + first * BLOCK_SIZE + "
_BACKWARDS = "(BLOCKS * BLOCK_SIZE - 1 - element)"


@dataclass(frozen=True)
class Mutant:
    """One wrong kernel.

    Attributes:
        label: of the manifest's entry that it is compiled as.
        old: what the kernel's file says; must occur in it.
        new: what the copy says instead.
        launch: instead of the entry's own.
    """

    label: str
    old: str = ""
    new: str = ""
    launch: Launch | None = None


OVERFLOWING = {
    "a program id that is never widened": Mutant(
        _DEQUANTIZE, _TILE_STARTS, "first = tl.program_id(0) * BLOCKS"
    ),
    "a program id that is widened after a product": Mutant(
        _QUANTIZE, _TILE_STARTS, "first = (tl.program_id(0) * BLOCKS).to(tl.int64)"
    ),
    "a tile's begin that is cast back": Mutant(
        _QUANTIZE, _TILE_STARTS, f"{_TILE_STARTS}\n    first = first.to(tl.int32)"
    ),
    "the offsets of values narrowed": Mutant(
        _QUANTIZE,
        "values + first * BLOCK_SIZE + element",
        "values + (first * BLOCK_SIZE + element).to(tl.int32)",
    ),
    "the offsets of words narrowed, unsigned": Mutant(
        _QUANTIZE,
        "tl.pointer_type(tl.uint32)) + first * (BLOCK_SIZE // 8)",
        "tl.pointer_type(tl.uint32)) + (first * (BLOCK_SIZE // 8)).to(tl.uint32)",
    ),
    "the offsets of scales narrowed": Mutant(
        _DEQUANTIZE,
        "absmax + first + tl.arange(0, BLOCKS)",
        "absmax + (first + tl.arange(0, BLOCKS)).to(tl.int32)",
    ),
    "the offset of the nested scale narrowed": Mutant(
        _DEQUANTIZE,
        "nested_absmax + first // _NESTED_BLOCK_SIZE",
        "nested_absmax + (first // _NESTED_BLOCK_SIZE).to(tl.int32)",
    ),
    "the offsets of the result narrowed and widened again": Mutant(
        _DEQUANTIZE,
        "out + first * BLOCK_SIZE + element",
        "out + (first * BLOCK_SIZE + element).to(tl.int32).to(tl.int64)",
    ),
    "a nested block's begin that is cast back": Mutant(
        "quantize_absmax",
        "start = first * _NESTED_BLOCK_SIZE",
        "start = (first * _NESTED_BLOCK_SIZE).to(tl.int32)",
    ),
    "what is left of the scales narrowed": Mutant(
        "quantize_absmax", "inside = scale < n - start", "inside = scale < (n - start).to(tl.int32)"
    ),
    "a loop over tiles": Mutant(
        _DEQUANTIZE,
        _TILE_STARTS,
        f"{_TILE_STARTS}\n    for _ in range(tl.load(levels).to(tl.int32)):\n        first += BLOCKS",
    ),
}
# Each named by what is to be said of it.
OTHERWISE_WRONG = {
    "spills": Mutant(_QUANTIZE, launch=Launch(tile=32768, num_warps=2)),
    "bytes of shared memory": Mutant(
        _DEQUANTIZE, "levels + tl.arange(0, _LEVELS)", "levels + (tl.arange(0, 32768) & 15)"
    ),
    "fused multiply-adds": Mutant(
        _DEQUANTIZE,
        "scale.to(tl.int32)) * factor + tl.load(offset)",
        "scale.to(tl.int32))\n        scale = tl.fma(scale, factor, tl.load(offset))",
    ),
    "no LDG\\.E\\.128": Mutant(
        _DEQUANTIZE,
        "tl.load(words + word)",
        "tl.load(words + (BLOCKS * BLOCK_SIZE // 8 - 1 - word))",
    ),
    "no STG\\.E\\.128": Mutant(
        _DEQUANTIZE,
        f"{_STORE_VALUES}element, values)",
        f"{_STORE_VALUES}{_BACKWARDS}, values)",
    ),
    "stores by STG.E.U16": Mutant(
        _DEQUANTIZE,
        f"{_STORE_VALUES}element, values)",
        f"{_STORE_VALUES}element, values)\n    {_STORE_VALUES}{_BACKWARDS}, values)",
    ),
    "instructions per element": Mutant(
        _QUANTIZE, "tl.store(absmax", "x = tl.sin(tl.cos(x))\n    tl.store(absmax"
    ),
}


def changed(entry: Entry, mutant: Mutant, folder: Path) -> Entry:
    """Give the entry with the kernel and launch of a mutant, whose file is put into ``folder``."""
    module = next(each for each in (nf4, double_quant) if hasattr(each, entry.kernel.__name__))
    launch = mutant.launch or entry.launch
    constants = dict(entry.constants)
    if "BLOCK_SIZE" in constants:
        constants["BLOCKS"] = launch.tile // constants["BLOCK_SIZE"]
    return replace(
        entry,
        kernel=getattr(_copy(module, mutant, folder), entry.kernel.__name__),
        constants=constants,
        launch=launch,
    )


def _copy(module: Any, mutant: Mutant, folder: Path) -> Any:
    """Import a changed copy of a module with kernels."""
    source = Path(module.__file__).read_text()
    if mutant.old not in source:
        raise ValueError(f"{module.__name__} does not say {mutant.old!r} any more")
    file = folder / "mutant.py"
    file.write_text(source.replace(mutant.old, mutant.new) if mutant.old else source)
    spec: Any = importlib.util.spec_from_file_location(f"mutant_{id(mutant)}", file)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def main() -> None:
    """Print a line for each mutant of this process's share: its name and its row."""
    share, shares, which, arch = sys.argv[1:]
    mutants = {"overflowing": OVERFLOWING, "otherwise wrong": OTHERWISE_WRONG}[which]
    entries = {entry.label: entry for entry in manifest()}
    for name, mutant in list(mutants.items())[int(share) :: int(shares)]:
        with tempfile.TemporaryDirectory() as folder:
            (row,) = measure([changed(entries[mutant.label], mutant, Path(folder))], int(arch))
        sys.stdout.write(json.dumps({"name": name, "row": row}) + "\n")


if __name__ == "__main__":
    main()
