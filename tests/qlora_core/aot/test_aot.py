"""Every Triton kernel compiles for the GPUs we serve, and its machine code is what was meant."""

import ast

import pytest

from tests.qlora_core.aot.gate import (
    ARCHITECTURES,
    OTHER_TRITON,
    OTHER_TRITON_PIN,
    ROOT,
    Row,
    compile_rows,
    complaints,
    launches,
)

needs_other_triton = pytest.mark.skipif(
    not OTHER_TRITON.exists(), reason="`make test` installs the other Triton, pytest alone does not"
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_everyday_kernels_are_as_they_should_be(arch: int) -> None:
    rows = compile_rows("everyday", (arch,))

    assert {row.arch for row in rows} == {arch}
    assert [complaint for row in rows for complaint in complaints(row)] == []
    assert {row.kernel for row in rows} == kernels_in_the_tree()


@pytest.mark.parametrize(
    "other_triton", [False, pytest.param(True, marks=needs_other_triton)], ids=["own", "other"]
)
def test_the_gate_compiles_what_the_engine_launches(other_triton: bool) -> None:
    asked, missing = launches(other_triton=other_triton)

    assert {words.split()[0] for words in asked} == kernels_in_the_tree()
    assert missing == []


@needs_other_triton
def test_the_other_triton_compiles_the_everyday_kernels_too() -> None:
    rows = compile_rows("everyday", (90,), other_triton=True)

    assert {f"triton=={row.triton}" for row in rows} == {OTHER_TRITON_PIN.read_text().strip()}
    assert [complaint for row in rows for complaint in complaints(row)] == []
    assert {row.kernel for row in rows} == kernels_in_the_tree()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "other_triton", [False, pytest.param(True, marks=needs_other_triton)], ids=["own", "other"]
)
def test_every_configuration_is_as_it_should_be(other_triton: bool) -> None:
    rows = compile_rows("all", other_triton=other_triton)

    assert {row.arch for row in rows} == set(ARCHITECTURES)
    assert [complaint for row in rows for complaint in complaints(row)] == []


def kernels_in_the_tree() -> set[str]:
    """The names of all functions that a launch may name: `triton.jit` and ending in `_kernel`."""
    return {
        node.name
        for path in (ROOT / "qlora_core").rglob("kernels.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


def test_everything_that_a_gpu_would_stumble_over_is_complained_about() -> None:
    row = Row(
        label="a kernel",
        kernel="a_kernel",
        arch=120,
        triton="3.7.1",
        registers=255,
        shared_bytes=100 * 1024,
        stack_accesses=2,
        surplus_fused=1,
        narrow_program_ids=["%1 = arith.muli %0, %c64_i32 : i32"],
        global_accesses={"LDG.E.U8": 16},
        missing=["LDG.E.128"],
        instructions=400,
        per_element=12.5,
        most_per_element=12,
    )

    found = " ".join(complaints(row))

    for words in ("spills", "102400 bytes of shared", "fused", "no LDG", "12.5 instr", "overflows"):
        assert words in found
