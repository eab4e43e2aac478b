"""NF4 to floats on x86 CPUs by machine code, where llvmlite is installed; the same bits as `reference`.

torch has no vectorized table look-up, which is all that dequantizing is. So the loop is written here in LLVM's
intermediate language and compiled into memory at its first use, which takes some ten milliseconds for each kind of
result, and a tenth of a second to import llvmlite: no compiler, no files.

A block has sixteen possible results, its scale times each level. They are computed and rounded once per block and split
into planes: their first bytes, their second bytes, and so on. One instruction (PSHUFB) then looks up the bytes of sixteen
elements in a plane, and what the planes give is interleaved.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_core.quant.codebook import NESTED_BLOCK_SIZE, NF4_LEVELS, dynamic_map
from qlora_core.quant.threads import share

# Elements that a thread takes at a time, a multiple of every nested block. Smaller ones cost more than they spread:
# waking two threads takes as long as a million elements.
_CHUNK = 2 * 1024 * 1024

# Not tensors, which may belong to whatever mode of torch they were first made in.
_LEVELS = (ctypes.c_float * len(NF4_LEVELS))(*NF4_LEVELS)
_MAP = (ctypes.c_float * 256)(*dynamic_map(signed=True))

_LLVM_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "i16"}
_FEATURES = {torch.float32: "ssse3", torch.float16: "f16c", torch.bfloat16: "ssse3"}
"""What a CPU must have for a dtype; F16C comes with AVX and so with SSSE3."""

_FUNCTION = """
declare <16 x i8> @llvm.x86.ssse3.pshuf.b.128(<16 x i8>, <16 x i8>)

define void @dequantize(ptr %packed, ptr %absmax, ptr %nested_absmax, ptr %offset, ptr %levels, ptr %map,
                        ptr noalias %out, i64 %blocks, i64 %pieces) {
entry:
  %levels.16 = load <16 x float>, ptr %levels, align 1
  br label %block

block:
  %b = phi i64 [0, %entry], [%b.next, %block.end]
  %block.from = phi ptr [%packed, %entry], [%from.next, %block.end]
  %block.to = phi ptr [%out, %entry], [%to.next, %block.end]
SCALE
  %scale.1 = insertelement <16 x float> poison, float %scale, i32 0
  %scale.16 = shufflevector <16 x float> %scale.1, <16 x float> poison, <16 x i32> zeroinitializer
  %products = fmul <16 x float> %levels.16, %scale.16
ROUND
PLANES
  br label %piece

piece:  ; sixteen bytes, thirty-two elements
  %p = phi i64 [0, %block], [%p.next, %piece]
  %from = phi ptr [%block.from, %block], [%from.next, %piece]
  %to = phi ptr [%block.to, %block], [%to.next, %piece]
  %bytes = load <16 x i8>, ptr %from, align 1
  %even = lshr <16 x i8> %bytes, splat (i8 4)
  %odd = and <16 x i8> %bytes, splat (i8 15)
LOOK_UP
  %from.next = getelementptr i8, ptr %from, i64 16
  %to.next = getelementptr i8, ptr %to, i64 WRITTEN
  %p.next = add i64 %p, 1
  %more.pieces = icmp ult i64 %p.next, %pieces
  br i1 %more.pieces, label %piece, label %block.end

block.end:
  %b.next = add i64 %b, 1
  %more.blocks = icmp ult i64 %b.next, %blocks
  br i1 %more.blocks, label %block, label %done

done:
  ret void
}
"""

_PLAIN_SCALE = """
  %scale.at = getelementptr float, ptr %absmax, i64 %b
  %scale = load float, ptr %scale.at, align 1
"""

# LLVM fuses no multiplication with an addition unless it is told to.
_NESTED_SCALE = """
  %code.at = getelementptr i8, ptr %absmax, i64 %b
  %code = load i8, ptr %code.at
  %place = zext i8 %code to i64
  %level.at = getelementptr float, ptr %map, i64 %place
  %level = load float, ptr %level.at, align 1
  %nested.block = udiv i64 %b, NESTED_BLOCK_SIZE
  %nested.at = getelementptr float, ptr %nested_absmax, i64 %nested.block
  %nested = load float, ptr %nested.at, align 1
  %distance = fmul float %level, %nested
  %mean = load float, ptr %offset, align 1
  %scale = fadd float %distance, %mean
"""

# By integers, since the CPU's own instruction makes subnormal numbers zero.
_TO_BFLOAT16 = """
  %bits = bitcast <16 x float> %products to <16 x i32>
  %kept = lshr <16 x i32> %bits, splat (i32 16)
  %last = and <16 x i32> %kept, splat (i32 1)
  %half = add <16 x i32> %last, splat (i32 32767)
  %up = add <16 x i32> %bits, %half
  %nearest = lshr <16 x i32> %up, splat (i32 16)
  %nan = fcmp uno <16 x float> %products, zeroinitializer
  %upper = select <16 x i1> %nan, <16 x i32> splat (i32 32704), <16 x i32> %nearest
  %results = trunc <16 x i32> %upper to <16 x i16>
"""

_ROUND = {
    torch.float32: "",
    torch.float16: "  %results = fptrunc <16 x float> %products to <16 x half>",
    torch.bfloat16: _TO_BFLOAT16,
}


def fill(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    *,
    block_size: int,
) -> bool:
    """Fill ``out`` with what the two `reference` modules give, if that can be done here.

    Args:
        packed: uint8 [n / 2] on the CPU, contiguous; this and the others in plain memory.
        absmax: [n / block_size], float32 scales, or their uint8 codes.
        nested_absmax: float32 [ceil(blocks / 256)] when there are codes, else None.
        offset: float32 [] when there are codes, else None.
        out: float32, float16 or bfloat16 [n], contiguous; whole blocks.
        block_size: elements per scale, a multiple of 32.

    Returns:
        Whether it was done: False without llvmlite, on CPUs that lack the instructions, and where no memory may
        become executable.
    """
    nested = nested_absmax is not None and offset is not None
    function = _function(out.dtype, nested=nested)
    if function is None:
        return False
    tables = ctypes.addressof(_LEVELS), ctypes.addressof(_MAP)
    packed_at, absmax_at, out_at = packed.data_ptr(), absmax.data_ptr(), out.data_ptr()
    nested_at = offset_at = 0  # which only the function for codes reads
    if nested_absmax is not None and offset is not None:
        nested_at, offset_at = nested_absmax.data_ptr(), offset.data_ptr()
    blocks = absmax.numel()
    step = max(_CHUNK // block_size, NESTED_BLOCK_SIZE)

    def work(starts: Iterator[int]) -> None:
        for start in starts:
            function(  # which gives Python's lock away meanwhile
                packed_at + start * block_size // 2,
                absmax_at + start * absmax.itemsize,
                nested_at + start // NESTED_BLOCK_SIZE * 4,
                offset_at,
                *tables,
                out_at + start * block_size * out.itemsize,
                min(step, blocks - start),
                block_size // 32,
            )

    share(range(0, blocks, step), work)
    torch.autograd.graph.increment_version(out)  # as torch's own operations do
    return True


def is_compiled(dtype: torch.dtype) -> bool:
    """Whether results of ``dtype`` are made here, and not by tables."""
    return _function(dtype, nested=True) is not None


@cache
def _function(dtype: torch.dtype, *, nested: bool) -> Callable[..., None] | None:
    """Give the loop for results of ``dtype``; None where there is no such thing."""
    if platform.machine() not in ("x86_64", "AMD64") or not _may_execute():
        return None
    try:
        return _compile(dtype, nested=nested)
    except Exception:  # noqa: BLE001 - no llvmlite, or one that is broken in any way; the tables need none
        return None


def _may_execute() -> bool:
    """Tell whether memory that was written to may become executable; LLVM crashes where that is refused."""
    if os.name != "posix":
        return True
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    size = ctypes.c_size_t(mmap.PAGESIZE)
    protection = mmap.PROT_READ | mmap.PROT_EXEC
    return ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), size, protection) == 0


def _compile(dtype: torch.dtype, *, nested: bool) -> Callable[..., None] | None:
    """Compile the loop for results of ``dtype``; None where the CPU lacks the instructions."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    if not features.get(_FEATURES[dtype]):
        return None
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    module = binding.parse_assembly(_source(dtype, nested=nested))
    module.verify()
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    pointers, counts = [ctypes.c_void_p] * 7, [ctypes.c_int64] * 2
    function: Any = ctypes.CFUNCTYPE(None, *pointers, *counts)(
        engine.get_function_address("dequantize")
    )
    function.engine = engine  # owns the machine code
    return function


def _source(dtype: torch.dtype, *, nested: bool) -> str:
    """Write the loop for results of ``dtype`` in LLVM's intermediate language."""
    size = dtype.itemsize
    scale = _NESTED_SCALE if nested else _PLAIN_SCALE
    return (
        _FUNCTION.replace("SCALE", scale)
        .replace("NESTED_BLOCK_SIZE", str(NESTED_BLOCK_SIZE))
        .replace("ROUND", _ROUND[dtype])
        .replace("PLANES", "\n".join(_planes(dtype)))
        .replace("LOOK_UP", "\n".join(_look_up(size)))
        .replace("WRITTEN", str(32 * size))
    )


def _planes(dtype: torch.dtype) -> Iterator[str]:
    """Split the block's sixteen results into %plane.0, %plane.1, ...: one byte of each."""
    size = dtype.itemsize
    kind = f"<{16 * size} x i8>"
    results = "%products" if dtype == torch.float32 else "%results"
    yield f"  %result.bytes = bitcast <16 x {_LLVM_TYPES[dtype]}> {results} to {kind}"
    for plane in range(size):
        picked = _indices(range(plane, 16 * size, size))
        yield f"  %plane.{plane} = shufflevector {kind} %result.bytes, {kind} poison, {picked}"


def _look_up(size: int) -> Iterator[str]:
    """Find the results of %even and %odd, sixteen elements at a time, and store them at %to."""
    for half in range(2):
        first = 8 * half
        codes = _indices(place for i in range(first, first + 8) for place in (i, 16 + i))
        yield f"  %codes.{half} = shufflevector <16 x i8> %even, <16 x i8> %odd, {codes}"
        for plane in range(size):
            yield (
                f"  %found.{half}.{plane} = call <16 x i8> @llvm.x86.ssse3.pshuf.b.128("
                f"<16 x i8> %plane.{plane}, <16 x i8> %codes.{half})"
            )
        for plane in range(0, size, 2):
            pair = _indices(place for i in range(16) for place in (i, 16 + i))
            yield (
                f"  %pair.{half}.{plane} = shufflevector <16 x i8> %found.{half}.{plane}, "
                f"<16 x i8> %found.{half}.{plane + 1}, {pair}"
            )
        whole = f"%pair.{half}.0"
        if size == 4:
            four = _indices(place for i in range(0, 32, 2) for place in (i, i + 1, 32 + i, 33 + i))
            whole = f"%whole.{half}"
            yield (
                f"  {whole} = shufflevector <32 x i8> %pair.{half}.0, <32 x i8> %pair.{half}.2, {four}"
            )
        yield f"  %to.{half} = getelementptr i8, ptr %to, i64 {16 * size * half}"
        yield f"  store <{16 * size} x i8> {whole}, ptr %to.{half}, align 1"


def _indices(places: Iterable[int]) -> str:
    """Write a constant vector, such as ``<2 x i32> <i32 0, i32 5>``."""
    listed = [f"i32 {place}" for place in places]
    return f"<{len(listed)} x i32> <{', '.join(listed)}>"
