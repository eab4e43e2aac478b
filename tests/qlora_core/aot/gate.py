"""The gate that needs no GPU: every kernel compiles to machine code that looks as it should.

Compiles in processes of their own, since a process has one Triton and this one may interpret; judges
what they report. Compiling proves neither speed nor right results: those take a GPU
(`bench/on_gpu.py`) and the interpreter's tests.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[3]
# Bytes of shared memory that one program may have, by compute capability (CUDA C++ Programming
# Guide, technical specifications per compute capability).
SHARED_LIMIT_BYTES = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    120: 99 * 1024,
}
ARCHITECTURES = tuple(SHARED_LIMIT_BYTES)
# The Triton that comes with older builds of torch; `make` installs it beside the environment.
OTHER_TRITON = ROOT / ".venv" / "other-triton"
OTHER_TRITON_PIN = Path(__file__).parent / "other-triton.txt"


@dataclass(frozen=True)
class Row:
    """What an entry became for one architecture under one Triton.

    Attributes:
        label: the entry's.
        kernel: the function's name.
        arch: 90 for sm_90.
        triton: its version.
        registers: per thread.
        shared_bytes: per program.
        stack_accesses: instructions that read or write a thread's own memory: spills. (A stack that
            is declared and never touched is none; triton 3.7 leaves some.)
        surplus_fused: fused multiply-adds beyond those that the kernel asks for.
        narrow_offsets: operations of the intermediate code that compute an offset in fewer than 64
            bits, where a weight may have more elements than 32 bits count.
        global_accesses: how many instructions of each kind read and write global memory.
        missing: instructions that the entry needs and the code does not have.
        other_stores: kinds of instructions that write global memory where the entry wants others.
        instructions: in the whole kernel.
        per_element: the same, divided by the elements of one thread.
        most_per_element: the entry's limit for that, or None.
    """

    label: str
    kernel: str
    arch: int
    triton: str
    registers: int
    shared_bytes: int
    stack_accesses: int
    surplus_fused: int
    narrow_offsets: list[str]
    global_accesses: dict[str, int]
    missing: list[str]
    other_stores: list[str]
    instructions: int
    per_element: float
    most_per_element: float | None


def complaints(row: Row) -> list[str]:
    """Say in sentences what is wrong with a kernel's machine code; nothing if all is well."""
    found: list[str] = []
    if row.stack_accesses:
        found.append(f"spills: {row.stack_accesses} accesses to local memory")
    if row.shared_bytes > SHARED_LIMIT_BYTES[row.arch]:
        found.append(f"{row.shared_bytes} bytes of shared memory are more than there are")
    if row.surplus_fused:
        found.append(f"{row.surplus_fused} fused multiply-adds change the last bit")
    if row.missing:
        found.append(f"no {' and no '.join(row.missing)}, but {row.global_accesses}")
    if row.other_stores:
        found.append(f"stores by {' and '.join(row.other_stores)}")
    if row.most_per_element is not None and row.per_element > row.most_per_element:
        found.append(f"{row.per_element:.1f} instructions per element")
    found += [f"overflows beyond 2^31 elements: {use}" for use in row.narrow_offsets]
    return [f"{row.label} on sm_{row.arch}, triton {row.triton}: {each}" for each in found]


def compile_rows(arch: int, *, other_triton: bool = False, processes: int = 1) -> list[Row]:
    """Compile the manifest for an architecture.

    Args:
        arch: its compute capability, 90 for sm_90.
        other_triton: with `OTHER_TRITON` instead of the environment's own.
        processes: at once; tests have one each, since they run side by side themselves.

    Raises:
        RuntimeError: something does not compile; the message holds the compiler's words.
    """
    told = _run_shares("compiling.py", str(arch), other_triton=other_triton, processes=processes)
    return [Row(**row) for row in told]


def mutants(which: Literal["overflowing", "otherwise wrong"], arch: int) -> dict[str, list[str]]:
    """Give the complaints about each kernel that is wrong on purpose, by what is wrong with it."""
    told = _run_shares("mutants.py", which, str(arch), other_triton=False, processes=2)
    return {each["name"]: complaints(Row(**each["row"])) for each in told}


def launches(*, other_triton: bool = False) -> tuple[list[str], list[str]]:
    """Give what the engine's launches ask Triton to compile, and what of it the manifest has not."""
    with tempfile.TemporaryDirectory() as cache:
        told = json.loads(_run("asking.py", cache=cache, other_triton=other_triton))
    return told["asked"], told["missing"]


def _run_shares(
    script: str, *words: str, other_triton: bool, processes: int
) -> list[dict[str, Any]]:
    """Give what the lines say that a script prints, run in processes with a share of the work each."""
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(processes) as pool:

        def run(share: int) -> list[dict[str, Any]]:
            shares = (str(share), str(processes))
            told = _run(script, *shares, *words, cache=cache, other_triton=other_triton)
            return [json.loads(line) for line in told.splitlines()]

        return [line for lines in pool.map(run, range(processes)) for line in lines]


def _run(script: str, *words: str, cache: str, other_triton: bool) -> str:
    """Give the output of one of this folder's scripts, in a process that compiles."""
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    paths = [str(OTHER_TRITON)] * other_triton + [str(ROOT)]
    environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(words)} failed: {done.stderr}")
    return done.stdout
