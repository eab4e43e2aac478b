"""Ringing the doorbell: wake the workers, who then ask PostgreSQL what there is to do.

A ring that fails is logged and forgotten: workers look by themselves every `poll_s`, and the API's process rings
again for what waits (`service.queue.background`).
"""

import logging

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError
from sqlalchemy.orm import Session

from service.db import after_commit
from service.queue.broker import KICK_EXPIRES_S, Kind, make_app, task_name
from service.settings import Settings

_log = logging.getLogger(__name__)

_RETRY_ONCE = {"max_retries": 1, "interval_start": 0.05, "interval_step": 0, "interval_max": 0.05}


class Doorbell:
    """A connection to the broker for ringing; one per process, safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_app(settings, answer_within_s=2)

    def kick(self, kind: Kind) -> bool:
        """Wake the workers for `kind` of work; False: the broker did not answer (logged, harmless)."""
        try:
            self._app.send_task(
                task_name(kind),
                queue=kind,
                expires=KICK_EXPIRES_S,
                ignore_result=True,
                retry=True,
                retry_policy=_RETRY_ONCE,
            )
        except (OperationalError, RedisError, OSError) as error:
            _log.warning("kick_failed", extra={"kind": kind, "reason": str(error)})
            return False
        return True

    def kick_after_commit(self, session: Session, kind: Kind) -> None:
        """Wake the workers once `session`'s transaction has committed: only then can they find the row."""

        def ring() -> None:
            self.kick(kind)

        after_commit(session, ring)

    def close(self) -> None:
        """Let go of the connections."""
        self._app.close()
