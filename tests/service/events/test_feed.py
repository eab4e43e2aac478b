"""The feed wakes those who wait for a job, and nobody else, over one connection that comes back."""

import asyncio
import time

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from service.db import transaction
from service.errors import Unavailable
from service.events.actions import NewEvent, append
from service.events.feed import Feed, Subscription
from service.settings import Settings
from service.tables import DEFAULT_PROJECT


def tell(sessions: sessionmaker[Session], job_id: str) -> None:
    with transaction(sessions) as session:
        append(session, DEFAULT_PROJECT, job_id, NewEvent("x"))


def listeners(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(
            text(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'nibble-events'"
                " AND datname = current_database() AND query ILIKE 'listen%'"
            )
        ).scalar_one()


async def until(engine: Engine, count: int) -> None:
    def wait() -> None:
        deadline = time.monotonic() + 60
        while listeners(engine) != count:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    await asyncio.to_thread(wait)


async def until_listening(*subscriptions: Subscription) -> None:
    """Wait for the wake-up that says "we listen now", and forget it."""
    for subscription in subscriptions:
        assert await subscription.wait(60)
        subscription.rearm()


def test_a_commit_wakes_who_waits_for_that_job_only(
    settings: Settings, job_id: str, sessions: sessionmaker[Session]
) -> None:
    async def play() -> tuple[bool, bool]:
        feed = Feed.of(settings)
        with feed.subscribe(job_id) as mine, feed.subscribe("ftjob-other") as other:
            await until_listening(mine, other)
            await asyncio.to_thread(tell, sessions, job_id)
            return await mine.wait(60), await other.wait(0.2)

    assert asyncio.run(play()) == (True, False)


def test_nothing_is_told_before_the_commit(
    settings: Settings, job_id: str, sessions: sessionmaker[Session]
) -> None:
    async def play() -> tuple[bool, bool]:
        feed = Feed.of(settings)
        with feed.subscribe(job_id) as mine, sessions() as session:
            await until_listening(mine)
            append(session, DEFAULT_PROJECT, job_id, NewEvent("x"))
            early = await mine.wait(0.3)
            session.commit()
            return early, await mine.wait(60)

    assert asyncio.run(play()) == (False, True)


def test_a_lost_connection_comes_back_and_wakes_everyone(
    settings: Settings, job_id: str, sessions: sessionmaker[Session], engine: Engine
) -> None:
    def cut() -> None:
        with engine.begin() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'nibble-events' AND datname = current_database()"
                )
            )

    async def play() -> tuple[bool, bool]:
        feed = Feed.of(settings)
        with feed.subscribe(job_id) as mine:
            await until_listening(mine)
            await asyncio.to_thread(cut)
            back = await mine.wait(60)  # whatever was missed can be read now
            mine.rearm()
            await asyncio.to_thread(tell, sessions, job_id)
            return back, await mine.wait(60)

    assert asyncio.run(play()) == (True, True)


def test_without_waiters_there_is_no_connection(
    settings: Settings, job_id: str, engine: Engine
) -> None:
    async def play() -> list[int]:
        feed = Feed.of(settings)
        counts = [listeners(engine)]
        with feed.subscribe(job_id) as one, feed.subscribe(job_id), feed.subscribe("ftjob-other"):
            await until_listening(one)
            counts.append(listeners(engine))
        assert feed.waiting == 0
        await until(engine, 0)
        with feed.subscribe(job_id) as late:
            await until_listening(late)
            counts.append(listeners(engine))
        return counts

    assert asyncio.run(play()) == [0, 1, 1]


def test_a_waiter_too_many_is_refused_and_room_is_made_again(settings: Settings) -> None:
    async def play() -> None:
        feed = Feed("postgresql://nobody@127.0.0.1:1/nothing", max_waiting=1)
        with feed.subscribe("a"):
            with pytest.raises(Unavailable, match="1 streams are open"), feed.subscribe("b"):
                pass
            assert feed.waiting == 1
        with feed.subscribe("b"):
            assert feed.waiting == 1

    asyncio.run(play())


def test_closing_wakes_everyone_and_refuses_the_next(settings: Settings, job_id: str) -> None:
    async def play() -> bool:
        feed = Feed.of(settings)
        with feed.subscribe(job_id) as mine:
            mine.rearm()
            await feed.close()
            with pytest.raises(Unavailable):
                feed.check_room()
            return await mine.wait(60) and feed.closed

    assert asyncio.run(play())


def test_a_database_that_is_away_leaves_the_waiter_waiting() -> None:
    async def play() -> bool:
        feed = Feed("postgresql://nobody@127.0.0.1:1/nothing")
        with feed.subscribe("ftjob-1") as mine:
            return await mine.wait(0.5)

    assert asyncio.run(play()) is False
