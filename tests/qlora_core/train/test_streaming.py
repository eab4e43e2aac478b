"""A run over tokens on disk, read by several processes, is the run over tokens in memory, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_core import TextEncoder, load_dataset, train
from qlora_core.text import check
from qlora_core.train import Event, StepMetrics


@pytest.mark.parametrize("processes", [1, 3])
def test_streamed_is_in_memory(
    processes: int, load: Any, encoder: TextEncoder, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(check, "_PART_BYTES", 300)
    path = tmp_path / "train.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"Question {i}?"},
                      {"role": "assistant", "content": "yes " * (i * 5 % 11 + 1)}]}
        for i in range(21)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    runs: list[tuple[list[float | None], dict[str, torch.Tensor]]] = []

    for count, in_memory_bytes in ((1, 1 << 20), (processes, 32)):
        dataset = load_dataset(
            path, encoder, context_length=64, processes=count, in_memory_bytes=in_memory_bytes
        )
        events: list[Event] = []
        result = train(
            load(), encoder, dataset, config(n_epochs=1), events.append, output_dir=tmp_path / "run"
        )
        losses = [event.train_loss for event in events if isinstance(event, StepMetrics)]
        assert result.adapter is not None
        runs.append((losses, load_file(result.adapter / "adapter_model.safetensors")))

    (losses, adapter), (streamed_losses, streamed_adapter) = runs
    assert streamed_losses == losses
    assert all(torch.equal(streamed_adapter[name], value) for name, value in adapter.items())
