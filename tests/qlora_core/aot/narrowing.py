"""Finds where a kernel computes an offset in fewer than 64 bits, in Triton's intermediate code.

How large an offset becomes depends on the program id and on the kernel's integer arguments. What is
computed from those is followed to where it is added to a pointer. Numbers that depend on neither,
such as places inside a tile, may be of any width, and so may data that was loaded.
"""

import re

_NAME = re.compile(r"%\w+")
_INTEGER_ARGUMENT = re.compile(r"(%\w+): i\d+\b")
_IDS = ("tt.get_program_id", "tt.get_num_programs")
# A mask is no number any more.
_COMPARISON = "arith.cmpi"
_REGIONS = ("scf.", "cf.")
# A line ends in its result's type; that of an addition to a pointer, in the offset's.
_WIDE = re.compile(r"(\b|x)i64>?$")


def narrow_offsets(ttir: str) -> list[str]:
    """Give the operations that compute in fewer than 64 bits with what a program id went into.

    Args:
        ttir: a kernel's code as ``compile(...).asm["ttir"]`` has it.

    Returns:
        Their lines, the first of each path; also lines that take such a number into or out of a
        loop or a branch, where this does not follow it.
    """
    followed: set[str] = set()
    found: list[str] = []
    for line in ttir.splitlines():
        if line.strip().startswith("tt.func"):
            followed.update(_INTEGER_ARGUMENT.findall(line))
            continue
        result, operation = _parts(line)
        if operation.startswith(_IDS):
            followed.add(result)
        elif followed.isdisjoint(_NAME.findall(operation)) or operation.startswith(_COMPARISON):
            continue
        elif operation.startswith(_REGIONS) or (result and not _WIDE.search(operation)):
            found.append(f"{result} = {operation}" if result else operation)
        elif not operation.startswith("tt.addptr"):  # where a followed number has arrived
            followed.add(result)
    return found


def _parts(line: str) -> tuple[str, str]:
    """Give the name of a line's result, empty if there is none, and the rest without its location."""
    code = line.partition(" loc(")[0].strip()
    result, equals, operation = code.partition(" = ")
    return (result.partition(":")[0], operation) if equals and result[0] == "%" else ("", code)
