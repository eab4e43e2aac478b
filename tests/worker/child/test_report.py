import json
from pathlib import Path

from qlora_core.train.events import (
    CheckpointSaved,
    DatasetProgress,
    Notice,
    OutOfMemoryRecovered,
    ResumeNotExact,
    RunFinished,
    RunStarted,
    SamplesGenerated,
    StepMetrics,
    ValidationMetrics,
)
from worker.child.report import Report, sink
from worker.relay import Tail


def step(n: int, loss: float | None = 0.154) -> StepMetrics:
    return StepMetrics(
        step=n,
        total_steps=300,
        epoch=0.1,
        train_loss=loss,
        train_mean_token_accuracy=0.9,
        learning_rate=1e-4,
        grad_norm=1.0,
        tokens_per_s=10.0,
        mfu=None,
        trained_tokens=5,
        step_time_s=0.1,
        memory={"rss_bytes": 1},
    )


def started(start_step: int) -> RunStarted:
    return RunStarted(300, start_step, 10, 3, 100, 1000, "cpu", 0, 0)


def test_how_far_a_large_file_is_read_is_told_in_percent(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    with Report(path) as report:
        sink(report)(DatasetProgress(30_000_000, 40_000_000))

    (line,) = Tail(path).read()
    assert line.message == "Reading the files: 75% of 40,000,000 bytes"
    assert line.kind == "dataset_progress"


def test_engine_events_become_lines_in_openais_words(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    with Report(path) as report:
        tell = sink(report)
        tell(started(0))
        tell(step(12))
        tell(ValidationMetrics(12, 0.4, 0.8))
        tell(CheckpointSaved(12, 1, "/x", 0.1, 0.9, 0.4, 0.8))
        tell(SamplesGenerated(12, "adapter", [{"messages": [], "answer": "a"}]))
        tell(Notice("warn", "Look here.", {"step": 12}))

    lines = Tail(path).read()
    assert [line.n for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.type for line in lines] == ["message", "metrics", "metrics", *["message"] * 3]
    assert lines[1].message == "Step 12/300: training loss=0.15"
    assert lines[2].message == "Step 12/300: full validation loss=0.40"
    assert lines[2].data["valid_loss"] == lines[2].data["full_valid_loss"] == 0.4
    assert lines[3].kind == "checkpoint_saved"
    assert lines[4].data["samples"][0]["answer"] == "a"
    assert (lines[5].level, lines[5].message) == ("warn", "Look here.")


def test_tokens_with_loss_are_not_called_what_openai_calls_all_tokens(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    with Report(path) as report:
        sink(report)(step(12))

    data = Tail(path).read()[0].data
    assert data["loss_tokens"] == 5
    assert "trained_tokens" not in data


def test_a_skipped_step_has_no_loss_to_tell(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    with Report(path) as report:
        sink(report)(step(7, loss=None))

    (line,) = Tail(path).read()
    assert (line.type, line.message) == ("metrics", "Step 7/300: skipped")
    assert line.data["train_loss"] is None


def test_the_end_says_of_which_step_the_adapter_is_unless_it_is_the_last(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    with Report(path) as report:
        tell = sink(report)
        tell(RunFinished(9, 90, 0.25, 0.5, 9, 6, 0.4, stopped_early=False))
        tell(RunFinished(9, 90, 0.25, 0.4, 6, 6, 0.4, stopped_early=True))

    assert [line.message for line in Tail(path).read()] == [
        "Training finished after 9 steps: training loss=0.2500",
        "Training finished after 9 steps: training loss=0.2500; the adapter is the best one, of step 6: "
        "full validation loss=0.4000",
    ]


def test_a_run_that_goes_on_says_from_where(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    with Report(path) as report:
        sink(report)(started(40))

    assert Tail(path).read()[-1].data == {"kind": "attempt_resumed", "from_step": 40}


def test_a_run_that_may_not_go_on_exactly_warns_with_the_reasons(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    with Report(path) as report:
        sink(report)(ResumeNotExact(40, ["torch was 2, and is 3 now.", "And so on."]))

    (line,) = Tail(path).read()
    assert (line.level, line.kind) == ("warn", "resume_not_exact")
    assert line.message == (
        "Goes on after step 40, but perhaps not to the bit as without a stop. torch was 2, and is 3 now. And so on."
    )
    assert line.data["reasons"] == ["torch was 2, and is 3 now.", "And so on."]


def test_memory_that_ended_is_a_warning_with_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    with Report(path) as report:
        sink(report)(
            OutOfMemoryRecovered(
                3,
                "in step 3",
                "smaller_passes",
                "passes are small",
                "More.",
                1.25,
                64,
                {"rss_bytes": 9},
            )
        )

    (line,) = Tail(path).read()
    assert (line.level, line.kind) == ("warn", "out_of_memory_recovered")
    assert line.message == "Memory ended in step 3. From now on passes are small. More."
    assert line.data["memory"] == {"rss_bytes": 9}
    assert (line.data["step"], line.data["change"], line.data["slower"]) == (
        3,
        "smaller_passes",
        1.25,
    )


def test_every_line_is_json_whatever_the_figures(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    with Report(path) as report:
        sink(report)(step(1, loss=float("nan")))

    line = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: name)
    assert line["data"]["train_loss"] is None
