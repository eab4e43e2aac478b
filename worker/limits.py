"""How long a training may go on, all its attempts together.

Its limit of memory is its child's own to set (`worker.child.train`), that of the disk is in `worker.room`.
"""

import time
from dataclasses import dataclass

from service.queue import story
from service.queue.claim import Claim
from service.queue.finish import JobError
from worker.context import WorkerContext


@dataclass(frozen=True)
class TimeLimit:
    """When a training has to end: the service's limit, or the job's own where that is shorter."""

    limit_s: float
    is_own: bool
    ends_at: float
    """In seconds of `time.monotonic`."""

    def is_over(self) -> bool:
        """Tell whether it has trained as long as it may."""
        return time.monotonic() >= self.ends_at

    def error(self) -> JobError:
        """Return the job's error."""
        name = "max_time_s" if self.is_own else "NIBBLE_TRAIN_TIME_S"
        return {
            "code": "time_limit",
            "message": f"The training took longer than the {self.limit_s:g} seconds that {name} allows.",
            "param": "hyperparameters.max_time_s" if self.is_own else None,
            "hint": f"Use fewer epochs, or raise {name}; earlier checkpoints are kept.",
        }


def time_limit(context: WorkerContext, claim: Claim) -> TimeLimit | None:
    """Return how long this attempt may train, after what earlier ones took; None: as long as it takes."""
    if claim.kind != "train":
        return None
    own = (claim.job.hyperparameters or {}).get("max_time_s")
    both = [(context.settings.train_time_s, False), (own, True)]
    limits = [(limit_s, is_own) for limit_s, is_own in both if limit_s is not None]
    if not limits:
        return None
    limit_s, is_own = min(limits)
    now = time.monotonic()
    with context.transaction() as session:
        spent_s = story.time_spent_s(session, claim.fence)
    return TimeLimit(float(limit_s), is_own, now + limit_s - spent_s)
