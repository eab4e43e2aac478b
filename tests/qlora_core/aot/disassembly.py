"""Reads cubins: their machine instructions and their registers.

Nearly all that a disassembler does for one kernel is to start, so all kernels go through one as a single
piece of machine code and are told apart by where they lie in it.
"""

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# An address, perhaps a predicate, a name.
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE
)


def instructions_of(cubins: Sequence[bytes], arch: int) -> list[list[str]]:
    """Give the names of each cubin's machine instructions in their order, padding left out."""
    codes = [_code_of(cubin) for cubin in cubins]
    begins = [0, *accumulate(len(code) for code in codes)]
    names: list[list[str]] = [[] for _ in cubins]
    told = _tell(b"".join(codes), "nvdisasm", "--binary", f"SM{arch}{'a' * (arch >= 90)}")
    for address, name in _INSTRUCTION.findall(told):
        if name != "NOP":
            names[bisect_right(begins, int(address, 16)) - 1].append(name)
    return names


def registers_of(cubin: bytes) -> int:
    """Give how many registers a thread of a cubin's kernel has."""
    return int(re.findall(r"\bREG:(\d+)", _tell(cubin, "cuobjdump", "-res-usage"))[0])


def _code_of(cubin: bytes) -> bytes:
    """Give the section of an ELF file that holds its one kernel's code (ELF-64, figure 1-8: section headers)."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * at) for at in range(count)]
    names_at = sections[names][4]
    (code,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", names_at + name)
    )
    return code


def _tell(content: bytes, tool: str, *options: str) -> str:
    """Give what one of the tools that come with Triton tells of a file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [_TOOLS / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
