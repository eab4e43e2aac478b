"""Compiles a share of the manifest for some architectures and prints what each entry became as JSON.

A process of its own, started by `gate` without TRITON_INTERPRET and with the Triton that is asked
for: ``compiling.py everyday|all SHARE SHARES 80 90 …``.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from tests.qlora_core.aot.entries import Entry, elements_per_thread, manifest
from tests.qlora_core.aot.narrowing import narrow_offsets

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


def instructions_of(cubin: bytes) -> list[str]:
    """Give the names of a cubin's machine instructions in their order, padding left out."""
    told = _dump("-sass", cubin)
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    return [name for name in line.findall(told) if name != "NOP"]


def registers_of(cubin: bytes) -> int:
    """Give how many registers a thread of a cubin's kernel has."""
    return int(re.findall(r"\bREG:(\d+)", _dump("-res-usage", cubin))[0])


def _dump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def measure(entry: Entry, arch: int) -> dict[str, Any]:
    """Compile one entry for one architecture and say what it became; `gate.Row` has the fields."""
    compiled = compile_one(entry, arch)
    names = instructions_of(compiled.asm["cubin"])
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
    """Print one line of JSON per entry and architecture of this process's share."""
    which, share, shares, *archs = sys.argv[1:]
    pairs = [
        (entry, int(arch))
        for entry in manifest()
        if which == "all" or entry.everyday
        for arch in archs
    ]
    for entry, arch in pairs[int(share) :: int(shares)]:
        sys.stdout.write(json.dumps(measure(entry, arch)) + "\n")


if __name__ == "__main__":
    main()
