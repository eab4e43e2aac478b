"""Telling a job, once, that it waits for a larger GPU than any worker has: it is not failed, as such a worker may come."""

from sqlalchemy.orm import Session

from service.events.actions import NewEvent, append
from service.queue import line_repository
from service.queue.expectation import training_slots
from service.queue.fit import why_unfit

_AT_ONCE = 100


def tell_unfit(session: Session, *, lease_s: float) -> int:
    """Tell up to 100 waiting jobs that no worker's GPU has room for them; return how many were told."""
    rooms = [slot.room_bytes for slot in training_slots(session, lease_s=lease_s)]
    known = [room_bytes for room_bytes in rooms if room_bytes is not None]
    if not known or len(known) < len(rooms):  # on a device of unknown size anything is tried
        return 0
    jobs = line_repository.lock_unfit(session, max(known), _AT_ONCE)
    for job in jobs:
        reason = why_unfit(job.memory_needed_bytes, rooms)
        if reason is not None:
            data = {"kind": "no_gpu_fits", "memory_needed_bytes": job.memory_needed_bytes}
            append(session, job.project_id, job.id, NewEvent(reason, level="warn", data=data))
        line_repository.note_unfit_told(session, job.id)
    return len(jobs)
