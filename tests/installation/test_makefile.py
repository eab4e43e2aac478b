"""`make`: what it says before it does anything. That its targets work is shown by everything that runs through them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.installation.conftest import ROOT


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The suite may run under a make itself, whose flags would reach this one.
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A clone in which nothing is installed yet."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def installed(fresh: Path) -> Path:
    """One whose .venv is newer than what it is made from."""
    (fresh / ".venv").mkdir()
    (fresh / ".venv" / ".installed").touch()
    return fresh


def _python(folder: Path, script: str) -> Path:
    """A `python3` that does what a shell script says."""
    program = folder / "python-of-the-test"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


def test_without_a_target_it_shows_them_all(fresh: Path) -> None:
    shown = _make(fresh)

    targets = re.findall(r"^\.PHONY: (.+)$", (fresh / "Makefile").read_text(), re.MULTILINE)[0]
    assert shown.returncode == 0
    assert set(re.findall(r"make ([a-z-]+)", shown.stdout)) == set(targets.split())


def test_an_old_python_is_named_with_what_to_do(fresh: Path) -> None:
    old = _python(fresh, 'test "$1" = --version && echo "Python 3.9.2"; exit 1')

    refused = _make(fresh, "demo", f"PYTHON={old}")

    assert refused.returncode == 2
    assert "needs Python 3.11 or newer" in refused.stderr
    assert "is Python 3.9.2" in refused.stderr
    assert "make demo PYTHON=python3.12" in refused.stderr
    assert not (fresh / ".venv").exists()


def test_a_python_without_venv_is_named_with_what_to_do(fresh: Path) -> None:
    bare = _python(fresh, 'case "$2" in *ensurepip*) exit 1;; esac')

    refused = _make(fresh, "test", f"PYTHON={bare}")

    assert refused.returncode == 2
    assert "has no venv" in refused.stderr
    assert "apt-get install python3-venv" in refused.stderr


def test_nothing_is_installed_again_until_pins_or_ranges_change(installed: Path) -> None:
    up_to_date = _make(installed, "-q", "install")
    newer = (installed / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(installed / "constraints.txt", (newer, newer))

    changed = _make(installed, "-q", "install")

    assert (up_to_date.returncode, changed.returncode) == (0, 1)


def test_tests_and_kernels_have_a_second_triton_beside_the_environments_own() -> None:
    pin = Path("tests", "qlora_core", "aot", "other-triton.txt")

    for target in ("test", "test-all", "kernels"):
        planned = _make(ROOT, "-n", "-o", ".venv/.installed", "-W", str(pin), target).stdout

        install = f"--no-deps --target .venv/other-triton -r {pin}"
        assert install in planned, target
        assert "other-triton" not in planned.splitlines()[-1], "installed after its use"


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU here")
def test_gpu_tests_without_a_gpu_say_so_and_are_no_failure(installed: Path) -> None:
    ended = _make(installed, "gpu")

    assert ended.returncode == 0
    assert "no NVIDIA GPU" in ended.stdout


def test_check_runs_every_tool_and_ci_runs_check_and_test() -> None:
    planned = _make(ROOT, "-n", "-o", ".venv/.installed", "check").stdout.splitlines()

    tools = ("ruff check", "ruff format --check", "pyright", "lint-imports", "deptry", "codespell")
    for line, tool in zip(planned, tools, strict=True):
        assert line.startswith(f".venv/bin/{tool}"), line
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert ci.read_text().splitlines()[-2:] == ["make check", "make test"]
