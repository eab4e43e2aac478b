"""Bare environments that hold exactly what an extra asks for.

The wheel is built from the tree and its own metadata decides: the packages it requires, and theirs, are linked out of
this environment's installed ones, so nothing is downloaded and nothing else can be imported.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable, Iterable
from email import message_from_string
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


class Environment:
    """A virtual environment without pip."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.site_packages = next(folder.glob("lib/python3*/site-packages"))

    def run(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run Python in it, with nothing from outside: neither variables nor this folder."""
        return subprocess.run(
            [str(self.python), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=self.folder,
            env={name: os.environ[name] for name in ("PATH", "HOME", "PYTEST_NIBBLE_SESSION")},
        )

    def imports(self, *modules: str) -> str:
        """Import modules in one process; return what went wrong, or an empty string."""
        return self.run("-c", "import " + ", ".join(modules)).stderr

    def has(self, module: str) -> bool:
        """Whether there is such a top-level module."""
        code = f"import importlib.util as u; print(u.find_spec({module!r}) is not None)"
        return self.run("-c", code).stdout.strip() == "True"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the packages and of nothing else."""
    source = tmp_path_factory.mktemp("source")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]:
        name = pattern.removesuffix("*")
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    output = tmp_path_factory.mktemp("wheel")
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, str(output)],
        check=True,
        cwd=source,
        capture_output=True,
        timeout=120,
    )
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """Make an environment with the wheel and what its extras ask for."""

    def make(*extras: str) -> Environment:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, symlinks=True)
        environment = Environment(folder)
        for needed in closure(_requirements(wheel), extras):
            _link(needed, environment.site_packages)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(environment.site_packages)
        return environment

    return make


def closure(requirements: Iterable[Requirement], extras: Iterable[str]) -> list[Distribution]:
    """The installed distributions that requirements ask for, directly or not, in no order that matters."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()

    def walk(requirements: Iterable[Requirement], extras: Iterable[str]) -> None:
        for requirement in requirements:
            if not _applies(requirement, extras):
                continue
            name = canonical(requirement.name)
            wanted = {"", *requirement.extras}
            if all((name, extra) in seen for extra in wanted):
                continue
            seen.update((name, extra) for extra in wanted)
            found[name] = distribution(requirement.name)
            walk(map(Requirement, found[name].requires or ()), requirement.extras)

    walk(requirements, extras)
    return list(found.values())


def canonical(name: str) -> str:
    """A project's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = message_from_string(archive.read(name).decode())
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def _link(needed: Distribution, site_packages: Path) -> None:
    here = Path(sysconfig.get_path("purelib"))
    for file in needed.files or ():
        source = Path(str(needed.locate_file(file))).resolve()
        if source.is_relative_to(here) and source.is_file():  # scripts lie elsewhere
            target = site_packages / source.relative_to(here)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(source)
