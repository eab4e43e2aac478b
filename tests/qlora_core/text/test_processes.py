"""Several processes find in a file what one finds, and end with their parent or with a sentence."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_core.text import TextEncoder, check_dataset
from qlora_core.text import check as check_module
from qlora_core.text import processes as processes_module
from qlora_core.text.check import scan_dataset
from qlora_core.text.processes import TokenizerProcesses, usual_processes
from qlora_core.text.scanning import Scanned, ScanSettings

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def encoder(make_folder: Any) -> TextEncoder:
    return TextEncoder.from_folder(make_folder("headers"), now=1_700_000_000.0)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "_PART_BYTES", 1000)


def _lines(count: int, *, bad: bool) -> Iterator[bytes]:
    draw = random.Random(1)
    for i in range(count):
        words = " ".join(draw.choice(("a", "new", "ünïcode", "word", "日本")) for _ in range(draw.randint(1, 60)))  # fmt: skip
        message = {"role": "assistant", "content": words, "weight": draw.choice((0, 1, 1, 1))}
        line = json.dumps({"messages": [{"role": "user", "content": f"q{i}"}, message]})
        match draw.randint(0, 30) if bad else -1:
            case 0:
                yield b"not {number} json {example}\n"
            case 1:
                yield b"\n"
            case 2:
                yield b'{"prompt": "a", "completion": "b"}\n'
            case 3:
                yield line.replace("assistant", "nobody").encode() + b"\n"
            case 4:
                yield b'{"messages": "\xff"}\r\n'
            case 5:
                yield json.dumps({"messages": [{"role": "x" * 3000}]}).encode() + b"\n"
            case _:
                yield line.encode() + b"\n"


def _write(path: Path, count: int, *, bad: bool = False, start: bytes = b"") -> Path:
    path.write_bytes(start + b"".join(_lines(count, bad=bad)) + b'{"messages": [')
    return path


def _all(path: Path, encoder: TextEncoder, count: int, **options: Any) -> tuple[Any, list[Any]]:
    settings = ScanSettings(**{"context_length": 60, "max_errors": 25, **options}, keeps_tokens=True)  # fmt: skip
    found: list[Scanned] = []
    report = scan_dataset(path, encoder, settings, processes=count, on_part=found.append)
    names = ("tokens", "lengths", "trained_counts", "lines")
    return report, [[x for part in found for x in getattr(part, name)] for name in names]


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_finds_the_same_on_any_number_of_processes(
    count: int, bad: bool, encoder: TextEncoder, tmp_path: Path, small_parts: None
) -> None:
    # The first lines do not say the format, so that the parent reads more than the first part alone.
    path = _write(tmp_path / "train.jsonl", 300, bad=bad, start=b"\xef\xbb\xbf" + b"nothing\n" * 300)  # fmt: skip

    alone, kept_alone = _all(path, encoder, 1)
    together, kept_together = _all(path, encoder, count)

    assert together == alone
    assert kept_together == kept_alone
    assert alone.n_examples > 100
    assert alone.n_errors > 300
    assert len(alone.errors) == 25


def test_errors_say_their_line_in_the_file(
    encoder: TextEncoder, tmp_path: Path, small_parts: None
) -> None:
    path = _write(tmp_path / "train.jsonl", 300, bad=True)
    lines = path.read_bytes().split(b"\n")

    report = check_dataset(path, encoder, context_length=60, processes=2)

    assert len(report.errors) > 20
    assert [error.line for error in report.errors] == sorted(error.line for error in report.errors)
    for error in report.errors:
        assert str(error.line) in error.message
        if error.code == "not_jsonl":
            assert lines[error.line - 1].startswith((b"not {number} json", b'{"messages": ['))
        if b"not {number}" in lines[error.line - 1]:
            assert "not {number} json {e" in error.message
    assert report.errors[-1].line == len(lines)


def test_settings_reach_the_processes(
    encoder: TextEncoder, tmp_path: Path, small_parts: None
) -> None:
    path = _write(tmp_path / "train.jsonl", 80)

    alone = _all(path, encoder, 1, train_on_inputs=True)
    together = _all(path, encoder, 2, train_on_inputs=True)

    assert together == alone
    assert alone[0].n_dropped == 0


def test_progress_goes_to_the_end_in_order(
    encoder: TextEncoder, tmp_path: Path, small_parts: None
) -> None:
    path = _write(tmp_path / "train.jsonl", 200)
    told: list[tuple[int, int]] = []

    check_dataset(
        path, encoder, context_length=60, processes=2, on_progress=lambda *done: told.append(done)
    )

    assert told == sorted(told)
    assert told[-1] == (path.stat().st_size,) * 2
    assert len(told) > 20


def test_small_files_and_little_memory_need_no_further_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes_module.os, "sched_getaffinity", lambda _: set(range(64)))

    def limited_to(limit: int) -> int:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
        return usual_processes(10 << 30)

    assert usual_processes(7 << 20) == 1
    assert usual_processes(9 << 20) == 2
    assert usual_processes(10 << 30) == 16
    assert limited_to(4 << 30) == 3
    assert limited_to(1 << 30) == 1


def test_the_processes_share_the_memory_that_one_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4 << 30, -1))

    share = processes_module._memory_share(3)

    assert share == 1 << 30


def test_a_process_without_enough_memory_says_so(
    encoder: TextEncoder, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.jsonl"
    long = {"messages": [{"role": "user", "content": "word " * 600_000}, {"role": "assistant", "content": "a"}]}  # fmt: skip
    path.write_bytes(b"".join(_lines(30, bad=False)) + json.dumps(long).encode())
    monkeypatch.setattr(processes_module, "_memory_share", lambda _: 1 << 20)

    with pytest.raises(MemoryError, match="a process that reads the dataset"):
        check_dataset(path, encoder, context_length=60, processes=2)


def test_a_process_that_ends_ends_the_reading(
    encoder: TextEncoder, tmp_path: Path, small_parts: None
) -> None:
    path = _write(tmp_path / "train.jsonl", 300)
    settings = ScanSettings(context_length=60)

    with TokenizerProcesses(path, encoder, settings, count=2) as helpers:
        found = helpers.scan(iter([(0, 500)] * 50), "chat")
        next(found)
        for process in helpers._processes:
            process.kill()
        with pytest.raises(MemoryError, match="ended with code -9"):
            list(found)


@pytest.mark.parametrize("meant_for_the_parent", [signal.SIGTERM, signal.SIGINT])
def test_a_wish_to_end_is_left_to_the_parent_from_the_start(
    encoder: TextEncoder, tmp_path: Path, meant_for_the_parent: int
) -> None:
    path = _write(tmp_path / "train.jsonl", 300)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    with TokenizerProcesses(path, encoder, ScanSettings(context_length=60), count=2) as helpers:
        for process in helpers._processes:
            process.send_signal(meant_for_the_parent)
        found = helpers.scan(iter([(0, 500)] * 9), "chat")
        next(found)
        for process in helpers._processes:
            process.send_signal(meant_for_the_parent)
        rest = list(found)

    assert len(rest) == 8
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_nothing_is_left_when_the_reader_stops(
    encoder: TextEncoder, tmp_path: Path, small_parts: None
) -> None:
    path = _write(tmp_path / "train.jsonl", 300)
    started: list[Any] = []
    start: Any = subprocess.Popen

    def noted(*args: Any, **options: Any) -> Any:
        started.append(start(*args, **options))
        return started[-1]

    def stop(part: Scanned) -> None:
        if started:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes_module.subprocess, "Popen", noted)
        with pytest.raises(InterruptedError):
            scan_dataset(path, encoder, ScanSettings(60), processes=2, on_part=stop)

    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


def test_a_process_ends_when_its_parent_is_killed(
    make_folder: Any, tmp_path: Path, small_parts: None
) -> None:
    path = _write(tmp_path / "train.jsonl", 300)
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from qlora_core.text import TextEncoder\n"
        "from qlora_core.text.processes import TokenizerProcesses\n"
        "from qlora_core.text.scanning import ScanSettings\n"
        "encoder = TextEncoder.from_folder(sys.argv[1])\n"
        "helpers = TokenizerProcesses(Path(sys.argv[2]), encoder, ScanSettings(60), count=1)\n"
        "print(helpers._processes[0].pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, make_folder("headers"), path],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    child = int(parent.stdout.readline())

    parent.kill()
    parent.wait()

    with parent.stdout:
        deadline = time.monotonic() + 60
        while Path(f"/proc/{child}/cmdline").is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not Path(f"/proc/{child}/cmdline").is_file()
