"""A process is watched until its whole line is there, or until it dies, which ends in a sentence."""

import sys

import pytest

from bench.watching import ProcessEnded, Watched, watch

READY = "import sys, time; print('ready', flush=True); sys.stdin.readline(); "
# Says a part of its line and waits until that was read. Between two reads the watcher looks.
SAY = """
import fcntl, termios
def say(part):
    print(part, end='', flush=True)
    while any(fcntl.ioctl(1, termios.FIONREAD, bytes(4))):
        time.sleep(0.001)
"""


def watch_python(program: str) -> Watched:
    return watch([sys.executable, "-c", program])


def test_memory_that_is_given_back_before_the_end_is_seen() -> None:
    program = "held = bytearray(64 << 20); say('{'); say(' '); del held; print('}', flush=True)"

    watched = watch_python(READY + SAY + program)

    assert 60 << 20 <= watched.above["RssAnon"] <= 70 << 20
    assert watched.above["RssFile"] <= 4 << 20
    assert watched.above["together"] >= watched.above["RssAnon"]


def test_a_line_that_comes_in_halves_is_told_whole() -> None:
    program = (
        "print('{\"seconds\":', end='', flush=True); time.sleep(0.2); print(' 1.5}', flush=True)"
    )

    assert watch_python(READY + program).told == {"seconds": 1.5}


@pytest.mark.parametrize("ready", ["", READY], ids=["at once", "after it was ready"])
def test_a_process_that_dies_is_told_with_its_last_words(ready: str) -> None:
    with pytest.raises(
        ProcessEnded, match=r"ended with 1 before it was measured: .*no_such_module"
    ):
        watch_python(ready + "import no_such_module")


def test_a_process_that_says_much_besides_is_waited_for() -> None:
    program = "sys.stderr.write('x' * 1_000_000); print('{}', flush=True)"

    assert watch_python(READY + program).told == {}


def test_a_process_that_is_killed_is_told_by_its_signal() -> None:
    with pytest.raises(ProcessEnded, match="ended with -9 before it was measured: it said nothing"):
        watch_python(READY + "import os; os.kill(os.getpid(), 9)")
