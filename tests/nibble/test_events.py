import pytest

from nibble.events import JobEvent, Sample, Step, read_event

METRICS = {
    "id": "ftevent-1",
    "level": "info",
    "type": "metrics",
    "message": "Step 3/10: training loss=1.50",
    "data": {
        "step": 3,
        "total_steps": 10,
        "train_loss": 1.5,
        "full_valid_loss": 1.75,
        "valid_loss": 9.0,
        "tokens_per_s": 1234.5,
        "memory": {"allocated_bytes": 1, "reserved_bytes": 2, "peak_bytes": 3},
    },
}


def test_a_steps_figures_are_read() -> None:
    event = read_event(METRICS)

    assert event == JobEvent(
        id="ftevent-1",
        level="info",
        message="Step 3/10: training loss=1.50",
        step=Step(3, 10, 1.5, 1.75, 1234.5, 3.0),
    )


def test_figures_that_are_missing_or_odd_are_left_out() -> None:
    data = {"step": "3", "total_steps": True, "train_loss": float("nan"), "memory": [1]}

    event = read_event({"message": "", "type": "metrics", "data": data})

    assert event is not None
    assert event.step == Step(None, None, None, None, None, None)


def test_a_message_has_no_figures() -> None:
    event = read_event(
        {"message": "Fine-tuning job started", "type": "message", "data": {"step": 1}}
    )

    assert event == JobEvent(id="", level="info", message="Fine-tuning job started", step=None)


@pytest.mark.parametrize("document", [None, [], "text", 3, {}, {"message": 5}, {"id": "ftjob-1"}])
def test_what_is_no_event_is_none(document: object) -> None:
    assert read_event(document) is None


def test_samples_are_read_with_the_question_they_answer() -> None:
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is len?"},
    ]
    samples = [{"messages": prompt, "answer": "A function."}, {"messages": [], "answer": "x"}, 3]
    data = {"kind": "samples_generated", "stage": "base", "samples": samples}

    event = read_event({"message": "Samples generated", "type": "message", "data": data})

    assert event is not None
    assert event.samples == (Sample("What is len?", "A function."),)
