"""Checks a job's files, and its sample prompts, with the very code that will read them for training, in bounded memory and time. No torch.

Every bad line is told as an event (the first 100 of each file), and the whole report is stored with the job.
"""

import resource
import signal
from pathlib import Path
from typing import Any, Literal

from qlora_core.models.files import find_shards, read_config
from qlora_core.text import DatasetReport, TextEncoder, check_dataset
from service.jobs.resolve import resolve_context_length, resolve_hyperparameters
from service.models.actions import file_names, resolve_folder
from worker.child.need import memory_needed
from worker.child.plan import base_model
from worker.child.prompts import check_prompts
from worker.child.report import Report
from worker.folder import AttemptFolder
from worker.reasons import JobError

Param = Literal["training_file", "validation_file"]

_MIN_TRAINING_EXAMPLES = 10
_MIN_VALIDATION_EXAMPLES = 1


def run(_: AttemptFolder, spec: dict[str, Any], report: Report) -> dict[str, Any]:
    """Check both files and the prompts, and return what result.json will hold: the reports, the resolved hyperparameters, the need.

    Raises:
        EngineError, ModelUnavailable: the base model cannot be used.
        MemoryError: a file needs more than is allowed.
    """
    model, cache = base_model(spec), Path(spec["model_cache"])
    # Without its weights: the training child downloads them, and others wait for this slot.
    folder = resolve_folder(model, cache, weights=False)
    read_config(folder)
    find_shards(folder, file_names(model, folder, cache))  # refuse now what could not be loaded
    _limit(int(spec["memory_bytes"]), int(spec["time_s"]))
    encoder = TextEncoder.from_folder(folder, now=spec["now"])
    requested = spec["hyperparameters"]
    context_length = resolve_context_length(requested, encoder.context_length)
    train_on_inputs = requested.get("train_on_inputs") is True

    training = check_dataset(
        Path(spec["training_file"]),
        encoder,
        context_length=context_length,
        train_on_inputs=train_on_inputs,
        min_examples=_MIN_TRAINING_EXAMPLES,
    )
    tell(report, "training_file", training, context_length=context_length)
    validation: DatasetReport | None = None
    if spec["validation_file"] is not None:
        validation = check_dataset(
            Path(spec["validation_file"]),
            encoder,
            context_length=context_length,
            train_on_inputs=train_on_inputs,
            min_examples=_MIN_VALIDATION_EXAMPLES,
        )
        tell(report, "validation_file", validation, context_length=context_length)

    reports: dict[str, Any] = {
        "training_file": training.as_dict(),
        "validation_file": None if validation is None else validation.as_dict(),
    }
    error = problem_of(training, validation) or check_prompts(
        spec["sample_prompts"], encoder, report
    )
    if error is not None:
        return {"outcome": "failed", "error": error, "report": reports}
    resolved = resolve_hyperparameters(requested, training, encoder.context_length)
    return {
        "outcome": "succeeded",
        "error": None,
        "report": reports,
        "hyperparameters": resolved,
        "memory_needed_bytes": memory_needed(
            folder, resolved, longest_tokens=training.longest_tokens
        ),
    }


def problem_of(training: DatasetReport, validation: DatasetReport | None) -> JobError | None:
    """Return the job's error if a file cannot be used; the training file's comes first."""
    if training.problem is not None:
        problem = training.problem
        return {"code": problem.code, "message": problem.message, "param": "training_file"}
    if validation is None:
        return None
    if validation.problem is not None:
        message = validation.problem.message
        message = message.replace("training file", "validation file")
        message = message.replace("Training file", "Validation file")
        return _invalid_validation(message)
    if validation.format != training.format:
        return _invalid_validation(
            "The job failed due to an invalid validation file. Unexpected file format: the training file is in the "
            f"{training.format} format, but the validation file is in the {validation.format} format."
        )
    return None


def _invalid_validation(message: str) -> JobError:
    return {"code": "invalid_validation_file", "message": message, "param": "validation_file"}


def tell(report: Report, param: Param, found: DatasetReport, *, context_length: int) -> None:
    """Tell every bad line, and what was cut or left out."""
    name = param.replace("_", " ").capitalize()
    for error in found.errors:
        report.message(
            f"{name}, line {error.line}: {error.message}",
            level="error",
            data={
                "kind": "line_error",
                "param": param,
                "line": error.line,
                "code": error.code,
                "field": error.field,
            },
        )
    if found.n_errors > len(found.errors):
        more = found.n_errors - len(found.errors)
        report.message(
            f"{name}: {more} more bad {'line is' if more == 1 else 'lines are'} not listed",
            level="error",
            data={"kind": "line_errors_left_out", "param": param, "count": more},
        )
    if found.n_truncated:
        report.message(
            f"{name}: {_examples(found.n_truncated)} longer than the context length of {context_length} tokens and"
            f" {'is cut at its' if found.n_truncated == 1 else 'are cut at their'} end",
            level="warn",
            data={"kind": "truncated", "param": param, "count": found.n_truncated},
        )
    if found.n_dropped:
        report.message(
            f"{name}: {_why_left_out(found, context_length)}",
            level="warn",
            data={"kind": "dropped", "param": param, "count": found.n_dropped},
        )


def _examples(count: int) -> str:
    return "1 example is" if count == 1 else f"{count} examples are"


def _why_left_out(found: DatasetReport, context_length: int) -> str:
    """An example may have been left out because its answers lie beyond the context length."""
    count, too_long = found.n_dropped, found.n_dropped_truncated
    them = "it" if count == 1 else "them"
    text = f"{_examples(count)} left out, since nothing in {them} would be trained"
    if too_long == 0:
        return text
    if too_long == count:
        which = "it is" if count == 1 else "all of them are"
    else:
        which = f"{too_long} of them {'is' if too_long == 1 else 'are'}"
    return f"{text}: {which} too long for the context length of {context_length} tokens"


def _limit(memory_bytes: int, time_s: int) -> None:
    """Cap what this process may allocate, and have the kernel end it when the time is over.

    RLIMIT_DATA rather than RLIMIT_AS: threads' address space that is reserved but not used would count in the latter.
    The clock starts once the model's files are here, since a download takes as long as the network lets it.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    signal.alarm(time_s)
