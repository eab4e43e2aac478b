"""Out of memory is not the end: what was begun is undone, the run made more frugal by a notch, and begun again.

Only for work that changes nothing until it is whole: forward and backward passes, whose gradients can be dropped.
An optimizer's step is none, since half of it cannot be told from all of it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from qlora_core.out_of_memory import OUT_OF_MEMORY, is_out_of_memory
from qlora_core.quant.workspace import release_idle
from qlora_core.train.events import OutOfMemoryRecovered
from qlora_core.train.memory.free_memory import return_freed
from qlora_core.train.memory.meter import measured_memory
from qlora_core.train.memory.notches import make_more_frugal
from qlora_core.train.memory.out_of_memory import out_of_memory
from qlora_core.train.resume.random_states import random_states, restore_random_states
from qlora_core.train.run import Run

Found = TypeVar("Found")


def until_it_fits(
    run: Run, attempt: Callable[[], Found], *, step: int, during: str, trains: bool = True
) -> Found:
    """Return what ``attempt`` gives, which is made again under a more frugal plan while memory ends in it.

    Gradients are zero and random states as they were whenever it is made again.

    Args:
        run: its plan is changed.
        attempt: forward passes, and backward passes where it ``trains``; gradients were zero before it.
        step: that it belongs to, for the event.
        during: what it is, such as "in step 3".
        trains: whether it makes gradients.

    Raises:
        OutOfMemoryError: memory has ended in the most frugal form, too.
    """
    while True:
        states = random_states()
        run.loss_of.last_pass = None
        try:
            return attempt()
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            memory, reason = measured_memory(run.model.device), str(error)
        # Only here are the error and its frames gone, and with them the tensors that they held.
        where = during + _pass_in_words(run, trains=trains)
        _undo(run, states)
        notch = make_more_frugal(run, trains=trains)
        if notch is None:
            raise out_of_memory(run, where, memory) from MemoryError(reason)
        run.sink(
            OutOfMemoryRecovered(
                step=step,
                where=where,
                change=notch.change,
                words=notch.words,
                cost=notch.cost,
                slower=notch.slower,
                micro_batch_tokens=run.plan.micro_batch_tokens,
                memory=memory,
            )
        )


def _pass_in_words(run: Run, *, trains: bool) -> str:
    if run.loss_of.last_pass is None:
        return ""
    examples, tokens = run.loss_of.last_pass
    n_examples = len(examples)
    if n_examples > 1:
        return f", in a pass of {n_examples:,} examples and {tokens:,} tokens"
    dataset = run.dataset if trains else run.validation
    line = f" (line {dataset.lines[examples[0]]:,})" if dataset else ""
    return f", in a pass of one example{line} and {tokens:,} tokens"


def _undo(run: Run, states: dict[str, Tensor]) -> None:
    run.optimizer.zero_grad(set_to_none=True)
    restore_random_states(states)
    gc.collect()
    release_idle()
    return_freed()
    # What failed is not the peak of the step that succeeds.
    run.memory.begin_step()
