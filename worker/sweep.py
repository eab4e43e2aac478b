"""Disk that ended jobs no longer need: inputs and engine output of attempts that nobody will take over.

The worker that ends a job clears its own. What is left are jobs that ended elsewhere: cancelled by the API while they waited, or
failed by the reaper.
"""

from service.logging import get_logger
from service.queue.story import ended_among
from worker.context import WorkerContext
from worker.folder import AttemptFolder

log = get_logger(__name__)

_AT_ONCE = 500


def sweep(context: WorkerContext) -> int:
    """Clear the attempts of ended jobs on this disk and return of how many jobs that was.

    What tells the story (spec, events, log, result) stays.
    """
    attempts_dir = context.settings.attempts_dir
    if not attempts_dir.is_dir():
        return 0
    heavy = sorted({path.parents[1].name for path in attempts_dir.glob("*/*/run")})
    swept = 0
    for start in range(0, len(heavy), _AT_ONCE):
        with context.transaction() as session:
            ended = ended_among(session, heavy[start : start + _AT_ONCE])
        for job_id in ended:
            for path in (attempts_dir / job_id).iterdir():
                AttemptFolder(path).drop_heavy_parts()
        swept += len(ended)
    if swept:
        log.info("attempts_swept", jobs=swept)
    return swept
