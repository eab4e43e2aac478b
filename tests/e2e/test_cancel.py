"""Cancelling at every stage: `cancelled` is said when the child is gone, and soon."""

from tests.e2e.conftest import Deployment, User, chat_file, children_of, wait_until

LONG = chat_file(400, words=20)


def test_cancelled_while_queued_running_and_validating(service: Deployment, user: User) -> None:
    running = user.submit(LONG, n_epochs=50, batch_size=1)
    user.wait_for_message(running, "Step 1/")
    queued = user.submit(chat_file(12))
    user.wait(queued, "queued")

    assert user.jobs.cancel(queued).status == "cancelled"
    assert "Fine-tuning job started" not in user.messages(queued)

    training = busiest_child(service)
    user.jobs.cancel(running)
    user.wait(running, "cancelled", timeout_s=20)  # an epoch more would take minutes
    assert training not in {child.pid for child in children_of(service.processes[-1])}

    many = chat_file(30_000)  # takes seconds to check
    validating = user.submit(many)
    user.wait_for_message(validating, "Validating training file")
    user.jobs.cancel(validating)
    job = user.wait(validating, "cancelled", timeout_s=20)
    assert job.error is None
    assert user.messages(validating)[-1] == "Fine-tuning job cancelled"

    after = user.submit(chat_file(12), n_epochs=1)
    assert user.wait(after, "succeeded").fine_tuned_model


def busiest_child(service: Deployment) -> int:
    """The pid of the training child: the one with the most processor time."""
    children = children_of(service.processes[-1])
    wait_until(lambda: bool(children), timeout_s=1, why="the worker has no child")
    return max(children, key=lambda child: child.cpu_times().user).pid
