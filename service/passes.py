"""Work that a process does again and again beside its requests, in a thread of its own.

Each pass starts afresh, so one that fails costs nothing but time: the next one finds the same work.
"""

import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from service.errors import ServiceError
from service.logging import get_logger

log = get_logger(__name__)


def repeat(make_pass: Callable[[], object], *, name: str, every_s: float) -> Callable[[], None]:
    """Call `make_pass` every so many seconds, the first time after as long; the function returned stops it and waits for it.

    A pass that fails is logged as `<name>_failed`.
    """
    stopping, failed = threading.Event(), f"{name}_failed"

    def loop() -> None:
        while not stopping.wait(every_s):
            try:
                make_pass()
            except (SQLAlchemyError, ServiceError) as error:
                # The database or the storage is away.
                log.warning(failed, reason=str(error))
            except Exception:  # (a thread's edge: the next pass may fare better)
                log.exception(failed)

    thread = threading.Thread(target=loop, name=name, daemon=True)
    thread.start()

    def stop() -> None:
        stopping.set()
        thread.join(timeout=10)

    return stop
