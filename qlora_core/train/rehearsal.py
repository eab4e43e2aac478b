"""One forward and backward pass over the largest micro-batch that can come, before anything is trained.

Where memory does not suffice, the run so ends at its beginning and not at the one long example of its
second epoch. What is computed is thrown away, and the random states are put back: the run that follows
is the same to the bit.
"""

from __future__ import annotations

import torch

from qlora_core.data import largest_possible
from qlora_core.train.memory import out_of_memory_named
from qlora_core.train.run import Run

_MOMENTS = 2  # what AdamW will keep for every trained element, from its first step on


def rehearse(run: Run) -> None:
    """Go through the largest micro-batch.

    Raises:
        OutOfMemoryError: it does not fit; the message says how large it is.
    """
    device = run.model.device
    batch = largest_possible(run.batching, run.dataset, batch_size=run.config.batch_size)
    rows, width = batch.input_ids.shape
    what = f" in a trial of the largest micro-batch, {rows} x {width:,} tokens"
    if len(batch.examples) == 1:
        what += f" (the example in line {run.dataset.lines[batch.examples[0]]:,})"
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards), out_of_memory_named(device, during=what):
        reserved = [] if run.optimizer.state else [
            torch.empty_like(parameter) for parameter in run.parameters for _ in range(_MOMENTS)
        ]  # fmt: skip
        run.loss_of(batch.to(device)).loss.backward()
        del reserved
    run.optimizer.zero_grad(set_to_none=True)
