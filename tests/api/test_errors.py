"""Whatever is wrong with a request, the answer is OpenAI's envelope and says what and where; never a traceback."""

import hashlib
import json
import socket
import threading

import anyio
import httpx2
import openai
import pytest
from openai import OpenAI
from sqlalchemy import text
from starlette.types import Message

from api.body import MAX_DRAIN_BYTES, MAX_JSON_BYTES
from api.main import create_app
from service import db
from service.settings import Settings

JOBS = "/v1/fine_tuning/jobs"
JSON = {"content-type": "application/json"}


def error_of(answer: httpx2.Response) -> dict[str, str | None]:
    """Return the envelope's content, having checked its four keys."""
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Basic bWU6eW91"},
        {"authorization": "Bearer sk-nibble-wrong"},
        {"authorization": "Bearer My API Key"},
        {"authorization": "Bearer sk-\xff\xfe"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/files", "/v1/nothing", JOBS])
def test_without_a_sound_key_nothing_under_v1_answers(
    steady: httpx2.Client, headers: dict[str, str], path: str
) -> None:
    answer = httpx2.get(
        steady.base_url.join(path), headers=httpx2.Headers(headers, encoding="latin-1")
    )

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert error_of(answer)["code"] == "invalid_api_key"


def test_the_sdk_names_a_wrong_key_as_such(steady: httpx2.Client) -> None:
    with (
        OpenAI(base_url=steady.base_url.join("/v1"), api_key="My API Key") as client,
        pytest.raises(openai.AuthenticationError, match="Incorrect API key") as caught,
    ):
        client.models.list()

    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id is not None


def test_an_unknown_address_and_a_wrong_method_are_told_apart(steady: httpx2.Client) -> None:
    unknown = steady.get("/v1/engines")
    method = steady.put("/v1/models")

    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "unknown_url")
    assert "GET /v1/engines" in (error_of(unknown)["message"] or "")
    assert (method.status_code, error_of(method)["code"]) == (405, "method_not_supported")
    assert method.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "line 1, column 2"),
        (b'{"model": }', "line 1, column 11"),
        (b"model=tiny", "line 1, column 1"),
        (b'{"seed": NaN}', "NaN is not a JSON value"),
        (b'{"seed": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"suffix": "\xff"}', "byte 13 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' + b"[" * 80 + b"]" * 80 + b"}", "nested more than 64 deep"),
        (b'{"seed": ' + b"9" * 5000 + b"}", ": it holds a number of too many digits."),
        (b"[1]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_body_that_is_no_json_object_is_refused_with_its_place(
    steady: httpx2.Client, body: bytes, told: str
) -> None:
    answer = steady.post(JOBS, content=body, headers=JSON)

    assert answer.status_code == 400
    assert told in (error_of(answer)["message"] or "")
    assert error_of(answer)["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("content_type", "told"),
    [
        ("text/plain", "says 'text/plain'."),
        ("application/x-www-form-urlencoded", "says 'application/x-www-form-urlencoded'."),
        ("", "says nothing of its type."),
    ],
)
def test_json_under_another_content_type_is_refused(
    steady: httpx2.Client, content_type: str, told: str
) -> None:
    answer = steady.post(JOBS, content=b"{}", headers={"content-type": content_type})

    assert answer.status_code == 400
    assert error_of(answer)["code"] == "invalid_content_type"
    message = error_of(answer)["message"] or ""
    assert "Content-Type: application/json" in message
    assert message.endswith(told)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (rb'{"suffix": "a\u0000b"}', "suffix"),
        (rb'{"suffix": "a\ud800"}', "suffix"),
        (rb'{"metadata": {"k": ["x", {"y": "\u0000"}]}}', "metadata.k[1].y"),
        (rb'{"metadata": {"\u0000": "v"}}', "metadata"),
    ],
)
def test_what_postgresql_cannot_store_is_refused_with_its_path(
    steady: httpx2.Client, body: bytes, param: str
) -> None:
    answer = steady.post(JOBS, content=body, headers=JSON)

    assert answer.status_code == 400
    assert error_of(answer)["param"] == param
    assert "NUL" in (error_of(answer)["message"] or "")


def test_an_escaped_backslash_before_u0000_is_sound(steady: httpx2.Client) -> None:
    answer = steady.post(JOBS, content=rb'{"suffix": "a\\u0000b"}', headers=JSON)

    assert "NUL" not in answer.text


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/files/%00", None),
        ("/v1/models/a%00b", None),
        ("/v1/files?limit=3&after=%00", "after"),
        (f"{JOBS}?metadata%5Bk%5D=v%00", "metadata[k]"),
        (f"{JOBS}?metadata%5Bk%00%5D=v", "metadata[k\0]"),
        (f"{JOBS}/ftjob-1/events?after=%00", "after"),
    ],
)
def test_a_nul_in_an_address_is_refused_by_its_parameter(
    steady: httpx2.Client, path: str, param: str | None
) -> None:
    answer = steady.get(path)

    assert answer.status_code == 400
    assert (error_of(answer)["code"], error_of(answer)["param"]) == ("invalid_value", param)
    assert "NUL" in (error_of(answer)["message"] or "")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=10001", "limit"),
        ("limit=-1", "limit"),
        ("limit=many", "limit"),
        ("order=up", "order"),
    ],
)
def test_a_query_out_of_bounds_names_its_parameter(
    steady: httpx2.Client, query: str, param: str
) -> None:
    answer = steady.get(f"/v1/files?{query}")

    assert answer.status_code == 400
    assert error_of(answer)["param"] == param
    assert (error_of(answer)["message"] or "").startswith(f"Invalid '{param}': ")


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_huge_json_body_is_refused(steady: httpx2.Client, *, is_declared: bool) -> None:
    body = json.dumps({"suffix": "x" * MAX_JSON_BYTES}).encode()
    content = body if is_declared else iter([body[:500_000], body[500_000:]])

    answer = steady.post(JOBS, content=content, headers=JSON)

    assert answer.status_code == 413
    assert error_of(answer)["code"] == "request_too_large"


def test_an_endless_body_with_a_wrong_key_costs_at_most_a_megabyte(settings: Settings) -> None:
    app = create_app(settings)
    read = 0
    sent: list[Message] = []

    async def receive() -> Message:
        nonlocal read
        read += 65_536
        return {"type": "http.request", "body": b"x" * 65_536, "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/files",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer wrong"), (b"transfer-encoding", b"chunked")],
    }
    anyio.run(app, scope, receive, send)

    assert sent[0]["status"] == 401
    assert (b"connection", b"close") in sent[0]["headers"]
    assert read <= MAX_DRAIN_BYTES + 65_536 <= 1_000_000
    assert sent[-1]["more_body"] is False
    app.state.nibble.engine.dispose()


def test_an_endless_body_with_a_wrong_key_is_answered_and_cut_off(steady: httpx2.Client) -> None:
    piece = b"%x\r\n%s\r\n" % (65_536, b"x" * 65_536)
    stop = threading.Event()

    with socket.create_connection(
        (steady.base_url.host, steady.base_url.port or 0), timeout=60
    ) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer wrong\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        sender = threading.Thread(target=_send_until_cut_off, args=(connection, piece, stop))
        sender.start()
        answer = connection.recv(4096)
        sender.join(timeout=60)
        is_cut_off = not sender.is_alive()
        stop.set()
        sender.join()

    assert answer.startswith(b"HTTP/1.1 401")
    assert is_cut_off


def _send_until_cut_off(connection: socket.socket, piece: bytes, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            connection.sendall(piece)
        except OSError:
            return


def test_a_body_that_ends_soon_with_a_wrong_key_gets_its_answer_whole(
    steady: httpx2.Client,
) -> None:
    with (
        OpenAI(base_url=steady.base_url.join("/v1"), api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.files.create(file=("a.jsonl", b"x" * 3_000_000), purpose="fine-tune")


def test_a_key_with_spaces_is_legal(http: httpx2.Client, settings: Settings) -> None:
    engine = db.connect(settings)
    with db.transaction(db.sessions(engine)) as session:
        session.execute(
            text("UPDATE api_keys SET sha256 = :sha256"),
            {"sha256": hashlib.sha256(b"My API Key").hexdigest()},
        )
    engine.dispose()

    answer = http.get("/v1/models", headers={"authorization": "Bearer My API Key"})

    assert answer.status_code == 200


def test_what_nobody_expected_is_a_500_in_the_envelope_without_a_traceback(
    http: httpx2.Client, settings: Settings
) -> None:
    engine = db.connect(settings)
    with db.transaction(db.sessions(engine)) as session:
        session.execute(text("ALTER TABLE jobs RENAME COLUMN fine_tuned_model TO gone"))
    engine.dispose()

    answer = http.get("/v1/models")

    assert answer.status_code == 500
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert answer.headers["x-request-id"] in (error["message"] or "")
    assert "SELECT" not in answer.text
