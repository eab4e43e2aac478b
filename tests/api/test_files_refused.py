"""Uploads that must not succeed: a clear error, and not a byte left behind."""

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from openai import OpenAI

from service.settings import Settings
from tests.api import forms
from tests.api.conftest import CHAT_LINE, blobs_of, run_process, serve, wait_until

PURPOSE = forms.field("purpose", "fine-tune")
SOUND = forms.file(CHAT_LINE)


def post(client: httpx2.Client, body: bytes | Iterator[bytes]) -> httpx2.Response:
    return client.post("/v1/files", content=body, headers=forms.CONTENT_TYPE)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    names = [name for name in ("steady_settings", "settings") if name in request.fixturenames]
    used: list[Settings] = [request.getfixturevalue(name) for name in names]
    yield
    for settings in used:
        assert blobs_of(settings) == []


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        (b"", None, "before its closing boundary"),
        (forms.form(), "file", "Missing required parameter: 'file'"),
        (forms.form(PURPOSE), "file", "Missing required parameter: 'file'"),
        (forms.form(SOUND), "purpose", "Missing required parameter: 'purpose'"),
        (forms.form(PURPOSE, SOUND, SOUND), "file", "more than one 'file'"),
        (forms.form(PURPOSE, PURPOSE, SOUND), "purpose", "more than one 'purpose'"),
        (forms.form(PURPOSE, forms.field("colour", "red"), SOUND), "colour", "Unknown parameter"),
        (forms.form(PURPOSE, forms.file(CHAT_LINE, None)), "file", "has no file name"),
        (forms.form(PURPOSE, forms.file(b"")), "file", "is empty"),
        (forms.form(forms.file(b""), PURPOSE), "file", "is empty"),
        (forms.form(forms.field("purpose", "x" * 2000)), "purpose", "too long"),
        (forms.form(forms.field("purpose", "finetune"), SOUND), "purpose", "'fine-tune'"),
        (forms.form(SOUND, forms.field("purpose", "finetune")), "purpose", "'fine-tune'"),
        (forms.form(forms.field("purpose", "fine-tune-results"), SOUND), "purpose", "not one of"),
        ((PURPOSE + SOUND)[:-40], None, "before its closing boundary"),
        (PURPOSE + SOUND, None, "before its closing boundary"),
        (forms.form(PURPOSE, SOUND).replace(b"----nibble", b"----other"), None, "boundary"),
        (b"not a form at all", None, "boundary"),
        (b"------nibble\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + forms.END, None, "name"),
        (b"------nibble\r\n" + b"X" * 20_000 + b"\r\n", None, "not well-formed"),
    ],
    ids=lambda value: repr(value)[-30:],
)
def test_a_wrong_form_is_refused(
    steady: httpx2.Client,
    steady_settings: Settings,
    body: bytes,
    param: str | None,
    told: str,
) -> None:
    answer = post(steady, body)

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert told in error["message"]


@pytest.mark.parametrize(
    ("content_type", "code", "told"),
    [
        ("application/json", "invalid_content_type", "content type is 'application/json'."),
        ("multipart/form-data", "invalid_multipart", "names no boundary"),
        ("multipart/form-data; boundary=", "invalid_multipart", "names no boundary"),
        ("multipart/form-data; boundary=" + "x" * 500, "invalid_multipart", "boundary is too long"),
        ("multipart/form-data; boundary=----mine", "invalid_multipart", "does not keep to the boundary"),
        ("", "invalid_content_type", "this request has no content type."),
    ],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_a_body_that_is_no_form_is_refused(
    steady: httpx2.Client, steady_settings: Settings, content_type: str, code: str, told: str
) -> None:
    answer = steady.post(
        "/v1/files", content=forms.form(PURPOSE, SOUND), headers={"content-type": content_type}
    )

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert told in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (b"Content-Disposition form-data\r\n\r\n", "headers are not well-formed"),
        (b": x\r\n\r\n", "headers are not well-formed"),
        (b"a: b\r\n" * 100, "too many headers, or too long ones"),
    ],
    ids=["no colon", "no name", "many"],
)
def test_a_part_with_odd_headers_is_refused_in_plain_words(
    steady: httpx2.Client, steady_settings: Settings, head: bytes, told: str
) -> None:
    body = b"--" + forms.BOUNDARY + b"\r\n" + head + b"x\r\n" + forms.END

    answer = steady.post("/v1/files", content=body, headers=forms.CONTENT_TYPE)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_multipart")
    assert told in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b'[{"messages": []}]', '[{"message'),
        (b"prompt,completion\nhello,world\n", "prompt,com"),
        (b"\n\n  \n7\n", "7"),
        (b"PK\x03\x04\x00\x00", "PK\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"),
        (b"[" * 200_000, "[[[[[[[[[["),
        (b"x" * 3_000_000, "xxxxxxxxxx"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_jsonl_is_refused_in_openai_s_words(
    steady: httpx2.Client, steady_settings: Settings, content: bytes, hint: str
) -> None:
    early = post(steady, forms.form(PURPOSE, forms.file(content)))
    late = post(steady, forms.form(forms.file(content), PURPOSE))

    line = 4 if content.startswith(b"\n") else 1
    told = (
        "Expected file to have JSONL format, where every line is a JSON dictionary. Line"
        f" {line} is not a dictionary (HINT: line starts with: "
    )
    for answer in (early, late):
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(f'{told}"{hint}')


def test_the_sdk_shows_the_jsonl_error_as_a_bad_request(
    steady: httpx2.Client, steady_settings: Settings
) -> None:
    key = steady.headers["authorization"].removeprefix("Bearer ")
    with (
        OpenAI(base_url=steady.base_url.join("/v1"), api_key=key) as client,
        pytest.raises(openai.BadRequestError, match="Expected file to have JSONL format"),
    ):
        client.files.create(file=("data.csv", b"a,b\n1,2\n"), purpose="fine-tune")


@pytest.mark.parametrize("filename", ["", "..", "folder/", "a\x01b", "x" * 256])
def test_a_name_that_is_none_is_refused(
    steady: httpx2.Client, steady_settings: Settings, filename: str
) -> None:
    answer = post(steady, forms.form(PURPOSE, forms.file(CHAT_LINE, filename)))

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_filename"


@pytest.mark.parametrize(
    ("anchor", "seconds", "param"),
    [
        ("created_at", "3599", "expires_after.seconds"),
        ("created_at", "2592001", "expires_after.seconds"),
        ("created_at", "soon", "expires_after.seconds"),
        ("created_at", "-1", "expires_after.seconds"),
        ("created_at", "³6000", "expires_after.seconds"),
        ("created_at", None, "expires_after.seconds"),
        ("last_active_at", "3600", "expires_after.anchor"),
        (None, "3600", "expires_after.anchor"),
    ],
)
def test_an_expiry_out_of_bounds_is_refused(
    steady: httpx2.Client,
    steady_settings: Settings,
    anchor: str | None,
    seconds: str | None,
    param: str,
) -> None:
    fields = {"expires_after[anchor]": anchor, "expires_after[seconds]": seconds}
    parts = [forms.field(name, value) for name, value in fields.items() if value is not None]

    answer = post(steady, forms.form(PURPOSE, *parts, SOUND))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_declared_length_over_the_limit_is_refused_before_the_body(
    base_url: str, key: str, settings: Settings
) -> None:
    head = b"content-length: %d\r\n" % (settings.max_upload_bytes + 1_000_000)

    with forms.open_upload(base_url, key, head=head, body=b"") as connection:
        answer = forms.read_all(connection)

    assert answer.startswith(b"HTTP/1.1 413")
    assert b"file_too_large" in answer


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_real_length_over_the_limit_is_refused(settings: Settings, *, is_declared: bool) -> None:
    small = settings.model_copy(update={"max_upload_bytes": 100_000})
    body = forms.form(PURPOSE, forms.file(CHAT_LINE * 1_200))

    with serve(small) as url:
        key = settings.first_key_file.read_text().strip()
        answer = httpx2.post(
            f"{url}/v1/files",
            content=body if is_declared else iter([body]),
            headers=forms.CONTENT_TYPE | {"authorization": f"Bearer {key}"},
        )

    assert len(body) < 100_000 + 100_000  # the declared length alone does not tell
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "A file may have 100000 bytes."


def test_what_comes_after_the_form_s_end_is_bounded_too(settings: Settings) -> None:
    small = settings.model_copy(update={"max_upload_bytes": 100_000})
    pieces = [forms.form(PURPOSE, SOUND), *[b"\r\n" * 50_000] * 4]

    with serve(small) as url:
        key = settings.first_key_file.read_text().strip()
        answer = httpx2.post(
            f"{url}/v1/files",
            content=iter(pieces),
            headers=forms.CONTENT_TYPE | {"authorization": f"Bearer {key}"},
        )

    assert answer.status_code == 413


def test_a_wrong_purpose_that_comes_first_costs_no_upload(
    base_url: str, key: str, settings: Settings
) -> None:
    body = forms.field("purpose", "finetune") + forms.file_start() + CHAT_LINE

    with forms.open_upload(base_url, key, body=body) as connection:
        answer = forms.read_all(connection)

    assert answer.startswith(b"HTTP/1.1 400")


def test_an_upload_that_would_fill_the_disk_is_refused_before_the_body(
    settings: Settings,
) -> None:
    full = settings.model_copy(update={"min_free_bytes": 1 << 60})

    with serve(full) as url:
        key = settings.first_key_file.read_text().strip()
        with forms.open_upload(url, key, body=b"") as connection:
            answer = forms.read_all(connection)

    head, body = answer.split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 507")
    assert json.loads(body)["error"]["code"] == "insufficient_storage"
    assert "x-should-retry: false" in head.decode().lower()


def test_a_disk_that_fills_up_meanwhile_is_a_507(settings: Settings, tmp_path: Path) -> None:
    def let_no_file_grow() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))

    with run_process(settings, tmp_path / "api.log", before_exec=let_no_file_grow) as api:
        key = settings.first_key_file.read_text().strip()
        answer = httpx2.post(
            f"{api.url}/v1/files",
            content=forms.form(PURPOSE, forms.file(CHAT_LINE * 60_000)),
            headers=forms.CONTENT_TYPE | {"authorization": f"Bearer {key}"},
            timeout=30,
        )

    assert answer.status_code == 507
    assert answer.json()["error"]["code"] == "insufficient_storage"
    assert "Traceback" not in api.log.read_text()


def test_a_client_that_goes_in_the_middle_leaves_nothing(
    base_url: str, key: str, settings: Settings
) -> None:
    body = PURPOSE + forms.file_start() + CHAT_LINE * 30_000

    with forms.open_upload(base_url, key, body=body):
        wait_until(lambda: len(blobs_of(settings)) == 1)  # it has begun to be written

    wait_until(lambda: blobs_of(settings) == [])


def test_a_server_that_stops_in_the_middle_leaves_nothing(settings: Settings) -> None:
    body = PURPOSE + forms.file_start() + CHAT_LINE * 30_000

    with contextlib.ExitStack() as held:
        with serve(settings) as url:
            key = settings.first_key_file.read_text().strip()
            held.enter_context(forms.open_upload(url, key, body=body))
            wait_until(lambda: len(blobs_of(settings)) == 1)

        assert blobs_of(settings) == []


def test_a_client_that_falls_silent_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, base_url: str, key: str, settings: Settings
) -> None:
    monkeypatch.setattr("api.body.IDLE_S", 0.2)
    body = PURPOSE + forms.file_start() + CHAT_LINE * 30_000

    with forms.open_upload(base_url, key, body=body) as connection:
        answer = forms.read_all(connection)

    assert answer.startswith(b"HTTP/1.1 408")


def test_uploads_that_never_end_hold_no_connection_of_the_database(
    base_url: str, key: str, settings: Settings
) -> None:
    body = PURPOSE + forms.file_start() + CHAT_LINE
    headers = {"authorization": f"Bearer {key}"}

    with contextlib.ExitStack() as stack:
        for _ in range(30):  # more than the pool has
            stack.enter_context(forms.open_upload(base_url, key, body=body))
        answers = [httpx2.get(f"{base_url}/v1/files", headers=headers) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 200]
    wait_until(lambda: blobs_of(settings) == [])
