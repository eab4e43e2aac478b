"""One forward and backward pass over the largest micro-batch that can come, before anything is trained.

Where memory does not suffice, the run so becomes more frugal, or ends, at its beginning and not at the one long
example of its second epoch. What is computed is thrown away, and the random states are put back: the run that follows
is the same to the bit. Torch is held to deterministic algorithms for it, and where the model has none, told from then on.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qlora_core.data import largest_possible
from qlora_core.train.events import Notice
from qlora_core.train.memory.recovery import until_it_fits
from qlora_core.train.run import Run
from qlora_core.train.surroundings import callers_kept, surround

# In torch's words for an operation that has no deterministic algorithm.
_NOT_DETERMINISTIC = "deterministic"


def rehearse(run: Run, *, step: int = 0) -> None:
    """Go through the largest micro-batch, more frugally until it fits; ``step`` steps are done.

    Raises:
        OutOfMemoryError: it does not fit in the most frugal form; the message says how large it is.
    """
    until_it_fits(
        run,
        lambda: _go_through(run),
        step=step,
        during="in a trial of the largest micro-batch",
    )
    run.optimizer.zero_grad(set_to_none=True)


def _go_through(run: Run) -> None:
    if run.plan.deterministic:
        reason = _not_deterministic(run)
        if not reason:
            return
        run.adopt(replace(run.plan, deterministic=False))
        surround(run.plan)
        run.sink(Notice("warn", f"A run that goes on may differ in its last bits: {reason}."))
        run.optimizer.zero_grad(set_to_none=True)
    _pass(run)


def _not_deterministic(run: Run) -> str:
    """Make the pass with deterministic algorithms alone; returns what torch has against that, or nothing."""
    with callers_kept():
        surround(run.plan, strict=True)
        try:
            _pass(run)
        except RuntimeError as error:
            if _NOT_DETERMINISTIC not in str(error):
                raise
            return str(error).partition(".")[0]
    return ""


def _pass(run: Run) -> None:
    device = run.model.device
    batch = largest_possible(run.batching, run.dataset, batch_size=run.config.batch_size)
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        found = run.loss_of(batch.to(device))
        run.optimizer.prefetch()  # as beside the last backward of a step
        found.loss.backward()
