"""Does the queue move: workers heard of, nothing that waits beside an idle one, no lease past its end?"""

from sqlalchemy.orm import Session

from operations.doctor.finding import Finding, fail, ok, warn
from operations.health import WORKER_SILENCE_S
from service.census import repository as census
from service.settings import Settings

STUCK_S = 60.0
"""Work that waits so long beside an idle slot is stuck: a slot looks for itself every NIBBLE_POLL_S."""
_KINDS = {"validate": "to be validated", "train": "to be trained"}


def examine_workers(session: Session) -> Finding:
    """Say who is there, and what a worker said that it lacks."""
    here = census.workers(session, within_s=WORKER_SILENCE_S)
    problems = sorted({str(w.slots["problem"]) for w in here if w.slots.get("problem")})
    if problems:
        return fail("workers", "; ".join(problems), "then start the worker again")
    if not here:
        return fail(
            "workers",
            f"none was heard of for {WORKER_SILENCE_S:.0f} s",
            "start one: `nibble up`, or `python -m worker` on a machine with the GPU",
        )
    silent = census.silent_workers(session, within_s=WORKER_SILENCE_S)
    if silent:
        return warn(
            "workers",
            f"{len(here)} heard of, {silent} fell silent within a day",
            "look whether their machines live; their jobs have gone back to the queue",
        )
    return ok("workers", f"{len(here)} heard of")


def examine_queue(session: Session, settings: Settings) -> Finding:
    """Look for work that waits although a slot for it is idle."""
    patience_s = max(STUCK_S, 2 * settings.poll_s)
    unfit = 0
    for kind, words in _KINDS.items():
        fit, too_large = census.waiting(session, kind, longer_than_s=patience_s)
        unfit += too_large
        total, held = census.slots(session, kind, within_s=WORKER_SILENCE_S)
        if fit and total > held:
            return fail(
                "queue",
                f"{_jobs(fit)} waited {words} for over {patience_s:.0f} s while {total - held} slots for it are idle",
                "look into the worker's log for no_claim or attempt_crashed, and start the worker again",
            )
        if fit and not total:
            return fail(
                "queue",
                f"{_jobs(fit)} waited {words} and no worker does that",
                "start a worker with NIBBLE_TRAIN_SLOTS and NIBBLE_VALIDATE_SLOTS above 0",
            )
    if unfit:
        return warn(
            "queue",
            f"{_jobs(unfit)} waits for a larger GPU than any worker has",
            "start a worker on one, or cancel and ask for less (the job's story says how much)",
        )
    live = census.live_jobs(session)
    told = ", ".join(f"{n} {status}" for status, (n, _) in sorted(live.items()))
    return ok("queue", f"moves ({told or 'empty'})")


def examine_leases(session: Session, settings: Settings) -> Finding:
    """Look for leases that should have been taken back: the API's process does that."""
    overdue_s = settings.lease_s / 4 + 3 * settings.reap_s
    ended = census.ended_leases(session, longer_than_s=overdue_s)
    if ended:
        return fail(
            "leases",
            f"of {_jobs(ended)} ended over {overdue_s:.0f} s ago and {'was' if ended == 1 else 'were'} not taken back",
            "the API's process takes them back: start one, or look into its log for background_pass_failed",
        )
    return ok("leases", "none past its end")


def _jobs(n: int) -> str:
    return "1 job" if n == 1 else f"{n} jobs"
