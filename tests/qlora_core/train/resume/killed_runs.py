"""Trains the same run twice: once unbroken, and once killed and resumed again and again until it is done.

``python -m tests.qlora_core.train.resume.killed_runs FOLDER`` reads ``cases.json`` there and leaves of each case, in a folder of its number,
the runs' own folders ``whole`` and ``broken`` with what both told in ``whole.jsonl`` and ``broken.jsonl``, and in ``kills.json`` what each
kill interrupted. Every run is a process of its own, forked from this one, which has only imported and read what they share.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_core import (
    Dataset,
    LoraConfig,
    TextEncoder,
    TrainConfig,
    load_dataset,
    load_model,
    train,
)
from qlora_core.train import Event, RunStarted, StepMetrics

# Kills after which a run may go on to its end.
_KILLS = 6
_FILE_CALLS = ("open", "os.mkdir", "os.rename", "shutil.rmtree")


class Inputs:
    """What all runs share."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        self.encoder = TextEncoder.from_folder(self.base)
        self.train, self.validation = (self._dataset(folder / name) for name in ("train.jsonl", "valid.jsonl"))  # fmt: skip

    def _dataset(self, path: Path) -> Dataset:
        return load_dataset(path, self.encoder, context_length=64)


def main() -> None:
    """Run all cases."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)  # a process with more cannot be forked
    inputs = Inputs(folder)
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        place = folder / str(number)
        place.mkdir()
        drawn = random.Random(case["seed"])
        status = forked(lambda place=place, case=case: go(inputs, case, place, "whole"))
        if status != 0:
            sys.exit(f"the unbroken run of {case} ended with {status}")
        kills: list[str] = []
        while (status := forked(lambda: attempt(inputs, case, place, drawn, len(kills)))) != 0:  # noqa: B023 - called at once
            if status != -signal.SIGKILL:
                sys.exit(f"a resumed run of {case} ended with {status}")
            drawn.random()  # a process that was killed has drawn from its own copy
            kills.append((place / "killed").read_text())
        (place / "kills.json").write_text(json.dumps(kills))


def forked(act: Callable[[], None]) -> int:
    """Act in a process of its own; give its exit code, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except BaseException:  # noqa: BLE001 - the edge of a process
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(
    inputs: Inputs, case: Mapping[str, Any], place: Path, drawn: random.Random, kills: int
) -> None:
    """Go on with the broken run, until something that is drawn is interrupted by a kill."""
    if any((place / "broken/resume").glob("step-*")):
        torch.set_num_threads(drawn.choice([1, 2]))  # the plan has one
    if kills < _KILLS:
        at_file = drawn.random() < 0.5
        left = drawn.randrange(1, 60) if at_file else drawn.randrange(1, 12)
        killer = Killer(place / "killed", left)
        if at_file:
            sys.addaudithook(lambda name, arguments: killer.file_call(place, name, arguments))
        else:
            go(inputs, case, place, "broken", told=killer.told)
            return
    go(inputs, case, place, "broken")


class Killer:
    """Kills this process at the n-th thing that it is told of, and leaves a note of what that was."""

    def __init__(self, note: Path, left: int) -> None:
        self._note, self._left, self._noting = note, left, False

    def told(self, event: Event) -> None:
        """Count an event."""
        self._count(event.kind)

    def file_call(self, place: Path, name: str, arguments: tuple[Any, ...]) -> None:
        """Count what is done to files of the run's folder."""
        if (
            name in _FILE_CALLS
            and not self._noting
            and str(arguments[0]).startswith(str(place / "broken/"))
        ):
            self._count(f"{name} {arguments[0]}")

    def _count(self, what: str) -> None:
        self._left -= 1
        if self._left == 0:
            self._noting = True
            self._note.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)


def go(
    inputs: Inputs,
    case: Mapping[str, Any],
    place: Path,
    name: str,
    told: Callable[[Event], None] = lambda _: None,
) -> None:
    """Train, from the last resume point if there is one, and write down what is told."""
    model = load_model(inputs.base, device="cpu", compute_dtype=torch.float32)
    memory = Memory(case["ends_in_step"])
    model.model.register_forward_pre_hook(memory.forward, with_kwargs=True)
    settings = dict(case["config"])
    config = TrainConfig(
        n_epochs=2, batch_size=4, learning_rate=1e-2, context_length=64, gradient_checkpointing=False,
        lora=LoraConfig(r=4, alpha=8, dropout=settings.pop("dropout")), **settings,
    )  # fmt: skip
    with (place / f"{name}.jsonl").open("a", encoding="utf-8") as file:

        def sink(event: Event) -> None:
            file.write(json.dumps(event.as_dict()) + "\n")
            file.flush()
            memory.told(event)
            told(event)

        resume = place / name / "resume"
        train(
            model, inputs.encoder, inputs.train, config, sink, output_dir=place / name,
            validation=inputs.validation, resume_from=resume if resume.is_dir() else None,
        )  # fmt: skip


class Memory:
    """Suffices until a step, and from then on only for passes of few tokens that recompute every layer."""

    def __init__(self, ends_in_step: int | None) -> None:
        self._ends_in_step = ends_in_step
        self._next_step: int | None = None

    def told(self, event: Event) -> None:
        """Note which step comes next."""
        match event:
            case RunStarted():
                self._next_step = event.start_step + 1
            case StepMetrics():
                self._next_step = event.step + 1
            case _:
                pass

    def forward(self, module: Any, arguments: Any, named: dict[str, Any]) -> None:  # noqa: ARG002 - torch's signature
        """Refuse what does not fit.

        Raises:
            torch.OutOfMemoryError: the pass has too many tokens.
        """
        ids = named.get("input_ids")
        if self._ends_in_step is None or self._next_step is None or ids is None:
            return
        if self._next_step >= self._ends_in_step and torch.is_grad_enabled() and ids.numel() > 80:
            raise torch.OutOfMemoryError("the test's memory")


if __name__ == "__main__":
    main()
