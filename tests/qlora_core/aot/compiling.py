"""Compiles a share of the manifest for one architecture and prints what each entry became as JSON.

A process of its own, started by `gate` without TRITON_INTERPRET and with the Triton that is asked
for: ``compiling.py SHARE SHARES 90``.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from tests.qlora_core.aot.disassembly import instructions_of, registers_of
from tests.qlora_core.aot.entries import Entry, elements_per_thread, manifest
from tests.qlora_core.aot.narrowing import narrow_offsets


def compile_one(entry: Entry, arch: int) -> Any:
    """Compile as the launcher would."""
    names = entry.kernel.arg_names
    source = ASTSource(
        fn=entry.kernel,
        signature={name: entry.types.get(name, "constexpr") for name in names},
        constexprs=entry.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in entry.aligned},
    )
    target = GPUTarget("cuda", arch, 32)
    return compile_kernel(source, target=target, options=entry.launch.options)


def measure(entries: Sequence[Entry], arch: int) -> list[dict[str, Any]]:
    """Compile entries for one architecture and say what they became; `gate.Row` has the fields."""
    compiled = [compile_one(entry, arch) for entry in entries]
    instructions = instructions_of([each.asm["cubin"] for each in compiled], arch)
    return [_row(*each, arch) for each in zip(entries, compiled, instructions, strict=True)]


def _row(entry: Entry, compiled: Any, names: list[str], arch: int) -> dict[str, Any]:
    fused = len(re.findall(r"\bfma\.", compiled.asm["ptx"]))
    return {
        "label": entry.label,
        "kernel": entry.kernel.__name__,
        "arch": arch,
        "triton": triton.__version__,
        "registers": registers_of(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "stack_accesses": sum(name.startswith(("STL", "LDL")) for name in names),
        "surplus_fused": 0 if entry.fused is None else fused - entry.fused,
        "narrow_offsets": narrow_offsets(compiled.asm["ttir"]) if entry.whole_weight else [],
        "global_accesses": dict(Counter(name for name in names if name[:3] in ("LDG", "STG"))),
        "missing": [
            need for need in entry.needs if not any(re.fullmatch(need, name) for name in names)
        ],
        "other_stores": sorted(
            {name for name in names if name[:3] == "STG" and not re.fullmatch(entry.stores, name)}
        ),
        "instructions": len(names),
        "per_element": len(names) / elements_per_thread(entry.launch),
        "most_per_element": entry.most_per_element,
    }


def main() -> None:
    """Print a line of JSON for each entry of this process's share."""
    share, shares, arch = map(int, sys.argv[1:])
    for row in measure(manifest()[share::shares], arch):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
