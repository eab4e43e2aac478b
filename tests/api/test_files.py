"""Files through the official SDK: what goes in comes out, listed, paged, deleted, and nobody else's."""

import base64
import hashlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx2
import openai
import pytest
from openai import OpenAI
from sqlalchemy import event, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service import clock
from service.files.actions import register_produced
from service.settings import Settings
from service.storage import Storage
from service.tables import DEFAULT_PROJECT, File
from tests.api import forms
from tests.api.conftest import CHAT_LINE, blobs_of, serve


@pytest.fixture
def strict(base_url: str, key: str) -> Iterator[OpenAI]:
    """The SDK, holding every answer to its types."""
    with OpenAI(
        base_url=f"{base_url}/v1", api_key=key, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def test_an_uploaded_file_comes_back_byte_for_byte(strict: OpenAI, session: Session) -> None:
    content = CHAT_LINE * 50_000  # several writes

    file = strict.files.create(file=("training.jsonl", content), purpose="fine-tune")

    assert file.id.startswith("file-")
    assert (file.object, file.filename, file.purpose) == ("file", "training.jsonl", "fine-tune")
    assert (file.bytes, file.status, file.expires_at) == (len(content), "processed", None)
    assert strict.files.retrieve(file.id) == file
    assert strict.files.wait_for_processing(file.id).status == "processed"
    assert strict.files.content(file.id).read() == content
    row = session.get_one(File, file.id)
    assert row.sha256 == hashlib.sha256(content).hexdigest()


def test_a_file_may_be_sent_as_bare_bytes_or_from_a_path(strict: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "über uns.jsonl"
    path.write_bytes(CHAT_LINE)

    bare = strict.files.create(file=CHAT_LINE, purpose="fine-tune")
    named = strict.files.create(file=path, purpose="fine-tune")

    assert bare.filename == "upload"
    assert named.filename == "über uns.jsonl"
    header = strict.files.with_raw_response.content(named.id).headers["content-disposition"]
    assert header == "attachment; filename*=UTF-8''%C3%BCber%20uns.jsonl"


@pytest.mark.parametrize(
    "sent", ["../../etc/training.jsonl", "/etc/training.jsonl", r"C:\data\training.jsonl"]
)
def test_of_a_name_with_folders_only_the_last_part_is_kept(
    steady: httpx2.Client, steady_settings: Settings, sent: str
) -> None:
    body = forms.form(forms.field("purpose", "batch"), forms.file(b"x", sent))

    answer = steady.post("/v1/files", content=body, headers=forms.CONTENT_TYPE)

    assert answer.json()["filename"] == "training.jsonl"
    folder = steady_settings.data_dir / "blobs" / "files" / "proj_default"
    assert all(blob.parent == folder for blob in blobs_of(steady_settings))


@pytest.mark.parametrize("purpose", ["assistants", "batch", "vision", "user_data", "evals"])
def test_a_file_of_another_purpose_may_hold_anything(steady: httpx2.Client, purpose: str) -> None:
    answer = steady.post(
        "/v1/files", files={"file": ("x.bin", b"\x00\xff")}, data={"purpose": purpose}
    )

    assert answer.status_code == 200
    assert answer.json()["purpose"] == purpose


def test_files_are_listed_newest_first_page_by_page(strict: OpenAI) -> None:
    made = [
        strict.files.create(file=(f"{i}.jsonl", CHAT_LINE), purpose="fine-tune").id
        for i in range(5)
    ]

    newest_first = [file.id for file in strict.files.list(limit=2)]
    oldest_first = [file.id for file in strict.files.list(limit=2, order="asc")]
    page = strict.files.list(limit=2)

    assert newest_first == made[::-1]
    assert oldest_first == made
    assert page.has_more
    assert (page.first_id, page.last_id) == (made[4], made[3])  # type: ignore[attr-defined]


def test_paging_goes_on_behind_a_file_deleted_meanwhile(strict: OpenAI) -> None:
    made = [
        strict.files.create(file=(f"{i}.jsonl", CHAT_LINE), purpose="fine-tune").id
        for i in range(3)
    ]
    strict.files.delete(made[1])

    behind = strict.files.list(after=made[1])

    assert [file.id for file in behind.data] == [made[0]]


def test_a_list_can_be_narrowed_to_a_purpose_and_answers_what_the_sdk_s_tests_send(
    strict: OpenAI,
) -> None:
    strict.files.create(file=("a.jsonl", CHAT_LINE), purpose="fine-tune")
    batch = strict.files.create(file=("b.jsonl", CHAT_LINE), purpose="batch")

    assert [file.id for file in strict.files.list(purpose="batch")] == [batch.id]
    assert strict.files.list(purpose="purpose").data == []
    assert strict.files.list(after="after", limit=0, order="asc", purpose="purpose").data == []
    assert strict.files.list(after="after").data == []


def test_a_deleted_file_is_gone_for_everyone_who_asks(strict: OpenAI) -> None:
    file = strict.files.create(file=("a.jsonl", CHAT_LINE), purpose="fine-tune")

    deleted = strict.files.delete(file.id)

    assert deleted.to_dict() == {"id": file.id, "object": "file", "deleted": True}
    assert strict.files.list().data == []
    for look in (strict.files.retrieve, strict.files.content, strict.files.delete):
        with pytest.raises(openai.NotFoundError, match=f"No such File object: {file.id}") as caught:
            look(file.id)
        assert caught.value.param == "id"


def test_another_team_s_file_does_not_exist(strict: OpenAI, other_team: OpenAI) -> None:
    file = strict.files.create(file=("a.jsonl", CHAT_LINE), purpose="fine-tune")

    for look in (other_team.files.retrieve, other_team.files.content, other_team.files.delete):
        with pytest.raises(openai.NotFoundError):
            look(file.id)
    assert other_team.files.list().data == []
    assert other_team.files.list(after=file.id).data == []
    assert strict.files.retrieve(file.id).id == file.id


def test_a_file_goes_when_its_time_is_over(strict: OpenAI, session: Session) -> None:
    file = strict.files.create(
        file=("a.jsonl", CHAT_LINE),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at == file.created_at + 3600

    session.execute(update(File).values(expires_at=clock.now() - timedelta(seconds=1)))
    session.commit()

    with pytest.raises(openai.NotFoundError):
        strict.files.retrieve(file.id)
    assert strict.files.list().data == []


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 3_000_001])
def test_a_job_s_results_come_base64_encoded(
    client: OpenAI, settings: Settings, session: Session, tmp_path: Path, size: int
) -> None:
    content = (b"step,train_loss\n1,0.5\n" * (size // 20 + 1))[:size]
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    Storage.open(settings).put_file("results/1", path)
    file = register_produced(
        session, DEFAULT_PROJECT, "step_metrics.csv", "fine-tune-results", "results/1", size, "00"
    )
    session.commit()

    served = client.files.content(file.id)

    assert served.read() == base64.b64encode(content)
    assert int(served.response.headers["content-length"]) == len(served.content)


def test_a_row_that_cannot_be_written_leaves_no_blob(
    http: httpx2.Client, session: Session, settings: Settings
) -> None:
    session.execute(text("ALTER TABLE files RENAME COLUMN sha256 TO gone"))
    session.commit()

    answer = http.post(
        "/v1/files", files={"file": ("a.jsonl", CHAT_LINE)}, data={"purpose": "fine-tune"}
    )

    assert answer.status_code == 500
    assert blobs_of(settings) == []


def test_a_file_whose_bytes_are_lost_is_a_404(client: OpenAI, settings: Settings) -> None:
    file = client.files.create(file=("a.jsonl", CHAT_LINE), purpose="fine-tune")
    for blob in blobs_of(settings):
        blob.unlink()

    with pytest.raises(openai.NotFoundError, match="not there any more"):
        client.files.content(file.id)


def test_a_row_whose_commit_was_made_but_not_answered_keeps_its_bytes(
    settings: Settings, session: Session
) -> None:
    def lose(committed: Session) -> None:
        if committed.info.pop("file", False):
            raise OperationalError("COMMIT", None, ConnectionError("the answer was lost"))

    def note(flushed: Session, *_: object) -> None:
        flushed.info["file"] = any(isinstance(row, File) for row in flushed.new)

    event.listen(Session, "before_flush", note)
    event.listen(Session, "after_commit", lose)
    try:
        with serve(settings) as url:
            key = settings.first_key_file.read_text().strip()
            answer = httpx2.post(
                f"{url}/v1/files",
                files={"file": ("a.jsonl", CHAT_LINE)},
                data={"purpose": "fine-tune"},
                headers={"authorization": f"Bearer {key}"},
            )
    finally:
        event.remove(Session, "before_flush", note)
        event.remove(Session, "after_commit", lose)

    assert answer.status_code == 503
    assert session.scalar(select(File.bytes)) == len(CHAT_LINE)
    assert [blob.read_bytes() for blob in blobs_of(settings)] == [CHAT_LINE]
