"""Processes that read parts of a dataset file side by side, with the same result as one.

Each is a fresh interpreter that loads the model folder's tokenizer and nothing else (`tokenizer_process`). It
is asked over a pipe and ends when the pipe closes, however its parent ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Self

from qlora_core.text.encoder import TextEncoder
from qlora_core.text.report import DatasetFormat, LineError
from qlora_core.text.scanning import Scanned, ScanSettings

ARRAYS = ("tokens", "lengths", "trained_counts", "lines")

# A process takes about as long to start as to read this much.
_WORTH_A_PROCESS_BYTES = 4 << 20
_MOST_PROCESSES = 16
# What one needs at least where memory is limited: the largest tokenizers take some hundred megabytes.
_PROCESS_BYTES = 1 << 30
_PARTS_AHEAD = 2
_END_S = 5.0
# It decides what becomes of the work of the processes.
_FOR_THE_PARENT = (signal.SIGTERM, signal.SIGINT)
_OUT_OF_MEMORY = "out of memory"
_START = (
    "import json, sys\n"
    "sys.path[:] = json.loads(sys.stdin.buffer.readline())\n"
    "from qlora_core.text.tokenizer_process import main\n"
    "main()\n"
)


def usual_processes(file_bytes: int) -> int:
    """Return how many processes a file of this size is read by: at most one for each core that this one may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_DATA)
    fitting = _MOST_PROCESSES
    if limit_bytes != resource.RLIM_INFINITY:
        fitting = limit_bytes // _PROCESS_BYTES - 1
    return max(1, min(cores or 1, file_bytes // _WORTH_A_PROCESS_BYTES, fitting))


class TokenizerProcesses:
    """Processes that read one file.

    Args:
        path: the file.
        encoder: read from a folder; the processes read it from there again.
        settings: what the parts are read with.
        count: of processes.
    """

    def __init__(
        self, path: Path, encoder: TextEncoder, settings: ScanSettings, *, count: int
    ) -> None:
        task = {
            "path": str(path),
            "folder": str(encoder.folder),
            "now": encoder.now,
            "settings": asdict(settings),
            "memory_bytes": _memory_share(count),
        }
        self._count = count
        self._processes = [_start(task) for _ in range(count)]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> Self:
        """Use it in a `with`, which ends the processes."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):  # of a question that it never read
                    if pipe is not None:
                        pipe.close()

    def scan(
        self,
        parts: Iterator[tuple[int, int]],
        format: DatasetFormat,  # noqa: A002 - the report's word
    ) -> Iterator[tuple[int, Scanned]]:
        """Yield what is found in each part and where it ends, in the order of the parts.

        Raises:
            MemoryError: a process had not enough memory.
            RuntimeError: a process ended, and why is in the log.
        """
        asked: deque[tuple[int, Future[Scanned]]] = deque()
        for start, end in parts:
            asked.append((end, self._threads.submit(self._ask, start, end, format)))
            if len(asked) > _PARTS_AHEAD * self._count:
                done, future = asked.popleft()
                yield done, future.result()
        for done, future in asked:
            yield done, future.result()

    def _ask(self, start: int, end: int, format: DatasetFormat) -> Scanned:  # noqa: A002
        process = self._idle.get()
        try:
            return _answer(process, {"start": start, "end": end, "format": format})
        except (BrokenPipeError, EOFError) as error:
            raise _ended(process) from error
        finally:
            self._idle.put(process)


def send(scanned: Scanned, pipe: IO[bytes]) -> None:
    """Write what was found: a line of JSON, and the arrays' bytes after it."""
    header = {
        item.name: getattr(scanned, item.name)
        for item in fields(scanned)
        if item.name not in ARRAYS
    }
    header["errors"] = [asdict(error) for error in scanned.errors]
    contents = [getattr(scanned, name).tobytes() for name in ARRAYS]
    header["sizes"] = [len(content) for content in contents]
    pipe.write(json.dumps(header).encode() + b"\n")
    for content in contents:
        pipe.write(content)
    pipe.flush()


def say_out_of_memory(pipe: IO[bytes]) -> None:
    """Write that there was not enough memory, in place of what was found."""
    pipe.write(json.dumps({"failed": _OUT_OF_MEMORY}).encode() + b"\n")
    pipe.flush()


def _start(task: dict[str, Any]) -> subprocess.Popen[bytes]:
    # A process has its parent's mask from its first moment on, before it could ignore anything itself.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _write(process, [path or str(Path.cwd()) for path in sys.path])
    _write(process, task)
    return process


def _write(process: subprocess.Popen[bytes], value: object) -> None:
    if process.stdin is None:
        raise RuntimeError("the process has no pipe")
    process.stdin.write(json.dumps(value).encode() + b"\n")
    process.stdin.flush()


def _answer(process: subprocess.Popen[bytes], question: dict[str, Any]) -> Scanned:
    _write(process, question)
    pipe = process.stdout
    line = b"" if pipe is None else pipe.readline()
    if pipe is None or not line.endswith(b"\n"):
        raise EOFError
    header = json.loads(line)
    if header.get("failed") == _OUT_OF_MEMORY:
        raise MemoryError("a process that reads the dataset ran out of memory")
    sizes = header.pop("sizes")
    header["errors"] = [LineError(**error) for error in header["errors"]]
    scanned = Scanned(**header)
    for name, size in zip(ARRAYS, sizes, strict=True):
        content = pipe.read(size)
        if len(content) != size:
            raise EOFError
        getattr(scanned, name).frombytes(content)
    return scanned


def _ended(process: subprocess.Popen[bytes]) -> Exception:
    """Say why a process ended: the kernel and the tokenizer end one that needs more memory than there is."""
    try:
        code = process.wait(_END_S)
    except subprocess.TimeoutExpired:
        code = None
    if code in (-9, -6):
        return MemoryError(f"a process that reads the dataset was ended with code {code}")
    return RuntimeError(f"a process that reads the dataset ended with code {code}")


def _memory_share(count: int) -> int | None:
    """Return what each process may allocate where this one is limited: all of them together no more than it alone."""
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if limit_bytes == resource.RLIM_INFINITY else limit_bytes // (count + 1)
