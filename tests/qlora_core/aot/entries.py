"""Every Triton kernel in every way it is launched: what the ahead-of-time gate compiles.

A new kernel gets a function here that yields its entries, and a place in `FAMILIES`; a test finds
kernels that have none. Import this only where TRITON_INTERPRET is not set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from qlora_core.ops.adamw import kernels as adamw
from qlora_core.ops.adamw.launch import ADAMW_8, ADAMW_32
from qlora_core.quant.codebook import BLOCK_SIZES, NESTED_BLOCK_SIZE
from qlora_core.quant.double_quant.kernels import quantize_absmax_kernel
from qlora_core.quant.launches import (
    DEQUANTIZE_NF4,
    DEQUANTIZE_NF4_CANDIDATES,
    NF4_REST,
    QUANTIZE_ABSMAX,
    QUANTIZE_NF4,
    QUANTIZE_NF4_CANDIDATES,
    Launch,
)
from qlora_core.quant.nf4 import kernels as nf4

FLOATS = ("bf16", "fp16", "fp32")
# In which AdamW's step keeps a copy of what it trains.
COPIES = (None, "bf16", "fp16")
# In which the GPU bench times candidates.
BENCHED = (64, 128, 4096)


@dataclass(frozen=True)
class Entry:
    """One kernel in one configuration, and what its machine code must look like.

    Attributes:
        label: for people.
        kernel: the `triton.jit` function.
        types: of its arguments that are no constants, as Triton spells them.
        constants: its `tl.constexpr` arguments.
        launch: how it is launched.
        unaligned: tensors that do not begin at a multiple of 16 bytes, as newly allocated ones do.
        whole_weight: whether program ids reach as far as a weight does, so that what is computed
            from them must have 64 bits.
        fused: fused multiply-adds that the kernel itself asks for, per thread; None to count none.
        needs: machine instructions that must occur, as regular expressions.
        stores: which of those that write global memory may occur, as a regular expression.
        most_per_element: the most machine instructions per element, or None.
    """

    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    launch: Launch
    unaligned: tuple[str, ...] = ()
    whole_weight: bool = True
    fused: int | None = 0
    needs: tuple[str, ...] = ()
    stores: str = ".*"
    most_per_element: float | None = None

    @property
    def aligned(self) -> list[str]:
        """The tensors that begin at a multiple of 16 bytes."""
        pointers = [name for name, kind in self.types.items() if kind.startswith("*")]
        return [name for name in pointers if name not in self.unaligned]


def elements_per_thread(launch: Launch) -> int:
    """How many elements one thread works on, at least one."""
    return max(launch.tile // (32 * launch.num_warps), 1)


def quantize_nf4() -> Iterator[Entry]:
    """Whole tiles; the last entry is for a slice of values, which may begin anywhere."""
    for dtype, block_size in product(FLOATS, BLOCK_SIZES):
        yield _quantize_nf4(QUANTIZE_NF4, dtype, block_size)
    for launch, block_size in product(QUANTIZE_NF4_CANDIDATES, BENCHED):
        if launch != QUANTIZE_NF4:
            yield _quantize_nf4(launch, "bf16", block_size)
    yield _quantize_nf4(QUANTIZE_NF4, "bf16", 64, unaligned=("values",))


def _quantize_nf4(
    launch: Launch, dtype: str, block_size: int, *, unaligned: tuple[str, ...] = ()
) -> Entry:
    return Entry(
        label=f"quantize_nf4 {dtype} block {block_size}{_told(launch, unaligned)}",
        kernel=nf4.quantize_nf4_kernel,
        types={"values": f"*{dtype}", "packed": "*u8", "absmax": "*fp32", "bins": "*i64"},
        constants={"BLOCK_SIZE": block_size, "BLOCKS": launch.tile // block_size},
        launch=launch,
        unaligned=unaligned,
        fused=elements_per_thread(launch),
        needs=() if unaligned else (r"LDG\.E\.128", r"STG\.E\.(64|128)"),
        stores=r"STG\.E(\.64|\.128)?",
        most_per_element=None if unaligned else 30,
    )


def quantize_nf4_rest() -> Iterator[Entry]:
    """What is left after whole tiles; it may begin anywhere."""
    for dtype, block_size in product(FLOATS, BLOCK_SIZES):
        yield Entry(
            label=f"quantize_nf4_rest {dtype} block {block_size}",
            kernel=nf4.quantize_nf4_rest_kernel,
            types={
                "values": f"*{dtype}",
                "packed": "*u8",
                "absmax": "*fp32",
                "bins": "*i64",
                "n": "i32",
            },
            constants={"BLOCK_SIZE": block_size},
            launch=Launch(tile=block_size, num_warps=NF4_REST.num_warps),
            unaligned=("values", "packed", "absmax", "bins"),
            whole_weight=False,
            fused=None,
        )


def dequantize_nf4() -> Iterator[Entry]:
    """Whole tiles, plain and doubly quantized; the last entry is for slices of codes and output."""
    for dtype, block_size, nested in product(FLOATS, BLOCK_SIZES, (True, False)):
        yield _dequantize_nf4(DEQUANTIZE_NF4, dtype, block_size, nested=nested)
    for launch, block_size in product(DEQUANTIZE_NF4_CANDIDATES, BENCHED):
        if launch != DEQUANTIZE_NF4:
            yield _dequantize_nf4(launch, "bf16", block_size, nested=True)
    yield _dequantize_nf4(DEQUANTIZE_NF4, "bf16", 64, nested=True, unaligned=("packed", "out"))


def _dequantize_nf4(
    launch: Launch,
    dtype: str,
    block_size: int,
    *,
    nested: bool,
    unaligned: tuple[str, ...] = (),
) -> Entry:
    told = _told(launch, unaligned)
    return Entry(
        label=f"dequantize_nf4 {dtype} block {block_size}{' nested' if nested else ''}{told}",
        kernel=nf4.dequantize_nf4_kernel,
        types=_types_of_dequantize(dtype, nested=nested),
        constants={
            "BLOCK_SIZE": block_size,
            "BLOCKS": launch.tile // block_size,
            "NESTED": nested,
            "GATHER": launch.gather,
        },
        launch=launch,
        unaligned=unaligned,
        needs=() if unaligned else (r"LDG\.E\.128", r"STG\.E\.128"),
        stores=".*" if unaligned else r"STG\.E\.128",
        most_per_element=None if unaligned else 12,
    )


def dequantize_nf4_rest() -> Iterator[Entry]:
    """What is left after whole tiles; it may begin anywhere."""
    for dtype, block_size, nested in product(FLOATS, BLOCK_SIZES, (True, False)):
        types = _types_of_dequantize(dtype, nested=nested)
        yield Entry(
            label=f"dequantize_nf4_rest {dtype} block {block_size}{' nested' if nested else ''}",
            kernel=nf4.dequantize_nf4_rest_kernel,
            types=types | {"n": "i32"},
            constants={"BLOCK_SIZE": block_size, "NESTED": nested},
            launch=Launch(tile=block_size, num_warps=NF4_REST.num_warps),
            unaligned=tuple(types),
            whole_weight=False,
        )


def _types_of_dequantize(dtype: str, *, nested: bool) -> dict[str, str]:
    return {
        "packed": "*u8",
        "absmax": "*u8" if nested else "*fp32",
        "nested_absmax": "*fp32",
        "offset": "*fp32",
        "levels": "*fp32",
        "dynamic_levels": "*fp32",
        "out": f"*{dtype}",
    }


def quantize_absmax() -> Iterator[Entry]:
    """The scales of double quantization."""
    yield Entry(
        label="quantize_absmax",
        kernel=quantize_absmax_kernel,
        types={
            "absmax": "*fp32",
            "offset": "*fp32",
            "thresholds": "*fp32",
            "codes": "*u8",
            "nested_absmax": "*fp32",
            "n": "i64",
        },
        constants={"BLOCKS": QUANTIZE_ABSMAX.tile // NESTED_BLOCK_SIZE},
        launch=QUANTIZE_ABSMAX,
    )


def adamw_32() -> Iterator[Entry]:
    """A step with moments in 32 bits."""
    moments = {"mean": "*fp32", "square": "*fp32"}
    for copy in COPIES:
        yield _adamw(
            "adamw_32", adamw.adamw_32_kernel, moments, copy, ADAMW_32, most_per_element=75
        )


def adamw_8() -> Iterator[Entry]:
    """A step with moments in 8 bits."""
    moments = {
        "mean": "*u8",
        "square": "*u8",
        "mean_absmax": "*fp32",
        "square_absmax": "*fp32",
        "mean_levels": "*fp32",
        "mean_thresholds": "*fp32",
        "mean_table": "*u8",
        "square_levels": "*fp32",
        "square_thresholds": "*fp32",
        "square_table": "*u8",
    }
    for copy in COPIES:
        yield _adamw("adamw_8", adamw.adamw_8_kernel, moments, copy, ADAMW_8, most_per_element=165)


def _adamw(
    label: str,
    kernel: Any,
    moments: dict[str, str],
    copy: str | None,
    launch: Launch,
    *,
    most_per_element: float,
) -> Entry:
    """With a working copy of the values in ``copy``'s type, or without one."""
    copies = {} if copy is None else {"copies": f"*{copy}"}
    numbers = ("decay", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps")
    return Entry(
        label=label if copy is None else f"{label} with a copy in {copy}",
        kernel=kernel,
        types={"values": "*fp32", "gradients": "*fp32"}
        | moments
        | copies
        | {"scalars": "*fp32"}
        | dict.fromkeys(numbers, "fp32"),
        constants={"TILE": launch.tile} | ({"copies": None} if copy is None else {}),
        launch=launch,
        # An exact root and exact quotients are made of them.
        fused=None,
        needs=(r"LDG\.E\.128", r"STG\.E\.128"),
        most_per_element=most_per_element,
    )


def _told(launch: Launch, unaligned: tuple[str, ...]) -> str:
    lookup = "" if launch.gather else " through L1"
    slices = f", {' and '.join(unaligned)} anywhere" if unaligned else ""
    return f", tile {launch.tile} of {launch.num_warps} warps{lookup}{slices}"


FAMILIES: tuple[Callable[[], Iterator[Entry]], ...] = (
    quantize_nf4,
    quantize_nf4_rest,
    dequantize_nf4,
    dequantize_nf4_rest,
    quantize_absmax,
    adamw_32,
    adamw_8,
)


def manifest() -> list[Entry]:
    """Give every entry of every family."""
    return [entry for family in FAMILIES for entry in family()]
