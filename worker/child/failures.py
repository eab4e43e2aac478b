"""Exceptions into the job's `error`: {code, message, param} and a hint where there is something to do.

What we raise on purpose speaks for itself. Of anything else the user hears its name, and the log keeps its traceback.
"""

import traceback

from qlora_core.errors import DatasetError, EngineError, ModelError
from qlora_core.out_of_memory import is_out_of_memory
from service.models.actions import ModelUnavailable
from worker.reasons import OUT_OF_MEMORY_HINT, JobError, disk_full, is_disk_full, out_of_memory

_HINTS = {
    "out_of_memory": OUT_OF_MEMORY_HINT,
    "loss_not_finite": "Use a smaller learning_rate, or look for odd examples in the training file.",
    "model_weights_pickle": "Convert the weights to safetensors.",
    "invalid_lora_target_modules": "Leave lora_target_modules out to adapt every linear layer.",
}


def explain(error: BaseException) -> JobError:
    """Return what the job's `error` will say; the log gets the traceback."""
    if isinstance(error, EngineError):
        traceback.print_exception(error)  # the log may show folders, which users do not see
        return _reason(str(error.code), str(error), _param(error))
    if isinstance(error, ModelUnavailable):
        traceback.print_exception(error)
        return _reason("model_unavailable", str(error), "model")
    if is_disk_full(error):
        return disk_full(error)
    if is_out_of_memory(error):
        traceback.print_exception(error)
        return out_of_memory()
    traceback.print_exception(error)
    return _reason(
        "internal_error",
        f"The job stopped because of an unexpected error ({type(error).__name__}) in Nibble or in a library.",
        None,
    ) | {"hint": "The log of the job's attempt has the details; please report it."}


def _reason(code: str, message: str, param: str | None) -> JobError:
    reason: JobError = {"code": code, "message": message, "param": param}
    if code in _HINTS:
        reason["hint"] = _HINTS[code]
    return reason


def _param(error: EngineError) -> str | None:
    if isinstance(error, ModelError):
        return "model"
    if isinstance(error, DatasetError):
        return "training_file"
    return None
