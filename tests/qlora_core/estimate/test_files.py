"""The sizes of what a run writes, against the files of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

from qlora_core import TrainConfig, estimate, save_adapter
from qlora_core.estimate import Estimate
from qlora_core.optim import OPTIMIZERS
from qlora_core.train.progress import Progress
from qlora_core.train.resume.points import save_resume_point
from qlora_core.train.run import Run
from qlora_core.train.step import take_step
from qlora_core.train.weights import copied_weights
from tests.qlora_core.estimate.families import config_of
from tests.qlora_core.estimate.measured_step import prepared_run


def options_of(settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig.from_dict({"batch_size": 2, "context_length": 20, **settings})


def estimate_of(settings: dict[str, Any]) -> Estimate:
    return estimate(_config().to_dict(), options_of(settings), device="cpu")


def run_of(settings: dict[str, Any], folder: Path) -> Run:
    """Give a run after its first step."""
    run = prepared_run(_config(), options_of(settings), [20, 20], folder)
    take_step(run, Progress())
    return run


def _config() -> PreTrainedConfig:
    return config_of("llama", tie_word_embeddings=True)


@pytest.mark.parametrize(
    "lora", [{"r": 16}, {"r": 4, "modules_to_save": ["embed_tokens"]}], ids=["lora", "whole"]
)
def test_the_adapters_file_is_as_large_as_estimated(lora: dict[str, Any], tmp_path: Path) -> None:
    run = run_of({"lora": lora}, tmp_path)

    save_adapter(run.model, tmp_path / "adapter")

    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert estimate_of({"lora": lora}).adapter_file_bytes == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("keeps_best", [True, False], ids=["best kept", "last alone"])
def test_a_resume_point_is_as_large_as_estimated(
    keeps_best: bool, optimizer: str, tmp_path: Path
) -> None:
    settings = {"lora": {"r": 16}, "optimizer": optimizer}
    run = run_of(settings, tmp_path)

    folder = save_resume_point(
        tmp_path / "resume",
        model=run.model,
        optimizer=run.optimizer,
        progress=Progress(),
        best=copied_weights(run.model) if keeps_best else {},
        identity=run.identity,
    )

    size = sum(path.stat().st_size for path in folder.iterdir())
    estimated = estimate_of({**settings, "early_stopping_patience": 3 * keeps_best})
    assert estimated.resume_point_bytes == pytest.approx(size, rel=0.02)
