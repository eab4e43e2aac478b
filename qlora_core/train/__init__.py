"""Training: the loop, its settings, what it reports, and how it resumes."""

from qlora_core.train.config import TrainConfig
from qlora_core.train.events import (
    CheckpointSaved,
    Event,
    Notice,
    ResumePointSaved,
    RunFinished,
    RunStarted,
    SamplesGenerated,
    Sink,
    StepMetrics,
    ValidationMetrics,
)
from qlora_core.train.loop import TrainResult, train

__all__ = [
    "CheckpointSaved",
    "Event",
    "Notice",
    "ResumePointSaved",
    "RunFinished",
    "RunStarted",
    "SamplesGenerated",
    "Sink",
    "StepMetrics",
    "TrainConfig",
    "TrainResult",
    "ValidationMetrics",
    "train",
]
