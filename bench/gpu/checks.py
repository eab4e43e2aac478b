"""Holds the kernels to the references and to bitsandbytes, bit for bit, on the device they run on.

The compiled kernels are checked nowhere else: pytest may be missing on a machine with a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu import rivals
from bench.gpu.groups import Group, Rows
from qlora_core import quantize_nf4
from qlora_core.quant.codebook import BLOCK_SIZES, NF4_THRESHOLDS
from qlora_core.quant.double_quant import launch as scales_launch
from qlora_core.quant.double_quant import reference as scales_reference
from qlora_core.quant.launches import (
    DEQUANTIZE_NF4,
    DEQUANTIZE_NF4_CANDIDATES,
    QUANTIZE_NF4_CANDIDATES,
)
from qlora_core.quant.nf4 import launch, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def groups(device: str) -> list[Group]:
    """Give the groups of this part."""
    sizes = BLOCK_SIZES if device == "cuda" else (64, 4096)
    found = [
        *(
            Group(f"checks block {size}", partial(_against_references, size, device))
            for size in sizes
        ),
        Group("checks hard values", partial(_hard_values, device)),
        Group("checks candidates", partial(_candidates, device)),
        Group("checks scales", partial(_scales, device)),
        Group("checks searched scales", partial(_searched_scales, device)),
        Group("checks beyond 2^31 elements", partial(_beyond_32_bits, device)),
    ]
    if rivals.why_absent(device) is None:
        found.append(Group("checks against bitsandbytes", partial(_against_bitsandbytes, device)))
    return found


def _against_references(block_size: int, device: str) -> Rows:
    """Both directions, all dtypes, plain and nested; a tile, a rest and an odd element."""
    rows: Rows = []
    for dtype in DTYPES:
        for n in (3 * block_size + 17, 2 * DEQUANTIZE_NF4.tile + 77):
            values = _normal(n).to(dtype)
            packed, absmax = reference.quantize_nf4(values, block_size=block_size)
            got_packed, got_absmax = launch.launch_quantize(
                values.to(device), block_size=block_size
            )
            row: dict[str, Any] = {
                "dtype": str(dtype),
                "n": n,
                "wrong_codes": _differing(got_packed, packed),
                "wrong_scales": _differing(got_absmax, absmax),
            }
            for nested in (False, True):
                key = "wrong_values_nested" if nested else "wrong_values_plain"
                row[key] = _wrong_values(
                    packed, absmax, n, block_size, dtype, device, nested=nested
                )
            rows.append(row)
    return rows


def _wrong_values(
    packed: Tensor,
    absmax: Tensor,
    n: int,
    block_size: int,
    dtype: torch.dtype,
    device: str,
    *,
    nested: bool,
) -> int:
    codes, nested_absmax, offset, scales = absmax, None, None, absmax
    if nested:
        codes, nested_absmax, offset = scales_reference.quantize_absmax(absmax)
        scales = scales_reference.dequantize_absmax(codes, nested_absmax, offset)
    out = torch.full((n,), torch.nan, dtype=dtype, device=device)
    launch.launch_dequantize(
        packed.to(device),
        codes.to(device),
        None if nested_absmax is None else nested_absmax.to(device),
        None if offset is None else offset.to(device),
        out,
        block_size=block_size,
    )
    expected = reference.dequantize_nf4(packed, scales, n=n, block_size=block_size, dtype=dtype)
    return _differing(out, expected)


def _hard_values(device: str) -> Rows:
    """What rounding, ties and extremes are made of; quantized in blocks of 32."""
    on = torch.tensor(NF4_THRESHOLDS)
    ties = torch.cat([on, on.nextafter(torch.tensor(2.0)), on.nextafter(torch.tensor(-2.0))])
    normal = _normal(DEQUANTIZE_NF4.tile + 77)
    outliers, zeros, extremes = normal.clone(), normal.clone(), normal.clone()
    outliers[17::64] *= 1000
    zeros[64:3000] = 0.0
    extremes[::37] = torch.finfo(torch.float32).max
    makers = {
        # A one in each block, so that the others are scaled by one.
        "ties": torch.cat([torch.ones(135, 1), ties.repeat(93).view(135, 31)], dim=1).view(-1),
        "subnormal": normal * 1e-40,
        "outliers": outliers,
        "zero blocks": zeros,
        "largest float32": extremes,
        "constant": torch.full((4173,), -0.37),
    }
    rows: Rows = []
    for name, values in makers.items():
        packed, absmax = reference.quantize_nf4(values, block_size=32)
        got_packed, got_absmax = launch.launch_quantize(values.to(device), block_size=32)
        rows.append(
            {
                "values": name,
                "wrong_codes": _differing(got_packed, packed),
                "wrong_scales": _differing(got_absmax, absmax),
                "wrong_values": _wrong_values(
                    packed, absmax, values.numel(), 32, torch.float32, device, nested=False
                ),
            }
        )
    return rows


def _candidates(device: str) -> Rows:
    """Every way to launch gives the same bits."""
    rows: Rows = []
    n = 3 * 8192 + 5
    values = _normal(n)
    packed, absmax = reference.quantize_nf4(values, block_size=64)
    for candidate in QUANTIZE_NF4_CANDIDATES:
        got, _ = launch.launch_quantize(values.to(device), block_size=64, launch=candidate)
        rows.append({"quantize": str(candidate), "wrong_codes": _differing(got, packed)})
    expected = reference.dequantize_nf4(packed, absmax, n=n, block_size=64, dtype=torch.bfloat16)
    for candidate in DEQUANTIZE_NF4_CANDIDATES:
        out = torch.full((n,), torch.nan, dtype=torch.bfloat16, device=device)
        launch.launch_dequantize(
            packed.to(device), absmax.to(device), None, None, out, block_size=64, launch=candidate
        )
        rows.append({"dequantize": str(candidate), "wrong_values": _differing(out, expected)})
    return rows


def _scales(device: str) -> Rows:
    """Double quantization of scales; the mean is the device's own, as the format says."""
    rows: Rows = []
    for n in (1, 255, 256, 1025, 100_003 if device == "cuda" else 5000):
        absmax = (_normal(n).abs() * 0.01 + 0.04).to(device)
        got = scales_launch.launch_quantize(absmax)
        expected = scales_reference.quantize_absmax(absmax)
        names = ("wrong_codes", "wrong_nested_scales", "wrong_offset")
        counts = (_differing(a, b) for a, b in zip(got, expected, strict=True))
        rows.append({"n": n} | dict(zip(names, counts, strict=True)))
    return rows


def _searched_scales(device: str) -> Rows:
    """``scale="mse"``: no block's error grows, and the kernel reads what was found as the CPU does.

    Against a CPU's search differences are counted, not judged: sums in another order may prefer
    another of two scales that are nearly as good.
    """
    n = 2**20 + 77 if device == "cuda" else 2 * DEQUANTIZE_NF4.tile + 77
    rows: Rows = []
    for dtype in DTYPES:
        values = _normal(n).to(dtype)
        for double_quant in (False, True):
            weight = quantize_nf4(values.to(device), double_quant=double_quant, scale="mse")
            plain = quantize_nf4(values.to(device), double_quant=double_quant).to("cpu")
            on_cpu = quantize_nf4(values, double_quant=double_quant, scale="mse")
            out = torch.full((n,), torch.nan, device=device)
            launch.launch_dequantize(
                weight.packed,
                weight.absmax,
                weight.nested_absmax,
                weight.offset,
                out,
                block_size=64,
            )
            error = _squared_errors(values, out)
            before = _squared_errors(values, plain.dequantize(torch.float32))
            rows.append(
                {
                    "dtype": str(dtype),
                    "double_quant": double_quant,
                    "wrong_values": _differing(out, weight.to("cpu").dequantize(torch.float32)),
                    # Summed in another order than where it was decided.
                    "wrong_blocks": int((error > before * (1 + 1e-12)).sum()),
                    "share_of_error": float(error.sum() / before.sum()),
                    "differing_codes": _differing(weight.packed, on_cpu.packed),
                    "differing_scales": _differing(weight.absmax, on_cpu.absmax),
                }
            )
    return rows


def _squared_errors(values: Tensor, back: Tensor) -> Tensor:
    """Sum the squared errors of each block of 64: float64."""
    squares = (values.double() - back.cpu().double()).square()
    return torch.stack([block.sum() for block in squares.split(64)])


def _beyond_32_bits(device: str) -> Rows:
    """A weight of more than 2^31 elements, both ways, compared at its begin, middle and very end."""
    n = (2**31 if device == "cuda" else 2**13) + 3 * 4096 + 77
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 8 * n:
        return [{"n": n, "skipped": "less than 16 GiB of GPU memory are free"}]
    values = torch.empty(n, dtype=torch.bfloat16, device=device).normal_()
    packed, absmax = launch.launch_quantize(values, block_size=64)
    out = torch.full((n,), torch.nan, dtype=torch.bfloat16, device=device)
    launch.launch_dequantize(packed, absmax, None, None, out, block_size=64)
    rows: Rows = []
    for start in (0, n // 2 // 64 * 64, n // 64 * 64 - 64 * 100):
        part = values[start : start + 64 * 100 + 77]
        expected_packed, expected_absmax = reference.quantize_nf4(part, block_size=64)
        expected = reference.dequantize_nf4(
            expected_packed, expected_absmax, n=len(part), block_size=64, dtype=torch.bfloat16
        )
        whole = len(part) // 64 * 64  # the slice may end in the middle of a block
        rows.append(
            {
                "n": n,
                "from": start,
                "wrong_codes": _differing(
                    packed[start // 2 :][: whole // 2], expected_packed[: whole // 2]
                ),
                "wrong_values": _differing(out[start:][:whole], expected[:whole]),
            }
        )
    rows.append({"n": n, "wrong_unwritten": int(out[-5000:].isnan().sum())})
    return rows


def _against_bitsandbytes(device: str) -> Rows:
    """Equal where docs/formats/nf4.md says so; what differs on purpose is counted, not judged."""
    shape = (1024, 1024) if device == "cuda" else (64, 128)
    rows: Rows = []
    for dtype in DTYPES:
        values = _normal(shape[0] * shape[1]).view(shape).to(device, dtype)
        for block_size in (64, 4096):
            for double_quant in (False, True):
                weight = quantize_nf4(values, block_size=block_size, double_quant=double_quant)
                back = weight.dequantize()
                theirs = rivals.state_of(weight).dequantize()
                packed, state = rivals.quantize(
                    values, block_size=block_size, double_quant=double_quant
                )
                rows.append(
                    {
                        "dtype": str(dtype),
                        "block_size": block_size,
                        "double_quant": double_quant,
                        "wrong_values": _differing(back, theirs),
                        # Its CUDA build approximates the reciprocal; its CPU code rounds 8-bit codes.
                        "differing_codes": _differing(weight.packed, packed.view(-1)),
                        "differing_scales": _differing(weight.absmax, state.absmax),
                    }
                )
    zeros = torch.zeros(64, 64, device=device)
    packed, _ = rivals.quantize(zeros, block_size=64, double_quant=False)
    ours = quantize_nf4(zeros).packed
    rows.append(
        {
            "zero_block": "its codes, on purpose ours are 7",
            "theirs": f"{int(packed.view(-1)[0]):02x}",
            "ours": f"{int(ours[0]):02x}",
            "wrong_codes": int((ours != 0x77).sum()),
        }
    )
    return rows


def _normal(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


def _differing(actual: Tensor, expected: Tensor) -> int:
    """Count elements that are not equal; a NaN is equal to nothing."""
    return int((actual.cpu() != expected.cpu()).sum())
