"""Cancelling at every stage: `cancelled` is said when the child is gone, and soon."""

from tests.e2e.conftest import Deployment, User, chat_file, children_of, training_pid


def test_cancelled_while_queued_running_and_validating(service: Deployment, user: User) -> None:
    running = user.submit_endless()
    queued = user.submit(chat_file(12))
    user.wait(queued, "queued")

    assert user.jobs.cancel(queued).status == "cancelled"
    assert "Fine-tuning job started" not in user.messages(queued)

    training = training_pid(service, running)
    user.jobs.cancel(running)
    user.wait(running, "cancelled")
    assert training not in {child.pid for child in children_of(service.processes[-1])}

    many = chat_file(30_000)  # takes seconds to check
    validating = user.submit(many)
    user.wait_for_message(validating, "Validating training file")
    user.jobs.cancel(validating)
    job = user.wait(validating, "cancelled")
    assert job.error is None
    assert user.messages(validating)[-1] == "Fine-tuning job cancelled"

    after = user.submit(chat_file(12), n_epochs=1)
    assert user.wait(after, "succeeded").fine_tuned_model
