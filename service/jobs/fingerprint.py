"""Telling a repeated create call from a new one.

The SDK sends no `Idempotency-Key`, but repeats a call whose answer it did not get, and says so in
`x-stainless-retry-count`. Two deliberate calls with one body make two jobs; a repeated call finds its first job.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy.orm import Session

from service import clock
from service.errors import IdempotencyKeyReused, InvalidRequest
from service.jobs import repository
from service.jobs.spec import CreateJob
from service.keys.actions import Caller
from service.tables import Job, Submission

RETRY_WINDOW = timedelta(minutes=10)
"""An automatic retry comes within seconds; ten minutes also cover the SDK's own time limit."""
MAX_KEY_LENGTH = 255


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a create call: its body's hash, its key if it has one, and whether the SDK repeats it."""

    body_sha256: str
    idempotency_key: str | None = None
    is_retry: bool = False

    @classmethod
    def of(
        cls, body: CreateJob, *, idempotency_key: str | None = None, retry_count: str | None = None
    ) -> "Fingerprint":
        """Return the fingerprint of a call with this body and these headers.

        Raises:
            InvalidRequest: the key is empty, longer than 255 characters or not printable.
        """
        if idempotency_key is not None and not (
            1 <= len(idempotency_key) <= MAX_KEY_LENGTH and idempotency_key.isprintable()
        ):
            raise InvalidRequest(
                f"The Idempotency-Key header must have 1 to {MAX_KEY_LENGTH} printable characters.",
                param="Idempotency-Key",
            )
        # Of what was understood, so that spacing and the order of keys make no difference.
        content = json.dumps(body.model_dump(exclude_unset=True), sort_keys=True)
        return cls(
            body_sha256=hashlib.sha256(content.encode()).hexdigest(),
            idempotency_key=idempotency_key,
            is_retry=(retry_count or "").isdecimal() and retry_count not in {None, "0"},
        )


def first_job(session: Session, caller: Caller, fingerprint: Fingerprint) -> Job | None:
    """Return the job that this very call has already made, or None; the caller holds the creation lock.

    Raises:
        IdempotencyKeyReused: the key came before, with another body.
    """
    submission = _find(session, caller, fingerprint)
    if submission is None:
        return None
    return repository.get(session, caller.project_id, submission.job_id)


def _find(session: Session, caller: Caller, fingerprint: Fingerprint) -> Submission | None:
    if fingerprint.idempotency_key is not None:
        found = repository.submission_by_key(
            session, caller.project_id, fingerprint.idempotency_key
        )
        if found is not None and found.body_sha256 != fingerprint.body_sha256:
            raise IdempotencyKeyReused(
                "This Idempotency-Key was already used with another body. Send the same body, or a new key.",
                param="Idempotency-Key",
            )
        return found
    if not fingerprint.is_retry:
        return None
    return repository.newest_submission(
        session,
        caller.project_id,
        caller.key_id,
        fingerprint.body_sha256,
        since=clock.now() - RETRY_WINDOW,
    )
