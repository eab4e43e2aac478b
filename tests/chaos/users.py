"""Those who submit: scripts with OpenAI's own SDK and its own retries, which go on while the service is under fire."""

import json
import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from openai import OpenAI

SCRIPTS = 4
EXAMPLES, BATCH_SIZE, EPOCHS = 16, 2, 5
STEPS = EXAMPLES // BATCH_SIZE * EPOCHS
_RETRIES = 8
"""The SDK's own, with its pauses of at most eight seconds."""


@dataclass(frozen=True)
class Submission:
    """What a script was told: the job of its create call."""

    number: int
    job_id: str


class Users:
    """Scripts that submit `count` jobs between them, each with a file of its own."""

    def __init__(
        self, url: str, key: str, *, count: int, seed: int, longest_pause_s: float
    ) -> None:
        """Begin to submit, in threads of their own."""
        self.count = count
        self._pause_s = longest_pause_s
        self._client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=_RETRIES, timeout=30)
        self._pool = ThreadPoolExecutor(SCRIPTS)
        rng = random.Random(seed)
        self._futures: list[Future[Submission]] = [
            self._pool.submit(self._submit, number, rng.random()) for number in range(count)
        ]

    def are_done(self) -> bool:
        """Whether every create call has been answered, or given up by the SDK."""
        return all(future.done() for future in self._futures)

    def told(self) -> list[Submission]:
        """The submissions that were answered with a job."""
        answered: list[Submission] = []
        for future in self._futures:
            with suppress(
                Exception
            ):  # given up: whether it became a job, the checks ask the database
                answered.append(future.result())
        return answered

    def close(self) -> None:
        """Submit no more."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _submit(self, number: int, share: float) -> Submission:
        time.sleep(share * self._pause_s)
        # Every other one says which submission it is; the others rely on being recognised as a retry.
        headers = {"Idempotency-Key": f"submission-{number}"} if number % 2 else {}
        file = self._client.files.create(
            file=("train.jsonl", _content(number)), purpose="fine-tune"
        )
        job = self._client.fine_tuning.jobs.create(
            model="tiny",
            training_file=file.id,
            metadata={"submission": str(number)},
            hyperparameters={"n_epochs": EPOCHS, "batch_size": BATCH_SIZE},
            extra_headers=headers,
        )
        return Submission(number, job.id)


def _content(number: int) -> bytes:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} of {number}?"},
                {"role": "assistant", "content": f"It is {i}, a nibble is four bits"},
            ]
        }
        for i in range(EXAMPLES)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
