"""Training that goes on from an adapter, and what a run says of the adapter it makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig, load_adapter, load_model, train
from qlora_core.data import epoch_order, windows
from qlora_core.errors import AdapterError, ResumePointError
from qlora_core.nn import LoraConfig
from qlora_core.train import Event, Notice, StepMetrics, ValidationMetrics
from tests.tiny_models import save_tiny_tokenizer

Load = Callable[[], PreTrainedModel]
MakeConfig = Callable[..., TrainConfig]
MakeDataset = Callable[..., Dataset]


def _loss(model: PreTrainedModel, dataset: Dataset, indices: list[int]) -> float:
    total, n_tokens = 0.0, 0
    for index in indices:
        ids, trained = dataset.example(index)
        labels = torch.where(trained, ids.long(), -100)[None]
        with torch.no_grad():
            loss = model(input_ids=ids.long()[None], labels=labels).loss  # pyright: ignore[reportCallIssue]
        total += float(loss) * dataset.trained_counts[index]
        n_tokens += dataset.trained_counts[index]
    return total / n_tokens


def test_it_goes_on_where_the_adapter_stands(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    dataset, events = make_dataset(12), list[Event]()
    train(load(), encoder, dataset, config(), lambda _: None, output_dir=tmp_path / "first")
    adapted = load()
    load_adapter(adapted, tmp_path / "first/adapter")

    train(
        load(), encoder, dataset, config(lora=LoraConfig(r=4, alpha=8, dropout=0.0)), events.append,
        output_dir=tmp_path / "second", adapter=tmp_path / "first/adapter",
        validation=dataset,
    )  # fmt: skip

    first = next(event for event in events if isinstance(event, StepMetrics))
    window = windows(epoch_order(12, seed=0, epoch=0), 4)[0]
    assert first.train_loss == pytest.approx(_loss(adapted, dataset, window), rel=1e-5)
    losses = [event.full_valid_loss for event in events if isinstance(event, ValidationMetrics)]
    assert losses[0] == pytest.approx(_loss(adapted, dataset, list(range(12))), rel=1e-5)
    assert losses[-1] < losses[0]


def test_an_adapter_that_is_not_as_configured_is_refused(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    train(load(), encoder, make_dataset(4), config(), lambda _: None, output_dir=tmp_path / "first")

    with pytest.raises(AdapterError, match="r"):
        train(
            load(), encoder, make_dataset(4), config(lora=LoraConfig(r=8, alpha=8)), lambda _: None,
            output_dir=tmp_path / "second", adapter=tmp_path / "first/adapter",
        )  # fmt: skip


def test_a_resume_point_belongs_to_the_adapter_that_the_run_went_on_from(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        train(
            load(), encoder, make_dataset(4), config(seed=seed, n_epochs=1), lambda _: None,
            output_dir=tmp_path / name,
        )  # fmt: skip
    stopped = train(
        load(), encoder, make_dataset(4), config(), lambda _: None, output_dir=tmp_path / "run",
        adapter=tmp_path / "a/adapter", should_stop=lambda: True,
    )  # fmt: skip

    with pytest.raises(ResumePointError, match="belongs to another run: start is "):
        train(
            load(), encoder, make_dataset(4), config(), lambda _: None, output_dir=tmp_path / "run",
            adapter=tmp_path / "b/adapter", resume_from=tmp_path / "run/resume",
        )  # fmt: skip
    resumed = train(
        load(), encoder, make_dataset(4), config(), lambda _: None, output_dir=tmp_path / "run",
        adapter=tmp_path / "a/adapter", resume_from=tmp_path / "run/resume",
    )  # fmt: skip

    assert stopped.stopped
    assert not resumed.stopped


def test_what_servers_make_of_the_adapter_is_told_before_it_is_trained(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    events: list[Event] = []

    train(
        load(), encoder, make_dataset(4), config(n_epochs=1, lora=LoraConfig(r=24, use_rslora=True)),
        events.append, output_dir=tmp_path,
    )  # fmt: skip

    told = [event for event in events if isinstance(event, Notice)]
    assert [notice.level for notice in told] == ["info", "info"]
    assert "--max-lora-rank 32" in told[0].message
    assert "rsLoRA" in told[1].message
    assert events.index(told[1]) < next(
        i for i, event in enumerate(events) if isinstance(event, StepMetrics)
    )


def test_layers_that_get_no_adapter_are_named(
    config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    experts = MixtralConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(experts).save_pretrained(tmp_path / "base")
    save_tiny_tokenizer(tmp_path / "base")
    model = load_model(tmp_path / "base", device="cpu", compute_dtype=torch.float32)
    events: list[Event] = []

    train(
        model, TextEncoder.from_folder(tmp_path / "base"), make_dataset(4), config(n_epochs=1),
        events.append, output_dir=tmp_path,
    )  # fmt: skip

    (notice,) = (event for event in events if isinstance(event, Notice))
    assert notice.level == "warn"
    assert notice.message.startswith("These layers get no adapter: ")
    assert "mlp.experts.down_proj" in notice.message
