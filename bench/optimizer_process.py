"""One fresh process of `bench.optimizer`: times one optimizer over one set of tensors, and prints what it found as JSON.

All contenders get the same tensors and the same gradients, and tell how far they moved the tensors, so that the caller
can see that they did the same work.
"""

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_core.optim import OPTIMIZERS, build_optimizer

SECONDS = 0.6  # for each thing timed, if it does not take longer to do it three times
MAX_GRAD_NORM = 1.0
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
RATE = 1e-4


def main(contender: str, size: str, threads: int) -> None:
    """Time the contender's step, and print it."""
    torch.set_num_threads(threads)
    if torch.get_num_threads() != threads:
        raise SystemExit(f"torch uses {torch.get_num_threads()} threads instead of {threads}")
    params = tensors(ADAPTERS[size])
    with warnings.catch_warnings():
        # That it does not page on a CPU is said where the table is.
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        optimizer = CONTENDERS[contender](params)
        load = os.getloadavg()[0]
        print(json.dumps(measure(optimizer, params) | {"load": load}))


def tensors(shapes: Sequence[tuple[int, int]]) -> list[nn.Parameter]:
    """Give tensors of these shapes, the same ones in every process."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02)) for shape in shapes]


def lora_shapes(
    rank: int, layers: int, hidden: int, key_values: int, feed_forward: int
) -> list[tuple[int, int]]:
    """Give the shapes of all A and B of a LoRA over a model like Llama."""
    into_and_out_of = [
        (hidden, hidden), (hidden, key_values), (hidden, key_values), (hidden, hidden),
        (hidden, feed_forward), (hidden, feed_forward), (feed_forward, hidden),
    ]  # fmt: skip
    return [
        shape
        for _ in range(layers)
        for columns, rows in into_and_out_of
        for shape in ((rank, columns), (rows, rank))
    ]


ADAPTERS = {
    "Llama-3.1-8B, r=16": lora_shapes(16, 32, 4096, 1024, 14336),
    "SmolLM2-135M, r=8": lora_shapes(8, 30, 576, 192, 1536),
    "a single layer, for tests": lora_shapes(2, 1, 96, 32, 200),
}


def measure(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> dict[str, Any]:
    """Take steps for how far they go, and then for their time, without clipping and with it."""
    before = [param.detach().clone() for param in params]
    gradients = torch.Generator().manual_seed(1)
    for param in params:
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.normal_(generator=gradients)
    for _ in range(3):
        optimizer.step()
    moved = sum(
        float((param.detach().double() - old).square().sum())
        for param, old in zip(params, before, strict=True)
    )
    del before

    def clip_and_step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        optimizer.step()

    found: dict[str, Any] = {
        "elements": sum(param.numel() for param in params),
        "tensors": len(params),
        "moved": moved**0.5,
        "state_bytes": state_bytes(optimizer),
        "step_ms": timed(optimizer.step),
    }
    (group,) = optimizer.param_groups
    folds = "max_grad_norm" in group  # ours clips within its step
    if folds:
        group["max_grad_norm"] = MAX_GRAD_NORM
    found["clip_and_step_ms"] = timed(optimizer.step if folds else clip_and_step)
    source = torch.ones(found["elements"])
    target = torch.zeros_like(source)
    found["copy_ms"] = timed(lambda: target.copy_(source))
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Give the bytes of the memory behind the state's tensors, each piece of memory once."""
    pieces = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    }
    return sum(pieces.values())


def timed(action: Callable[[], Any]) -> float:
    """Give the median of its times in milliseconds."""
    milliseconds: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(milliseconds) < 3 or (time.perf_counter() < end and len(milliseconds) < 50):
        began = time.perf_counter()
        action()
        milliseconds.append(1e3 * (time.perf_counter() - began))
    return statistics.median(milliseconds)


def _of_torch(params: list[nn.Parameter], *, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=RATE, fused=fused, foreach=not fused, **SETTINGS)


def _of_bitsandbytes(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes import optim

    return getattr(optim, name)(params, lr=RATE, **SETTINGS)


def _ours(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return build_optimizer(name, params, learning_rate=RATE, **SETTINGS)


CONTENDERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    **{f"ours {name}": lambda params, name=name: _ours(name, params) for name in OPTIMIZERS},
    "torch AdamW, fused": lambda params: _of_torch(params, fused=True),
    "torch AdamW, foreach": lambda params: _of_torch(params, fused=False),
    **{
        f"bitsandbytes {name}": lambda params, name=name: _of_bitsandbytes(name, params)
        for name in ("AdamW", "AdamW8bit", "PagedAdamW8bit")
    },
}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
