"""Training: the loop, its settings, what it reports, and how it resumes.

``qlora_core.train`` is this package and, as the engine's public name, the function in it: once the
package is imported Python binds it to that name, so the package itself can be called as `train`.
"""

import sys
from types import ModuleType
from typing import Any

from qlora_core.train.config import TrainConfig
from qlora_core.train.events import (
    CheckpointSaved,
    DatasetProgress,
    Event,
    Notice,
    OutOfMemoryRecovered,
    ResumeNotExact,
    ResumePointSaved,
    RunFinished,
    RunStarted,
    SamplesGenerated,
    Sink,
    StepMetrics,
    ValidationMetrics,
)
from qlora_core.train.loop import TrainResult, train
from qlora_core.train.reading import tell_reading

__all__ = [
    "CheckpointSaved",
    "DatasetProgress",
    "Event",
    "Notice",
    "OutOfMemoryRecovered",
    "ResumeNotExact",
    "ResumePointSaved",
    "RunFinished",
    "RunStarted",
    "SamplesGenerated",
    "Sink",
    "StepMetrics",
    "TrainConfig",
    "TrainResult",
    "ValidationMetrics",
    "tell_reading",
    "train",
]


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> TrainResult:  # noqa: ANN401 - train's own
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
