"""A folder is whole or not there, and neither the old one nor the new one is lost on the way."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_core.whole_folder import leftovers, remove_leftovers, written_whole


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


def test_cut_off_between_the_renames_both_folders_are_there(old: Path) -> None:
    stopped(old, renaming="os._exit(9)")

    (aside,) = old.parent.glob(".out.*.replaced")
    assert (aside / "weights").read_text() == "old"
    (unfinished,) = old.parent.glob(".out.*.unfinished")
    assert (unfinished / "weights").read_text() == "new"
    assert leftovers(old) == sorted([aside, unfinished])


def test_what_was_set_aside_stays_when_the_next_one_is_whole(old: Path) -> None:
    stopped(old, renaming="os._exit(9)")

    write(old)

    assert (old / "weights").read_text() == "new"
    (aside,) = set(old.parent.iterdir()) - {old}
    assert (aside / "weights").read_text() == "old"


@pytest.mark.parametrize("name", [".out.unfinished", ".out.replaced", ".out.mine.unfinished"])
def test_folders_of_such_names_that_are_not_ours_are_left_alone(old: Path, name: str) -> None:
    (old.parent / name).mkdir()
    (old.parent / name / "weights").write_text("precious")

    write(old)

    assert (old / "weights").read_text() == "new"
    assert (old.parent / name / "weights").read_text() == "precious"


def test_two_that_write_at_once_do_not_disturb_each_other(old: Path) -> None:
    with written_whole(old) as first:
        (first / "weights").write_text("first")
        with written_whole(old) as second:
            (second / "weights").write_text("second")
        assert (old / "weights").read_text() == "second"

    assert (old / "weights").read_text() == "first"
    assert list(old.parent.iterdir()) == [old]


def test_what_another_one_wrote_meanwhile_is_not_replaced_where_nothing_was(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    with pytest.raises(OSError, match=r"Directory not empty: .*/out'"), written_whole(folder):
        write(folder)

    assert (folder / "weights").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_has_the_rights_that_any_new_one_has(tmp_path: Path) -> None:
    (tmp_path / "any").mkdir()

    write(tmp_path / "out")

    assert (tmp_path / "out").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_folder_that_cannot_be_made_is_named_itself() -> None:
    with pytest.raises(OSError, match=r"'/proc/nf4'"), written_whole(Path("/proc/nf4")):
        pass


def test_leftovers_go_and_what_is_being_written_stays(old: Path) -> None:
    stopped(old, writing="os.kill(os.getpid(), 9)")
    stopped(old, renaming="os._exit(9)")

    with written_whole(old.with_name("other")) as unfinished:
        remove_leftovers(old.parent)

        assert list(old.parent.iterdir()) == [unfinished]


def test_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: .*nf4"),
        written_whole(tmp_path / "nf4"),
    ):
        Path("/dev/full").write_text("more than there is room for")

    assert list(tmp_path.iterdir()) == []
