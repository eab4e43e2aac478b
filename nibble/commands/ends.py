"""What `jobs create --wait` and `jobs watch` share: following a job, showing it, ending as it ended."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from nibble import output
from nibble.download import download
from nibble.endings import Ending, ExitCode, exit_code_of
from nibble.follow import Follower
from nibble.progress import display

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob

_CODES = {
    "succeeded": ExitCode.SUCCEEDED,
    "failed": ExitCode.FAILED,
    "cancelled": ExitCode.CANCELLED,
}

_BAD_LINES = 10


def follow(client: "OpenAI", job_id: str, *, patience_s: float) -> "FineTuningJob":
    """Show a job's progress to its end and return it. Ctrl-C leaves the job alone and ends here (130)."""
    with display() as shown:
        follower = Follower(
            client, job_id, on_event=shown.event, on_trouble=shown.trouble, patience_s=patience_s
        )
        try:
            return follower.run()
        except KeyboardInterrupt as interrupt:
            code = exit_code_of(interrupt)
    output.say(
        f"The job goes on. Watch it again with: nibble jobs watch {job_id}   "
        f"Stop it with: nibble jobs cancel {job_id}"
    )
    raise typer.Exit(code)


def fetch_adapter(
    client: "OpenAI",
    job_id: str,
    folder: Path,
    *,
    patience_s: float,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Download and unpack an adapter, say so, and return what `--json` tells of it."""
    try:
        files = download(client, job_id, folder, checkpoint=checkpoint, patience_s=patience_s)
    except KeyboardInterrupt as interrupt:
        code = exit_code_of(interrupt)
        which = f" --checkpoint {checkpoint}" if checkpoint else ""
        where = shlex.quote(str(folder))
        output.say(f"Fetch the rest with: nibble jobs download {job_id} {where}{which}")
        raise typer.Exit(code) from None
    total = sum(file.bytes for file in files)
    output.say(f"The adapter is in {folder} ({len(files)} files, {output.size(total)}).")
    listed = [{"name": f.name, "bytes": f.bytes, "sha256": f.sha256} for f in files]
    return {"job_id": job_id, "folder": str(folder), "bytes": total, "files": listed}


def show_job(job: "FineTuningJob", *, json: bool, adapter: dict[str, Any] | None = None) -> None:
    """Print a job, and where its adapter went, as a result."""
    document = job.to_dict(mode="json")
    if json:
        output.print_json(document | ({"adapter": adapter} if adapter else {}))
        return
    output.print_fields(
        (
            ("job", job.id),
            ("status", state_of(job)),
            ("model", job.model),
            ("fine-tuned model", job.fine_tuned_model),
            ("training file", job.training_file),
            ("validation file", job.validation_file),
            ("hyperparameters", _hyperparameters(document)),
            ("trained tokens", job.trained_tokens),
            ("created", output.local_time(job.created_at)),
            ("finished", output.local_time(job.finished_at)),
            ("error", _error(document)),
            ("adapter", adapter and adapter["folder"]),
        )
    )


def is_paused(job: "FineTuningJob") -> bool:
    """Whether a job waits to be resumed; the API says `queued` of it, and since when it is paused."""
    return bool((job.model_extra or {}).get("paused_at"))


def state_of(job: "FineTuningJob") -> str:
    """A job's status for people."""
    return "paused" if is_paused(job) else job.status


def end_with(job: "FineTuningJob") -> None:
    """Exit with the code of the job's status."""
    code = _CODES.get(job.status)
    if code is None:
        raise Ending(ExitCode.FAILED, f"the job ended in a status that is new here: {job.status}")
    raise typer.Exit(int(code))


def _hyperparameters(document: dict[str, Any]) -> str | None:
    known = cast("dict[str, Any]", document.get("hyperparameters") or {})
    return ", ".join(f"{name}={value}" for name, value in known.items()) or None


def _error(document: dict[str, Any]) -> str | None:
    """Why the job failed, what helps, and the first bad lines of its file."""
    error = cast("dict[str, Any]", document.get("error") or {})
    told = [str(error[part]) for part in ("message", "hint") if error.get(part)]
    lines = list(_bad_lines(cast("dict[str, Any]", document.get("dataset_report") or {})))
    told += lines[:_BAD_LINES]
    if len(lines) > _BAD_LINES:
        told.append(f"… and more bad lines: nibble jobs get {document.get('id')} --json")
    return "\n  ".join(told) or None


def _bad_lines(report: dict[str, Any]) -> Iterator[str]:
    """A sentence for each bad line of the training file, then of the validation file."""
    for param in ("training_file", "validation_file"):
        found = cast("dict[str, Any]", report.get(param) or {})
        for line in cast("list[dict[str, Any]]", found.get("errors") or []):
            name = param.replace("_", " ").capitalize()
            yield f"{name}, line {line.get('line')}: {line.get('message')}"
