"""What of a create call fits its schema, but not together."""

from typing import Any

from service.errors import InvalidRequest
from service.jobs.spec import CreateJob

_NEED_VALIDATION = ("eval_steps", "early_stopping_patience", "load_best_at_end")


def check_together(body: CreateJob) -> None:
    """Refuse hyperparameters that contradict each other, or need a file that is not there.

    Raises:
        InvalidRequest: with the name of one of them.
    """
    requested = {
        name: value for name, value in body.requested_hyperparameters().items() if value != "auto"
    }
    if "warmup_ratio" in requested and "warmup_steps" in requested:
        raise _refused(body, "warmup_steps", "warmup_ratio and warmup_steps are both given; keep one of them.")  # fmt: skip
    if body.validation_file is None:
        for name in _NEED_VALIDATION:
            if requested.get(name):
                raise _refused(body, name, f"{name} needs a validation file; give validation_file.")


def _refused(body: CreateJob, name: str, message: str) -> InvalidRequest:
    block = body.method.supervised if body.method else None
    newer: dict[str, Any] = (
        block.hyperparameters.as_sent() if block and block.hyperparameters else {}
    )
    place = "method.supervised.hyperparameters" if name in newer else "hyperparameters"
    return InvalidRequest(message, param=f"{place}.{name}", code="invalid_hyperparameters")
