"""The first signal is a wish, the second one means it, and afterwards signals are as they were."""

import os
import signal

import pytest

from qlora_core.commands.interruption import StopWish


def test_the_first_signal_is_noted_and_the_second_one_interrupts(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with StopWish() as wish:
        assert not wish()
        signal.raise_signal(signal.SIGINT)

        assert wish()
        assert wish.signal == signal.SIGINT
        assert "once more to stop at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_afterwards_signals_are_as_they_were() -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

    with StopWish():
        during = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

    assert during != before
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_wish_is_noted_where_nobody_can_be_told() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    kept = os.dup(2)
    os.dup2(writer, 2)
    try:
        with StopWish() as wish:
            signal.raise_signal(signal.SIGINT)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writer)

    assert wish.signal == signal.SIGINT
