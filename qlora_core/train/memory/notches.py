"""How a run is made more frugal, one notch at a time, each dearer than the one before.

First every layer is recomputed on the way back, then a forward pass gets half as many tokens until it is one
example, then what is kept for the way back moves to the host's memory. The batch stays what it was, and so do loss
and gradient, up to rounding; with dropout, other passes drop other inputs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

from qlora_core.data import Batching, epoch_order, windows
from qlora_core.train.run import Run

# Windows over which the cost of smaller passes is reckoned.
_WINDOWS = 32


@dataclass(frozen=True)
class Notch:
    """What was changed.

    Attributes:
        change: its name.
        words: what is done from now on.
        cost: in words.
        slower: about how many times as long a step takes, by calculation; None where nothing is known.
    """

    change: Literal["recompute", "smaller_passes", "inputs_on_host"]
    words: str
    cost: str
    slower: float | None


def make_more_frugal(run: Run, *, trains: bool) -> Notch | None:
    """Change the run's plan by the next notch that lowers the peak of its last pass.

    Args:
        run: it stays as it is where there is no such notch.
        trains: whether memory ended in a pass with gradients; the others keep nothing between layers.
    """
    if run.loss_of.last_pass is None:
        return None
    if trains and not run.plan.recompute and (notch := _recompute(run)):
        return notch
    examples, tokens = run.loss_of.last_pass
    if len(examples) > 1:
        return _halve(run, tokens)
    if trains and not run.plan.inputs_on_host and run.model.device.type == "cuda":
        return _move_inputs(run)
    return None


def _recompute(run: Run) -> Notch | None:
    plan = replace(run.plan, recompute=True, notch=run.plan.notch + 1)
    before = run.plan
    if run.adopt(plan):
        run.adopt(before)
        return None
    # Forward, backward to the inputs alone since weights are frozen, and forward again: three for two.
    return Notch(
        "recompute",
        "every layer is computed again in the backward pass",
        "A step takes about half as long again.",
        1.5,
    )


def _halve(run: Run, tokens: int) -> Notch:
    before = run.batching
    fewer = max(1, tokens // 2)
    run.adopt(replace(run.plan, micro_batch_tokens=fewer, notch=run.plan.notch + 1))
    old, new = _tokens_computed(run, before), _tokens_computed(run, run.batching)
    slower = max(1.0, new / old)
    return Notch(
        "smaller_passes",
        f"a forward pass takes {fewer:,} tokens at most, or one example",
        f"A step is of the same examples in more passes, and takes about {slower - 1:.0%} longer.",
        slower,
    )


def _tokens_computed(run: Run, batching: Batching) -> int:
    """Count what some windows take, passes counted in tokens: the rule by which padded examples are grouped."""
    order = epoch_order(len(run.dataset), seed=run.config.seed, epoch=0)
    found = 0
    for window in itertools.islice(windows(order, run.config.batch_size), _WINDOWS):
        for group in batching.groups(run.dataset.lengths, window):
            lengths = [run.dataset.lengths[index] for index in group]
            tokens = sum(lengths) if batching.packed else len(group) * max(lengths)
            found += tokens + batching.pass_tokens
    return found


def _move_inputs(run: Run) -> Notch:
    run.adopt(replace(run.plan, inputs_on_host=True, notch=run.plan.notch + 1))
    return Notch(
        "inputs_on_host",
        "what layers keep for the backward pass is kept in the host's memory",
        "All of it goes to the host and back in each pass; how long that takes depends on the machine.",
        None,
    )
