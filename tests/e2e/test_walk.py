"""The whole walk with the official SDK: upload, job, events, stream, checkpoints, adapter."""

import base64
import csv
import hashlib
import io
import json
import tarfile
from contextlib import suppress
from pathlib import Path

from tests.e2e.conftest import User, chat_file, children_of, wait_until


def test_upload_train_watch_and_download(user: User) -> None:
    job_id = user.submit(
        chat_file(24), validation=chat_file(4), n_epochs=2, batch_size=6, learning_rate=0.01
    )

    job = user.wait(job_id, "succeeded")

    assert job.fine_tuned_model is not None
    assert job.fine_tuned_model.startswith("ft:tiny:org-nibble::")
    assert job.error is None
    assert job.trained_tokens
    assert job.hyperparameters.n_epochs == 2
    messages = user.messages(job_id)
    in_order = [
        f"Created fine-tuning job: {job_id}",
        f"Validating training file: {job.training_file} and validation file: {job.validation_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        *(message for message in messages if message.startswith("Step 8/8: training loss=")),
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert [message for message in messages if message in in_order] == in_order
    assert len(in_order) == 7
    assert job.fine_tuned_model in {model.id for model in user.client.models.list()}
    check_metrics(user, job_id)
    check_stream(user, job_id)
    check_checkpoints(user, job_id)
    check_results(user, job.result_files)
    check_adapter(user, job_id)
    check_who_has_torch(user)


def check_who_has_torch(user: User) -> None:
    """Neither the API nor the worker's parent; the spare child that waits for the next job."""
    has_torch = {
        process.pid: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
        for process in user.deployment.processes
    }
    assert not any(has_torch.values())

    def spare_is_ready() -> bool:
        for child in children_of(user.deployment.processes[-1]):
            with suppress(OSError):  # one that has ended meanwhile
                if "libtorch" in Path(f"/proc/{child.pid}/maps").read_text(encoding="utf-8"):
                    return True
        return False

    wait_until(spare_is_ready, timeout_s=90, why="no child stands ready with torch loaded")


def check_metrics(user: User, job_id: str) -> None:
    events = [e for e in user.jobs.list_events(job_id, limit=100) if e.type == "metrics"]
    steps = {}
    for event in reversed(events):
        data = event.data
        assert isinstance(data, dict)
        steps.setdefault(data["step"], {}).update(data)
    assert sorted(steps) == list(range(9))  # 0 is the base model's validation
    assert steps[8]["train_loss"] < steps[1]["train_loss"]
    assert steps[8]["full_valid_loss"] < steps[0]["full_valid_loss"]
    assert steps[8]["memory"]["rss_bytes"] > 0
    assert steps[8]["tokens_per_s"] > 0


def check_stream(user: User, job_id: str) -> None:
    """An ended job's stream tells its whole story again and closes."""
    with user.http.stream("GET", f"/v1/fine_tuning/jobs/{job_id}/stream") as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if "data:" in line]
    told = [json.loads(line).get("message") for line in lines]
    assert [message for message in told if message] == user.messages(job_id)


def check_checkpoints(user: User, job_id: str) -> None:
    checkpoints = list(user.jobs.checkpoints.list(job_id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [8, 4]
    for checkpoint in checkpoints:
        assert checkpoint.fine_tuned_model_checkpoint.endswith(
            f":ckpt-step-{checkpoint.step_number}"
        )
        assert checkpoint.metrics.full_valid_loss is not None


def check_results(user: User, result_files: list[str]) -> None:
    content = user.client.files.content(result_files[0]).read()
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(content).decode())))
    assert list(rows[0]) == [
        "step",
        "train_loss",
        "train_accuracy",
        "valid_loss",
        "valid_mean_token_accuracy",
    ]
    assert [int(row["step"]) for row in rows] == list(range(9))
    assert float(rows[-1]["train_loss"]) < float(rows[1]["train_loss"])


def check_adapter(user: User, job_id: str) -> None:
    answer = user.http.get(f"/v1/fine_tuning/jobs/{job_id}/adapter")
    assert answer.status_code == 200
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        files = {
            member.name.rsplit("/", 1)[-1]: archive.extractfile(member)
            for member in archive.getmembers()
            if member.isfile()
        }
        content = {name: file.read() for name, file in files.items() if file is not None}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= content.keys()
    config = json.loads(content["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tiny"
    manifest = json.loads(content["manifest.json"])
    for file in manifest["files"]:
        assert hashlib.sha256(content[file["name"]]).hexdigest() == file["sha256"]
