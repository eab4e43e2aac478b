"""Unpacking an adapter's tar safely, and holding every file to the manifest's sha256.

Nothing in the archive is trusted: only regular files under plain relative names are written, into a new folder that
takes its final name when all of it has been checked. A reader never sees half an adapter.
"""

import hashlib
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20
_MAX_MANIFEST_BYTES = 10_000_000

_Content = tuple[int, str]
"""How many bytes, and their sha256 in hex."""


class BadArchiveError(Exception):
    """The archive is damaged, or holds what no adapter does; nothing was left in the target folder."""


@dataclass(frozen=True)
class Unpacked:
    """One file of the adapter; `name` is relative to its folder, `sha256` is in hex."""

    name: str
    bytes: int
    sha256: str


def unpack(archive: Path, folder: Path) -> list[Unpacked]:
    """Turn a downloaded tar into `folder`, which must be absent or empty, and return its files by name.

    Raises:
        BadArchiveError: see there.
        OSError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.unpacking-", dir=folder.parent))
    try:
        written = _extract(archive, staging)
        top = _top(written)
        files = {name.removeprefix(top): file for name, file in written.items()}
        _check(files, staging / top)
        if folder.is_dir():
            folder.rmdir()  # empty, or an OSError that says so
        (staging / top).chmod(0o755)
        (staging / top).rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [Unpacked(name, *files[name]) for name in sorted(files)]


def _extract(archive: Path, folder: Path) -> dict[str, _Content]:
    files: dict[str, _Content] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if member.isdir():
                    _safe_name(member.name)
                    continue
                if not member.isreg() or member.issparse():
                    raise BadArchiveError(f"{member.name!r} in it is not a plain file")
                name = _safe_name(member.name)
                content = tar.extractfile(member)
                if name in files or content is None:
                    raise BadArchiveError(f"{name!r} is in it twice")
                files[name] = _write(content, folder, name, member.size)
    except (tarfile.TarError, EOFError, UnicodeError, ValueError) as error:
        raise BadArchiveError(f"it cannot be read to its end ({error})") from error
    return files


def _top(files: Iterable[str]) -> str:
    """The folder inside the archive that holds the manifest, and everything else: "" or "name/"."""
    tops = {name.removesuffix(MANIFEST) for name in files if PurePosixPath(name).name == MANIFEST}
    top = min(tops, key=len, default=None)
    if top is None:
        raise BadArchiveError(f"it has no {MANIFEST}")
    if outside := sorted(name for name in files if not name.startswith(top)):
        raise BadArchiveError(f"{outside[0]!r} in it is not in its manifest")
    return top


def _safe_name(name: str) -> str:
    path = PurePosixPath(name)
    parts = path.parts
    odd = not parts or path.is_absolute() or ".." in parts or "\\" in name or ":" in parts[0]
    if odd or not name.isprintable():
        raise BadArchiveError(f"{name!r} in it would leave the folder")
    return str(path)


def _write(content: IO[bytes], folder: Path, name: str, size: int) -> _Content:
    target = folder / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        raise BadArchiveError(f"{name!r} in it is both a file and a folder") from error
    digest, written = hashlib.sha256(), 0
    with file:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
            written += len(chunk)
            file.write(chunk)
    if written != size:
        raise BadArchiveError(f"{name!r} in it ends early")
    return written, digest.hexdigest()


def _check(files: dict[str, _Content], folder: Path) -> None:
    """Every file but the manifest is in the manifest, with its size and sha256, and nothing is missing."""
    promised = _manifest(files[MANIFEST][0], folder)
    found = {name: content for name, content in files.items() if name != MANIFEST}
    if missing := sorted(promised.keys() - found.keys()):
        raise BadArchiveError(f"{missing[0]!r} is missing from it")
    if unknown := sorted(found.keys() - promised.keys()):
        raise BadArchiveError(f"{unknown[0]!r} in it is not in its manifest")
    for name, content in found.items():
        if content != promised[name]:
            raise BadArchiveError(f"{name!r} does not match its sha256 in the manifest")


def _manifest(size_bytes: int, folder: Path) -> dict[str, _Content]:
    if size_bytes > _MAX_MANIFEST_BYTES:
        raise BadArchiveError(f"its {MANIFEST} is too long")
    try:
        document: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = cast("list[dict[str, Any]]", document["files"])
        return {str(file["name"]): (int(file["bytes"]), str(file["sha256"])) for file in listed}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadArchiveError(f"its {MANIFEST} cannot be read") from error
