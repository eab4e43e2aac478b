"""What is on the disk of a resume point, and when."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_core.errors import ResumePointError
from qlora_core.train.resume.files import (
    discard_old_points,
    points_of,
    read_point,
    write_point,
)
from qlora_core.train.weights import Weights


def tensors(step: int) -> dict[str, Weights]:
    return {
        "one": {"a": torch.full((3, 5), float(step)), "b": torch.arange(7, dtype=torch.uint8)},
        "two": {},
    }


def write(folder: Path, step: int) -> Path:
    point = write_point(folder, step, tensors(step), {"step": step})
    discard_old_points(folder, step).result()
    return point


def test_what_was_written_is_read(tmp_path: Path) -> None:
    point = write(tmp_path, 3)

    state, found = read_point(point, ["one", "two"])

    assert state == {"step": 3}
    assert found["two"] == {}
    assert all(torch.equal(found["one"][name], value) for name, value in tensors(3)["one"].items())


def test_the_files_are_safetensors_with_their_sums_beside_them(tmp_path: Path) -> None:
    point = write(tmp_path, 3)

    sums = json.loads((point / "manifest.json").read_text())

    assert sums == {
        name: hashlib.sha256((point / name).read_bytes()).hexdigest()
        for name in ("one.safetensors", "two.safetensors", "state.json")
    }
    assert load_file(point / "one.safetensors")["a"].sum() == 45


def test_more_parts_than_may_wait_are_hashed_as_well(tmp_path: Path) -> None:
    many = {str(index): torch.randn(101) for index in range(200)}

    point = write_point(tmp_path, 1, {"many": many}, {})

    _, found = read_point(point, ["many"])
    assert all(torch.equal(found["many"][name], value) for name, value in many.items())


def test_a_point_is_on_the_disk_before_it_is_in_its_place_and_older_ones_go_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run/resume"
    happened: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        happened.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def noting_rename(source: Path, target: Path) -> None:
        rename(source, target)
        happened.append(("rename", Path(target).name))

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    write(folder, 1)
    first = list(happened)
    write(folder, 2)
    happened.clear()

    write(folder, 3)

    assert first[:2] == [("fsync", tmp_path.name), ("fsync", "run")]  # the folders are new, too
    (placed,) = [at for at, what in enumerate(happened) if what == ("rename", "step-3")]
    written = {name for kind, name in happened[:placed] if kind == "fsync"}
    assert {"one.safetensors", "two.safetensors", "state.json", "manifest.json"} < written
    assert any(name.endswith(".unfinished") for name in written)
    assert happened[placed + 1] == ("fsync", "resume")
    (gone,) = happened[placed + 2 :]
    assert gone[0] == "rename"
    assert gone[1].startswith(".step-1.")
    assert [point.name for point in points_of(folder)] == ["step-3", "step-2"]
    assert len(list(folder.iterdir())) == 2


def test_a_point_whose_sum_is_gone_is_torn(tmp_path: Path) -> None:
    point = write(tmp_path, 3)
    manifest = point / "manifest.json"
    manifest.write_text(manifest.read_text().replace("one.", "onf."))

    with pytest.raises(
        ResumePointError, match=r"The resume point step-3 is torn: one.safetensors has changed"
    ):
        read_point(point, ["one", "two"])
