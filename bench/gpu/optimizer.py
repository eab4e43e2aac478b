"""Checks and times the optimizers: a step beside bitsandbytes' and torch's, its launches, and paging within a training step."""

from __future__ import annotations

import statistics
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench.gpu import optimizer_checks, rivals
from bench.gpu.groups import Group, Rows
from bench.gpu.measuring import Action, time_all
from bench.loading import make_model
from bench.optimizer import CLIP_BYTES, FLOOR_BYTES
from bench.optimizer_process import ADAPTERS, CONTENDERS, state_bytes
from operations.demo.docstrings import write_demo_files
from qlora_core import LoraConfig, TextEncoder, TrainConfig, load_dataset, load_model
from qlora_core.optim import OPTIMIZERS
from qlora_core.train import StepMetrics, train

_TINY_LLAMA = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
_WARM_UPS = 3
# What a step with moments in 8 bits may take for 42 million elements on an H200.
_ASKED_MS = {"our kernel, 8 bits": 0.3, "ours adamw_8bit": 0.3}


def groups(device: str) -> list[Group]:
    """Give the groups of both parts, the optimizer itself and training with it paged or not."""
    return [
        *optimizer_checks.groups(device),
        Group("optimizer speed", partial(_speed, device)),
        Group("optimizer launches", partial(_launches, device)),
        Group("paging in a training step", partial(_training, device)),
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
    for bits in (32, 8):
        name = f"our kernel, {bits} bits"
        actions[name] = optimizer_checks.kernel_alone(elements, bits, device)
        described[name] = {"elements": elements, "floor_bytes": elements * FLOOR_BYTES[bits]}
    source = torch.empty(elements * 8, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timings = time_all(actions | {"copy": partial(target.copy_, source)}, device)
    copy_bytes_per_ms = 2 * source.numel() / timings["copy"].ms
    rows: Rows = [{"what": "copy", "bytes": 2 * source.numel(), "ms": timings["copy"].ms}]
    for contender, about in described.items():
        timing = timings[contender]
        floor_ms = about["floor_bytes"] / copy_bytes_per_ms
        rows.append(
            {"what": contender, **about, "ms": timing.ms, "low_ms": timing.low_ms, "high_ms": timing.high_ms}
            | {"times_the_floor": timing.ms / floor_ms}
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


def _training(device: str) -> Rows:
    """Steps of the engine with each optimizer, forth and back, over an adapter of 40 million elements."""
    times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    memory: dict[str, Mapping[str, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = _TINY_LLAMA
        if device == "cuda":
            folder = Path(scratch) / "model"
            make_model(folder, "llama", 8, 2048)
        for name in [*OPTIMIZERS, *reversed(OPTIMIZERS)]:
            steps = _train(folder, name, Path(scratch), device)
            times[name] += [step.step_time_s for step in steps[_WARM_UPS:]]
            memory[name] = steps[-1].memory
    rows: Rows = []
    for name, taken in times.items():
        row: dict[str, Any] = {"optimizer": name, "step_s": statistics.median(taken)}
        unpaged = name.removeprefix("paged_")
        if name != unpaged:
            row["times_unpaged"] = row["step_s"] / statistics.median(times[unpaged])
        rows.append(row | {"low_s": min(taken), "high_s": max(taken), **memory[name]})
    return rows


def _train(folder: Path, optimizer: str, scratch: Path, device: str) -> list[StepMetrics]:
    encoder = TextEncoder.from_folder(_TINY_LLAMA)
    n_steps, batch_size, rank = (15, 8, 128) if device == "cuda" else (2 + _WARM_UPS, 1, 8)
    files = write_demo_files(scratch, max_train=n_steps * batch_size, max_validation=2)
    data = load_dataset(files.train, encoder, context_length=1024)
    model = load_model(
        folder,
        device=device,
        compute_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
    )
    config = TrainConfig(
        n_epochs=1, batch_size=batch_size, context_length=1024, micro_batch_tokens=2048, optimizer=optimizer,
        lora=LoraConfig(r=rank),
    )  # fmt: skip
    events: list[Any] = []
    # A folder of its own: in that of another run it would go on from there.
    output_dir = tempfile.mkdtemp(dir=scratch)
    train(model, encoder, data, config, events.append, output_dir=output_dir)
    return [event for event in events if isinstance(event, StepMetrics)]
