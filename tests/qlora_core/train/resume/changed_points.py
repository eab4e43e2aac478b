"""Resume points that a test changes, with sums that fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def state_of(point: Path) -> dict[str, Any]:
    """Read what a point holds beside its tensors."""
    return json.loads((point / "state.json").read_text(encoding="utf-8"))


def change_state(point: Path, **changes: Any) -> None:
    """Write a point's state anew, with a sum that fits."""
    state = point / "state.json"
    state.write_text(json.dumps(state_of(point) | changes), encoding="utf-8")
    manifest = point / "manifest.json"
    sums = json.loads(manifest.read_text())
    sums["state.json"] = hashlib.sha256(state.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(sums))
