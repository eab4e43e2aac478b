"""Checks and times the optimizers: a step beside bitsandbytes' and torch's, and what it launches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench.gpu import optimizer_checks, rivals
from bench.gpu.groups import Group, Rows
from bench.gpu.measuring import Action, time_all
from bench.optimizer import CLIP_BYTES, FLOOR_BYTES
from bench.optimizer_process import ADAPTERS, CONTENDERS, state_bytes

# Of an element in bfloat16, which a training step's kernel writes beside the one in float32.
_COPY_BYTES = 2.0
# What a step with moments in 8 bits may take for 42 million elements on an H200.
_ASKED_MS = {"our kernel, 8 bits and copies": 0.3, "ours adamw_8bit": 0.3}


def groups(device: str) -> list[Group]:
    """Give the groups of this part."""
    return [
        *optimizer_checks.groups(device),
        Group("optimizer speed", partial(_speed, device)),
        Group("optimizer launches", partial(_launches, device)),
    ]


def _adapter(device: str) -> Sequence[tuple[int, int]]:
    return ADAPTERS["Llama-3.1-8B, r=16" if device == "cuda" else "a single layer, for tests"]


def _contenders(device: str) -> list[str]:
    known = [name for name in CONTENDERS if not name.startswith("bitsandbytes")]
    return known if rivals.why_absent(device) else list(CONTENDERS)


def _built(contender: str, device: str) -> torch.optim.Optimizer:
    """Give a contender that has taken two steps, over gradients that stay there."""
    params = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in _adapter(device)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        optimizer = CONTENDERS[contender](params)
        for param in params:
            if param.grad is None:
                param.grad = torch.empty_like(param)
            param.grad.normal_()
        for _ in range(2):
            optimizer.step()
    return optimizer


def _speed(device: str) -> Rows:
    """Whole steps as a loop calls them, ours with clipping within; and our kernels alone."""
    elements = sum(rows * columns for rows, columns in _adapter(device))
    actions: dict[str, Action] = {}
    described: dict[str, dict[str, Any]] = {}
    for contender in _contenders(device):
        optimizer = _built(contender, device)
        bits = 8 if "8bit" in contender else 32
        (group,) = optimizer.param_groups
        clips = "max_grad_norm" in group
        if clips:
            group["max_grad_norm"] = 1.0
        actions[contender] = optimizer.step
        described[contender] = {
            "elements": elements,
            "state_bytes": state_bytes(optimizer),
            "floor_bytes": elements * (FLOOR_BYTES[bits] + (CLIP_BYTES if clips else 0)),
        }
    for bits, copies in ((32, False), (32, True), (8, False), (8, True)):
        name = f"our kernel, {bits} bits{' and copies' if copies else ''}"
        actions[name] = optimizer_checks.kernel_alone(elements, bits, device, copies=copies)
        floor_bytes = elements * (FLOOR_BYTES[bits] + (_COPY_BYTES if copies else 0))
        described[name] = {"elements": elements, "floor_bytes": floor_bytes}
    source = torch.empty(elements * 8, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timings = time_all(actions | {"copy": partial(target.copy_, source)}, device)
    copy_bytes_per_ms = 2 * source.numel() / timings["copy"].ms
    rows: Rows = [{"what": "copy", "bytes": 2 * source.numel(), "ms": timings["copy"].ms}]
    for contender, about in described.items():
        timing = timings[contender]
        rows.append(
            {"what": contender, **about, "ms": timing.ms, "low_ms": timing.low_ms, "high_ms": timing.high_ms}
            | {"share_of_copy": about["floor_bytes"] / timing.ms / copy_bytes_per_ms}
            | ({"asked_ms": _ASKED_MS[contender]} if contender in _ASKED_MS else {})
        )  # fmt: skip
    return rows


def _launches(device: str) -> Rows:
    """What one step launches, by the profiler, and whether it waits for the GPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    rows: Rows = []
    for contender in _contenders(device):
        optimizer = _built(contender, device)
        with profile(activities=activities) as found:
            optimizer.step()
            _finish(device)
        events = found.events() or []
        names = [event.name for event in events if event.device_type.name == "CUDA"]
        of_adamw = sum("adamw_" in name for name in names)
        row: dict[str, Any] = {
            "what": contender,
            "on_gpu": len(names),
            "of_adamw": of_adamw,
            "waits": device == "cuda" and _waits(optimizer),
        }
        if device == "cuda" and contender in ("ours adamw", "ours adamw_8bit"):
            row |= {"wrong_launches": int(of_adamw != 1), "wrong_waits": int(row["waits"])}
        rows.append(row)
    return rows


def _waits(optimizer: torch.optim.Optimizer) -> bool:
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
