"""`nibble jobs …`: look, watch, pause, resume, cancel, download. Creating has its own file."""

import functools
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from nibble import output
from nibble.answers import expect_job, expect_list
from nibble.commands.create import create
from nibble.commands.ends import end_with, fetch_adapter, follow, is_paused, show_job, state_of
from nibble.commands.options import BaseUrl, JobId, Json, Patience
from nibble.connection import connect
from nibble.download import check_target
from nibble.endings import guarded

app = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True)
app.command("create")(create)


@app.command("list")
@guarded
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 20,
    base_url: BaseUrl = None,
    json: Json = False,
) -> None:
    """List fine-tuning jobs."""
    from openai.types.fine_tuning import FineTuningJob

    with connect(base_url) as client:
        ask = functools.partial(client.fine_tuning.jobs.list, limit=min(limit, 100))
        jobs = expect_list(FineTuningJob, ask, limit=limit)
        if json:
            output.print_json(
                {"object": "list", "data": [job.to_dict(mode="json") for job in jobs]}
            )
            return
        rows = (
            (
                job.id,
                state_of(job),
                job.model,
                output.local_time(job.created_at),
                job.fine_tuned_model,
            )
            for job in jobs
        )
        output.print_table(
            ("JOB", "STATUS", "MODEL", "CREATED", "FINE-TUNED MODEL"),
            rows,
            empty="There are no jobs yet.",
        )


@app.command("get")
@guarded
def get_job(job_id: JobId, base_url: BaseUrl = None, json: Json = False) -> None:
    """Show one job."""
    with connect(base_url) as client:
        job = expect_job(client.fine_tuning.jobs.retrieve(job_id))
    show_job(job, json=json)


@app.command("watch")
@guarded
def watch_job(
    job_id: JobId, timeout: Patience = 300.0, base_url: BaseUrl = None, json: Json = False
) -> None:
    """Follow a job to its end; the exit code says how it ended (0 succeeded, 1 failed, 3 cancelled)."""
    with connect(base_url) as client:
        job = follow(client, job_id, patience_s=timeout)
    show_job(job, json=json)
    end_with(job)


@app.command("cancel")
@guarded
def cancel_job(job_id: JobId, base_url: BaseUrl = None, json: Json = False) -> None:
    """Ask for a job to be cancelled; a running one stops after its current step."""
    with connect(base_url) as client:
        job = expect_job(client.fine_tuning.jobs.cancel(job_id))
    show_job(job, json=json)
    if job.status != "cancelled":
        output.say(f"Its worker is being told; watch it stop with: nibble jobs watch {job.id}")


@app.command("pause")
@guarded
def pause_job(job_id: JobId, base_url: BaseUrl = None, json: Json = False) -> None:
    """Have a job wait until it is resumed; a running one saves where it stands and frees its GPU."""
    with connect(base_url) as client:
        job = expect_job(client.fine_tuning.jobs.pause(job_id))
    show_job(job, json=json)
    if not is_paused(job):
        output.say(
            f"Its worker is being told; look whether it has stopped: nibble jobs get {job.id}"
        )


@app.command("resume")
@guarded
def resume_job(job_id: JobId, base_url: BaseUrl = None, json: Json = False) -> None:
    """Let a paused job go on from where it was."""
    with connect(base_url) as client:
        job = expect_job(client.fine_tuning.jobs.resume(job_id))
    show_job(job, json=json)


@app.command("checkpoints")
@guarded
def list_checkpoints(job_id: JobId, base_url: BaseUrl = None, json: Json = False) -> None:
    """List the adapters kept on the way, newest first."""
    from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

    with connect(base_url) as client:
        ask = functools.partial(client.fine_tuning.jobs.checkpoints.list, job_id, limit=100)
        found = expect_list(FineTuningJobCheckpoint, ask, limit=1_000)
        if json:
            output.print_json({"object": "list", "data": [c.to_dict(mode="json") for c in found]})
            return
        rows = (
            (c.id, c.step_number, _valid_loss(c.to_dict()), c.fine_tuned_model_checkpoint)
            for c in found
        )
        output.print_table(
            ("CHECKPOINT", "STEP", "VALIDATION LOSS", "NAME"),
            rows,
            empty="It has no checkpoints yet.",
        )


@app.command("download")
@guarded
def download_adapter(
    job_id: JobId,
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A new folder; the default is ./JOB-ID.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="A checkpoint's id (`nibble jobs checkpoints`), of any job.")
    ] = None,
    timeout: Patience = 300.0,
    base_url: BaseUrl = None,
    json: Json = False,
) -> None:
    """Download a succeeded job's adapter, ready for peft; a broken download goes on where it stopped."""
    target = check_target(folder or Path(Path(job_id).name))
    with connect(base_url) as client:
        adapter = fetch_adapter(client, job_id, target, patience_s=timeout, checkpoint=checkpoint)
        if json:
            output.print_json(adapter)
        else:
            output.print_result(adapter["folder"])


def _valid_loss(checkpoint: dict[str, Any]) -> str | None:
    metrics = cast("dict[str, Any]", checkpoint.get("metrics") or {})
    loss = metrics.get("full_valid_loss")
    return f"{loss:.4f}" if isinstance(loss, float) else None
