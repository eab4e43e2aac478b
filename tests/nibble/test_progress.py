import pytest

from nibble.events import JobEvent, Step
from nibble.progress import LineDisplay, figures


def step_event(number: int, *, valid_loss: float | None = None) -> JobEvent:
    step = Step(number, 100, 1.5 / number, valid_loss, 1234.4, 3 * 2**29)
    return JobEvent(id=f"ftevent-{number}", level="info", message=f"Step {number}", step=step)


def test_figures_are_told_with_their_units() -> None:
    told = figures(Step(1, 2, 1.23456, 2.0, 12345.6, 3 * 2**29))

    assert told == ["loss 1.2346", "validation loss 2.0000", "12,346 tokens/s", "memory 1.5 GiB"]


def test_figures_that_are_not_there_are_not_told() -> None:
    assert figures(Step(1, 2, None, None, None, None)) == []


def test_lines_tell_the_first_the_last_and_the_validated_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with LineDisplay() as display:
        for number in range(1, 101):
            display.event(step_event(number, valid_loss=0.5 if number == 50 else None))

    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "Step 1/100",
        "Step 50/100",
        "Step 100/100",
    ]
    assert (
        lines[1]
        == "Step 50/100: loss 0.0300, validation loss 0.5000, 1,234 tokens/s, memory 1.5 GiB"
    )


def test_a_message_is_shown_without_what_would_steer_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    event = JobEvent(id="1", level="error", message="\x1b[2Joh [bold]no[/]\r\x07", step=None)

    with LineDisplay() as display:
        display.event(event)

    assert capsys.readouterr().err == "[2Joh [bold]no[/]\n"
