"""A checkpoint's folder: where it may be, and that neither the old one nor the new one is lost on the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_core.errors import ConfigError
from qlora_core.models.checkpoint_folder import refuse_target, written_whole


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "weights").write_text("old")
    return folder


def write(folder: Path) -> None:
    with written_whole(folder) as unfinished:
        (unfinished / "weights").write_text("new")


# What Python calls before it renames a folder to the place of the checkpoint.
AT_THE_RENAME = """
import os, sys
from pathlib import Path
from qlora_core.models.checkpoint_folder import written_whole

def hook(event, arguments):
    if event == "os.rename" and Path(arguments[0]).name.endswith(".unfinished"):
        {act}

sys.addaudithook(hook)
with written_whole(Path(sys.argv[1])) as unfinished:
    (unfinished / "weights").write_text("new")
"""


def stopped_at_the_rename(folder: Path, act: str) -> None:
    script = AT_THE_RENAME.format(act=act)

    done = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=60
    )

    assert done.returncode != 0


def test_a_folder_is_replaced_and_nothing_stays_beside_it(old: Path) -> None:
    write(old)

    assert (old / "weights").read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


def test_a_link_stays_a_link_and_what_it_leads_to_is_replaced(old: Path) -> None:
    link = old.parent / "link"
    link.symlink_to("out")

    write(link)

    assert link.is_symlink()
    assert (old / "weights").read_text() == "new"


def test_where_the_new_folder_cannot_take_its_place_the_old_one_is_put_back(old: Path) -> None:
    stopped_at_the_rename(old, 'raise OSError(5, "Input/output error")')

    assert (old / "weights").read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


def test_cut_off_between_the_renames_both_folders_are_there_and_the_next_run_says_where(
    old: Path,
) -> None:
    stopped_at_the_rename(old, "os._exit(9)")

    aside = old.parent / ".out.replaced"
    assert (aside / "weights").read_text() == "old"
    assert (old.parent / ".out.unfinished" / "weights").read_text() == "new"
    with pytest.raises(ConfigError, match=r"\.out\.replaced is what .*out was before a run"):
        refuse_target(old, None, overwrite=True)
    aside.rename(old)
    write(old)
    assert (old / "weights").read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


def test_what_a_cut_off_removal_left_goes_with_the_next_one(old: Path) -> None:
    aside = old.parent / ".out.replaced"
    aside.mkdir()
    (aside / "weights").write_text("older")

    write(old)

    assert (old / "weights").read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


def test_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: .*nf4"),
        written_whole(tmp_path / "nf4"),
    ):
        Path("/dev/full").write_text("more than there is room for")

    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.skipif(os.geteuid() == 0, reason="no permission stops root")
def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(0o555)

    assert "closed cannot be written to" in refusal(tmp_path / "closed" / "nf4")
