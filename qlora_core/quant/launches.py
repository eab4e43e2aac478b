"""How each Triton kernel of the storage format is launched: the one table of tiles and warps.

The operations launch from it, the ahead-of-time gate compiles all of it, and the GPU bench times
its candidates against each other. A number here is changed after a bench, not by an autotuner, so
that what runs never depends on what some cache held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One way to launch a kernel.

    Attributes:
        tile: elements per program.
        num_warps: warps of 32 threads per program.
        gather: where a kernel looks numbers up in a small table: in shared memory (`tl.gather`) or,
            if False, by loads that the L1 cache answers.
    """

    tile: int
    num_warps: int
    gather: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told; a fused multiplication and addition would change bits."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


DEQUANTIZE_NF4 = Launch(tile=4096, num_warps=4)
DEQUANTIZE_NF4_CANDIDATES = (
    DEQUANTIZE_NF4,
    Launch(tile=4096, num_warps=4, gather=False),
    Launch(tile=8192, num_warps=4),
    Launch(tile=8192, num_warps=4, gather=False),
    Launch(tile=8192, num_warps=8),
)

QUANTIZE_NF4 = Launch(tile=4096, num_warps=4)
QUANTIZE_NF4_CANDIDATES = (
    QUANTIZE_NF4,
    Launch(tile=4096, num_warps=8),
    Launch(tile=8192, num_warps=8),
)

# What is left of a weight after whole tiles, one block of up to 4096 elements per program.
NF4_REST = Launch(tile=4096, num_warps=4)

# There are few scales, so nothing is to be gained by candidates.
QUANTIZE_ABSMAX = Launch(tile=1024, num_warps=4)
