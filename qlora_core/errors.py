"""Everything the engine raises on purpose, as one tree.

    EngineError
    ├── ModelError                     the base model's folder cannot be used
    │   ├── ModelNotFound                  model_not_found
    │   ├── ModelWeightsMissing            model_weights_missing
    │   ├── ModelWeightsPickle             model_weights_pickle
    │   ├── ModelWeightsInvalid            model_weights_invalid
    │   └── ModelUnsupported               model_unsupported
    ├── DatasetError                   code of its problem: invalid_training_file, invalid_n_examples
    ├── ConfigError (ValueError)           invalid_config
    │   └── LoraTargetError                invalid_lora_target_modules
    ├── AdapterError                       adapter_invalid
    ├── ResumePointError                   resume_point_invalid
    ├── LossNotFiniteError                 loss_not_finite
    ├── OutOfMemoryError                   out_of_memory
    ├── DeviceError                        device_error
    ├── ShapeError (ValueError)            tensor_shape
    ├── DtypeError (TypeError)             tensor_dtype
    ├── LayoutError (ValueError)           tensor_layout
    └── NonFiniteError (ValueError)        tensor_not_finite

``code`` is snake_case and ends up as the job's ``error.code``; the message is one or two sentences
for the person who started the job: what was wrong, where, what to do.
"""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    """Root of the engine's errors; catch this at a process edge."""

    code: ClassVar[str] | str = "engine_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ModelError(EngineError):
    """The base model cannot be loaded; raised only through its subclasses."""

    code = "model_error"


class ModelNotFound(ModelError):
    """The folder, or its config.json, is not there."""

    code = "model_not_found"


class ModelWeightsMissing(ModelError):
    """There are no weights, or some of those the architecture needs are absent."""

    code = "model_weights_missing"


class ModelWeightsPickle(ModelError):
    """The weights exist only as pickle files, which can run code; they are never opened."""

    code = "model_weights_pickle"


class ModelWeightsInvalid(ModelError):
    """A weight file is truncated or malformed, or a tensor has another shape than the config says."""

    code = "model_weights_invalid"


class ModelUnsupported(ModelError):
    """The architecture, or something inside it, is one the engine cannot train."""

    code = "model_unsupported"


class DatasetError(EngineError):
    """A training or validation file cannot be used.

    Attributes:
        code: of the problem, ready to be the job's ``error.code``.
        report: the ``DatasetReport`` with the bad lines, or None where there is none.
    """

    def __init__(
        self, message: str, *, code: str = "invalid_training_file", report: object = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.report = report

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_dataset_error, (self.message, self.code, self.report))


def _rebuild_dataset_error(message: str, code: str, report: object) -> DatasetError:
    return DatasetError(message, code=code, report=report)


class ConfigError(EngineError, ValueError):
    """A setting is out of its bounds."""

    code = "invalid_config"


class LoraTargetError(ConfigError):
    """A LoRA target names no linear layer of the model."""

    code = "invalid_lora_target_modules"


class AdapterError(EngineError):
    """An adapter folder is incomplete, malformed, or made for another model."""

    code = "adapter_invalid"


class ResumePointError(EngineError):
    """A resume point is incomplete, malformed, or belongs to another run."""

    code = "resume_point_invalid"


class LossNotFiniteError(EngineError):
    """The loss became NaN or infinite."""

    code = "loss_not_finite"


class OutOfMemoryError(EngineError):
    """The device ran out of memory."""

    code = "out_of_memory"


class DeviceError(EngineError):
    """A call of the GPU's runtime failed, or there is no such runtime."""

    code = "device_error"


class ShapeError(EngineError, ValueError):
    """A tensor has another shape than the operation needs."""

    code = "tensor_shape"


class DtypeError(EngineError, TypeError):
    """A tensor has another dtype than the operation needs."""

    code = "tensor_dtype"


class LayoutError(EngineError, ValueError):
    """A tensor is not contiguous, or tensors that belong together are on different devices."""

    code = "tensor_layout"


class NonFiniteError(EngineError, ValueError):
    """A tensor holds NaN or infinity."""

    code = "tensor_not_finite"
