"""`nibble demo`: a real fine-tune from beginning to end, against a service that it starts and stops itself.

What a team would do, in a team's order: upload two files, create a job, follow it, fetch the adapter, each through the
official SDK and the `nibble` client's own functions. Only the service underneath is the launcher's.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from nibble import output
from nibble.commands.options import Json
from nibble.download import check_target, download
from nibble.endings import Ending, ExitCode, guarded, refused
from nibble.follow import Follower
from nibble.progress import display
from nibble.upload import upload
from operations.demo.docstrings import DemoFiles, DocstringSourceError, write_demo_files
from operations.demo.outcome import read_outcome
from operations.demo.result import Result
from operations.launch import LaunchError, Service
from operations.stopping import Stopped, stop_on_signals
from operations.up import say
from service.models.catalog import Catalog, CatalogError
from service.settings import Settings, SettingsInvalid, read_settings

_LOOK_EVERY_S = 0.2
_PATIENCE_S = 60.0
_MAX_VALIDATION = 200


@guarded
def demo(
    model: Annotated[str, typer.Option(help="A base model of the catalog.")] = "tiny-llama",
    data_dir: Annotated[
        Path, typer.Option(help="Where the demo's service keeps everything.")
    ] = Path(".demo"),
    epochs: Annotated[int, typer.Option(min=1, max=50)] = 2,
    examples: Annotated[
        int, typer.Option(min=10, help="Train on so many examples at most.")
    ] = 1600,
    json: Json = False,
) -> None:
    """Fine-tune a small model on this Python's own documentation, and show what it learned.

    Ends with 0 only if the job succeeded and the validation loss fell. With --json the figures are one document on stdout.
    """
    began = time.monotonic()
    stop_on_signals()
    settings = _settings(data_dir)
    _check_model(settings, model)
    files = _write_files(settings, examples)
    say("Starting the service …")
    try:
        with Service(settings, say=say) as service:
            result = _walk_or_stop(service, files, model=model, epochs=epochs)
    except LaunchError as error:
        raise Ending(ExitCode.FAILED, str(error)) from error
    except Stopped as stopped:
        say("Stopped; nothing is left running.")
        raise typer.Exit(stopped.exit_code) from None
    took_s = time.monotonic() - began
    if json:
        output.print_json(result.as_dict() | {"took_s": round(took_s, 1)})
    else:
        print(result.as_text())
    say(f"\nEverything is stopped again. The demo took {_minutes(took_s)}.")
    if not result.outcome.improved:
        raise Ending(ExitCode.FAILED, "the validation loss did not fall")


def _settings(data_dir: Path) -> Settings:
    """Servers, storage and port of the demo's own, whatever else is configured on this machine."""
    try:
        given = read_settings(data_dir=data_dir, host="127.0.0.1", port=0)
    except SettingsInvalid as error:
        raise refused(str(error)) from error
    own = given.model_copy(update={"database_url": None, "redis_url": None, "storage_url": None})
    return own.model_copy(update={"storage_url": own.blobs_url})


def _check_model(settings: Settings, model: str) -> None:
    try:
        catalog = Catalog.load(settings.models_file)
    except CatalogError as error:
        raise refused(str(error)) from error
    if catalog.get(model) is None:
        known = ", ".join(entry.id for entry in catalog.all())
        raise refused(f"no model {model!r} in {settings.models_file}; there are: {known}")


def _write_files(settings: Settings, examples: int) -> DemoFiles:
    folder = settings.data_dir / "input"
    try:
        files = write_demo_files(folder, max_train=examples, max_validation=_MAX_VALIDATION)
    except DocstringSourceError as error:
        raise Ending(ExitCode.FAILED, str(error)) from error
    say(
        f"Wrote {files.n_train} training and {files.n_validation} validation examples "
        f"from this Python's docstrings to {folder}."
    )
    return files


def _walk_or_stop(service: Service, files: DemoFiles, *, model: str, epochs: int) -> Result:
    try:
        return _walk(service, files, model=model, epochs=epochs)
    except Stopped:
        say("Stopping the service …")
        raise


def _walk(service: Service, files: DemoFiles, *, model: str, epochs: int) -> Result:
    """Upload, create, follow, fetch."""
    key = service.settings.first_key_file.read_text().strip()
    with OpenAI(base_url=f"{service.url}/v1", api_key=key, timeout=60) as client:
        say(f"The service is ready at {service.url} (documentation: {service.url}/docs).")
        _clear(client)
        job = _create(client, files, model=model, epochs=epochs)
        say(f"Created {job.id}.")
        job = _follow(service, client, job.id)
        if job.status != "succeeded":
            why = job.error.message if job.error else "no reason was told"
            logs = service.settings.data_dir / "logs"
            raise Ending(ExitCode.FAILED, f"the job ended as {job.status}: {why} (logs: {logs})")
        outcome = read_outcome(_events(client, job.id))
        folder = check_target(service.settings.data_dir / "adapters" / job.id)
        adapter = download(client, job.id, folder, patience_s=_PATIENCE_S)
    return Result(outcome, job, folder, adapter, service.url)


def _clear(client: OpenAI) -> None:
    """Cancel what an interrupted demo left in the queue: it would be trained first."""
    for job in client.fine_tuning.jobs.list(limit=20):
        if job.status in ("validating_files", "queued", "running"):
            client.fine_tuning.jobs.cancel(job.id)
            say(f"Cancelled {job.id} of an earlier demo.")


def _create(client: OpenAI, files: DemoFiles, *, model: str, epochs: int) -> FineTuningJob:
    training = upload(client, files.train)
    validation = upload(client, files.validation)
    # More than OpenAI's three, which the SDK's types do not know. A larger step size than the default, since there is
    # time for few steps.
    hyperparameters: Any = {
        "n_epochs": epochs,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "context_length": 512,
    }
    return client.fine_tuning.jobs.create(
        model=model,
        training_file=training.id,
        validation_file=validation.id,
        suffix="demo",
        seed=0,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        extra_body={"sample_prompts": list(files.held_out_questions)},
    )


def _follow(service: Service, client: OpenAI, job_id: str) -> FineTuningJob:
    """Show the job's progress to its end, while the service is looked after by this, its own, thread."""
    leaving = threading.Event()
    with display() as shown:

        def trouble(message: str) -> None:
            if not leaving.is_set():
                shown.trouble(message)

        follower = Follower(
            client, job_id, on_event=shown.event, on_trouble=trouble, patience_s=_PATIENCE_S
        )
        result = _InBackground(follower.run)
        try:
            while not result.wait(_LOOK_EVERY_S):
                service.look_after()
        finally:
            leaving.set()
    return result.value()


class _InBackground:
    """A call in a thread that nobody waits for at the end of the process."""

    def __init__(self, call: Callable[[], FineTuningJob]) -> None:
        self._call = call
        self._value: FineTuningJob | None = None
        self._error: Exception | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Return whether it is done, waiting for it at most so long."""
        return self._done.wait(timeout_s)

    def value(self) -> FineTuningJob:
        """What the call returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        if self._value is None:
            raise RuntimeError("not done yet")
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._call()
        except Exception as error:  # noqa: BLE001  (a thread's edge; value() raises it again)
            self._error = error
        finally:
            self._done.set()


def _events(client: OpenAI, job_id: str) -> list[dict[str, Any]]:
    newest_first = client.fine_tuning.jobs.list_events(job_id, limit=100)
    return [event.to_dict(mode="json") for event in newest_first][::-1]


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
