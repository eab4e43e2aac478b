"""A job's result file: one line per step, as OpenAI's.

Where a job was taken up again after a loss, a step counts as its newest attempt told it.
"""

import csv
import io
from typing import Any

from sqlalchemy.orm import Session

from service.events import actions as events
from service.tables import Job

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""OpenAI's header, to the letter: `train_accuracy` here is `train_mean_token_accuracy` in the events."""

_SOURCES: dict[str, tuple[str, ...]] = {
    "train_loss": ("train_loss",),
    "train_accuracy": ("train_mean_token_accuracy",),
    "valid_loss": ("valid_loss", "full_valid_loss"),
    "valid_mean_token_accuracy": ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
}


def results_csv(session: Session, job: Job) -> bytes:
    """Return the result file: UTF-8 CSV, cells empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step, data in sorted(steps(session, job).items()):
        writer.writerow([step, *(_cell(data, names) for names in _SOURCES.values())])
    return text.getvalue().encode()


def steps(session: Session, job: Job) -> dict[int, dict[str, Any]]:
    """Return what is known of each step, from its newest attempt."""
    told: dict[int, dict[str, Any]] = {}
    attempts: dict[int, int] = {}
    for event in events.metrics(session, job.project_id, job.id):
        data = event.data or {}
        step, attempt_no = data.get("step"), event.attempt_no or 0
        if not isinstance(step, int) or attempt_no < attempts.get(step, 0):
            continue
        if attempt_no > attempts.get(step, 0):
            told[step] = {}
        attempts[step] = attempt_no
        told.setdefault(step, {}).update({k: v for k, v in data.items() if v is not None})
    return told


def _cell(data: dict[str, Any], names: tuple[str, ...]) -> object:
    return next((data[name] for name in names if name in data), "")
