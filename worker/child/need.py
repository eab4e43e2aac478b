"""What memory a job needs on a GPU, estimated from its model's config.json and its hyperparameters. No torch."""

from pathlib import Path
from typing import Any

from qlora_core.errors import EngineError
from qlora_core.estimate import estimate
from worker.child.plan import LORA_NAMES, SETTING_NAMES

_ONE_EXAMPLE = 1  # a pass holds at least one, however long


def memory_needed(
    model_folder: Path, hyperparameters: dict[str, Any], *, longest_tokens: int
) -> int | None:
    """Return the bytes that a step takes on a GPU in the most frugal form that a run falls back to.

    Args:
        model_folder: of the base model.
        hyperparameters: the job's, resolved.
        longest_tokens: of its longest example, before it is cut.

    Returns:
        None where the estimate does not know the model or a setting: the run itself will say what is wrong with it.
    """
    settings = {name: hyperparameters[name] for name in SETTING_NAMES if name in hyperparameters}
    lora = {
        ours: hyperparameters[name] for name, ours in LORA_NAMES.items() if name in hyperparameters
    }
    try:
        found = estimate(
            model_folder,
            {
                **settings,
                "lora": lora,
                "gradient_checkpointing": True,
                "micro_batch_tokens": _ONE_EXAMPLE,
            },
            longest_tokens=max(2, longest_tokens),
            inputs_on_host=True,
        )
    except EngineError:
        return None
    return found.memory.total_bytes
