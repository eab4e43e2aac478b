"""A thread that works for one attempt beside its supervisor.

What nobody expected must not end in silence: it is logged here, and raised in the supervisor's thread, which gives
the job back with the reason.
"""

import contextvars
import threading
from collections.abc import Callable

from service.logging import get_logger
from service.queue.fence import Fenced
from worker.context import GivenUp

log = get_logger(__name__)


class Companion:
    """Runs `act` once. Losing the job, or the time to wait for the database, is an ordinary end."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self._name = name
        self._act = act
        self._failure: Exception | None = None
        # Its log lines have the ids of whom it works for.
        ids = contextvars.copy_context()
        self._thread = threading.Thread(target=lambda: ids.run(self._run), name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end; one that was never started has ended, too."""
        if self._thread.ident is not None:
            self._thread.join()

    def check(self) -> None:
        """Raise what ended the thread, if that was an error nobody expected."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._act()
        except Fenced:
            log.info("companion_fenced", companion=self._name)
        except GivenUp:
            log.warning("companion_gave_up", companion=self._name)
        except Exception as error:
            log.exception("companion_crashed", companion=self._name)
            self._failure = error
