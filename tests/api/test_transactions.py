"""One transaction per request: committed before the answer, never shared out beyond the pool."""

import threading

import httpx2
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from tests.api.conftest import CHAT_LINE


def upload(http: httpx2.Client) -> str:
    answer = http.post(
        "/v1/files", files={"file": ("a.jsonl", CHAT_LINE)}, data={"purpose": "fine-tune"}
    )
    file_id: str = answer.json()["id"]
    return file_id


def test_a_commit_that_fails_is_not_answered_with_success(
    http: httpx2.Client, session: Session
) -> None:
    file_id = upload(http)
    session.execute(
        text(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'not at commit'; END $$"
        )
    )
    session.execute(
        text(
            "CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON files DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
    )
    session.commit()

    answer = http.delete(f"/v1/files/{file_id}")

    assert answer.status_code == 500
    assert http.get(f"/v1/files/{file_id}").status_code == 200


def test_requests_beyond_the_pool_wait_their_turn(base_url: str, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"}
    statuses: list[int] = []

    def ask() -> None:
        with httpx2.Client(base_url=base_url, headers=headers, timeout=60) as client:
            statuses.append(client.get("/v1/files").status_code)

    threads = [threading.Thread(target=ask) for _ in range(120)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert statuses == [200] * 120


def test_a_database_that_dropped_its_connections_costs_no_request(
    http: httpx2.Client, session: Session
) -> None:
    assert http.get("/v1/files").status_code == 200
    session.execute(
        text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    )
    session.commit()

    answer = http.get("/v1/files")

    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/v1/files", "/v1/models"])
def test_a_table_that_is_locked_for_long_does_not_stop_the_other_routes(
    http: httpx2.Client, session: Session, path: str
) -> None:
    session.execute(text("LOCK TABLE checkpoints IN ACCESS EXCLUSIVE MODE"))

    answer = http.get(path)

    session.rollback()
    assert answer.status_code == 200
