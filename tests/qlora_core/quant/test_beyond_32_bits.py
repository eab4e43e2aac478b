"""More elements than 32 bits count: kernels and CPU path far inside such a weight, without its memory.

The memory is a sparse file, of which only what is touched exists. Kernels run for the programs that
begin beyond 2^31 elements, the CPU path for the chunks there. Then the same kernels count in 16 bits on
a small weight: they are right up to 2^15 elements and wrong after, so the one type is what decides.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_core.quant.codebook import (
    NESTED_BLOCK_SIZE,
    dynamic_levels,
    dynamic_thresholds,
    nf4_levels,
)
from qlora_core.quant.double_quant import kernels as double_quant_kernels
from qlora_core.quant.double_quant import reference as double_quant_reference
from qlora_core.quant.launches import DEQUANTIZE_NF4, QUANTIZE_ABSMAX, QUANTIZE_NF4
from qlora_core.quant.nf4 import cpu, reference
from qlora_core.quant.nf4 import kernels as nf4_kernels
from qlora_core.quant.nf4.bins import code_bins

FAR = 2**31
BLOCK_SIZE = 64


@pytest.fixture
def sparse(tmp_path: Path) -> Callable[[int, torch.dtype], Tensor]:
    """Makes tensors of zeros whose pages exist once they are written."""

    def make(n: int, dtype: torch.dtype) -> Tensor:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        with file.open("wb") as empty:
            empty.truncate(n * dtype.itemsize)
        return torch.from_file(str(file), shared=True, size=n, dtype=dtype)

    return make


@pytest.fixture
def beginning_at(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the programs of later launches count from a number on."""
    if kernel_device != "cpu":
        pytest.skip("a GPU has the memory: bench/gpu/checks.py")
    from triton.runtime.interpreter import InterpreterBuilder

    set_size, set_place = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx

    def begin(first: int) -> None:
        def set_later_size(builder: Any, x: int, y: int, z: int) -> None:
            set_size(builder, x + first, y, z)

        def set_later_place(builder: Any, x: int, y: int, z: int) -> None:
            set_place(builder, x + first, y, z)

        monkeypatch.setattr(InterpreterBuilder, "set_grid_dim", set_later_size)
        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_later_place)

    return begin


def normal(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


def test_quantizing_beyond_2_to_31_elements_equals_the_reference(
    sparse: Callable[[int, torch.dtype], Tensor], beginning_at: Callable[[int], None]
) -> None:
    n = FAR + 2 * QUANTIZE_NF4.tile
    values, packed = sparse(n, torch.bfloat16), sparse(n // 2, torch.uint8)
    absmax = sparse(n // BLOCK_SIZE, torch.float32)
    values[FAR:] = normal(n - FAR)

    beginning_at(FAR // QUANTIZE_NF4.tile)
    quantize(nf4_kernels, values, packed, absmax, programs=2)

    expected_packed, expected_absmax = reference.quantize_nf4(values[FAR:], block_size=BLOCK_SIZE)
    assert torch.equal(packed[FAR // 2 :], expected_packed)
    assert torch.equal(absmax[FAR // BLOCK_SIZE :], expected_absmax)


def test_dequantizing_beyond_2_to_31_elements_equals_the_references(
    sparse: Callable[[int, torch.dtype], Tensor], beginning_at: Callable[[int], None]
) -> None:
    n = FAR + 2 * DEQUANTIZE_NF4.tile
    packed, out = sparse(n // 2, torch.uint8), sparse(n, torch.bfloat16)
    codes = sparse(n // BLOCK_SIZE, torch.uint8)
    nested_absmax = sparse(-(-n // BLOCK_SIZE // NESTED_BLOCK_SIZE), torch.float32)
    far_packed, far_absmax = reference.quantize_nf4(normal(n - FAR), block_size=BLOCK_SIZE)
    far_codes, far_nested, offset = double_quant_reference.quantize_absmax(far_absmax)
    packed[FAR // 2 :], codes[FAR // BLOCK_SIZE :] = far_packed, far_codes
    nested_absmax[FAR // BLOCK_SIZE // NESTED_BLOCK_SIZE :] = far_nested
    out[FAR:] = torch.nan

    beginning_at(FAR // DEQUANTIZE_NF4.tile)
    dequantize(nf4_kernels, packed, codes, nested_absmax, offset, out, programs=2)

    scales = double_quant_reference.dequantize_absmax(far_codes, far_nested, offset)
    expected = reference.dequantize_nf4(
        far_packed, scales, n=n - FAR, block_size=BLOCK_SIZE, dtype=torch.bfloat16
    )
    assert torch.equal(out[FAR:], expected)


def test_quantizing_more_than_2_to_31_scales_equals_the_reference(
    sparse: Callable[[int, torch.dtype], Tensor], beginning_at: Callable[[int], None]
) -> None:
    n = FAR + QUANTIZE_ABSMAX.tile + 300
    absmax, codes = sparse(n, torch.float32), sparse(n, torch.uint8)
    nested_absmax = sparse(-(-n // NESTED_BLOCK_SIZE), torch.float32)
    absmax[FAR:] = normal(n - FAR).abs()
    offset = absmax[FAR:].mean()

    beginning_at(FAR // QUANTIZE_ABSMAX.tile)
    quantize_absmax(double_quant_kernels, absmax, offset, codes, nested_absmax, programs=2)

    far_codes, far_nested, _ = double_quant_reference.quantize_absmax(absmax[FAR:])
    assert torch.equal(codes[FAR:], far_codes)
    assert torch.equal(nested_absmax[FAR // NESTED_BLOCK_SIZE :], far_nested)


def test_the_cpu_path_beyond_2_to_31_elements_equals_the_references(
    sparse: Callable[[int, torch.dtype], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    n = FAR + 2**19 + 77  # a chunk, then a short one and a short block
    values, out = sparse(n, torch.bfloat16), sparse(n, torch.bfloat16)
    values[FAR:], out[FAR:] = normal(n - FAR), torch.nan
    expected_packed, expected_absmax = reference.quantize_nf4(values[FAR:], block_size=BLOCK_SIZE)
    expected = reference.dequantize_nf4(
        expected_packed, expected_absmax, n=n - FAR, block_size=BLOCK_SIZE, dtype=torch.bfloat16
    )
    monkeypatch.setattr(cpu, "share", only_the_last_two)

    packed, absmax = cpu.quantize_nf4(values, block_size=BLOCK_SIZE, name="values")
    cpu.dequantize_nf4_into(packed, absmax, None, None, out, block_size=BLOCK_SIZE)

    assert torch.equal(packed[FAR // 2 :], expected_packed)
    assert torch.equal(absmax[FAR // BLOCK_SIZE :], expected_absmax)
    assert torch.equal(out[FAR:], expected)


def only_the_last_two(parts: Sequence[Any], work: Callable[[Any], None]) -> None:
    """Spare the thousands of chunks before, each of which is a view of its own."""
    work(iter(parts[-2:]))


def test_with_16_bits_the_kernels_would_be_wrong_from_2_to_15_elements_on(
    kernel_device: str, tmp_path: Path
) -> None:
    if kernel_device != "cpu":
        pytest.skip("reads memory before the tensors")
    limit, n = 2**15, 2**15 + 4096
    nf4 = counting_in_16_bits(nf4_kernels, tmp_path)
    double_quant = counting_in_16_bits(double_quant_kernels, tmp_path)
    values, absmax = after(limit, normal(n)), after(limit, torch.zeros(n // BLOCK_SIZE))
    packed = after(limit, torch.zeros(n // 2, dtype=torch.uint8))
    scales, nested_absmax = after(limit, normal(n).abs()), after(limit, torch.zeros(n // 256))
    codes, out = after(limit, torch.zeros(n, dtype=torch.uint8)), after(limit, torch.zeros(n))
    offset = scales.mean()

    quantize(nf4, values, packed, absmax, programs=9)
    quantize_absmax(double_quant, scales, offset, codes, nested_absmax, programs=n // 1024)
    expected_packed, expected_absmax = reference.quantize_nf4(values, block_size=BLOCK_SIZE)
    expected_codes, _, _ = double_quant_reference.quantize_absmax(scales)
    small = double_quant_reference.quantize_absmax(expected_absmax)
    dequantize(nf4, expected_packed, *small, out, programs=9)

    expected = reference.dequantize_nf4(
        expected_packed,
        double_quant_reference.dequantize_absmax(*small),
        n=n,
        block_size=BLOCK_SIZE,
        dtype=torch.float32,
    )
    assert torch.equal(packed[: limit // 2], expected_packed[: limit // 2])
    assert torch.equal(codes[:limit], expected_codes[:limit])
    assert torch.equal(out[:limit], expected[:limit])
    assert not torch.equal(packed[limit // 2 :], expected_packed[limit // 2 :])
    assert not torch.equal(codes[limit:], expected_codes[limit:])
    assert not torch.equal(out[limit:], expected[limit:])


def counting_in_16_bits(module: Any, folder: Path) -> Any:
    """Import a copy of a module with kernels in which tiles begin at 16-bit numbers."""
    source = Path(module.__file__).read_text()
    assert "tl.program_id(0).to(tl.int64)" in source
    file = folder / f"{module.__name__.replace('.', '_')}_in_16_bits.py"
    file.write_text(source.replace("tl.int64", "tl.int16"))
    spec: Any = importlib.util.spec_from_file_location(file.stem, file)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def after(n: int, tensor: Tensor) -> Tensor:
    """Give a copy with the memory of ``n`` elements before it, where negative places end up."""
    return torch.cat([torch.zeros(n, dtype=tensor.dtype), tensor])[n:]


def quantize(
    kernels: Any, values: Tensor, packed: Tensor, absmax: Tensor, *, programs: int
) -> None:
    kernels.quantize_nf4_kernel[(programs,)](
        values,
        packed,
        absmax,
        code_bins(values.device),
        BLOCK_SIZE=BLOCK_SIZE,
        BLOCKS=QUANTIZE_NF4.tile // BLOCK_SIZE,
        **QUANTIZE_NF4.options,
    )


def dequantize(
    kernels: Any,
    packed: Tensor,
    codes: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    out: Tensor,
    *,
    programs: int,
) -> None:
    kernels.dequantize_nf4_kernel[(programs,)](
        packed,
        codes,
        nested_absmax,
        offset,
        nf4_levels(packed.device),
        dynamic_levels(packed.device),
        out,
        BLOCK_SIZE=BLOCK_SIZE,
        BLOCKS=DEQUANTIZE_NF4.tile // BLOCK_SIZE,
        NESTED=True,
        GATHER=True,
        **DEQUANTIZE_NF4.options,
    )


def quantize_absmax(
    kernels: Any,
    absmax: Tensor,
    offset: Tensor,
    codes: Tensor,
    nested_absmax: Tensor,
    *,
    programs: int,
) -> None:
    kernels.quantize_absmax_kernel[(programs,)](
        absmax,
        offset,
        dynamic_thresholds(absmax.device),
        codes,
        nested_absmax,
        absmax.numel(),
        BLOCKS=QUANTIZE_ABSMAX.tile // NESTED_BLOCK_SIZE,
        **QUANTIZE_ABSMAX.options,
    )
