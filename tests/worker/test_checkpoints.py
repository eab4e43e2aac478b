"""Publishing checkpoints into an object store that is away for a moment: a real client, a local HTTP server."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from obstore.store import S3Store
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.queue.claim import claim
from service.settings import Settings
from service.storage import Storage
from service.tables import Event
from tests.worker.conftest import Submit, chat_lines
from worker.checkpoints import publish
from worker.crew import Crew
from worker.relay import CHECKPOINT, Line


class Bucket(BaseHTTPRequestHandler):
    """Takes every object, after it has refused `refusals` of them."""

    refusals = 0

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        status = 200
        if Bucket.refusals > 0:
            Bucket.refusals -= 1
            status = 403
        self.send_response(status)
        self.send_header("etag", '"x"')
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture
def storage() -> Iterator[Storage]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    store = S3Store(
        "bucket",
        endpoint=f"http://127.0.0.1:{server.server_port}",
        region="here",
        access_key_id="x",
        secret_access_key="x",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    yield Storage(store)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(("refusals", "is_over", "level"), [(2, False, "info"), (99, True, "warn")])
def test_a_passing_outage_of_the_storage_costs_no_checkpoint_and_a_lasting_one_no_more(
    refusals: int,
    is_over: bool,
    level: str,
    settings: Settings,
    storage: Storage,
    submit: Submit,
    sessions: sessionmaker[Session],
    story: Callable[[str], list[Event]],
    tmp_path: Path,
) -> None:
    submit(chat_lines(12))
    with transaction(sessions) as session:
        claimed = claim(session, kind="validate", worker_id="worker_a", host="here", lease_s=60)
    assert claimed is not None
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes(b"{}")
    Bucket.refusals = refusals
    over = threading.Event()
    if is_over:
        over.set()
    crew = Crew(settings)
    context = replace(crew.context, storage=storage)
    line = Line(
        1, 1.0, "info", "message", "m", {"kind": CHECKPOINT, "step": 5, "folder": str(folder)}
    )

    publish(context, claimed.fence, claimed.job, 1, line, give_up=threading.Event(), over=over)
    crew.stop()

    event = story(claimed.job.id)[-1]
    assert event.level == level, event.message
    assert ("Checkpoint created at step 5" in event.message) == (level == "info")
