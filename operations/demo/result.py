"""What the demo shows at its end, for people and as a document."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openai.types.fine_tuning import FineTuningJob

from nibble import output
from nibble.unpack import Unpacked
from operations.demo.outcome import Outcome

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Result:
    """A finished walk: the job's figures, the job, and its adapter on this machine."""

    outcome: Outcome
    job: FineTuningJob
    folder: Path
    adapter: list[Unpacked]
    url: str

    @property
    def weights(self) -> Unpacked:
        """The adapter's weights."""
        return next(file for file in self.adapter if file.name == _WEIGHTS)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values; a loss that no event told is null."""
        return {
            "job": self.job.to_dict(mode="json"),
            **asdict(self.outcome),
            "adapter": {
                "folder": str(self.folder),
                "weights": self.weights.name,
                "bytes": self.weights.bytes,
                "sha256": self.weights.sha256,
            },
            "documentation": f"{self.url}/docs",
        }

    def as_text(self) -> str:
        """A table of losses, the answers before and after, and where the adapter is."""
        outcome, job = self.outcome, self.job
        train = f"training (mean of {outcome.averaged_steps} steps)"
        lines = [
            "",
            f"{job.fine_tuned_model}: {outcome.steps} steps, {job.trained_tokens or 0:,} tokens",
            f"  {'loss':<32}{'start':>8}{'end':>9}",
            _losses(train, outcome.first_train_loss, outcome.last_train_loss),
            _losses(
                "validation (held-out modules)", outcome.first_valid_loss, outcome.last_valid_loss
            ),
        ]
        for answer in outcome.answers:
            lines += [
                "",
                f"  question  {output.plain(answer.question)}",
                f"  base      {_one_line(answer.base)}",
                f"  adapter   {_one_line(answer.adapter)}",
            ]
        lines += [
            "",
            f"  adapter   {self.folder}",
            f"  weights   {self.weights.name}, {self.weights.bytes:,} bytes",
            f"  sha256    {self.weights.sha256}",
            f"  Swagger   {self.url}/docs (while the demo ran; `make serve` starts the service to stay)",
        ]
        return "\n".join(lines)


def _losses(name: str, first: float | None, last: float | None) -> str:
    return f"  {name:<32}{_loss(first):>8}{_loss(last):>9}"


def _loss(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _one_line(text: str) -> str:
    return " ".join(output.plain(text).split())
