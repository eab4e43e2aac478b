"""Loading is the check with the examples kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_core.data import load_dataset
from qlora_core.errors import DatasetError
from qlora_core.text import DatasetReport, TextEncoder, check, check_dataset
from tests.tiny_models import save_tiny_tokenizer


def _chat(question: str, answer: str, **more: object) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **more},
        ]
    }


def _write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_what_validates_is_what_trains(tmp_path: Path) -> None:
    encoder = TextEncoder.from_folder(save_tiny_tokenizer(tmp_path / "model"))
    lines = [
        _chat("short", "answer"),
        _chat("silent", "answer", weight=0),
        _chat("q", "a very long answer " * 9),
    ]
    path = _write(tmp_path / "train.jsonl", *lines)

    dataset = load_dataset(path, encoder, context_length=40)

    assert dataset.report == check_dataset(path, encoder, context_length=40, min_examples=1)
    assert (len(dataset), dataset.report.n_dropped, dataset.report.n_truncated) == (2, 1, 1)
    for index, line in enumerate([lines[0], lines[2]]):
        expected = encoder.encode(line, context_length=40)
        ids, trained = dataset.example(index)
        assert ids.tolist() == expected.input_ids
        assert trained.tolist() == expected.trained
        assert dataset.lengths[index] == len(expected.input_ids)
        assert dataset.trained_counts[index] == expected.n_trained_tokens


@pytest.mark.parametrize(
    "options", [{"in_memory_bytes": 64}, {"processes": 2}, {"in_memory_bytes": 64, "processes": 3}]
)
def test_streamed_is_in_memory(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_PART_BYTES", 700)
    encoder = TextEncoder.from_folder(save_tiny_tokenizer(tmp_path / "model"))
    lines = [_chat("q" * (i % 9), "answer " * (i * 7 % 23 + 1), weight=int(i % 5 > 0)) for i in range(90)]  # fmt: skip
    path = _write(tmp_path / "train.jsonl", *lines)
    whole = load_dataset(path, encoder, context_length=100, processes=1)

    streamed = load_dataset(path, encoder, context_length=100, folder=tmp_path, **options)

    assert streamed.report == whole.report
    assert len(streamed) == len(whole) == 72
    for name in ("lengths", "trained_counts", "lines"):
        assert list(getattr(streamed, name)) == list(getattr(whole, name))
    for index in range(len(whole)):
        for one, other in zip(streamed.example(index), whole.example(index), strict=True):
            assert torch.equal(one, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "train.jsonl"]


def test_an_example_knows_its_line(tmp_path: Path) -> None:
    encoder = TextEncoder.from_folder(save_tiny_tokenizer(tmp_path / "model"))
    path = _write(tmp_path / "train.jsonl", _chat("q", "a", weight=0), _chat("q", "a"))
    path.write_text("\n" + path.read_text() + "\n" + path.read_text())

    dataset = load_dataset(path, encoder, context_length=40)

    assert list(dataset.lines) == [3, 6]


def test_inputs_are_trained_where_that_is_asked_for(tmp_path: Path) -> None:
    encoder = TextEncoder.from_folder(save_tiny_tokenizer(tmp_path / "model"))
    path = _write(tmp_path / "train.jsonl", _chat("question", "answer"))

    dataset = load_dataset(path, encoder, context_length=40, train_on_inputs=True)

    assert dataset.trained_counts[0] == dataset.lengths[0] - 1


def test_a_bad_file_raises_with_its_report(tmp_path: Path) -> None:
    encoder = TextEncoder.from_folder(save_tiny_tokenizer(tmp_path / "model"))
    path = _write(tmp_path / "train.jsonl", _chat("q", "a"), {"messages": []})

    with pytest.raises(DatasetError, match="Example 2 has no messages") as raised:
        load_dataset(path, encoder, context_length=40)

    assert raised.value.code == "invalid_training_file"
    assert isinstance(raised.value.report, DatasetReport)
    assert raised.value.report.errors[0].line == 2
