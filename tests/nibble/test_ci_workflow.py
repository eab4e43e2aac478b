"""The steps of the example workflow, run as a CI machine runs them: a bare shell, and the base install only."""

import json
import os
import re
import subprocess
import venv
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import yaml

from tests.installation.conftest import ROOT, _link, _requirements, closure, wheel
from tests.nibble.conftest import MODEL, Live, write_chat

__all__ = ["wheel"]  # a fixture

WORKFLOW = ROOT / "examples" / "ci" / "github-workflow.yml"


@pytest.fixture
def workflow() -> dict[str, Any]:
    """The workflow's only job."""
    document = yaml.safe_load(WORKFLOW.read_text())
    (job,) = document["jobs"].values()
    return cast("dict[str, Any]", job)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """A Python with pip, and what the client needs but not the client itself."""
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    for needed in [distribution("pip"), *closure(_requirements(wheel), ())]:
        _link(needed, site_packages)
    return folder / "bin"


@pytest.fixture
def machine(tmp_path: Path, python: Path) -> dict[str, str]:
    """The environment that steps run in."""
    return {
        "PATH": f"{python}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "GITHUB_SHA": "0123abc",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "PYTEST_NIBBLE_SESSION": os.environ["PYTEST_NIBBLE_SESSION"],
    }


def run_steps(
    job: dict[str, Any], folder: Path, machine: dict[str, str], settings: dict[str, str]
) -> dict[str, subprocess.CompletedProcess[str]]:
    """Run the steps' text in order until one fails, as the runner does; those that use an action are left out."""
    filled = {
        name: re.sub(r"\$\{\{ *(?:vars|secrets)\.(\w+) *\}\}", lambda m: settings[m[1]], value)
        for name, value in job["env"].items()
    }
    done: dict[str, subprocess.CompletedProcess[str]] = {}
    for step in job["steps"]:
        failed = any(result.returncode for result in done.values())
        if "run" not in step or (failed and "cancelled()" not in step.get("if", "")):
            continue
        assignments = [f"{name}={value}" for name, value in (machine | filled).items()]
        command = ["env", "-i", *assignments, "bash", "--noprofile", "--norc", "-e", "-c"]
        done[step["name"]] = subprocess.run(
            [*command, step["run"]], cwd=folder, capture_output=True, text=True, timeout=240
        )
    return done


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What the checkout step leaves: a repository with training data."""
    data = tmp_path / "repository" / "data"
    data.mkdir(parents=True)
    write_chat(data / "train.jsonl", examples=16)
    write_chat(data / "valid.jsonl", examples=10)
    return data.parent


@pytest.fixture
def settings(live: Live, wheel: Path) -> dict[str, str]:
    """The repository's variables and secrets."""
    key = Path(live.environment["NIBBLE_DATA_DIR"], "first-api-key").read_text().strip()
    return {
        "NIBBLE_BASE_URL": live.url,
        "NIBBLE_PACKAGE": str(wheel),
        "NIBBLE_MODEL": MODEL,
        "NIBBLE_API_KEY": key,
    }


def test_the_workflow_ends_with_an_adapter_to_keep(
    client: openai.OpenAI,
    workflow: dict[str, Any],
    machine: dict[str, str],
    settings: dict[str, str],
    repository: Path,
) -> None:
    done = run_steps(workflow, repository, machine, settings)

    said = {name: result.stderr for name, result in done.items()}
    assert [result.returncode for result in done.values()] == [0, 0, 0], said
    assert re.search(r"Step (\d+)/\1: loss", said["Fine-tune"])
    job = json.loads((repository / "job.json").read_text())
    assert job["status"] == "succeeded"
    assert client.fine_tuning.jobs.retrieve(job["id"]).metadata == {"commit": "0123abc"}
    keep = next(
        step["with"]["path"] for step in workflow["steps"] if "upload" in step.get("uses", "")
    )
    assert (repository / keep / "adapter_model.safetensors").stat().st_size > 1_000
    assert job["id"] in Path(machine["GITHUB_STEP_SUMMARY"]).read_text()
    assert settings["NIBBLE_API_KEY"] not in "".join(r.stdout + r.stderr for r in done.values())


def test_the_workflow_fails_when_the_data_is_bad_and_says_why(
    client: openai.OpenAI,
    workflow: dict[str, Any],
    machine: dict[str, str],
    settings: dict[str, str],
    repository: Path,
) -> None:
    (repository / "data" / "train.jsonl").write_text('{"messages": []}\n' * 12)

    done = run_steps(workflow, repository, machine, settings)

    assert [result.returncode for result in done.values()] == [0, 1, 0]
    summary = Path(machine["GITHUB_STEP_SUMMARY"]).read_text()
    assert '"status": "failed"' in summary
    assert "invalid_training_file" in summary
    assert not (repository / "adapter").exists()
