"""Measured memory of a run by kind, and one error for running out of it."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_core.errors import OutOfMemoryError
from qlora_core.nn import NF4Linear
from qlora_core.nn.nf4_experts import NF4Stack
from qlora_core.nn.nf4_linear import product_dtype
from qlora_core.optim.flat_adamw import FlatAdamW
from qlora_core.out_of_memory import OUT_OF_MEMORY, is_out_of_memory

_PAGE_BYTES = resource.getpagesize()
_STATM = Path("/proc/self/statm")


class MemoryMeter:
    """Tells where a training step's memory went.

    Kinds, in bytes: ``base_bytes`` everything frozen, ``adapter_bytes`` everything trained
    and its copy in 16 bits where products take one,
    ``optimizer_bytes`` its moments, ``optimizer_resident_bytes`` those that were on the device during
    the forward pass, ``gradients_bytes``, and ``workspace_bytes`` the largest quantized weight while it
    is dense. Beside them on a GPU: ``activations_bytes``, what is left of the step's
    peak, ``allocated_bytes`` and ``reserved_bytes`` now, and ``peak_bytes`` allocated at most since the
    run began. On a CPU, whose allocator counts nothing: ``rss_bytes`` of the process now and
    ``peak_rss_bytes`` since it started.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        optimizer: FlatAdamW,
        device: torch.device,
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._device = device
        self._base_bytes = base_bytes(model)
        self._adapter_bytes = _distinct_bytes(parameters) + optimizer.copy_bytes
        self._workspace_bytes = workspace_bytes(model, device)
        self._peak_bytes = 0
        self.begin_step()

    def begin_step(self) -> None:
        """Begin to look for a new peak; call it before the forward pass."""
        self._paged_in_bytes = self._optimizer.resident_bytes
        if self._device.type == "cuda":
            self._peak_bytes = max(self._peak_bytes, torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)

    def measure(self) -> dict[str, int]:
        """Return the kinds; call it while the step's gradients are there."""
        moments = (value for state in self._optimizer.state.values() for value in state.values())
        gradients = (p.grad for p in self._parameters if p.grad is not None)
        optimizer_bytes = _distinct_bytes(v for v in moments if isinstance(v, Tensor))
        on_device = {
            "base_bytes": self._base_bytes,
            "adapter_bytes": self._adapter_bytes,
            "optimizer_resident_bytes": self._paged_in_bytes
            if self._optimizer.paged
            else optimizer_bytes,
            "gradients_bytes": _distinct_bytes(gradients),
            "workspace_bytes": self._workspace_bytes,
        }
        kinds = {**on_device, "optimizer_bytes": optimizer_bytes}
        if self._device.type == "cuda":
            step_peak_bytes = torch.cuda.max_memory_allocated(self._device)
            self._peak_bytes = max(self._peak_bytes, step_peak_bytes)
            kinds["activations_bytes"] = max(0, step_peak_bytes - sum(on_device.values()))
            return {**kinds, **measured_memory(self._device), "peak_bytes": self._peak_bytes}
        return {**kinds, **measured_memory(self._device)}


def measured_memory(device: torch.device) -> dict[str, int]:
    """Return what the allocator of a GPU counts, or of a CPU what the system says of the process."""
    if device.type == "cuda":
        return {
            "allocated_bytes": torch.cuda.memory_allocated(device),
            "reserved_bytes": torch.cuda.memory_reserved(device),
            "peak_bytes": torch.cuda.max_memory_allocated(device),
        }
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rss_bytes = peak_rss_bytes
    if _STATM.is_file():
        rss_bytes = int(_STATM.read_text().split()[1]) * _PAGE_BYTES
    return {"rss_bytes": rss_bytes, "peak_rss_bytes": max(peak_rss_bytes, rss_bytes)}


def base_bytes(model: nn.Module) -> int:
    """Return the bytes of everything frozen: parameters and buffers, shared ones once."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return _distinct_bytes([*frozen, *model.buffers()])


def workspace_bytes(model: nn.Module, device: torch.device) -> int:
    """Return the bytes of the largest quantized weight while a product needs it dense."""
    return max(
        (
            module.in_features * module.out_features
            * product_dtype(module.compute_dtype, device).itemsize
            for module in model.modules()
            if isinstance(module, NF4Linear | NF4Stack)
        ),
        default=0,
    )  # fmt: skip


def _distinct_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@contextmanager
def out_of_memory_named(device: torch.device) -> Iterator[None]:
    """Turn the several ways a device runs out of memory into our one error, where nothing more frugal can be tried."""
    try:
        yield
    except OUT_OF_MEMORY as error:
        if not is_out_of_memory(error):
            raise
        used = ", ".join(f"{name} {value:,}" for name, value in measured_memory(device).items())
        raise OutOfMemoryError(
            f"The {device.type} ran out of memory ({used}). Lower micro_batch_tokens or "
            "context_length, or turn gradient_checkpointing on."
        ) from error
