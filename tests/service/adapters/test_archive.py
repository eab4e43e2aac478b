"""The archive: a tar of known length, any part of which can be had."""

import asyncio
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import Session, sessionmaker

from service import clock
from service.adapters import actions
from service.adapters.archive import Archive, Literal
from service.db import transaction
from service.errors import NotFound
from service.storage import Storage
from service.tables import Adapter, Job
from tests.service.adapters.conftest import FILES


@pytest.fixture
def adapter(sessions: sessionmaker[Session], storage: Storage, job: Job, folder: Path) -> Adapter:
    with transaction(sessions) as session:
        return actions.publish(session, storage, job, 2, 5, folder)


def read(archive: Archive, storage: Storage, start: int, end: int) -> bytes:
    async def collect() -> bytes:
        return b"".join([piece async for piece in archive.read(storage, start, end)])

    return asyncio.run(collect())


def test_it_is_a_tar_of_the_announced_length_and_always_the_same(
    adapter: Adapter, storage: Storage
) -> None:
    archive = Archive.of(adapter, "folder")

    content = read(archive, storage, 0, archive.size)

    assert len(content) == archive.size
    assert content == read(Archive.of(adapter, "folder"), storage, 0, archive.size)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = {m.name: m for m in tar.getmembers()}
        assert set(members) == {f"folder/{name}" for name in [*FILES, "manifest.json"]}
        for name, expected in FILES.items():
            member = members[f"folder/{name}"]
            file = tar.extractfile(member)
            assert file is not None
            assert file.read() == expected
            assert (member.mode, member.uid, member.uname) == (0o644, 0, "")
            assert member.mtime == clock.unix(adapter.created_at)


def test_every_part_of_it_is_the_same_part_of_the_whole(adapter: Adapter, storage: Storage) -> None:
    archive = Archive.of(adapter, "folder")
    whole = read(archive, storage, 0, archive.size)

    edges = [0]
    for part in archive.parts:
        edges.append(edges[-1] + part.size)
    points = sorted({max(0, min(archive.size, e + d)) for e in edges for d in (-1, 0, 1)})

    for start, end in zip(points, points[3:], strict=False):
        assert read(archive, storage, start, end) == whole[start:end], (start, end)


def test_another_folder_or_content_is_another_etag(adapter: Adapter) -> None:
    etag = Archive.of(adapter, "a").etag

    assert etag == Archive.of(adapter, "a").etag
    assert etag != Archive.of(adapter, "b").etag
    assert etag.startswith('"tar1-a-')


def test_a_missing_or_changed_blob_is_found_before_anything_is_sent(
    adapter: Adapter, storage: Storage
) -> None:
    archive = Archive.of(adapter, "a")
    archive.check(storage)

    storage.delete(adapter.files[0]["blob_key"])

    with pytest.raises(NotFound, match="not there any more"):
        archive.check(storage)


@given(
    st.lists(st.binary(max_size=9), max_size=6),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_cutting_is_slicing(contents: list[bytes], start: int, end: int) -> None:
    archive = Archive(tuple(Literal(content) for content in contents), etag='"x"')

    cut = [
        part.content[first:last]
        for part, first, last in archive.cut(start, end)
        if isinstance(part, Literal)
    ]

    assert b"".join(cut) == b"".join(contents)[start:end]
    assert all(cut)


def test_a_file_of_more_than_eight_gigabytes_has_a_header_tar_can_read() -> None:
    size = 9 * 2**30
    adapter = Adapter(
        files=[{"name": "big", "bytes": size, "sha256": "0", "blob_key": "k"}],
        created_at=clock.now(),
    )

    archive = Archive.of(adapter, "folder")

    header = archive.parts[0]
    assert isinstance(header, Literal)
    assert archive.size == header.size + size + 1024
    with tarfile.open(fileobj=io.BytesIO(header.content + bytes(1024))) as tar:
        member = tar.next()
        assert member is not None
        assert (member.name, member.size) == ("folder/big", size)
