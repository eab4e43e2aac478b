"""The two ways of dequantizing whole blocks on a CPU, compiled and by tables, against the reference, bit for bit."""

import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from qlora_core import quantize_nf4
from qlora_core.quant.codebook import BLOCK_SIZES
from qlora_core.quant.double_quant import reference as double_quant_reference
from qlora_core.quant.nf4 import compiled, cpu, reference

Fill = Callable[..., bool | None]
CAN_COMPILE = find_spec("llvmlite") is not None and platform.machine() in ("x86_64", "AMD64")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[compiled.fill, cpu.fill_by_tables], ids=["compiled", "by tables"])
def fill(request: pytest.FixtureRequest) -> Fill:
    if request.param is compiled.fill and not CAN_COMPILE:
        pytest.skip("compiled code needs llvmlite and an x86 CPU")
    return request.param


def codes_and_scales(blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Every byte there is, in random order, under scales of every size."""
    generator = torch.Generator().manual_seed(blocks)
    n = blocks * block_size // 2
    packed = torch.arange(n).remainder(256)[torch.randperm(n, generator=generator)]
    exponents = torch.linspace(-44, 38, blocks)[torch.randperm(blocks, generator=generator)]
    return packed.to(torch.uint8), 3 * 10**exponents


def expected_of(packed: Tensor, scales: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    n = 2 * packed.numel()
    return reference.dequantize_nf4(packed, scales, n=n, block_size=block_size, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("blocks", [1, 83])
def test_scales_in_float32(blocks: int, block_size: int, dtype: torch.dtype, fill: Fill) -> None:
    packed, absmax = codes_and_scales(blocks, block_size)
    out = torch.full((2 * packed.numel(),), torch.nan, dtype=dtype)

    fill(packed, absmax, None, None, out, block_size=block_size)

    assert torch.equal(out, expected_of(packed, absmax, block_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("blocks", [1, 256, 601])
def test_doubly_quantized_scales(
    blocks: int, block_size: int, dtype: torch.dtype, fill: Fill
) -> None:
    packed, _ = codes_and_scales(blocks, block_size)
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)) * 1e-3
    codes, nested_absmax, offset = double_quant_reference.quantize_absmax(absmax)
    out = torch.full((2 * packed.numel(),), torch.nan, dtype=dtype)

    fill(packed, codes, nested_absmax, offset, out, block_size=block_size)

    scales = double_quant_reference.dequantize_absmax(codes, nested_absmax, offset)
    assert torch.equal(out, expected_of(packed, scales, block_size, dtype))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [32, 4096])
def test_more_than_one_part_for_each_thread(block_size: int, nested: bool, fill: Fill) -> None:
    blocks = 2 * 1024 * 1024 // block_size + 300
    packed, absmax = codes_and_scales(blocks, block_size)
    nested_absmax = offset = None
    scales = absmax
    if nested:
        absmax, nested_absmax, offset = double_quant_reference.quantize_absmax(
            torch.linspace(0.1, 0.5, blocks)
        )
        scales = double_quant_reference.dequantize_absmax(absmax, nested_absmax, offset)
    out = torch.full((2 * packed.numel(),), torch.nan, dtype=torch.bfloat16)

    fill(packed, absmax, nested_absmax, offset, out, block_size=block_size)

    assert torch.equal(out, expected_of(packed, scales, block_size, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_that_are_not_finite_or_negative(dtype: torch.dtype, fill: Fill) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(5)
    absmax = torch.tensor([torch.inf, torch.nan, -2.5, -0.0, 3e38]).repeat_interleave(2)
    absmax[3:4].view(torch.int32).fill_(0x7FFFFFFF)  # the NaN that rounding by integers would spoil
    out = torch.zeros(2560, dtype=dtype)

    fill(packed, absmax, None, None, out, block_size=256)

    torch.testing.assert_close(
        out, expected_of(packed, absmax, 256, dtype), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_begins_anywhere_and_nothing_beside_it(dtype: torch.dtype, fill: Fill) -> None:
    packed, absmax = codes_and_scales(7, 64)
    memory = torch.full((7 * 64 + 2,), torch.nan, dtype=dtype)
    odd_packed = torch.empty(7 * 32 + 1, dtype=torch.uint8)[1:].copy_(packed)

    fill(odd_packed, absmax, None, None, memory[1:-1], block_size=64)

    assert torch.equal(memory[1:-1], expected_of(packed, absmax, 64, dtype))
    assert memory[[0, -1]].isnan().all()


def test_autograd_sees_that_a_tensor_was_written(fill: Fill) -> None:
    packed, absmax = codes_and_scales(3, 64)
    out = torch.ones(192)
    product = (out * torch.ones(192, requires_grad=True)).sum()

    fill(packed, absmax, None, None, out, block_size=64)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def run(script: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, which may be killed by what it does."""
    command = [sys.executable, "-c", f"import sys\n{script}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    "broken",
    [
        "sys.modules['llvmlite'] = None",
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'llvmlite': raise OSError('Could not find/load shared object file')\n"
        "sys.meta_path.insert(0, Finder())",
        "import types\n"
        "sys.modules['llvmlite'] = types.ModuleType('llvmlite')\n"
        "binding = sys.modules['llvmlite'].binding = types.ModuleType('binding')",
    ],
    ids=["missing", "cannot be loaded", "another's"],
)
def test_nothing_needs_llvmlite(broken: str) -> None:
    script = (
        f"{broken}\n"
        "import torch\n"
        "from qlora_core import quantize_nf4\n"
        "from qlora_core.quant.nf4 import compiled\n"
        "assert quantize_nf4(torch.ones(4, 64)).dequantize().eq(1).all()\n"
        "assert compiled._function(torch.float32, nested=True) is None\n"
    )

    done = run(script)

    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_nothing_needs_memory_that_becomes_executable() -> None:
    script = (
        "import ctypes\n"
        "PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1\n"
        "if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0): sys.exit(77)\n"
        "import torch\n"
        "from qlora_core import quantize_nf4\n"
        "assert quantize_nf4(torch.ones(4, 64)).dequantize().eq(1).all()\n"
    )

    done = run(script)

    if done.returncode == 77:
        pytest.skip("this kernel cannot refuse it")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(64, 128), (31, 33), (1100, 1000)])
def test_torch_compile_traces_what_it_can_compile(shape: tuple[int, int]) -> None:
    script = (
        "import torch\n"
        "from qlora_core import quantize_nf4\n"
        f"weight = quantize_nf4(torch.randn{shape})\n"
        "zeros = torch.zeros(weight.shape)\n"
        "add = lambda a: a + weight.dequantize(torch.float32)\n"
        "found = torch.compile(add, backend='eager', fullgraph=True)(zeros)\n"
        "assert torch.equal(found, weight.dequantize())\n"
        "again = torch.compile(lambda a: quantize_nf4(a).dequantize(), backend='eager')(found)\n"
        "assert torch.equal(again, quantize_nf4(found).dequantize())\n"
    )

    done = run(script)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(64, 128), (31, 33), (1100, 1000)])
@pytest.mark.parametrize("llvmlite", [True, False], ids=["compiled", "by tables"])
def test_fake_and_wrapped_tensors_are_refused_and_leave_nothing_behind(
    shape: tuple[int, int], *, llvmlite: bool
) -> None:
    script = (
        f"if not {llvmlite}: sys.modules['llvmlite'] = None\n"
        "import torch\n"
        "from torch._subclasses import FakeTensorMode\n"
        "from qlora_core import quantize_nf4\n"
        "from qlora_core.errors import LayoutError\n"
        "from qlora_core.quant.nf4.reference import dequantize_nf4\n"
        f"values = torch.randn{shape}\n"
        "def refused(function):\n"
        "    try: function()\n"
        "    except LayoutError as error: return 'fake' in str(error)\n"
        "mode = FakeTensorMode(allow_non_fake_inputs=True)\n"
        "fake = mode.from_tensor(values)\n"
        "assert refused(lambda: quantize_nf4(fake))\n"
        "with mode: assert refused(lambda: quantize_nf4(values))\n"
        "dequantize = lambda _: weight.dequantize(torch.float32)\n"
        "weight = quantize_nf4(values)\n"
        "with mode: assert refused(lambda: dequantize(None))\n"
        "assert refused(lambda: torch.func.functionalize(dequantize)(values))\n"
        "with mode: assert refused(lambda: weight.dequantize(out=values))\n"
        "assert refused(lambda: weight.dequantize(out=fake))\n"
        "n = values.numel()\n"
        "args = dict(n=n, block_size=64, dtype=torch.float32)\n"
        "expected = dequantize_nf4(weight.packed, weight.scales(), **args)\n"
        "assert torch.equal(weight.dequantize().view(-1), expected)\n"
    )

    done = run(script)

    assert done.returncode == 0, done.stderr


def test_memory_that_torch_negates_when_it_reads_it() -> None:
    weight = quantize_nf4(torch.randn(10, 70), double_quant=False)
    negated = replace(weight, absmax=torch._neg_view(-weight.absmax))  # pyright: ignore[reportPrivateImportUsage]
    out = torch._neg_view(torch.full((700,), torch.nan))  # pyright: ignore[reportPrivateImportUsage]

    assert torch.equal(negated.dequantize(), weight.dequantize())
    assert torch.equal(weight.dequantize(out=out), weight.dequantize())


@pytest.mark.skipif(not CAN_COMPILE, reason="compiled code needs llvmlite and an x86 CPU")
def test_a_weight_is_dequantized_by_compiled_code_where_it_can_be() -> None:
    weight = quantize_nf4(torch.ones(2, 64))

    assert compiled.fill(
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.offset,
        torch.empty(128),
        block_size=64,
    )
