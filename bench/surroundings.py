"""What a measurement was made on: the device, its load, versions, and the commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def surroundings(*packages: str) -> dict[str, Any]:
    """Tell the CPU, its number and load, the commit, and the versions of Python and of these packages."""
    return {
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "commit": commit(),
        "versions": versions(*packages),
    }


def commit() -> str:
    """Give the short name of the commit that is checked out; "unknown" where there is no repository."""
    try:
        told = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.stdout.strip()


def versions(*packages: str) -> dict[str, str | None]:
    """Give the version of Python and of each package; None where it is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
