"""What the API's process does beside requests: the first key, the queue's loops, files that are due to go.

The database may not be there yet, or be without tables, or the data folder full, when the process starts: the first key
is then made as soon as it can be, and `/readyz` says until then what is missing.
"""

import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from api.deps import State
from service.adapters import retention
from service.db import transaction
from service.files import purge
from service.keys.actions import ensure_first_key
from service.logging import get_logger
from service.queue import background

log = get_logger(__name__)

_RETRY_S = 1.0


def start_background(state: State) -> Callable[[], None]:
    """Start everything, and return the function that stops it and waits for it."""
    stopping = threading.Event()
    if not _set_up(state):
        threading.Thread(
            target=_set_up_later, args=(state, stopping), name="first-key", daemon=True
        ).start()
    stop_queue = background.start(state.settings, state.sessions)
    stop_purge = purge.start(state.sessions, state.storage)
    stop_retention = retention.start(
        state.sessions, state.storage, keep_checkpoints=state.settings.keep_checkpoints
    )

    def stop() -> None:
        stopping.set()
        stop_retention()
        stop_purge()
        stop_queue()

    return stop


def _set_up(state: State) -> bool:
    try:
        with transaction(state.sessions) as session:
            path = ensure_first_key(session, state.settings)
    except (SQLAlchemyError, OSError) as error:  # no database yet, or no room for the key's file
        log.warning("first_key_not_made", reason=str(error).split("\n", 1)[0])
        return False
    log.info("first_key_kept", path=str(path))
    state.is_set_up.set()
    return True


def _set_up_later(state: State, stopping: threading.Event) -> None:
    while not stopping.wait(_RETRY_S):
        if _set_up(state):
            return
