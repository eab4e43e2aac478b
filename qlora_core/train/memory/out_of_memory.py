"""The error of a run that does not fit in its most frugal form: what was tried, what takes the memory, what would fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_core.errors import EngineError, OutOfMemoryError
from qlora_core.estimate import estimate
from qlora_core.estimate.fitting import largest_fitting
from qlora_core.train.memory.free_memory import free_bytes
from qlora_core.train.run import Run
from qlora_core.units import size

_KINDS = {
    "base_bytes": "base model",
    "adapter_bytes": "adapter",
    "optimizer_bytes": "optimizer",
    "gradients_bytes": "gradients",
    "activations_bytes": "activations",
    "workspace_bytes": "one dense weight",
}

_IN_GENERAL = "Lower context_length or the adapter's r, or take a smaller base model."
# There when nothing is computed.
_HELD = ("base_bytes", "adapter_bytes", "optimizer_resident_bytes", "gradients_bytes")
# Of the form that did not fit, what something has to be below to count as smaller.
_LESS = 0.9


def out_of_memory(run: Run, where: str, memory: Mapping[str, int]) -> OutOfMemoryError:
    """Make the error.

    Args:
        run: as it was tried last.
        where: memory has ended, such as "in step 3".
        memory: what was measured then.
    """
    used = ", ".join(f"{name} {value:,}" for name, value in memory.items())
    tried = f"The {run.model.device.type} ran out of memory {where} ({used}), {_tried(run)}."
    return OutOfMemoryError(" ".join([tried, *_estimated(run)]))


def _tried(run: Run) -> str:
    forms = [
        "with every layer recomputed"
        if run.plan.recompute
        else "with layers that cannot be recomputed",
        f"at most {run.plan.micro_batch_tokens:,} tokens or one example in a forward pass",
    ]
    if run.plan.inputs_on_host:
        forms.append("layers' inputs on the host")
    return f"in the most frugal form there is: {', '.join(forms)}"


def _estimated(run: Run) -> list[str]:
    """Say what takes how much and what would fit; in general words where the base model cannot be estimated."""
    if run.plan.kernels == "none":  # the estimate is of quantized models
        return [_IN_GENERAL]
    try:
        return _of_estimate(run)
    except EngineError:
        return [_IN_GENERAL]


def _of_estimate(run: Run) -> list[str]:
    lengths = run.dataset.lengths
    # A pass of one example is split no further: only one of fewer tokens takes less.
    alone = _tokens_of_one_example(run)
    micro = run.plan.micro_batch_tokens
    most = max(lengths) if alone is None else min(alone, max(lengths))
    config = run.model.config.get_text_config().to_dict()
    options: dict[str, Any] = {
        "device": "cuda" if run.model.device.type == "cuda" else "cpu",
        "compute_dtype": str(run.model.dtype).removeprefix("torch."),
        "longest_tokens": most,
        "mean_tokens": sum(min(one, most) for one in lengths) / len(lengths),
        "inputs_on_host": run.plan.inputs_on_host,
    }
    tried = run.config.as_dict() | {
        "micro_batch_tokens": micro if alone is None else min(alone, micro),
        "gradient_checkpointing": run.plan.recompute,
    }
    memory = estimate(config, tried, **options).memory
    kinds = ", ".join(f"{words} {size(getattr(memory, name))}" for name, words in _KINDS.items())
    # That this form did not fit is known, whatever room there seems to be.
    room = int(_LESS * memory.total_bytes)
    free = free_bytes(run.model.device)
    if free is not None:
        room = min(room, free + sum(run.memory.measure()[name] for name in _HELD))
    fitting = largest_fitting(config, tried, room_bytes=room, **options)
    return [
        f"By the estimate this takes {size(memory.total_bytes)}: {kinds}.",
        fitting.sentence,
    ]


def _tokens_of_one_example(run: Run) -> int | None:
    """Return how many tokens the pass had that did not fit, if it was of one example."""
    if run.loss_of.last_pass is None:
        return None
    examples, tokens = run.loss_of.last_pass
    return tokens if len(examples) == 1 else None
