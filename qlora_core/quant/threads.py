"""Spread a job over a few Python threads, in each of which torch's operations run alone.

torch's own threads meet after every operation. A look-up over pieces that stay in the cache is made
of many short operations, some of which torch does not spread at all, and on a machine with other
work each of those meetings waits for a core. Here threads meet once, at the end.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Part = TypeVar("Part")

# Python's lock is held for up to a twentieth of the work, so about twenty threads would wait for it all the time.
_MOST = 16


class _Pool:
    """The process's threads, made at first use and kept; they end with the process."""

    def __init__(self) -> None:
        self.starting = threading.Lock()
        self.executor: ThreadPoolExecutor | None = None
        self.size = 0
        self.process = os.getpid()


_pool = _Pool()


def share(parts: Sequence[Part], work: Callable[[Iterator[Part]], None]) -> None:
    """Have ``work`` done on all ``parts``, by as many threads as `torch.get_num_threads` says, up to 16.

    Args:
        parts: what to do, of any type.
        work: draws parts from the iterator that it is given until none is left. It is called once
            in each thread, in inference mode, and must give the same results whichever parts it
            draws. Where no threads can be started, the caller's does it all.

    Raises:
        What ``work`` raises. No thread is at work any more when this returns or raises.
    """
    count = min(torch.get_num_threads(), len(parts), _MOST)
    # Where torch's threads are not OpenMP's, a thread cannot have a number of its own.
    if count < 2 or not torch.backends.openmp.is_available():
        _in_inference_mode(work, iter(parts))
        return

    shared = iter(parts)
    futures: list[Future[None]] = []
    try:
        # At its end Python starts no threads and takes no more work for them: the caller does it.
        with contextlib.suppress(RuntimeError):
            executor = _executor(count)
            futures += (executor.submit(_in_inference_mode, work, shared) for _ in range(count))
        if not futures:
            _in_inference_mode(work, shared)
        wait(futures)
    finally:
        # Also when a signal ends the waiting: the caller may then reuse the memory that parts name.
        for _ in shared:
            pass
        wait(futures)
    for future in futures:
        future.result()


def _in_inference_mode(work: Callable[[Iterator[Part]], None], shared: Iterator[Part]) -> None:
    """Do the work so that it may write to tensors made in inference mode as well as to others."""
    with torch.inference_mode():
        work(shared)


def _executor(count: int) -> ThreadPoolExecutor:
    """Give this process's threads, at least ``count`` of them; raises RuntimeError when none can be started."""
    global _pool  # noqa: PLW0603 - a forked child has none of its parent's threads
    if _pool.process != os.getpid():
        _pool = _Pool()
    with _pool.starting:
        if _pool.executor is None or _pool.size < count:
            _pool.executor = _start(count)
            _pool.size = count
        return _pool.executor


def _start(count: int) -> ThreadPoolExecutor:
    """Start ``count`` threads whose torch operations use one thread each.

    `torch.set_num_threads` sets the calling thread's number, and the one that threads begin with
    from then on. So the latter is put back, by a thread that ends: the caller's own stays as it is.
    """
    executor = ThreadPoolExecutor(count, thread_name_prefix="nf4")
    all_started = threading.Barrier(count + 1)
    failures: list[RuntimeError] = []

    def begin() -> None:
        torch.get_num_threads()  # takes up the usual number, which the first operation else would
        torch.set_num_threads(1)
        all_started.wait()

    def begin_all() -> None:
        usual = torch.get_num_threads()
        try:
            for _ in range(count):
                executor.submit(begin)
            all_started.wait()
        except RuntimeError as error:
            all_started.abort()
            failures.append(error)
        finally:
            torch.set_num_threads(usual)

    starter = threading.Thread(target=begin_all, name="nf4-starter")
    starter.start()
    starter.join()
    if failures:
        raise failures[0]
    return executor
