"""Blobs, in a local folder and in an object store (obstore's own, in memory: the same calls as for S3)."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest
from obstore.store import MemoryStore, S3Store

from service.errors import StorageFull, Unavailable
from service.settings import Settings
from service.storage import BlobMissing, Storage, StorageUrlInvalid

CONTENT = bytes(range(256)) * 40_000  # 10 MB: several parts of a multipart upload


def local(folder: Path) -> Storage:
    return Storage.open(_settings(folder))


def _settings(folder: Path, **changes: str) -> Settings:
    return Settings(_env_file=None, data_dir=folder, **changes)  # type: ignore[call-arg, arg-type]


@pytest.fixture(params=["local", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return local(tmp_path) if request.param == "local" else Storage(MemoryStore())


async def write(storage: Storage, key: str, *pieces: bytes) -> None:
    writer = storage.writer(key)
    for piece in pieces:
        await writer.write(piece)
    await writer.close()


def read(storage: Storage, key: str) -> bytes:
    return b"".join(storage.stream(key))


async def aread(storage: Storage, key: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([piece async for piece in storage.astream(key, start, end)])


@pytest.mark.parametrize("content", [b"", b"x", CONTENT], ids=len)
def test_what_was_written_is_read_back(storage: Storage, content: bytes) -> None:
    asyncio.run(write(storage, "files/a", content[:1000], content[1000:]))

    assert storage.size("files/a") == len(content)
    assert read(storage, "files/a") == content
    assert asyncio.run(aread(storage, "files/a")) == content


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 10), (5, None), (5_000_000, 7_000_001), (9, 9), (10_239_999, 10_240_000)],
)
def test_a_part_of_a_blob_can_be_read(storage: Storage, start: int, end: int | None) -> None:
    asyncio.run(write(storage, "a", CONTENT))

    assert b"".join(storage.stream("a", start, end)) == CONTENT[start:end]
    assert asyncio.run(aread(storage, "a", start, end)) == CONTENT[start:end]


def test_a_blob_is_there_only_once_it_is_whole(storage: Storage) -> None:
    async def scenario() -> None:
        writer = storage.writer("a")
        await writer.write(CONTENT)
        with pytest.raises(BlobMissing):
            storage.size("a")
        await writer.close()
        assert storage.size("a") == len(CONTENT)

    asyncio.run(scenario())


def test_an_aborted_blob_leaves_nothing(storage: Storage, tmp_path: Path) -> None:
    async def scenario() -> None:
        writer = storage.writer("a")
        await writer.write(CONTENT)
        await writer.abort()
        await writer.abort()
        await storage.writer("b").abort()  # one that was never written to

    asyncio.run(scenario())

    for key in ("a", "b"):
        with pytest.raises(BlobMissing):
            storage.size(key)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_abort_after_the_close_undoes_nothing(storage: Storage) -> None:
    async def scenario() -> None:
        writer = storage.writer("a")
        await writer.write(b"x")
        await writer.close()
        await writer.abort()

    asyncio.run(scenario())

    assert read(storage, "a") == b"x"


def test_a_missing_blob_is_told_at_once(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(BlobMissing, match="nothing"):
        storage.stream("nothing")
    with pytest.raises(BlobMissing):
        asyncio.run(aread(storage, "nothing"))
    with pytest.raises(BlobMissing):
        storage.fetch("nothing", tmp_path / "x")
    storage.delete("nothing")  # as good as deleted


def test_a_deleted_blob_is_gone(storage: Storage) -> None:
    asyncio.run(write(storage, "files/a", b"x"))

    storage.delete("files/a")

    with pytest.raises(BlobMissing):
        storage.size("files/a")


def test_files_go_in_and_out(storage: Storage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "folder" / "target"
    source.write_bytes(CONTENT)

    storage.put_file("a/b/c", source)
    storage.fetch("a/b/c", target)

    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]


def test_a_fetch_that_fails_leaves_the_old_file(storage: Storage, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")

    with pytest.raises(BlobMissing):
        storage.fetch("nothing", target)

    assert target.read_bytes() == b"old"
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [target]


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "../a", "a/../b", "a//b", ".partial/a", "a b", "ä", "a\x00"]
)
def test_a_key_that_could_leave_the_folder_is_refused(storage: Storage, key: str) -> None:
    with pytest.raises(ValueError, match="is not a blob's key"):
        storage.writer(key)
    with pytest.raises(ValueError, match="is not a blob's key"):
        storage.put_file(key, Path(__file__))


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = local(tmp_path)

    def full(_fd: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    async def scenario() -> None:
        writer = storage.writer("a")
        await writer.write(b"x")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageFull, match="no room left"):
            await writer.close()
        await writer.abort()

    asyncio.run(scenario())

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_store_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT": "http://127.0.0.1:1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "here",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }.items():
        monkeypatch.setenv(name, value)
    storage = Storage(
        S3Store("bucket", retry_config={"max_retries": 0})  # the default tries for minutes
    )

    with pytest.raises(Unavailable, match="does not answer"):
        storage.size("a")
    with pytest.raises(Unavailable):
        asyncio.run(write(storage, "a", b"x"))


def test_room_is_known_for_a_folder_only(tmp_path: Path) -> None:
    free = local(tmp_path).free_bytes()

    assert free is not None
    assert free > 0
    assert Storage(MemoryStore()).free_bytes() is None


@pytest.mark.parametrize("url", ["file://relative", "ftp://host/x", "nonsense", "file:relative"])
def test_an_address_that_cannot_be_used_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(StorageUrlInvalid, match=url):
        Storage.open(_settings(tmp_path, storage_url=url))


def test_a_folder_with_a_space_in_its_name_can_be_used(tmp_path: Path) -> None:
    storage = Storage.open(_settings(tmp_path, storage_url=f"file://{tmp_path}/my%20blobs"))

    asyncio.run(write(storage, "a", b"x"))

    assert (tmp_path / "my blobs" / "a").read_bytes() == b"x"


def test_only_what_was_cut_off_long_ago_is_swept(tmp_path: Path) -> None:
    storage = local(tmp_path)
    partial = tmp_path / "blobs" / ".partial"
    old, new = partial / "old", partial / "new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 100, time.time() - 100))

    swept = storage.sweep(older_than_s=50)

    assert (swept, list(partial.iterdir())) == (1, [new])


WRITE_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
from service.settings import Settings
from service.storage import Storage

async def main():
    writer = Storage.open(Settings(_env_file=None, data_dir=Path(sys.argv[1]))).writer("files/a")
    await writer.write(b"half of it")
    print("written", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_a_slow_upload_is_left_alone_and_swept_once_its_process_was_killed(tmp_path: Path) -> None:
    storage = local(tmp_path)
    partial = tmp_path / "blobs" / ".partial"
    command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        (left,) = partial.iterdir()
        os.utime(left, (0, 0))  # as if nothing had come for years

        while_it_lives = storage.sweep(older_than_s=50)
        writer.kill()
        writer.wait()
        after = storage.sweep(older_than_s=50)

    assert (while_it_lives, after) == (0, 1)
    assert list(partial.iterdir()) == []


def test_what_goes_while_it_is_looked_at_is_nothing_to_sweep(tmp_path: Path) -> None:
    storage = local(tmp_path)
    partial = tmp_path / "blobs" / ".partial"
    (partial / "renamed-meanwhile").symlink_to(partial / "gone")  # listed, but not there any more

    assert storage.sweep(older_than_s=0) == 0
