"""Pausing a run for real: its child ends with a resume point, the slot is free, and the rest gives the unbroken run's story."""

import psutil
from openai.types.fine_tuning import FineTuningJob

from tests.e2e.conftest import Deployment, User, chat_file, training_pid, wait_until
from tests.e2e.test_recovery import STEPS, attempts_of, submit, wait_for_a_resume_point
from tests.held import held_until_told_to_end


def is_paused(job: FineTuningJob) -> bool:
    return bool(job.model_extra and job.model_extra["paused_at"])


def test_a_paused_job_frees_its_slot_and_goes_on_where_it_was(
    service: Deployment, user: User
) -> None:
    job_id = submit(user)
    child = psutil.Process(training_pid(service, job_id))
    wait_for_a_resume_point(service, job_id)

    with held_until_told_to_end(child):
        asked = user.jobs.pause(job_id)
    wait_until(lambda: is_paused(user.jobs.retrieve(job_id)), timeout_s=90, why="not paused")
    is_alive = child.is_running()
    other = user.submit(chat_file(12), n_epochs=1)
    user.wait(other, "succeeded")  # there is one slot, and it is free
    still = user.jobs.retrieve(job_id)
    user.jobs.resume(job_id)
    user.wait(job_id, "succeeded")

    assert asked.status in ("running", "queued")
    assert not is_alive
    assert is_paused(still)
    validated, first, second = attempts_of(service, job_id)
    assert validated == ("validate", "succeeded", None)
    assert first == ("train", "paused", None)
    from_step = second[2]
    assert second == ("train", "succeeded", from_step)
    # Nothing is trained twice: the point was written when the run stopped, not at the last epoch's end.
    told = [
        event.data["step"]
        for event in user.jobs.list_events(job_id, limit=100)
        if event.type == "metrics" and isinstance(event.data, dict)
    ]
    assert sorted(told) == list(range(1, STEPS + 1))
    assert from_step is not None
    assert from_step >= 2


def test_a_paused_job_can_be_cancelled(user: User) -> None:
    job_id = user.submit_endless()
    user.jobs.pause(job_id)
    wait_until(lambda: is_paused(user.jobs.retrieve(job_id)), timeout_s=90, why="not paused")

    cancelled = user.jobs.cancel(job_id)

    assert (cancelled.status, is_paused(cancelled)) == ("cancelled", False)


def test_a_cancel_overtakes_a_pause_and_a_resume_calls_one_off(user: User) -> None:
    job_id = user.submit_endless()

    user.jobs.pause(job_id)
    resumed = user.jobs.resume(job_id)
    going_on = user.messages(job_id)[-1]
    user.jobs.pause(job_id)
    user.jobs.cancel(job_id)
    cancelled = user.wait(job_id, "cancelled")

    assert not is_paused(resumed)
    assert going_on
    assert not is_paused(cancelled)
