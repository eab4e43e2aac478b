"""How a run is executed: what its last bits depend on beside its settings, and what memory has made of them.

A run decides once and then goes by its plan. A resume point holds it, and a run that goes on from there follows it
instead of deciding again; what cannot be followed is named, and from then on the two runs may differ in their last bits.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_core.data import Batching
from qlora_core.errors import ConfigError
from qlora_core.nn import NF4Linear
from qlora_core.nn.nf4_experts import NF4Stack
from qlora_core.nn.nf4_linear import product_dtype
from qlora_core.quant.nf4.compiled import is_compiled
from qlora_core.train.config import TrainConfig
from qlora_core.train.packing import Packing, attention_names
from qlora_core.typed_values import wrong_fields

# Of a plan that was read; an OpenMP that is asked for more threads than it can start ends the process.
_BOUNDS = {
    "threads": (1, 4096),
    "micro_batch_tokens": (1, 2**40),
    "pass_tokens": (0, 2**40),
    "alone_above": (0, 2**40),
    "loss_chunk_tokens": (1, 2**40),
    "notch": (0, 2**16),
}
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class ExecutionPlan:
    """How a run is executed.

    Attributes:
        device: the card's name, or "cpu".
        processor: what a CPU computes with; its libraries choose their code by it.
        threads: of torch on the CPU.
        deterministic: whether torch is held to algorithms that give the same bits each time.
        packing: how the examples of a forward pass are put together, a value of `Packing`.
        micro_batch_tokens: of a forward pass at most; less than asked for where memory has ended.
        pass_tokens: what one more forward pass counts, in tokens (`Batching`).
        alone_above: a longer example shares a forward pass with none (`Batching`).
        recompute: whether every layer is computed again on the way back.
        inputs_on_host: whether what is kept for that is kept in the host's memory.
        loss_chunk_tokens: over which the output head runs at a time; None where it runs over all.
        kernels: what makes quantized weights dense: "compiled", "tables" or "triton"; "none" where none is quantized.
        product_dtype: of matrix products with the base model.
        attention: transformers' names of the implementations.
        notch: how often the run was made more frugal because memory had ended.
        asked: the settings of the run's config that the plan began with, by name.
    """

    device: str
    processor: str
    threads: int
    deterministic: bool
    packing: str
    micro_batch_tokens: int
    pass_tokens: int
    alone_above: int | None
    recompute: bool
    inputs_on_host: bool
    loss_chunk_tokens: int | None
    kernels: str
    product_dtype: str
    attention: str
    notch: int
    asked: Mapping[str, bool | int]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExecutionPlan:
        """Make one from what `as_dict` gives.

        Raises:
            ConfigError: a field is missing or unknown, or its value cannot be.
        """
        known = {field.name for field in fields(cls)}
        wrong = sorted(known ^ set(values))
        if wrong:
            raise ConfigError(f"the plan is of another version of the engine: {', '.join(wrong)}")
        impossible = wrong_fields(cls, values) or [
            name
            for name, (least, most) in _BOUNDS.items()
            if values[name] is not None and not least <= values[name] <= most
        ]
        if impossible:
            raise ConfigError(f"its {', '.join(impossible)} cannot be")
        return cls(**values)


# Settings that are no part of a run's identity, with what of the plan they decide.
OF_SETTINGS = {
    "micro_batch_tokens": ("micro_batch_tokens",),
    "packing": ("packing", "attention"),
    "gradient_checkpointing": ("recompute",),
}
# What is as it is, with the words for it.
_GIVEN = {
    "device": "the device",
    "processor": "the processor",
    "packing": "how examples share a forward pass",
    "attention": "the attention",
    "kernels": "what makes weights dense",
    "product_dtype": "the dtype of matrix products",
}


def followed(then: ExecutionPlan, now: ExecutionPlan) -> tuple[ExecutionPlan, list[str]]:
    """Return the plan to go on with, and a sentence for each thing in which it is not ``then``.

    Args:
        then: the plan to follow.
        now: what the run would do of itself. Where its settings are others than ``then``'s, they win.
    """
    changed = [name for name in OF_SETTINGS if then.asked.get(name) != now.asked[name]]
    settled = {name for setting in changed for name in OF_SETTINGS[setting]}
    reasons = [
        f"{name} is {_word(now.asked[name])}, and was {_word(then.asked.get(name))}."
        for name in changed
    ]
    reasons += [
        f"{words.capitalize()} is {_word(getattr(now, name))}, and was {_word(getattr(then, name))}."
        for name, words in _GIVEN.items()
        if name not in settled and getattr(then, name) != getattr(now, name)
    ]
    if (then.loss_chunk_tokens is None) != (now.loss_chunk_tokens is None):
        reasons.append("The output head runs over all tokens at once in one of the two runs.")
        then = replace(then, loss_chunk_tokens=now.loss_chunk_tokens)
    plan = replace(
        then,
        asked=now.asked,
        inputs_on_host=then.inputs_on_host and now.device != "cpu",
        **{name: getattr(now, name) for name in {*settled, *_GIVEN}},
    )
    return plan, reasons


def plan_of(
    model: PreTrainedModel,
    config: TrainConfig,
    *,
    batching: Batching,
    packing: Packing,
    recompute: bool,
    loss_chunk_tokens: int | None,
) -> ExecutionPlan:
    """Return the plan of a run that begins, from what was decided for it."""
    return ExecutionPlan(
        device=device_name(model.device),
        processor=_processor(),
        threads=torch.get_num_threads(),
        deterministic=True,
        packing=packing.value,
        micro_batch_tokens=batching.max_tokens,
        pass_tokens=batching.pass_tokens,
        alone_above=batching.alone_above,
        recompute=recompute,
        inputs_on_host=False,
        loss_chunk_tokens=loss_chunk_tokens,
        kernels=_kernels(model),
        product_dtype=str(product_dtype(model.dtype, model.device)).removeprefix("torch."),
        attention=attention_names(model),
        notch=0,
        asked={setting: getattr(config, setting) for setting in OF_SETTINGS},
    )


def device_name(device: torch.device) -> str:
    """Return the card's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _kernels(model: PreTrainedModel) -> str:
    if not any(isinstance(module, NF4Linear | NF4Stack) for module in model.modules()):
        return "none"
    if model.device.type != "cpu":
        return "triton"
    return "compiled" if is_compiled(torch.float32) else "tables"


def _processor() -> str:
    """Name what a CPU computes with: its model, where the system tells it, and the instructions that torch uses."""
    found = [line for line in _cpu_info() if line.startswith("model name")]
    model = found[0].partition(":")[2].strip() if found else platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_info() -> list[str]:
    return _CPU_INFO.read_text(encoding="utf-8").splitlines() if _CPU_INFO.is_file() else []


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:,}" if isinstance(value, int) else str(value)
