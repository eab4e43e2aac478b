"""What an attempt starts from: the job's files, the model, and the newest resume point of an earlier attempt."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import Unavailable
from service.logging import get_logger
from service.models.catalog import BaseModel
from service.queue import story
from service.queue.claim import Claim
from service.storage import BlobMissing
from worker.checkpoints import publish
from worker.context import WorkerContext, outlast
from worker.folder import AttemptFolder, write_json
from worker.relay import CHECKPOINT, Line, Tail, tell_lines
from worker.room import ATTEMPT_BYTES, check_room

log = get_logger(__name__)

_STORAGE_TRIES = 5
_STEP_FOLDER = re.compile(r"step-(\d+)")


class InputsMissing(Exception):
    """The job cannot start, and will not be able to later. `code` and `param` go into the job's error."""

    def __init__(self, message: str, *, code: str, param: str | None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param


@dataclass(frozen=True)
class ResumePoint:
    """Where an earlier attempt can be taken up: the folder of its points, and what was told up to the newest.

    The engine takes the newest one that is whole, and says from which step it went on.
    """

    attempt_no: int
    folder: Path
    lines: list[Line]


def prepare(
    context: WorkerContext,
    claim: Claim,
    folder: AttemptFolder,
    *,
    device: str,
    give_up: threading.Event,
) -> None:
    """Fill the attempt's folder, which is there: its inputs and spec.json.

    Raises:
        InputsMissing: a file's bytes are gone, or the model is not in the catalog any more.
        Unavailable, OSError: the storage does not answer, or the disk is full.
        Fenced, GivenUp
    """
    job = claim.job
    model = context.catalog.get(job.model)
    if model is None:
        raise InputsMissing(
            f"Model {job.model} is not in the catalog any more.",
            code="model_not_found",
            param="model",
        )
    kept_free = context.settings.min_free_bytes
    check_room(folder.path, needed_bytes=ATTEMPT_BYTES, kept_free_bytes=kept_free)
    training = _fetch(context, claim, folder, "training_file", job.training_file, give_up)
    validation = (
        None
        if job.validation_file is None
        else _fetch(context, claim, folder, "validation_file", job.validation_file, give_up)
    )
    resume = take_over(context, claim, give_up) if claim.kind == "train" else None
    requested: dict[str, Any] = job.spec.get("hyperparameters", {})
    spec: dict[str, Any] = {
        "kind": claim.kind,
        "job_id": job.id,
        "attempt_no": claim.fence.attempt_no,
        "base_model": job.model,
        "model": _as_json(model),
        "model_cache": str(context.settings.data_dir / "models"),
        "training_file": str(training),
        "validation_file": None if validation is None else str(validation),
        "hyperparameters": job.hyperparameters if claim.kind == "train" else requested,
        "seed": job.seed,
        "now": job.created_at.timestamp(),
        "sample_prompts": job.spec.get("sample_prompts", []),
        "resume_from": None if resume is None else str(resume.folder),
        "device": device,
        "min_free_bytes": kept_free,
        "resume_point_every_s": context.settings.resume_point_every_s,
        "memory_bytes": context.settings.validate_memory_bytes
        if claim.kind == "validate"
        else context.settings.train_memory_bytes,
        "time_s": context.settings.validate_time_s,
    }
    write_json(folder.spec, spec)


def _fetch(
    context: WorkerContext,
    claim: Claim,
    folder: AttemptFolder,
    param: str,
    file_id: str,
    give_up: threading.Event,
) -> Path:
    """Copy a file's bytes into the attempt's folder; a storage that does not answer is asked again."""
    gone = InputsMissing(
        f"The {param.replace('_', ' ')} {file_id} is not there any more.",
        code="file_not_found",
        param=param,
    )
    key = claim.blobs.get(file_id)
    if not key:
        raise gone
    target = folder.inputs / f"{param}.jsonl"
    for attempt in range(1, _STORAGE_TRIES + 1):
        try:
            context.storage.fetch(key, target)
        except BlobMissing:
            raise gone from None
        except Unavailable:
            if attempt == _STORAGE_TRIES or give_up.wait(2.0**attempt / 4):
                raise
        else:
            break
    return target


def _as_json(model: BaseModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "path": None if model.path is None else str(model.path),
        "hub": model.hub,
        "revision": model.revision,
        "created": model.created,
    }


def take_over(context: WorkerContext, claim: Claim, give_up: threading.Event) -> ResumePoint | None:
    """Find the newest resume point of an earlier attempt on this disk, and tell that attempt's story up to it.

    Raises:
        Fenced, GivenUp
    """
    point = find_resume_point(context, claim, wait=give_up.wait)
    if point is None:
        return None
    tell_lines(context, claim.fence, point.lines, wait=give_up.wait, attempt_no=point.attempt_no)
    for line in point.lines:
        if line.kind == CHECKPOINT:
            publish(context, claim.fence, claim.job, point.attempt_no, line, give_up=give_up)
    return point


def find_resume_point(
    context: WorkerContext, claim: Claim, *, wait: Callable[[float], bool]
) -> ResumePoint | None:
    """Return the newest resume point of the last earlier attempt that has one on this disk, or None."""

    def earlier() -> list[int]:
        with context.transaction() as session:
            return story.earlier_attempts(session, claim.fence)

    for attempt_no in outlast(earlier, wait=wait):
        point = resume_point_in(context.folder(claim.job.id, attempt_no), attempt_no)
        if point is not None:
            return point
    return None


def resume_point_in(folder: AttemptFolder, attempt_no: int) -> ResumePoint | None:
    """Return the newest resume point of an attempt's folder with the lines up to its step, or None.

    The folders say which is the newest, not the lines: a child that is killed may have no time left to tell of a
    point that it has just written, and the next attempt goes on from there all the same.
    """
    points = folder.run / "resume"
    found = [_STEP_FOLDER.fullmatch(path.name) for path in points.glob("step-*") if path.is_dir()]
    newest = max((int(match[1]) for match in found if match), default=None)
    if newest is None:
        return None
    lines: list[Line] = []
    for line in _all_lines(folder.events):
        step = line.data.get("step")
        if isinstance(step, int) and step > newest:
            break
        lines.append(line)
    return ResumePoint(attempt_no, points, lines)


def _all_lines(path: Path) -> list[Line]:
    tail = Tail(path)
    lines: list[Line] = []
    while more := tail.read():
        lines += more
    return lines
