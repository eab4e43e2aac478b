"""Work beside the caller's: in a thread, or in the caller's own where the system starts no more of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def begin(work: Callable[[], Result], *, name: str) -> Future[Result]:
    """Begin ``work`` in a thread of its own; where none can be started it is done when this returns.

    An executor would keep what it could not start a thread for, and wait for it at its end.
    """
    found: Future[Result] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            found.set_exception(error)

    try:
        threading.Thread(target=run, name=name).start()
    except RuntimeError:  # there is no room for a thread's stack, or as many as there may be
        run()
    return found
