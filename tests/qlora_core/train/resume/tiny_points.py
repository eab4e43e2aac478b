"""Resume points of a few tensors whose numbers are known from their step, for whoever breaks them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_core.optim.flat_adamw import FlatAdamW
from qlora_core.train.progress import Progress
from qlora_core.train.resume.files import discard_old_points
from qlora_core.train.resume.points import load_resume_point, save_resume_point

IDENTITY = {"config": {"seed": 0}}
# Odd sizes; some 250 KB with their moments.
_SHAPES = ((3, 5), (1, 257), (129, 161))


class WrongNumbers(Exception):
    """A point was taken whose numbers are not those of its step."""


class TinyRun:
    """Parameters and an optimizer, without a model."""

    def __init__(self) -> None:
        self.model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in _SHAPES])
        self.optimizer = FlatAdamW(list(self.model), bits=32, learning_rate=1e-3)

    def write(self, folder: Path, step: int) -> Path:
        """Write the point of a step as a run does."""
        fill(self.tensors(), step)
        torch.manual_seed(step)
        point = save_resume_point(
            folder, model=self.model, optimizer=self.optimizer, progress=Progress(step=step),
            best={}, identity=IDENTITY, plan={"threads": step},
        )  # fmt: skip
        discard_old_points(folder, step).result()
        return point

    def tensors(self) -> list[Tensor]:
        """Everything that a point brings back."""
        state = self.optimizer.state_dict()["state"]
        moments = [value for index in sorted(state) for value in state[index].values()]
        return [parameter.detach() for parameter in self.model] + moments


def fill(tensors: list[Tensor], step: int) -> None:
    """Give tensors the numbers of a step."""
    generator = torch.Generator().manual_seed(step)
    for tensor in tensors:
        tensor.copy_(torch.rand(tensor.shape, generator=generator))


def taken(folder: Path) -> tuple[int | None, list[str]]:
    """Resume in a new run; give the step that it goes on after, and the names of the points that were refused.

    Raises:
        WrongNumbers: they are not those that were written.
    """
    run, expected = TinyRun(), TinyRun()
    refused: list[str] = []
    found = load_resume_point(
        folder, model=run.model, optimizer=run.optimizer, identity=IDENTITY,
        on_refused=lambda point, _: refused.append(point.name),
    )  # fmt: skip
    if found is None:
        return None, refused
    step = found.progress.step
    random_state = torch.random.get_rng_state()
    torch.manual_seed(step)
    fill(expected.tensors(), step)
    whole = [
        found.point.name == f"step-{step}",
        found.plan == {"threads": step},
        torch.equal(random_state, torch.random.get_rng_state()),
        *map(torch.equal, run.tensors(), expected.tensors()),
    ]
    if not all(whole):
        raise WrongNumbers(f"{found.point.name}: {whole}")
    return step, refused
