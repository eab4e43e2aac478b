"""Where results are kept: one JSON file per device and commit, written anew after every group."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.gpu import rivals
from bench.gpu.groups import Rows
from bench.surroundings import ROOT, versions

_PACKAGES = ("torch", "triton", "transformers", "bitsandbytes")


class Results:
    """The rows of groups that have been run, by name, with what they were run on.

    Args:
        folder: where the file is, or None to keep nothing.
        device: ``cuda`` or ``cpu``.
        commit: of the code; asked from git when None.
        again: whether to begin anew although the file has rows.
    """

    def __init__(
        self, folder: Path | None, device: str, *, commit: str | None, again: bool
    ) -> None:
        self.about = _about(device, commit)
        name = f"on_gpu-{self.about['device']}-{self.about['commit']}.json"
        self.file = None if folder is None else folder / name.replace(" ", "-").lower()
        self.groups: dict[str, Rows] = {}
        if self.file is not None and self.file.exists() and not again:
            self.groups = json.loads(self.file.read_text())["groups"]

    def keep(self, name: str, rows: Rows) -> None:
        """Keep a group's rows; a run that is cut off afterwards does not lose them."""
        self.groups[name] = rows
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        written = self.file.with_suffix(".part")
        written.write_text(json.dumps(self.about | {"groups": self.groups}, indent=1) + "\n")
        written.replace(self.file)

    def wrong(self) -> list[str]:
        """Name the groups in which something that must be nought is not."""
        return [
            name
            for name, rows in self.groups.items()
            if any(row[key] for row in rows for key in row if key.startswith("wrong"))
        ]


def _about(device: str, commit: str | None) -> dict[str, Any]:
    query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    described = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        f"nvidia-smi {query}": _output(
            "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"
        ),
        "commit": commit or _output(*described) or "unknown",
        "versions": versions(*_PACKAGES) | {"cuda": torch.version.cuda},
        "bitsandbytes cannot be used": rivals.why_absent(device),
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
