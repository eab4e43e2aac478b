"""What the backward pass needs goes to the host's memory and comes back, and the gradients are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_core import load_model
from qlora_core.train.memory.host_memory import saved_on_host
from qlora_core.train.run import Run
from qlora_core.train.step import accumulate

WIDTH, LAYERS = 64, 2  # of `save_tiny_llama`


class Copies(TorchDispatchMode):
    """Notes the shapes of what is copied into other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.shapes.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


Prepare = Callable[..., Run]


@pytest.fixture
def prepared(base: Path, make_run: Callable[..., Run]) -> Prepare:
    def make(device: str = "cpu", **settings: Any) -> Run:
        model = load_model(base, device=device, compute_dtype=torch.float32)
        return make_run(12, model=model, batch_size=12, **settings)

    return make


def _gradients(run: Run) -> list[Tensor]:
    run.optimizer.zero_grad()
    accumulate(run, list(range(12)))
    return [p.grad.clone() for p in run.parameters if p.grad is not None]


@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_are_the_same_to_the_bit(recompute: bool, prepared: Prepare) -> None:
    run = prepared(gradient_checkpointing=recompute)
    expected = _gradients(run)
    run.loss_of.inputs_on_host = True

    with Copies() as copies:
        actual = _gradients(run)

    assert all(map(torch.equal, actual, expected))
    assert copies.shapes


def test_of_recomputed_layers_the_inputs_go_there(prepared: Prepare) -> None:
    run = prepared(gradient_checkpointing=True)
    tokens = sum(run.dataset.lengths)
    run.loss_of.inputs_on_host = True

    with Copies() as copies:
        _gradients(run)

    # Those of the layers, and what the last norm and the head keep; nothing of the layers' inside.
    assert LAYERS <= copies.shapes.count((1, tokens, WIDTH)) <= LAYERS + 3


def test_weights_stay_where_they_are() -> None:
    layer = nn.Linear(256, 256)
    x = torch.randn(3, 256, requires_grad=True)

    with Copies() as copies, saved_on_host(layer.parameters(), smallest_bytes=0):
        layer(layer(x)).sum()

    assert set(copies.shapes) == {(3, 256)}


@pytest.mark.gpu
def test_on_a_gpu_less_of_its_memory_is_taken_and_the_gradients_are_the_same(
    prepared: Prepare,
) -> None:
    run = prepared("cuda", gradient_checkpointing=False)
    expected = _gradients(run)
    peaks: list[int] = []

    for on_host in (False, True):
        run.loss_of.inputs_on_host = on_host
        torch.cuda.reset_peak_memory_stats()
        actual = _gradients(run)
        peaks.append(torch.cuda.max_memory_allocated())

    assert peaks[1] < peaks[0]
    assert all(map(torch.equal, actual, expected))
