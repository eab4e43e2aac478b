"""Pre-training in plain PyTorch and transformers: none of Nibble's own engine is used here.

A checkpoint holds weights and optimizer moments as safetensors beside a JSON file with the
counters. Batches and learning rate follow from the counters alone, so a resumed run needs no more.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import Progress, TextColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

_BATCH_TOKENS = 4096
_SHORT, _LONG = 256, 1024  # tokens per sequence
_LONG_FROM = 0.88  # progress at which sequences become long, so that late positions are trained
_PEAK_LR, _LAST_LR = 2e-3, 2e-5
_WARMUP_STEPS = 100
_WEIGHT_DECAY = 0.1
_CLIP_NORM = 1.0
_CHECKPOINT_EVERY_S = 120.0


@dataclass
class Counters:
    """Where a run stands; everything that its next step depends on beside the weights."""

    step: int = 0
    long_steps: int = 0
    elapsed_s: float = 0.0
    """Training time alone: validation and checkpoints do not count."""
    loss: float = math.nan
    """Exponential mean of the training loss, nats per token."""


@dataclass(frozen=True)
class Budget:
    """When to stop: after so many minutes, or (exactly repeatable) after so many steps."""

    minutes: float
    steps: int | None = None

    def progress(self, counters: Counters) -> float:
        """Return the share of the budget that is used up, 0 to 1 and above."""
        if self.steps is not None:
            return counters.step / self.steps
        return counters.elapsed_s / (60 * self.minutes)


def pretrain(
    model: LlamaForCausalLM,
    stream: Tensor,
    *,
    budget: Budget,
    seed: int,
    folder: Path,
    resume: bool,
    validate: Callable[[], float],
) -> Counters:
    """Train ``model`` in place on ``stream`` (int16 [tokens]) until the budget is used up."""
    optimizer = _optimizer(model)
    counters = _load(folder, model, optimizer) if resume else Counters()
    saved_at = time.monotonic()
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[said]}")) as bar:
        task = bar.add_task("pre-training", total=1.0, said="")
        while (progress := budget.progress(counters)) < 1:
            began = time.monotonic()
            loss = _step(model, optimizer, stream, counters, progress=progress, seed=seed)
            counters.step += 1
            counters.long_steps += _length(progress) == _LONG
            counters.loss = loss if counters.step == 1 else 0.98 * counters.loss + 0.02 * loss
            counters.elapsed_s += time.monotonic() - began
            rate = tokens_seen(counters) / counters.elapsed_s
            said = f"step {counters.step} loss {counters.loss:.3f} {rate:.0f} tokens/s"
            bar.update(task, completed=budget.progress(counters), said=said)
            if time.monotonic() - saved_at > _CHECKPOINT_EVERY_S:
                _save(folder, model, optimizer, counters)
                bar.print(f"{said}, held-out loss {validate():.4f}, checkpoint kept")
                saved_at = time.monotonic()
        _save(folder, model, optimizer, counters)
    return counters


def batch(stream: Tensor, index: int, *, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return batch ``index`` as inputs and targets, int64 [sequences, length].

    Each pass over the stream cuts it at another offset and takes the pieces in another order.
    """
    size = _BATCH_TOKENS // length
    per_pass = (len(stream) - 1 - length) // length // size  # batches in a pass
    number, within = divmod(index, per_pass)
    order = torch.Generator().manual_seed(1_000_003 * seed + 2 * number + (length == _LONG))
    offset = int(torch.randint(length, (), generator=order))
    pieces = torch.randperm(per_pass * size, generator=order)[within * size : (within + 1) * size]
    starts = offset + pieces[:, None] * length
    inputs = stream[starts + torch.arange(length)].long()
    targets = stream[starts + torch.arange(1, length + 1)].long()
    return inputs, targets


def learning_rate(progress: float, step: int) -> float:
    """Return the rate: linear warm-up over the first steps, then a cosine over the budget."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / _WARMUP_STEPS) * (_LAST_LR + (_PEAK_LR - _LAST_LR) * cosine)


def tokens_seen(counters: Counters) -> int:
    """Return how many tokens the run was trained on, repeats counted."""
    return counters.step * _BATCH_TOKENS


def heldout_loss(model: LlamaForCausalLM, stream: Tensor, *, length: int = _SHORT) -> float:
    """Return the mean loss over ``stream`` in nats per token, in windows of ``length`` tokens."""
    windows = (len(stream) - 1) // length
    inputs = stream[: windows * length].long().view(windows, length)
    targets = stream[1 : windows * length + 1].long().view(windows, length)
    total = 0.0
    with torch.inference_mode():
        for some, wanted in zip(inputs.split(16), targets.split(16), strict=True):
            logits = model(input_ids=some, use_cache=False).logits
            total += float(
                functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
            )
    return total / targets.numel()


def unigram_loss(stream: Tensor, held_out: Tensor, *, vocabulary: int) -> float:
    """Return the held-out loss of a model that knows only how often each token occurs.

    Counts come from the training stream, one added to each, so that no token is impossible.
    """
    counts = torch.bincount(stream.long(), minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[held_out[1:].long()].mean())


def _length(progress: float) -> int:
    return _LONG if progress >= _LONG_FROM else _SHORT


def _step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    stream: Tensor,
    counters: Counters,
    *,
    progress: float,
    seed: int,
) -> float:
    length = _length(progress)
    index = counters.long_steps if length == _LONG else counters.step - counters.long_steps
    inputs, targets = batch(stream, index, length=length, seed=seed)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(progress, counters.step)
    logits = model(input_ids=inputs, use_cache=False).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    gains = [weight for weight in model.parameters() if weight.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": gains, "weight_decay": 0.0}],
        lr=_PEAK_LR,
        betas=(0.9, 0.95),
        weight_decay=_WEIGHT_DECAY,
        fused=True,
    )


def _save(
    folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, counters: Counters
) -> None:
    tensors = {}
    for name, weight in model.named_parameters():
        state = optimizer.state[weight]
        tensors |= {
            f"weight.{name}": weight.detach(),
            f"mean.{name}": state["exp_avg"],
            f"square.{name}": state["exp_avg_sq"],
        }
    # The counters travel inside the file, so a checkpoint is there as a whole or not at all.
    save_file(tensors, folder / "new.safetensors", {"counters": json.dumps(asdict(counters))})
    (folder / "new.safetensors").replace(folder / "checkpoint.safetensors")


def _load(folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Counters:
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        raise SystemExit(f"nothing to resume: no {path.name} in {folder}; leave --resume out")
    with safe_open(path, framework="pt") as file:
        counters = Counters(**json.loads(file.metadata()["counters"]))
    tensors = load_file(path)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[f"weight.{name}"])
            optimizer.state[weight] = {
                "step": torch.tensor(float(counters.step)),
                "exp_avg": tensors[f"mean.{name}"],
                "exp_avg_sq": tensors[f"square.{name}"],
            }
    return counters
