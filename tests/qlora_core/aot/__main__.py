"""`make kernels`: compile everything with both Tritons, show a table, fail on any complaint."""

import os
import sys
import time
from collections import Counter

from tests.qlora_core.aot.gate import ARCHITECTURES, Row, compile_rows, complaints


def main() -> int:
    """Return 0 if every kernel's machine code is as it should be."""
    found: list[str] = []
    for other_triton in (False, True):
        for arch in ARCHITECTURES:
            began = time.monotonic()
            rows = compile_rows(arch, other_triton=other_triton, processes=os.cpu_count() or 1)
            found += [each for row in rows for each in complaints(row)]
            seconds = time.monotonic() - began
            sys.stdout.write(f"\nsm_{arch}, triton {rows[0].triton} ({seconds:.0f} s)\n")
            _show(rows)
    sys.stdout.write("\n" + ("\n".join(found) or "No complaints.") + "\n")
    return 1 if found else 0


def _show(rows: list[Row]) -> None:
    """Print a line per kernel over all its configurations, and one for each way to train with it."""
    for kernel, n in Counter(row.kernel for row in rows).items():
        mine = [row for row in rows if row.kernel == kernel]
        registers = _range([row.registers for row in mine])
        shared = _range([row.shared_bytes for row in mine])
        per_element = ""
        limited = [row.per_element for row in mine if row.most_per_element is not None]
        if limited:
            per_element = f", {min(limited):.1f} to {max(limited):.1f} instructions per element"
        sys.stdout.write(
            f"  {kernel}: {n} configurations, {registers} registers, "
            f"{shared} bytes shared{per_element}\n"
        )
    for row in rows:
        if " bf16 block 64" in row.label and row.most_per_element is not None:
            sys.stdout.write(
                f"    {row.label}: {row.per_element:.1f} per element, {row.registers} registers, "
                f"{row.global_accesses}\n"
            )


def _range(numbers: list[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}" if len(set(numbers)) > 1 else str(numbers[0])


if __name__ == "__main__":
    sys.exit(main())
