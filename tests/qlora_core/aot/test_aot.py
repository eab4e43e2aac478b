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
    mutants,
)
from tests.qlora_core.aot.narrowing import narrow_offsets

needs_other_triton = pytest.mark.skipif(
    not OTHER_TRITON.exists(), reason="`make test` installs the other Triton, pytest alone does not"
)
in_both_tritons = pytest.mark.parametrize(
    "other_triton", [False, pytest.param(True, marks=needs_other_triton)], ids=["own", "other"]
)


@in_both_tritons
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_configuration_of_every_kernel_is_as_it_should_be(
    arch: int, other_triton: bool
) -> None:
    rows = compile_rows(arch, other_triton=other_triton)

    pin = OTHER_TRITON_PIN.read_text().strip()
    assert {f"triton=={row.triton}" == pin for row in rows} == {other_triton}
    assert {row.arch for row in rows} == {arch}
    assert {row.kernel for row in rows} == kernels_in_the_tree()
    assert [complaint for row in rows for complaint in complaints(row)] == []


@in_both_tritons
def test_the_gate_compiles_what_the_engine_launches(other_triton: bool) -> None:
    asked, missing = launches(other_triton=other_triton)

    assert {words.split()[0] for words in asked} == kernels_in_the_tree()
    assert missing == []


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
        narrow_offsets=["%1 = arith.muli %0, %c64_i32 : i32"],
        global_accesses={"LDG.E.U8": 16},
        missing=["LDG.E.128"],
        other_stores=["STG.E.U8"],
        instructions=400,
        per_element=12.5,
        most_per_element=12,
    )

    found = " ".join(complaints(row))

    for words in (
        "spills",
        "102400 bytes of shared",
        "1 fused",
        "no LDG.E.128, but",
        "stores by STG.E.U8",
        "12.5 instr",
        "overflows",
    ):
        assert words in found


def test_an_offset_that_is_narrowed_on_its_way_is_complained_about() -> None:
    found = mutants("overflowing", 90)

    assert len(found) > 10
    assert {name for name in found if "overflows" not in " ".join(found[name])} == set()


def test_a_kernel_that_is_wrong_otherwise_is_complained_about() -> None:
    found = mutants("otherwise wrong", 86)

    assert len(found) > 6
    assert {name for name in found if name not in " ".join(found[name])} == set()


def test_a_number_that_leaves_a_loop_or_a_branch_is_not_followed_but_complained_about() -> None:
    code = """
      tt.func public @a_kernel(%values: !tt.ptr<f32> loc("values"(#loc)), %n: i64 loc("n"(#loc))) {
        %first = tt.get_program_id x : i32 loc(#loc1)
        %wide = arith.extsi %first : i32 to i64 loc(#loc1)
        %inside = arith.cmpi slt, %wide, %n : i64 loc(#loc1)
        %begin = scf.if %inside -> (i64) {
          scf.yield %wide : i64 loc(#loc2)
        } else {
          scf.yield %zero : i64 loc(#loc2)
        } loc(#loc3)
        %place = tt.addptr %values, %begin : !tt.ptr<f32>, i64 loc(#loc3)
    """

    assert narrow_offsets(code) == ["scf.yield %wide : i64"]
