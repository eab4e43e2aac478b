"""When is the service itself again after a fault? The definition that the table's seconds go by.

Every process is there again and signed in, and the API ready; each job whose process the fault took has been claimed again or has ended;
every other job that somebody worked on has told something new or has ended; and if any job waited, one has been claimed.
"""

from collections.abc import Mapping
from typing import Any

from tests.chaos.faults import Hit
from tests.chaos.service import Service

_JOBS = "SELECT id, status, attempt_no, seq, lease_owner IS NOT NULL AS is_held FROM jobs"
_ENDED = ("succeeded", "failed", "cancelled")

Jobs = Mapping[str, Any]


def look(service: Service) -> Jobs | None:
    """How each job stands; None: the database does not answer."""
    rows = service.query(_JOBS)
    return None if rows is None else {row.id: row for row in rows}


class Recovery:
    """Of one fault; `before` is how the jobs stood."""

    def __init__(self, service: Service, before: Jobs, hit: Hit) -> None:
        self._service = service
        self._before = before
        self._hit = hit

    def is_over(self) -> bool:
        """Whether the service is itself again."""
        now = look(self._service)
        return now is not None and self._jobs_go_on(now) and self._service.is_whole()

    def _jobs_go_on(self, now: Jobs) -> bool:
        waited = {id_ for id_, was in self._before.items() if _waits(was)}
        claimed = {id_ for id_ in waited if now[id_].attempt_no > self._before[id_].attempt_no}
        return (not waited or bool(claimed)) and all(
            self._goes_on(self._before[id_], now[id_]) for id_ in self._before
        )

    def _goes_on(self, was: Any, now: Any) -> bool:
        if not was.is_held or now.status in _ENDED:
            return True
        if was.id in self._hit.jobs:
            return now.attempt_no > was.attempt_no
        return now.seq > was.seq


def _waits(job: Any) -> bool:
    return not job.is_held and job.status in ("validating_files", "queued")
