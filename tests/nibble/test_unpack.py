import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from nibble.unpack import BadArchiveError, unpack

CONFIG = b'{"peft_type": "LORA"}'
WEIGHTS = bytes(range(256)) * 20


def manifest_of(files: dict[str, bytes]) -> bytes:
    listed = [
        {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    ]
    return json.dumps({"files": listed}).encode()


def plain_file(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member, content


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = target
    return member, b""


def write_tar(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return path


def adapter_members(top: str = "ftjob-1/") -> list[tuple[tarfile.TarInfo, bytes]]:
    files = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
    members = [plain_file(top + name, content) for name, content in files.items()]
    return [*members, plain_file(top + "manifest.json", manifest_of(files))]


@pytest.mark.parametrize("top", ["", "ftjob-1/", "a/b/"])
def test_an_adapter_is_unpacked_without_the_archives_own_folder(tmp_path: Path, top: str) -> None:
    archive = write_tar(tmp_path / "adapter.tar", adapter_members(top))

    files = unpack(archive, tmp_path / "adapter")

    assert [file.name for file in files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert files[1].bytes == len(WEIGHTS)
    assert files[1].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter.tar"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "adapter.tar", adapter_members())
    (tmp_path / "adapter").mkdir()

    unpack(archive, tmp_path / "adapter")

    assert (tmp_path / "adapter" / "adapter_config.json").read_bytes() == CONFIG


MALICIOUS = {
    "a name that climbs out": plain_file("ftjob-1/../../evil", b"x"),
    "a name that only climbs": plain_file("..", b"x"),
    "a Windows path": plain_file("ftjob-1\\..\\evil", b"x"),
    "a drive letter": plain_file("C:/evil", b"x"),
    "a control character": plain_file("ftjob-1/\x1b[2J", b"x"),
    "a symbolic link": special("ftjob-1/link", tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": special("ftjob-1/link", tarfile.LNKTYPE, "ftjob-1/adapter_config.json"),
    "a device": special("ftjob-1/null", tarfile.CHRTYPE),
    "a pipe": special("ftjob-1/pipe", tarfile.FIFOTYPE),
    "a folder that climbs out": special("../evil", tarfile.DIRTYPE),
    "a name twice": plain_file("ftjob-1/adapter_config.json", b"{}"),
    "a file where a folder is": plain_file("ftjob-1", b"x"),
    "a folder where a file is": plain_file("ftjob-1/adapter_config.json/x", b"x"),
    "a file that the manifest does not list": plain_file("ftjob-1/extra.bin", b"x"),
    "a file beside the archive's folder": plain_file("other/extra.bin", b"x"),
}


@pytest.mark.parametrize("member", MALICIOUS.values(), ids=MALICIOUS.keys())
def test_nothing_is_written_when_the_archive_holds(
    tmp_path: Path, member: tuple[tarfile.TarInfo, bytes]
) -> None:
    inside = tmp_path / "inside"
    archive = write_tar(tmp_path / "adapter.tar", [*adapter_members(), member])

    with pytest.raises(BadArchiveError):
        unpack(archive, inside / "adapter")

    assert list(inside.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.tar", "inside"]


def test_an_absolute_name_is_written_nowhere(tmp_path: Path) -> None:
    inside, evil = tmp_path / "inside", tmp_path / "evil"
    archive = write_tar(tmp_path / "adapter.tar", [*adapter_members(), plain_file(str(evil), b"x")])

    with pytest.raises(BadArchiveError):
        unpack(archive, inside / "adapter")

    assert list(inside.iterdir()) == []
    assert not evil.exists()


def test_a_link_cannot_lead_a_later_file_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    members = [
        special("ftjob-1/sub", tarfile.SYMTYPE, str(outside)),
        plain_file("ftjob-1/sub/x", b""),
    ]
    archive = write_tar(tmp_path / "adapter.tar", [*members, *adapter_members()])

    with pytest.raises(BadArchiveError, match="not a plain file"):
        unpack(archive, tmp_path / "adapter")

    assert list(outside.iterdir()) == []


def changed(content: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    _, weights, manifest = adapter_members()
    return [plain_file("ftjob-1/adapter_config.json", content), weights, manifest]


DAMAGED = {
    "another file's content": (changed(CONFIG[:-1] + b"]"), "sha256"),
    "another length": (changed(CONFIG + b" "), "sha256"),
    "no manifest": (adapter_members()[:2], r"no manifest\.json"),
    "a missing file": (adapter_members()[1:], "missing"),
    "a manifest that is no JSON": (
        [*adapter_members()[:2], plain_file("ftjob-1/manifest.json", b"{")],
        "cannot be read",
    ),
    "a manifest of another form": (
        [*adapter_members()[:2], plain_file("ftjob-1/manifest.json", b'{"files": [1]}')],
        "cannot be read",
    ),
    "nothing": ([], "no manifest"),
}


@pytest.mark.parametrize(("members", "why"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_archive_is_refused_with(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], why: str
) -> None:
    archive = write_tar(tmp_path / "adapter.tar", members)

    with pytest.raises(BadArchiveError, match=why):
        unpack(archive, tmp_path / "adapter")

    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("length", [1, 511, 700, 6000])
def test_an_archive_that_ends_early_is_refused(tmp_path: Path, length: int) -> None:
    archive = write_tar(tmp_path / "adapter.tar", adapter_members())
    archive.write_bytes(archive.read_bytes()[:length])

    with pytest.raises(BadArchiveError):
        unpack(archive, tmp_path / "adapter")


def test_a_page_of_html_is_no_archive(tmp_path: Path) -> None:
    archive = tmp_path / "adapter.tar"
    archive.write_bytes(b"<html>502 Bad Gateway</html>" * 50)

    with pytest.raises(BadArchiveError):
        unpack(archive, tmp_path / "adapter")
