import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from operations.embedded import valkey
from service.queue.kick import Doorbell
from service.settings import Settings


@pytest.fixture
def doorbell(settings: Settings) -> Iterator[Doorbell]:
    doorbell = Doorbell(settings)
    yield doorbell
    doorbell.close()


@pytest.fixture
def waiting(valkey_server: valkey.Valkey) -> Callable[[str], int]:
    """How many kicks wait in the broker's queue of a kind."""

    def count(kind: str) -> int:
        with valkey_server.client() as client:
            return int(client.llen(f"nibble:{kind}"))  # pyright: ignore[reportArgumentType]

    return count


def test_a_kick_waits_in_the_queue_of_its_kind(
    waiting: Callable[[str], int], doorbell: Doorbell
) -> None:
    rung = doorbell.kick("validate")

    assert rung
    assert (waiting("validate"), waiting("train")) == (1, 0)


def test_a_kick_rings_only_after_the_commit(
    waiting: Callable[[str], int], doorbell: Doorbell, session: Session
) -> None:
    session.execute(text("SELECT 1"))
    doorbell.kick_after_commit(session, "train")
    before = waiting("train")

    session.commit()

    assert (before, waiting("train")) == (0, 1)


def test_a_rollback_drops_the_kick(
    waiting: Callable[[str], int], doorbell: Doorbell, sessions: sessionmaker[Session]
) -> None:
    with sessions() as session:
        session.execute(text("SELECT 1"))
        doorbell.kick_after_commit(session, "train")
        session.rollback()
        session.execute(text("SELECT 1"))
        session.commit()

    assert waiting("train") == 0


def test_a_broker_that_is_down_costs_moments_and_no_error(
    settings: Settings, tmp_path: Path
) -> None:
    nobody = f"redis+socket://{tmp_path / 'nobody.sock'}"
    doorbell = Doorbell(settings.model_copy(update={"redis_url": SecretStr(nobody)}))
    started = time.monotonic()

    rung = doorbell.kick("train")

    assert not rung
    assert time.monotonic() - started < 20
    doorbell.close()
