"""The folders of steps, numbered by their names."""

from __future__ import annotations

import re
from pathlib import Path


def step_folder(parent: Path, step: int) -> Path:
    """Name the folder of one step."""
    return parent / f"step-{step}"


def step_folders(parent: Path, *, suffix: str = "") -> list[tuple[int, Path]]:
    """Return the finished folders of steps with their numbers, newest first; those with ``suffix`` behind the number."""
    if not parent.is_dir():
        return []
    pattern = re.compile(rf"step-(\d+){re.escape(suffix)}")
    found = [(pattern.fullmatch(path.name), path) for path in parent.iterdir() if path.is_dir()]
    return sorted(((int(m[1]), path) for m, path in found if m), reverse=True)
