"""A folder is whole or not there, and neither the old one nor the new one is lost on the way."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_core.whole_folder import written_whole


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "weights").write_text("old")
    return folder


def write(folder: Path) -> None:
    with written_whole(folder) as unfinished:
        (unfinished / "weights").write_text("new")


# Writes a folder, and does something at the end of that, or where Python calls before it renames the folder to its place.
WRITE = """
import os, sys
from pathlib import Path
from qlora_core.whole_folder import written_whole

def hook(event, arguments):
    if event == "os.rename" and Path(arguments[0]).name.endswith(".unfinished"):
        {renaming}

sys.addaudithook(hook)
with written_whole(Path(sys.argv[1])) as unfinished:
    (unfinished / "weights").write_text("new")
    {writing}
"""


def stopped(folder: Path, *, writing: str = "pass", renaming: str = "pass") -> None:
    script = WRITE.format(writing=writing, renaming=renaming)

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


@pytest.mark.parametrize("existing", [True, False])
def test_killed_while_writing_the_folder_is_as_it_was(existing: bool, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    if existing:
        folder.mkdir()
        (folder / "weights").write_text("old")

    stopped(folder, writing="os.kill(os.getpid(), 9)")

    assert folder.exists() is existing
    assert not existing or (folder / "weights").read_text() == "old"
    write(folder)
    assert (folder / "weights").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_where_the_new_folder_cannot_take_its_place_the_old_one_is_put_back(old: Path) -> None:
    stopped(old, renaming='raise OSError(5, "Input/output error")')

    assert (old / "weights").read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


def test_cut_off_between_the_renames_both_folders_are_there_until_the_next_one_is_whole(
    old: Path,
) -> None:
    stopped(old, renaming="os._exit(9)")

    aside = old.parent / ".out.replaced"
    assert (aside / "weights").read_text() == "old"
    assert (old.parent / ".out.unfinished" / "weights").read_text() == "new"
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
