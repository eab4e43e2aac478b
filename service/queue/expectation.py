"""Where a job stands in the line for training, and when it should start.

Both are what can be known, else None: a start is told only where each slot that the job could get is free now, or is
held by a run that has said when it will be done. How long a waiting job will take is not known, so nothing is told of
those for whom a slot would have to come free twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from service import clock
from service.queue import line_repository, workers_repository
from service.queue.fit import fits, room, why_unfit
from service.tables import Job, Worker

_MOST_WORKERS = 1_000
_MOST_HELD = 10_000
_UNFIT_AHEAD = 100
"""So many jobs that take no slot, since they fit none, may stand before one whose start is known."""


@dataclass(frozen=True)
class Place:
    """A waiting job's place. `position` 1 is next; `waits_because` says that no GPU is large enough, and which would be."""

    position: int | None = None
    expected_start: datetime | None = None
    waits_because: str | None = None


@dataclass(frozen=True)
class TrainingSlot:
    """Room for one run: how much memory (None: unknown, so enough), and from when on (None: nobody knows)."""

    room_bytes: int | None
    free_at: datetime | None


def places(session: Session, jobs: Sequence[Job], *, lease_s: float) -> dict[str, Place]:
    """Return the places of those of `jobs` that wait for training; the others have none.

    Args:
        session: the transaction.
        jobs: any.
        lease_s: a worker that has been silent for longer counts as lost.
    """
    queued = [job.id for job in jobs if job.status == "queued"]
    if not queued:
        return {}
    slots = training_slots(session, lease_s=lease_s)
    line = line_repository.line(session, first=len(slots) + _UNFIT_AHEAD, job_ids=queued)
    # The line's head is whole; behind it, others that are not here may take a slot first.
    head = [one for n, one in enumerate(line, 1) if one.position == n]
    needs = [one.memory_needed_bytes for one in head]
    starts = expected_starts(needs, slots, now=clock.now())
    starts += [None] * (len(line) - len(head))
    rooms = [slot.room_bytes for slot in slots]
    wanted = set(queued)
    return {
        one.job_id: Place(one.position, start, why_unfit(one.memory_needed_bytes, rooms))
        for one, start in zip(line, starts, strict=True)
        if one.job_id in wanted
    }


def expected_starts(
    needs: Sequence[int | None], slots: Sequence[TrainingSlot], *, now: datetime
) -> list[datetime | None]:
    """Return when each job of a line should start: in its turn, each takes the slot that is free first and has room.

    Args:
        needs: bytes that each job needs, in the line's order; None: unknown, so it may take any slot.
        slots: each is taken once.
        now: what is free since earlier is free now.
    """
    left = list(slots)
    starts: list[datetime | None] = []
    for need in needs:
        possible = [slot for slot in left if fits(need, slot.room_bytes)]
        known = sorted(
            ((slot.free_at, n) for n, slot in enumerate(possible) if slot.free_at is not None),
        )
        is_certain = bool(known) and (known[0][0] <= now or len(known) == len(possible))
        if is_certain:
            starts.append(max(now, known[0][0]))
            left.remove(possible[known[0][1]])
            continue
        starts.append(None)
        # It takes one of them, nobody knows which: for those behind it none of them is certain any more.
        left = [
            TrainingSlot(slot.room_bytes, None) if fits(need, slot.room_bytes) else slot
            for slot in left
        ]
    return starts


def training_slots(session: Session, *, lease_s: float) -> list[TrainingSlot]:
    """Return the slots for training of all workers that have been heard of within a lease."""
    runs: dict[str, list[datetime | None]] = {}
    now = clock.now()
    for held in workers_repository.held_jobs(session, _MOST_HELD):
        if held.is_training:
            # A run that is late by its own reckoning says nothing about when it will be done.
            late = held.estimated_finish is not None and held.estimated_finish <= now
            runs.setdefault(held.worker_id, []).append(None if late else held.estimated_finish)
    slots: list[TrainingSlot] = []
    for worker, is_heard in workers_repository.workers(
        session, within_s=lease_s, limit=_MOST_WORKERS
    ):
        if is_heard:
            slots += _slots_of(worker, runs.get(worker.id, []), now)
    return slots


def _slots_of(worker: Worker, ends: Sequence[datetime | None], now: datetime) -> list[TrainingSlot]:
    """Pair a worker's devices with its runs; where the devices differ, nobody knows which run is on which."""
    devices: list[dict[str, Any]] = worker.slots.get("devices", [])
    rooms = [room(device.get("memory_bytes")) for device in devices]
    if ends and len(set(rooms)) > 1:
        return [TrainingSlot(room_bytes, None) for room_bytes in rooms]
    free_at = [*ends, *([now] * len(rooms))]
    return [TrainingSlot(room_bytes, at) for room_bytes, at in zip(rooms, free_at, strict=False)]
