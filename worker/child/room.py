"""What a training will write, from its model's config.json, its settings and its data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_core.errors import EngineError
from qlora_core.estimate import estimate
from qlora_core.train import TrainConfig

_POINTS = 3  # two are kept while the next one is written
_WITH_EVERY_ADAPTER = ("tokenizer*", "*.jinja", "special_tokens_map.json", "vocab*", "merges.txt")


@dataclass(frozen=True)
class Need:
    """How much room a run needs on the disk."""

    all_bytes: int
    """The most that is ever there: the resume points, the checkpoints of all epochs and the adapter."""
    next_bytes: int
    """The most that is written at once: a resume point, or an adapter."""


def disk_need(model_folder: Path, config: TrainConfig, lengths: Sequence[int]) -> Need:
    """Return what a run will need.

    Args:
        model_folder: of the base model.
        config: the run's settings.
        lengths: tokens of each example.

    Returns:
        Nothing where the estimate does not know the model: the run then meets the disk's end by itself.
    """
    try:
        found = estimate(model_folder, config.as_dict(), longest_tokens=max(2, *lengths))
    except EngineError:
        return Need(0, 0)
    tokenizer = sum(
        path.stat().st_size
        for pattern in _WITH_EVERY_ADAPTER
        for path in model_folder.glob(pattern)
    )
    point, adapter = found.resume_point_bytes, found.adapter_file_bytes + tokenizer
    adapters = _epochs(config, len(lengths)) + 1
    return Need(_POINTS * point + adapters * adapter, max(point, adapter))


def _epochs(config: TrainConfig, n_examples: int) -> int:
    """Of how many epochs' ends a checkpoint is kept, or of an end within one."""
    if config.max_steps is None:
        return config.n_epochs
    steps_per_epoch = math.ceil(n_examples / config.batch_size)
    return min(config.n_epochs, math.ceil(config.max_steps / steps_per_epoch))
