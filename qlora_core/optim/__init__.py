"""Optimizers over the adapter's tensors, and learning-rate schedules as plain functions of the step."""

from qlora_core.optim.optimizer import OPTIMIZERS, build_optimizer
from qlora_core.optim.schedule import SCHEDULES, learning_rate_at, warmup_share

__all__ = ["OPTIMIZERS", "SCHEDULES", "build_optimizer", "learning_rate_at", "warmup_share"]
