"""Where a checkpoint's folder may be."""

import os
from pathlib import Path

import pytest

from qlora_core.errors import ConfigError
from qlora_core.models.checkpoint_folder import refuse_target


def refusal(folder: Path | str, source: Path | None = None) -> str:
    with pytest.raises(ConfigError) as told:
        refuse_target(Path(folder), source, overwrite=True)
    return told.value.message


def test_the_current_folder_and_those_above_it_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")

    for folder in (".", "..", "../../a", tmp_path / "a" / "b", "/"):
        assert "is the current folder, or above it" in refusal(folder)
    refuse_target(Path("c"), None, overwrite=False)
    refuse_target(Path("../c"), None, overwrite=False)


def test_the_models_own_folder_is_never_replaced_through_a_link_either(tmp_path: Path) -> None:
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")

    for folder in (tmp_path / "a" / "model", tmp_path / "a", tmp_path / "link"):
        assert "holds the model" in refusal(folder, source=tmp_path / "link" / "model")
    refuse_target(tmp_path / "a" / "model" / "nf4", tmp_path / "a" / "model", overwrite=False)


def test_a_path_through_what_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "leads through a folder that is not there" in refusal(tmp_path / "missing" / ".." / "c")


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")

    assert "leads nowhere" in refusal(tmp_path / "loop")


def test_a_file_on_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert "file is a file; name a folder" in refusal(tmp_path / "file")
    assert "file is a file, so there can be no folder" in refusal(tmp_path / "file" / "a" / "nf4")


def test_a_mount_point_is_refused(tmp_path: Path) -> None:
    mounts = [Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines()]
    folder = next(one for one in mounts if one.is_dir() and one not in tmp_path.parents)

    assert "is a mount point" in refusal(folder)


def test_a_place_where_nobody_can_make_a_folder_is_refused() -> None:
    assert "/proc cannot be written to" in refusal("/proc/nf4")


def test_a_name_that_is_too_long_to_be_written_beside_is_refused(tmp_path: Path) -> None:
    assert "cannot be written to (File name too long)" in refusal(tmp_path / ("a" * 250))


@pytest.mark.skipif(os.geteuid() == 0, reason="no permission stops root")
def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(0o555)

    assert "closed cannot be written to" in refusal(tmp_path / "closed" / "nf4")


@pytest.mark.parametrize("existing", [False, True])
def test_what_a_run_that_was_cut_off_has_set_aside_is_named(tmp_path: Path, existing: bool) -> None:
    (tmp_path / ".out.0123abcd.replaced").mkdir()
    if existing:
        (tmp_path / "out").mkdir()

    assert ".out.0123abcd.replaced is what" in refusal(tmp_path / "out")
    refuse_target(tmp_path / "other", None, overwrite=True)


@pytest.mark.parametrize("name", [".out.unfinished", ".out.replaced"])
def test_other_folders_beside_it_are_no_obstacle(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()

    refuse_target(tmp_path / "out", tmp_path / name, overwrite=True)


def test_a_model_in_what_a_cut_off_run_left_is_not_written_over(tmp_path: Path) -> None:
    source = tmp_path / ".out.0123abcd.unfinished"
    source.mkdir()

    assert "0123abcd.unfinished is what a run" in refusal(tmp_path / "out", source=source)
    refuse_target(tmp_path / "other", source, overwrite=True)
