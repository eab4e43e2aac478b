import io

import pytest
from rich.console import Console
from rich.text import Text

from nibble import output
from nibble.events import JobEvent, Sample, Step
from nibble.progress import BarDisplay, LineDisplay, figures, transfer


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


def test_a_validation_before_the_first_step_does_not_hide_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = JobEvent(id="v", level="info", message="", step=Step(0, 9, None, 0.5, None, None))

    with LineDisplay() as display:
        display.event(before)
        display.event(step_event(1))

    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["Step 0/9", "Step 1/100"]


def test_without_a_terminal_a_transfer_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with transfer("uploading") as told:
        told(1, 2)

    assert capsys.readouterr() == ("", "")


def test_samples_are_shown_below_their_message(capsys: pytest.CaptureFixture[str]) -> None:
    samples = (Sample("What is len?", "\nA function.\nOf one argument." + " More." * 90),)

    with LineDisplay() as display:
        display.event(
            JobEvent(id="1", level="info", message="By the base", step=None, samples=samples)
        )

    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["By the base", "  Q: What is len?"]
    assert lines[2].startswith("  A: A function. Of one argument. More. More.")
    assert lines[2].endswith(" …")
    assert len(lines[2]) <= 305
    assert len(lines) == 3


def test_a_message_is_shown_without_what_would_steer_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    event = JobEvent(id="1", level="error", message="\x1b[2Joh [bold]no[/]\r\x07", step=None)

    with LineDisplay() as display:
        display.event(event)

    assert capsys.readouterr().err == "[2Joh [bold]no[/]\n"


@pytest.mark.parametrize("width", [64, 80, 100])
def test_the_bar_stays_on_one_line_however_narrow_the_terminal(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=width)
    monkeypatch.setattr(output, "people", lambda: terminal)

    with BarDisplay() as display:
        display.event(step_event(40, valid_loss=0.75))

    lines = [line for line in Text.from_ansi(screen.getvalue()).plain.splitlines() if line.strip()]
    last = lines[-1]
    assert "40/100" in last
    assert "loss 0.0375" in last
    assert len(last.rstrip()) <= width
    assert not any("tokens/s" in line and "40/100" not in line for line in lines)


def test_the_bar_keeps_the_last_figures_of_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=140)
    monkeypatch.setattr(output, "people", lambda: terminal)
    validated = Step(40, 100, None, 0.75, None, None)

    with BarDisplay() as display:
        display.event(step_event(40))
        display.event(JobEvent(id="v", level="info", message="Step 40/100", step=validated))
        display.event(
            JobEvent(id="m", level="info", message="Checkpoint [red]created[/]", step=None)
        )

    shown = Text.from_ansi(screen.getvalue()).plain
    assert "Checkpoint [red]created[/]" in shown
    after_the_message = shown.partition("Checkpoint")[2]
    told = "40/100 loss 0.0375  validation loss 0.7500  1,234 tokens/s  memory 1.5 GiB"
    assert told in after_the_message
