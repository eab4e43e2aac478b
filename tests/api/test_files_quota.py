"""What a project may store together: an upload beyond it is refused, and leaves not a byte behind."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from openai import OpenAI

from service.settings import Settings
from tests.api import forms
from tests.api.conftest import CHAT_LINE, blobs_of, wait_until

LIMIT = 3_000_000
PURPOSE = forms.field("purpose", "fine-tune")
TWO_MB = CHAT_LINE * (2_000_000 // len(CHAT_LINE))


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The settings, with room for one file of two megabytes but not for two."""
    return settings.model_copy(update={"max_stored_bytes": LIMIT})


def store(client: OpenAI, content: bytes = TWO_MB) -> str:
    return client.files.create(file=("a.jsonl", content), purpose="fine-tune").id


def post(http: httpx2.Client, body: bytes | Iterator[bytes]) -> httpx2.Response:
    return http.post("/v1/files", content=body, headers=forms.CONTENT_TYPE)


def test_a_declared_length_over_what_is_left_is_refused_before_the_body(
    base_url: str, key: str, client: OpenAI, settings: Settings
) -> None:
    store(client)
    head = b"content-length: 1500000\r\n"

    with forms.open_upload(base_url, key, head=head, body=b"") as connection:
        answer = forms.read_all(connection)

    head, body = answer.split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert "x-should-retry: false" in head.decode().lower()
    assert json.loads(body)["error"] == {
        "message": f"This project's files have {len(TWO_MB)} bytes together and may have {LIMIT}; this file does not"
        " fit. Delete files that are not needed any more, and send it again.",
        "type": "invalid_request_error",
        "param": "file",
        "code": "storage_quota_exceeded",
    }
    assert len(blobs_of(settings)) == 1


def test_real_bytes_over_what_is_left_are_refused_as_they_come_without_a_declared_length(
    base_url: str, key: str, client: OpenAI, settings: Settings
) -> None:
    kept = store(client)
    piece = PURPOSE + forms.file_start() + CHAT_LINE.ljust(LIMIT - len(TWO_MB) + 100)
    chunk = b"%x\r\n%b\r\n" % (len(piece), piece)  # and no end: the answer does not wait for it
    head = b"transfer-encoding: chunked\r\n"

    with forms.open_upload(base_url, key, head=head, body=chunk) as connection:
        answer = forms.read_all(connection)

    assert answer.startswith(b"HTTP/1.1 413")
    assert b"storage_quota_exceeded" in answer
    assert [file.id for file in client.files.list()] == [kept]
    assert len(blobs_of(settings)) == 1


@pytest.mark.parametrize("over", [0, 1])
def test_the_last_byte_of_the_quota_can_be_used_and_no_more(
    http: httpx2.Client, client: OpenAI, settings: Settings, over: int
) -> None:
    store(client)
    content = CHAT_LINE.ljust(LIMIT - len(TWO_MB) + over)  # the form's length alone does not tell

    answer = post(http, forms.form(PURPOSE, forms.file(content)))

    assert answer.status_code == (413 if over else 200)
    assert len(blobs_of(settings)) == (1 if over else 2)


def test_deleting_a_file_makes_room(client: OpenAI) -> None:
    first = store(client)
    with pytest.raises(openai.APIStatusError, match="may have 3000000") as refused:
        store(client)
    client.files.delete(first)

    second = store(client)

    assert (refused.value.status_code, refused.value.code) == (413, "storage_quota_exceeded")
    assert [file.id for file in client.files.list()] == [second]


def test_another_project_has_a_quota_of_its_own(client: OpenAI, other_team: OpenAI) -> None:
    store(client)

    theirs = store(other_team)

    assert [file.id for file in other_team.files.list()] == [theirs]
    with pytest.raises(openai.APIStatusError, match="may have 3000000"):
        store(other_team)


def test_two_uploads_at_once_do_not_share_the_room_for_one(
    http: httpx2.Client, client: OpenAI, settings: Settings
) -> None:
    def body() -> Iterator[bytes]:
        yield PURPOSE + forms.file_start() + TWO_MB
        wait_until(lambda: len(blobs_of(settings)) == 2)  # each has been let in
        yield b"\r\n" + forms.END

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: post(http, body()), range(2)))

    assert sorted(answer.status_code for answer in answers) == [200, 413]
    (kept,) = client.files.list()
    assert [blob.name for blob in blobs_of(settings)] == [kept.id]
