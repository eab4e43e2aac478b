"""The error of a run that does not fit in its most frugal form: what was tried, what takes the memory, what would fit."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_core.errors import EngineError, OutOfMemoryError
from qlora_core.estimate import estimate
from qlora_core.estimate.result import Estimate
from qlora_core.train.run import Run

_KINDS = {
    "base_bytes": "base model",
    "adapter_bytes": "adapter",
    "optimizer_bytes": "optimizer",
    "gradients_bytes": "gradients",
    "activations_bytes": "activations",
    "workspace_bytes": "one dense weight",
}


def out_of_memory(run: Run, where: str, memory: Mapping[str, int]) -> OutOfMemoryError:
    """Make the error.

    Args:
        run: as it was tried last.
        where: memory has ended, such as "in step 3".
        memory: what was measured then.
    """
    used = ", ".join(f"{name} {value:,}" for name, value in memory.items())
    sentences = [
        f"The {run.model.device.type} ran out of memory {where} ({used}), {_tried(run)}.",
        *_estimated(run),
        "Lower context_length or the adapter's r, or take a smaller base model.",
    ]
    return OutOfMemoryError(" ".join(sentences))


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
    """Say what takes how much, where the model's family is one that can be estimated."""
    try:
        found = _estimate(run)
    except EngineError:
        return []
    kinds = ", ".join(
        f"{words} {_size(getattr(found.memory, name))}" for name, words in _KINDS.items()
    )
    return [f"By the estimate this takes {_size(found.memory.total_bytes)}: {kinds}."]


def _estimate(run: Run) -> Estimate:
    lengths = run.dataset.lengths
    settings = run.config.as_dict() | {
        "micro_batch_tokens": run.plan.micro_batch_tokens,
        "gradient_checkpointing": run.plan.recompute,
    }
    dtype = str(run.model.dtype).removeprefix("torch.")
    return estimate(
        run.model.config.get_text_config().to_dict(),
        settings,
        device="cuda" if run.model.device.type == "cuda" else "cpu",
        compute_dtype=dtype,  # pyright: ignore[reportArgumentType] - checked there
        longest_tokens=max(lengths),
        mean_tokens=sum(lengths) / len(lengths),
    )


def _size(nbytes: int) -> str:
    unit, name = (2**30, "GiB") if nbytes >= 2**30 else (2**20, "MiB")
    return f"{nbytes / unit:,.1f} {name}"
