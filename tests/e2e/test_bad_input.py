"""What bad files and bad base models get: a failed job that says why, never a hang; also while all training slots are busy."""

import json
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import User, chat_file


@pytest.fixture(scope="module")
def busy(user: User) -> Iterator[str]:
    """A long job that holds the only training slot."""
    job_id = user.submit_endless()
    yield job_id
    user.jobs.cancel(job_id)
    user.wait(job_id, "cancelled")


def one(message: object) -> bytes:
    return json.dumps({"messages": message}).encode() + b"\n"


GOOD = chat_file(10)
BAD_LINES = {
    "unknown role": one([{"role": "robot", "content": "x"}]),
    "no role": one([{"content": "x"}]),
    "no assistant": one([{"role": "user", "content": "x"}]),
    "no messages": one([]),
    "not an object": b"[1, 2]\n",
    "not JSON": b'{"messages": [\n',
    "not UTF-8": b'{"messages": "\xff"}\n',
}


def bad_lines(user: User, job_id: str) -> list[int]:
    """The numbers of the lines that the job's story complains of, in order."""
    return sorted(
        int(event.data["line"])  # pyright: ignore[reportArgumentType]
        for event in user.jobs.list_events(job_id, limit=100)
        if isinstance(event.data, dict) and event.data.get("kind") == "line_error"
    )


def test_bad_lines_are_reported_while_the_only_training_slot_is_busy(user: User, busy: str) -> None:
    content = GOOD + b"".join(BAD_LINES.values())

    job_id = user.submit(content)
    job = user.wait(job_id, "failed")

    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert bad_lines(user, job_id) == list(range(11, 11 + len(BAD_LINES)))
    assert user.jobs.retrieve(busy).status == "running"


def test_every_bad_line_up_to_a_hundred_is_reported(user: User) -> None:
    bad = b'{"messages": []}\n' * 150

    job_id = user.submit(GOOD + bad)
    job = user.wait(job_id, "failed")

    assert job.error is not None
    assert "150 bad lines" in job.error.message
    assert bad_lines(user, job_id) == list(range(11, 111))


def test_fewer_than_ten_examples_are_refused_in_openais_words(user: User) -> None:
    job = user.wait(user.submit(chat_file(7)), "failed")

    assert job.error is not None
    assert job.error.code == "invalid_n_examples"
    assert job.error.message == (
        "Training file has 7 example(s), but must have at least 10 examples"
    )


def test_a_file_with_nothing_left_to_train_on_is_refused(user: User) -> None:
    endless = [{"role": "user", "content": "x " * 500}, {"role": "assistant", "content": "y"}]

    job_id = user.submit(one(endless) * 12)
    job = user.wait(job_id, "failed")

    assert job.error is not None
    assert job.error.code == "invalid_training_file"
    assert any("12 examples are left out" in message for message in user.messages(job_id))


def test_a_bad_validation_file_is_named(user: User) -> None:
    job_id = user.submit(GOOD, validation=one([{"role": "robot", "content": "x"}]))
    job = user.wait(job_id, "failed")

    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_validation_file", "validation_file")
    assert "validation file" in job.error.message


def test_two_files_of_different_formats_are_refused(user: User) -> None:
    completion = b'{"prompt": "a", "completion": "b"}\n'

    job = user.wait(user.submit(GOOD, validation=completion), "failed")

    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_validation_file", "validation_file")


@pytest.mark.parametrize(
    ("model", "code"),
    [("no-weights", "model_weights_missing"), ("pickled", "model_weights_pickle")],
)
def test_a_model_folder_without_usable_weights_is_refused(
    user: User, model: str, code: str
) -> None:
    job = user.wait(user.submit(GOOD, model=model), "failed")

    assert job.error is not None
    assert (job.error.code, job.error.param) == (code, "model")
    assert model in (job.error.message or "")
    assert str(user.deployment.folder) not in (job.error.message or "")
