"""The estimate of what a run writes is held to what a run has written."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from qlora_core.data import Dataset, load_dataset
from qlora_core.models import load_model
from qlora_core.nn import LoraConfig
from qlora_core.text import TextEncoder
from qlora_core.train import CheckpointSaved, Event, ResumePointSaved, TrainConfig, train
from tests.worker.conftest import chat_lines
from worker.child.room import Need, disk_need
from worker.reasons import NoRoom

CONFIG = TrainConfig(n_epochs=3, batch_size=4, context_length=64, lora=LoraConfig(r=8))


@pytest.fixture
def dataset(model_folder: Path, tmp_path: Path) -> Dataset:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(chat_lines(12)))
    return load_dataset(path, TextEncoder.from_folder(model_folder), context_length=64)


def run(
    model_folder: Path,
    dataset: Dataset,
    output_dir: Path,
    *,
    sink: Callable[[Event], None],
    before_writing: Callable[[], None],
) -> None:
    model = load_model(model_folder, device="cpu", compute_dtype=torch.float32)
    encoder = TextEncoder.from_folder(model_folder)
    train(
        model,
        encoder,
        dataset,
        CONFIG,
        sink,
        output_dir=output_dir,
        before_writing=before_writing,
    )


def size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # superfluous points go meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def test_a_run_never_has_more_on_the_disk_than_was_asked_for(
    model_folder: Path, dataset: Dataset, tmp_path: Path
) -> None:
    most, calls = 0, 0
    written: list[int] = []

    def count() -> None:
        nonlocal calls
        calls += 1

    def look(event: Event) -> None:
        nonlocal most
        most = max(most, size(tmp_path / "run"))
        if isinstance(event, CheckpointSaved | ResumePointSaved):
            written.append(size(Path(event.folder)))

    run(model_folder, dataset, tmp_path / "run", sink=look, before_writing=count)

    need = disk_need(model_folder, CONFIG, dataset.lengths)
    assert (len(written), calls) == (
        6,
        7,
    )  # a checkpoint and a point for each epoch, and the adapter
    assert max(written) <= need.next_bytes <= 2 * max(written)
    assert most <= need.all_bytes <= 3 * most


def test_no_room_for_the_next_point_ends_the_run_and_keeps_the_last_one(
    model_folder: Path, dataset: Dataset, tmp_path: Path
) -> None:
    calls = 0

    def refuse_the_fourth() -> (
        None
    ):  # of the second epoch the checkpoint is written, the point is not
        nonlocal calls
        calls += 1
        if calls == 4:
            raise NoRoom("The job needs more.")

    with pytest.raises(NoRoom, match=r"needs more\."):
        run(
            model_folder,
            dataset,
            tmp_path / "run",
            sink=lambda _: None,
            before_writing=refuse_the_fourth,
        )

    assert [path.name for path in (tmp_path / "run" / "resume").iterdir()] == ["step-3"]
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-3", "step-6"]


def test_a_run_that_ends_early_keeps_fewer_checkpoints(model_folder: Path) -> None:
    def asked(max_steps: int | None) -> int:
        config = TrainConfig(n_epochs=5, batch_size=4, max_steps=max_steps)
        return disk_need(model_folder, config, [30] * 10).all_bytes  # three steps an epoch

    adapter = (asked(None) - asked(3)) // 4

    assert asked(4) - asked(3) == adapter
    assert asked(15) == asked(16) == asked(None)


def test_of_a_model_that_no_estimate_knows_nothing_is_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')

    assert disk_need(tmp_path, TrainConfig(), [30]) == Need(0, 0)
