"""A job with a validation file: measured within epochs, ended when that no longer improves, and its best adapter served."""

import io
import json
import tarfile
from typing import Any

from tests.e2e.conftest import User, chat_file


def test_a_job_stops_early_and_offers_its_best_adapter(user: User) -> None:
    # At this rate the validation loss soon jumps.
    job_id = user.submit(
        chat_file(24), validation=chat_file(4), n_epochs=20, batch_size=6, learning_rate=0.3,
        lr_scheduler_type="constant", warmup_steps=0, eval_steps=1, early_stopping_patience=3,
        lora_use_rslora=True, train_on_inputs=True,
    )  # fmt: skip

    job = user.wait(job_id, "succeeded")

    settings = job.hyperparameters.to_dict()
    assert settings["load_best_at_end"] is True
    assert settings["warmup_steps"] == 0
    assert "warmup_ratio" not in settings
    losses = _validations(user, job_id)
    last = max(losses)
    best = min((step for step in losses if step > 0), key=lambda step: losses[step])
    assert list(losses) == list(range(last + 1))
    assert 0 < best == last - 3 < 80 - 3
    told = user.messages(job_id)
    assert any(m.startswith("Stopped early: the validation loss has not improved in 3") for m in told)  # fmt: skip
    assert any(f"the adapter is the best one, of step {best}: " in message for message in told)
    answer = user.http.get(f"/v1/fine_tuning/jobs/{job_id}/adapter")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        manifest, config = (
            json.load(archive.extractfile(f"{job_id}/{name}") or io.BytesIO())
            for name in ("manifest.json", "adapter_config.json")
        )
    assert manifest["step"] == best
    assert config["use_rslora"] is True


def _validations(user: User, job_id: str) -> dict[int, float]:
    """The validation losses by step, under both of OpenAI's names."""
    events = list(user.jobs.list_events(job_id, limit=100))
    found: dict[int, float] = {}
    for event in reversed(events):
        data: Any = event.data
        if event.type == "metrics" and "full_valid_loss" in data:
            assert data["valid_loss"] == data["full_valid_loss"]
            found[data["step"]] = data["full_valid_loss"]
    return found
