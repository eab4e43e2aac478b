"""Disk that ended jobs no longer need: inputs and engine output of attempts that nobody will take over.

The worker that ends a job clears its own. What is left are jobs that ended elsewhere: cancelled by the API while they waited, or
failed by the reaper. After NIBBLE_KEEP_ATTEMPTS_DAYS the rest of an ended job's attempts goes, too.
"""

import shutil
import time
from pathlib import Path

from service.logging import get_logger
from service.queue.story import ended_among
from worker.context import WorkerContext
from worker.folder import AttemptFolder

log = get_logger(__name__)

_AT_ONCE = 500
_DAY_S = 86_400


def sweep(context: WorkerContext) -> int:
    """Clear the attempts of ended jobs on this disk and return of how many jobs that was.

    What tells the story (spec, events, log, result) stays.
    """
    attempts_dir = context.settings.attempts_dir
    if not attempts_dir.is_dir():
        return 0
    _expire(context, attempts_dir)
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


def _expire(context: WorkerContext, attempts_dir: Path) -> None:
    """Remove the folders of jobs that ended and that nobody has written to for as many days as the settings say."""
    limit = time.time() - context.settings.keep_attempts_days * _DAY_S
    old = sorted(path.name for path in attempts_dir.iterdir() if _last_written(path) < limit)
    for start in range(0, len(old), _AT_ONCE):
        with context.transaction() as session:
            ended = ended_among(session, old[start : start + _AT_ONCE])
        for job_id in ended:
            shutil.rmtree(attempts_dir / job_id, ignore_errors=True)
        if ended:
            log.info("attempts_expired", jobs=len(ended))


def _last_written(job_folder: Path) -> float:
    """When an attempt of the job last made or renamed a file, by this disk's own clock."""
    return max(path.stat().st_mtime for path in (job_folder, *job_folder.glob("*")))
