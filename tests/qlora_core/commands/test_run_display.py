"""What a person sees of a run: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from qlora_core.commands.run_display import RunDisplay
from qlora_core.train import (
    DatasetProgress,
    Notice,
    OutOfMemoryRecovered,
    ResumeNotExact,
    RunStarted,
    StepMetrics,
    ValidationMetrics,
)


def stepped(step: int, loss: float | None = 2.5) -> StepMetrics:
    return StepMetrics(
        step=step,
        total_steps=100,
        epoch=step / 100,
        train_loss=loss,
        train_mean_token_accuracy=0.5,
        learning_rate=2e-4,
        grad_norm=1.0,
        tokens_per_s=1234.4,
        mfu=None,
        trained_tokens=10,
        step_time_s=3.0,
        memory={"rss_bytes": 2**20, "peak_rss_bytes": 3 * 2**30},
    )


def shown(*events: object, terminal: bool, width: int = 120) -> str:
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=width, highlight=False, color_system=None
    )
    display = RunDisplay(console)
    with display.shown():
        for event in events:
            display.tell(event)  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_lines_say_where_the_run_is_and_how_long_it_takes() -> None:
    told = shown(
        RunStarted(100, 40, 1600, 2, 299_008, 4 * 2**20, "cpu", 1, 2),
        stepped(41),
        stepped(42),
        stepped(100),
        terminal=False,
    )

    assert told.splitlines() == [
        "1,600 examples, 100 steps; 299,008 parameters to train over a base of 4.0 MiB, on cpu",
        "cut to the context length: 1; left out because nothing in them is trained: 2",
        "going on after step 40",
        "step 41/100 loss 2.5000 lr 2.0e-04 1,234 tokens/s 3.0 GiB, 2:57 left",
        "step 100/100 loss 2.5000 lr 2.0e-04 1,234 tokens/s 3.0 GiB, 0:00 left",
    ]


def test_a_resume_that_may_not_be_exact_is_told_with_its_reasons() -> None:
    told = shown(ResumeNotExact(40, ["torch was 2, and is 3 now.", "And so on."]), terminal=False)

    assert told == (
        "Warning: The run goes on after step 40, but perhaps not to the bit as it would have without a stop. "
        "torch was 2, and is 3 now. And so on.\n"
    )


def test_a_run_that_memory_made_more_frugal_is_told_with_what_it_costs() -> None:
    event = OutOfMemoryRecovered(
        3, "in step 3", "recompute", "layers are computed again", "Half as long again.", 1.5, 64, {}
    )

    told = shown(event, terminal=False)

    assert told == (
        "Warning: Memory ended in step 3. From now on layers are computed again. Half as long again.\n"
    )


def test_validations_notices_and_reading_are_told() -> None:
    told = shown(
        DatasetProgress(5 * 2**20, 10 * 2**20),
        Notice("warn", "odd [thing]"),
        Notice("info", "just so"),
        ValidationMetrics(0, 5.0, 0.25),
        ValidationMetrics(7, 4.5, 0.5, is_best=True),
        terminal=False,
    )

    assert told.splitlines() == [
        "tokenized 5 of 10 MiB",
        "Warning: odd [thing]",
        "just so",
        "validation of the base model: loss 5.0000, accuracy 25.0%",
        "validation after step 7: loss 4.5000, accuracy 50.0%, the best so far",
    ]


def test_a_terminal_gets_a_bar_with_the_figures() -> None:
    started = RunStarted(100, 0, 1600, 2, 299_008, 2**20, "cpu", 0, 0)

    told = shown(started, stepped(1), stepped(2, loss=None), terminal=True)

    assert "  2/100 " in told
    assert "loss skipped lr 2.0e-04 1,234 tokens/s 3.0 GiB" in told
    assert "step 2/100" not in told


def test_the_bar_fits_a_terminal_of_80_characters() -> None:
    many = 99_999
    started = RunStarted(many, 0, 1600, 2, 299_008, 2**20, "cuda", 0, 0)
    step = replace(stepped(many), tokens_per_s=123_456.0, memory={"peak_bytes": 79 * 2**30})

    told = shown(started, step, terminal=True, width=80)

    assert "99999/99999 " in told
    assert "123,456 tokens/s 79.0 GiB 0:00:00" in told
