"""What each extra can import, and what it cannot: the client alone, the server without torch, the engine alone."""

import re
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.installation.conftest import ROOT, Environment, canonical, closure

Install = Callable[..., Environment]

ENGINE_ONLY = ("torch", "triton", "transformers", "safetensors")
SERVER_ONLY = ("fastapi", "celery", "sqlalchemy", "psycopg", "obstore", "alembic", "redis")


@pytest.fixture(scope="module")
def base(install: Install) -> Environment:
    return install()


@pytest.fixture(scope="module")
def server(install: Install) -> Environment:
    return install("server")


@pytest.fixture(scope="module")
def engine(install: Install) -> Environment:
    return install("engine")


def test_the_wheel_holds_what_is_not_python_too(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    migrations = [path.name for path in (ROOT / "migrations" / "versions").glob("*.py")]
    static = [path.relative_to(ROOT) for path in (ROOT / "api" / "static").rglob("*.*")]

    assert {f"migrations/versions/{name}" for name in migrations} <= set(names)
    assert {str(path) for path in static} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "examples/", "docs/"))]


def test_the_base_install_is_the_client_and_nothing_else(base: Environment) -> None:
    assert base.imports("nibble.main", "openai", "rich", "typer") == ""
    present = [name for name in (*ENGINE_ONLY, *SERVER_ONLY) if base.has(name)]
    assert present == []


def test_the_client_runs_from_the_base_install(base: Environment) -> None:
    shown = base.run("-m", "nibble", "--help")
    unreachable = base.run(
        "-c",
        "import os; os.environ['NIBBLE_API_KEY'] = 'sk-x'; from nibble.main import main; main()",
        *("models", "list", "--base-url", "http://127.0.0.1:9"),
    )

    assert shown.returncode == 0, shown.stderr
    assert "jobs" in shown.stdout
    assert unreachable.returncode == 4, unreachable.stderr
    assert "Traceback" not in unreachable.stderr


@pytest.mark.parametrize("command", ["up", "demo", "keys"])
def test_the_base_install_says_what_the_servers_commands_need(
    base: Environment, command: str
) -> None:
    refused = base.run("-m", "nibble", command)

    assert refused.returncode == 2
    assert "pip install 'nibble[server,engine]'" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_server_has_api_and_worker_and_no_torch(server: Environment) -> None:
    modules = ("api.main", "worker.app", "worker.crew", "operations.__main__", "service.tables")

    assert server.imports(*modules) == ""

    assert [name for name in ENGINE_ONLY if server.has(name)] == []


def test_the_server_reads_datasets_with_the_engines_own_code(server: Environment) -> None:
    assert server.imports("qlora_core", "qlora_core.text") == ""

    refused = server.imports("qlora_core.train.loop")

    assert "ModuleNotFoundError: No module named 'torch'" in refused


def test_the_server_starts_without_the_engine_but_takes_no_work(
    server: Environment, tmp_path: Path
) -> None:
    arguments = ["-m", "operations", "up", "--data-dir", str(tmp_path / "data"), "--port", "0"]
    (server.folder / "models.toml").write_text('[models.one]\npath = "one"\n')

    refused = server.run(*arguments)
    launcher = subprocess.Popen(
        [str(server.python), *arguments, "--no-worker"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=server.folder,
    )
    assert launcher.stderr is not None
    with launcher:
        lines: list[str] = []
        for line in launcher.stderr:
            lines.append(line)
            if "Ctrl-C" in line:
                launcher.send_signal(signal.SIGTERM)

    assert refused.returncode == 1
    assert "pip install 'nibble[engine]'" in refused.stderr
    assert "--no-worker" in refused.stderr
    assert launcher.returncode == 0, "".join(lines)
    assert "Nibble is ready.\n" in lines


def test_the_engine_is_usable_alone(engine: Environment) -> None:
    assert engine.imports("qlora_core.train.loop", "qlora_core.nn", "qlora_core.export") == ""

    assert [name for name in SERVER_ONLY if engine.has(name)] == []


def test_importing_the_engine_loads_neither_torch_nor_transformers(engine: Environment) -> None:
    code = "import sys, qlora_core, qlora_core.text; print({'torch', 'transformers'} & set(sys.modules))"

    assert engine.run("-c", code).stdout == "set()\n"


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_package_that_gets_installed_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(text for texts in extras.values() for text in texts)]
    pins = {canonical(name): version for name, version in _pins().items()}

    installed = {
        canonical(needed.name): needed.version.split("+")[0]  # a build's label is no version
        for needed in closure(map(Requirement, wanted), ())
    }

    missing = {
        name: version
        for name, version in installed.items()
        if pins.get(name) != version
        # A CUDA build of torch brings these along and pins them itself.
        and (name in pins or not name.startswith(("nvidia-", "cuda-")))
    }
    assert missing == {}, "constraints.txt does not pin these as they are installed here"


def test_pins_fit_the_ranges_and_carry_no_build_label() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {canonical(name): version for name, version in _pins().items()}

    assert not [version for version in pins.values() if "+" in version]
    for texts in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in map(Requirement, texts):
            assert requirement.specifier.contains(pins[canonical(requirement.name)]), requirement
    assert pins["torch"] == "2.13.0"
    assert pins["triton"] == "3.7.1"


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt", "Makefile", ".ci/run"])
def test_no_package_index_is_named(file: str) -> None:
    text = (ROOT / file).read_text()

    assert not re.search(r"index-url|pypi|https?://", text)


@pytest.mark.slow
@pytest.mark.parametrize("extras", ["", "[server]"])
def test_pip_installs_it_with_the_pins(wheel: Path, tmp_path: Path, extras: str) -> None:
    """The long form of the above: pip itself, a new environment, downloads."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]

    subprocess.run(
        [*pip, "-c", str(ROOT / "constraints.txt"), f"nibble{extras} @ {wheel.as_uri()}"],
        check=True,
        timeout=280,
    )

    environment = Environment(folder)
    assert environment.imports("nibble.main") == ""
    assert environment.has("fastapi") == (extras == "[server]")
    assert not environment.has("torch")
    shown = subprocess.run([str(folder / "bin" / "nibble"), "--help"], capture_output=True)
    assert shown.returncode == 0
