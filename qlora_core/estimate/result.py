"""What an estimate says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qlora_core.estimate.memory import MemoryEstimate
from qlora_core.estimate.parameters import ParameterCounts
from qlora_core.estimate.step_time import StepTime


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a run, calculated from its settings; nothing of it is measured.

    Attributes:
        tokens_per_step: that an optimizer step trains on, padding not counted.
        largest_pass_tokens: of the forward pass with the most, padding counted; memory is for this one.
        passes_per_step: forward passes of a step.
        parameters: by how they are stored.
        memory: bytes of tensors at the peak of a step, by kind.
        step_time: seconds of a step.
        adapter_file_bytes: of the adapter's weights on disk.
        resume_point_bytes: of one resume point on disk.
        assumed: in sentences, what is taken for granted.
    """

    tokens_per_step: int
    largest_pass_tokens: int
    passes_per_step: int
    parameters: ParameterCounts
    memory: MemoryEstimate
    step_time: StepTime
    adapter_file_bytes: int
    resume_point_bytes: int
    assumed: tuple[str, ...]

    def fits(self, nbytes: int) -> bool:
        """Whether the peak fits memory of so many bytes that is there for tensors.

        A CUDA context and what the allocator cannot use take some of a card beside it: give what is left.
        """
        return self.memory.total_bytes <= nbytes

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return {
            **asdict(self),
            "parameters": self.parameters.as_dict(),
            "memory": self.memory.as_dict(),
            "assumed": list(self.assumed),
        }
