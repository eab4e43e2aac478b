"""The pool of threads: everything is done once, and what surrounds it stays as it was."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qlora_core.quant.threads import share


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_every_part_is_done_once(count: int, threads: int) -> None:
    torch.set_num_threads(threads)
    done: list[int] = []

    share(range(count), done.extend)

    assert sorted(done) == list(range(count))


def test_one_thread_or_one_part_is_done_by_the_caller() -> None:
    where: list[int] = []

    def work(parts: Iterator[int]) -> None:
        where.extend(threading.get_ident() for _ in parts)

    share([1], work)
    torch.set_num_threads(1)
    share([1, 2, 3], work)

    assert where == [threading.get_ident()] * 4


def test_as_many_threads_as_torch_is_told_are_at_work_at_once_each_with_one_of_its_own() -> None:
    together = threading.Barrier(3)
    numbers: list[int] = []

    def work(parts: Iterator[int]) -> None:
        for _ in parts:
            together.wait(timeout=60)
            numbers.append(torch.get_num_threads())

    share([1, 2, 3], work)

    assert numbers == [1, 1, 1]


def test_the_number_of_torchs_threads_stays_the_same_here_and_in_new_threads() -> None:
    elsewhere: list[int] = []

    share(range(3), [].extend)
    thread = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    thread.start()
    thread.join()

    assert torch.get_num_threads() == 3
    assert elsewhere == [3]


def test_tensors_made_in_inference_mode_and_others_can_be_written() -> None:
    outside = torch.zeros(4)
    with torch.inference_mode():
        inside = torch.zeros(4)

    def work(parts: Iterator[Tensor]) -> None:
        for part in parts:
            part.add_(1)

    for threads in (1, 3):
        torch.set_num_threads(threads)
        share([*outside.split(1), *inside.split(1)], work)

    assert outside.tolist() == inside.tolist() == [2.0] * 4


def test_an_error_is_raised_after_the_other_threads_have_ended() -> None:
    ended: list[int] = []

    def work(parts: Iterator[int]) -> None:
        for part in parts:
            if part == 0:
                raise ValueError("part 0 is bad")
            time.sleep(0.05)
            ended.append(part)

    with pytest.raises(ValueError, match="part 0 is bad"):
        share(range(9), work)
    then = len(ended)
    time.sleep(0.2)

    assert len(ended) == then


def test_an_interrupt_ends_the_work_before_it_is_raised() -> None:
    running: list[int] = []
    begun: list[int] = []

    def work(parts: Iterator[int]) -> None:
        for part in parts:
            begun.append(part)
            running.append(part)
            time.sleep(0.1)  # meanwhile the caller has begun to wait
            if part == 0:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                time.sleep(0.1)
            running.remove(part)

    with pytest.raises(KeyboardInterrupt):
        share(range(40), work)

    assert not running
    assert len(begun) < 40


def test_several_callers_can_share_at_once() -> None:
    sums: dict[int, int] = {}

    def call(caller: int) -> None:
        done: list[int] = []
        for _ in range(20):
            share(range(50), done.extend)
        sums[caller] = sum(done)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    assert sums == dict.fromkeys(range(4), 20 * sum(range(50)))


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )


SETUP = """
import os, torch
from qlora_core import quantize_nf4
weight = quantize_nf4(torch.ones(1500, 1024))
assert weight.dequantize().eq(1).all()
"""


def test_a_process_that_used_it_ends() -> None:
    done = run(SETUP)

    assert done.returncode == 0, done.stderr


def test_a_forked_child_has_threads_of_its_own() -> None:
    done = run(
        SETUP
        + """
child = os.fork()
if child == 0:
    back = weight.dequantize()
    torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
    os._exit(0 if back.eq(1).all() else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    )

    assert done.returncode == 0, done.stderr


def test_the_last_words_of_a_process_can_be_dequantized() -> None:
    done = run(
        """
import atexit, threading, time
said = []

def late(where):
    assert weight.dequantize().eq(1).all()
    said.append(where)
    if len(said) == 2:
        print("both were told")

def outlive_the_main_thread():
    threading.main_thread().join()
    time.sleep(0.1)
    late("thread")

atexit.register(late, "exit")
threading.Thread(target=outlive_the_main_thread).start()
"""
        + SETUP
    )

    assert (done.returncode, done.stdout) == (0, "both were told\n"), done.stderr
    assert done.stderr == ""


def test_a_process_that_first_uses_it_at_its_end_ends() -> None:
    done = run(
        """
import atexit
import torch
from qlora_core import quantize_nf4
atexit.register(lambda: print(quantize_nf4(torch.ones(1500, 1024)).dequantize().sum().item()))
"""
    )

    assert (done.returncode, done.stdout) == (0, "1536000.0\n"), done.stderr
    assert done.stderr == ""
