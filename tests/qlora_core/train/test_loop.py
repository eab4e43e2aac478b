"""The loop: what it learns, what it reports, and that splitting a step changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig, load_adapter, load_model, train
from qlora_core.data import epoch_order, windows
from qlora_core.errors import ConfigError, LossNotFiniteError, ModelUnsupported, OutOfMemoryError
from qlora_core.nn import LoraConfig, add_lora, lora_disabled, lora_modules
from qlora_core.train import (
    CheckpointSaved,
    Event,
    Notice,
    ResumePointSaved,
    RunFinished,
    RunStarted,
    SamplesGenerated,
    StepMetrics,
    ValidationMetrics,
)
from qlora_core.train.generate import generate
from tests.tiny_models import save_tiny_gemma2, save_tiny_llama, save_tiny_qwen2

Load = Callable[[], PreTrainedModel]
MakeConfig = Callable[..., TrainConfig]
MakeDataset = Callable[..., Dataset]


def _steps(events: list[Event]) -> list[StepMetrics]:
    return [event for event in events if isinstance(event, StepMetrics)]


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_tells_everything_in_order(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    events: list[Event] = []
    dataset, validation = make_dataset(10), make_dataset(3)
    prompts = [[{"role": "user", "content": "Question 7?"}]]

    result = train(
        load(), encoder, dataset, config(), events.append,
        output_dir=tmp_path, validation=validation, sample_prompts=prompts,
        base_model_name_or_path="tiny",
    )  # fmt: skip

    kinds = [type(event) for event in events]
    epoch = [StepMetrics] * 3 + [ValidationMetrics, CheckpointSaved, ResumePointSaved]
    assert kinds == [
        RunStarted, ValidationMetrics, SamplesGenerated, *epoch, *epoch, SamplesGenerated, RunFinished,
    ]  # fmt: skip
    for event in events:
        json.dumps(event.as_dict(), allow_nan=False)
    started, steps = events[0], _steps(events)
    assert isinstance(started, RunStarted)
    assert (started.total_steps, started.start_step, started.n_examples) == (6, 0, 10)
    assert started.trainable_parameters == sum(
        t.numel() for t in _adapter(tmp_path / "adapter").values()
    )
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1].epoch == 2.0
    assert steps[-1].trained_tokens == 2 * sum(dataset.trained_counts) == result.trained_tokens
    assert all(step.tokens_per_s > 0 and step.memory["rss_bytes"] > 0 for step in steps)
    validations = [event for event in events if isinstance(event, ValidationMetrics)]
    assert [event.step for event in validations] == [0, 3, 6]
    assert validations[-1].full_valid_loss < validations[0].full_valid_loss
    assert result.valid_loss == validations[-1].full_valid_loss
    checkpoints = [event for event in events if isinstance(event, CheckpointSaved)]
    assert [Path(event.folder).name for event in checkpoints] == ["step-3", "step-6"]
    assert checkpoints[0].train_loss == steps[2].train_loss
    assert checkpoints[0].full_valid_loss == validations[1].full_valid_loss
    assert result.adapter == tmp_path / "adapter"
    assert not result.stopped
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == "tiny"


def test_learns_its_data_and_where_to_stop(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    events: list[Event] = []
    dataset = make_dataset(5, repeat=40)
    prompts = [[{"role": "user", "content": f"Question {i * 7}?"}] for i in range(3)]

    train(
        load(), encoder, dataset, config(n_epochs=1, batch_size=5, lora=LoraConfig(r=16, alpha=32)),
        events.append, output_dir=tmp_path, sample_prompts=prompts,
    )  # fmt: skip

    steps = _steps(events)
    losses = [step.train_loss or 0.0 for step in steps]
    assert 0 < losses[-1] < 0.1 < 3 < losses[0]
    assert (steps[-1].train_mean_token_accuracy or 0.0) > 0.99
    samples = [event for event in events if isinstance(event, SamplesGenerated)]
    assert [event.stage for event in samples] == ["base", "adapter"]
    # It can only say exactly this because the stop token was trained.
    assert [sample["answer"] for sample in samples[1].samples] == [
        "Four bits.", "Half a byte, that is four bits of it.", "A byte has eight.",
    ]  # fmt: skip


@pytest.mark.parametrize("family", [save_tiny_llama, save_tiny_qwen2, save_tiny_gemma2])
def test_the_first_steps_loss_is_that_of_transformers(
    family: Callable[..., Path], config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    folder = family(tmp_path / "base")
    events: list[Event] = []
    dataset = make_dataset(12)
    settings = config(n_epochs=1, batch_size=6)
    model = load_model(folder, device="cpu", compute_dtype=torch.float32)
    plain = load_model(folder, device="cpu", compute_dtype=torch.float32)
    window = windows(epoch_order(12, seed=0, epoch=0), 6)[0]
    losses, n_tokens = 0.0, 0
    for index in window:
        ids, trained = dataset.example(index)
        labels = torch.where(trained, ids.long(), -100)
        loss = plain(input_ids=ids.long()[None], labels=labels[None]).loss  # pyright: ignore[reportCallIssue]
        losses += float(loss) * dataset.trained_counts[index]
        n_tokens += dataset.trained_counts[index]

    train(
        model,
        TextEncoder.from_folder(folder),
        dataset,
        settings,
        events.append,
        output_dir=tmp_path,
    )

    assert _steps(events)[0].train_loss == pytest.approx(losses / n_tokens, abs=1e-5)


@pytest.mark.parametrize("changed", [{"micro_batch_tokens": 50}, {"micro_batch_tokens": 1}, {"gradient_checkpointing": True}], ids=str)  # fmt: skip
def test_splitting_or_recomputing_a_step_changes_nothing(
    changed: dict[str, Any], load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:  # fmt: skip
    # Seven examples in batches of four: the last window is smaller, and lengths differ.
    dataset = make_dataset(7)
    whole: list[Event] = []
    split: list[Event] = []

    train(load(), encoder, dataset, config(), whole.append, output_dir=tmp_path / "whole")
    train(load(), encoder, dataset, config(**changed), split.append, output_dir=tmp_path / "split")

    for one, other in zip(_steps(whole), _steps(split), strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert other.train_mean_token_accuracy == one.train_mean_token_accuracy


def test_dropout_is_recomputed_with_the_same_mask(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    lora = LoraConfig(r=4, dropout=0.3)
    results = []

    for name, recompute in (("kept", False), ("again", True)):
        events: list[Event] = []
        settings = config(lora=lora, gradient_checkpointing=recompute, n_epochs=1)
        train(load(), encoder, make_dataset(8), settings, events.append, output_dir=tmp_path / name)
        results.append([(step.train_loss, step.grad_norm) for step in _steps(events)])

    for one, other in zip(*results, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    adapters = []

    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train(
            load(), encoder, make_dataset(8), config(seed=seed), lambda _: None,
            output_dir=tmp_path / name,
        )  # fmt: skip
        adapters.append(_adapter(tmp_path / name / "adapter"))

    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert not all(torch.equal(adapters[0][name], adapters[2][name]) for name in adapters[0])


def test_validation_is_the_mean_over_all_its_tokens_and_moves_nothing(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    events: list[Event] = []
    validation = make_dataset(9)
    settings = config(lora=LoraConfig(r=4, dropout=0.2), micro_batch_tokens=100)
    model = load()
    sums, n_correct, n_tokens = 0.0, 0, 0
    for index in range(9):
        ids, trained = validation.example(index)
        logits = model(input_ids=ids.long()[None]).logits[0, :-1]  # pyright: ignore[reportCallIssue]
        mask, targets = trained[1:], ids.long()[1:]
        sums += float(functional.cross_entropy(logits[mask], targets[mask], reduction="sum"))
        n_correct += int((logits[mask].argmax(-1) == targets[mask]).sum())
        n_tokens += int(mask.sum())

    train(
        model, encoder, make_dataset(8), settings, events.append, output_dir=tmp_path / "with",
        validation=validation,
    )  # fmt: skip
    train(
        load(), encoder, make_dataset(8), settings, lambda _: None, output_dir=tmp_path / "without"
    )

    first = next(event for event in events if isinstance(event, ValidationMetrics))
    assert first.full_valid_loss == pytest.approx(sums / n_tokens, rel=1e-5)
    assert first.full_valid_mean_token_accuracy == pytest.approx(n_correct / n_tokens)
    with_it, without = _adapter(tmp_path / "with/adapter"), _adapter(tmp_path / "without/adapter")
    assert all(torch.equal(with_it[name], without[name]) for name in with_it)


def _spoil_steps(model: PreTrainedModel, steps: set[int], value: float = float("nan")) -> None:
    """Make the hidden states of some steps' forward passes (counted from 1) not finite."""
    seen = {"passes": -1}  # the first one is the trial before the first step

    def hook(module: Any, _: Any, output: Any) -> Any:
        if not module.training:
            return output
        seen["passes"] += 1
        return output * value if seen["passes"] in steps else output

    model.get_submodule("model.norm").register_forward_hook(hook)


def test_a_loss_that_is_not_finite_is_skipped_and_reported(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    events: list[Event] = []
    model = load()
    _spoil_steps(model, {2, 3, 5})

    result = train(model, encoder, make_dataset(12), config(), events.append, output_dir=tmp_path)

    steps = _steps(events)
    assert [step.step for step in steps if step.train_loss is not None] == [1, 4, 6]
    skipped = steps[1]
    assert skipped.step == 2
    assert (skipped.train_loss, skipped.train_mean_token_accuracy, skipped.grad_norm) == (None,) * 3
    assert skipped.learning_rate > 0
    assert skipped.trained_tokens == steps[0].trained_tokens
    notices = [event for event in events if isinstance(event, Notice)]
    assert [(notice.level, notice.data["step"]) for notice in notices] == [("warn", 2), ("warn", 3), ("warn", 5)]  # fmt: skip
    assert len(notices[0].data["examples"]) == 4
    assert result.steps == 6
    assert all(value.isfinite().all() for value in _adapter(tmp_path / "adapter").values())


def test_the_example_whose_loss_is_not_finite_is_named(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    events: list[Event] = []
    model, dataset = load(), make_dataset(4)
    _spoil_steps(model, {2})  # a forward pass for each example, the longest first
    longest_first = sorted(range(4), key=lambda index: (-dataset.lengths[index], index))

    train(
        model, encoder, dataset, config(n_epochs=1, micro_batch_tokens=1), events.append,
        output_dir=tmp_path,
    )  # fmt: skip

    (notice,) = (event for event in events if isinstance(event, Notice))
    culprit = longest_first[1]
    assert notice.data == {"step": 1, "examples": [culprit], "lines": [dataset.lines[culprit]]}
    (step,) = _steps(events)
    assert {told["example"] for told in step.highest_losses} == {
        index for index in range(4) if index != longest_first[1]
    }


def test_three_losses_in_a_row_that_are_not_finite_fail_the_run(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    model = load()
    _spoil_steps(model, {2, 3, 4}, float("inf"))

    with pytest.raises(LossNotFiniteError, match="3 steps in a row, up to step 4") as raised:
        train(model, encoder, make_dataset(12), config(), lambda _: None, output_dir=tmp_path)

    assert raised.value.code == "loss_not_finite"


def test_running_out_of_memory_is_one_error_of_ours(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    model = load()

    def exhausted(*_: Any) -> None:
        torch.empty(2**62, dtype=torch.uint8)

    model.get_submodule("model.norm").register_forward_pre_hook(exhausted)

    with pytest.raises(OutOfMemoryError, match="Lower micro_batch_tokens"):
        train(model, encoder, make_dataset(12), config(), lambda _: None, output_dir=tmp_path)


def test_a_model_with_an_adapter_is_refused(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    model = load()
    add_lora(model, LoraConfig(r=2))

    with pytest.raises(ConfigError, match="adapters already"):
        train(model, encoder, make_dataset(4), config(), lambda _: None, output_dir=tmp_path)


def test_the_saved_adapter_answers_as_the_trained_model(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    model = load()
    train(model, encoder, make_dataset(12), config(), lambda _: None, output_dir=tmp_path)
    ids = torch.tensor([[5, 9, 200, 7, 44]])

    again = load()
    base_logits = again(input_ids=ids).logits  # pyright: ignore[reportCallIssue]
    load_adapter(again, tmp_path / "adapter")

    trained_logits = model.eval()(input_ids=ids).logits  # pyright: ignore[reportCallIssue]
    assert torch.equal(again(input_ids=ids).logits, trained_logits)  # pyright: ignore[reportCallIssue]
    with lora_disabled(model):
        assert torch.equal(model(input_ids=ids).logits, base_logits)  # pyright: ignore[reportCallIssue]
    assert len(lora_modules(again)) == 14


def test_the_adapter_comes_with_the_template_and_the_stop_tokens_it_was_trained_with(
    load: Load, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "Question?"}]

    train(load(), encoder, make_dataset(4), config(), lambda _: None, output_dir=tmp_path)

    for folder in (tmp_path / "adapter", *(tmp_path / "checkpoints").iterdir()):
        beside = TextEncoder.from_folder(folder)
        assert beside.encode_prompt(messages) == encoder.encode_prompt(messages)
        assert (beside.stop_ids, beside.bos_id) == (encoder.stop_ids, encoder.bos_id)


# peft 0.21 asks transformers 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")
def test_the_trained_gradient_is_pefts(
    base: Path, encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    """One step of ours and one of peft with torch.optim.AdamW, over the same dense base."""
    dataset = make_dataset(4)
    dense = load_model(base, device="cpu", compute_dtype=torch.float32, quantize=False)
    settings = config(n_epochs=1, warmup_ratio=0.0, weight_decay=0.1)
    add_lora(dense, settings.lora, seed=0)
    start = {path: module.lora_A.detach().clone() for path, module in lora_modules(dense).items()}
    reference: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = peft.get_peft_model(reference, lora)
    for path, value in start.items():
        reference.get_submodule(f"base_model.model.{path}").lora_A["default"].weight.data.copy_(
            value
        )
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)  # fmt: skip
    n_trained = sum(dataset.trained_counts)
    for index in range(4):
        ids, trained = dataset.example(index)
        labels = torch.where(trained, ids.long(), -100)[None]
        loss = reference(input_ids=ids.long()[None], labels=labels).loss
        (loss * dataset.trained_counts[index] / n_trained).backward()
    torch.nn.utils.clip_grad_norm_([p for p in reference.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    model = load_model(base, device="cpu", compute_dtype=torch.float32, quantize=False)

    train(model, encoder, dataset, settings, lambda _: None, output_dir=tmp_path)

    for path, module in lora_modules(model).items():
        theirs = reference.get_submodule(f"base_model.model.{path}").lora_B["default"].weight
        torch.testing.assert_close(module.lora_B, theirs, rtol=1e-3, atol=1e-5)


def test_without_settings_the_run_is_refused(
    load: Load, encoder: TextEncoder, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="config must be a TrainConfig, not NoneType"):
        train(load(), encoder, make_dataset(4), None, print, output_dir=tmp_path)  # pyright: ignore[reportArgumentType]


def test_a_tokenizer_of_more_ids_than_the_model_has_is_refused(
    encoder: TextEncoder, config: MakeConfig, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    folder = save_tiny_llama(tmp_path / "small", vocab_size=40)
    model = load_model(folder, device="cpu", compute_dtype=torch.float32)

    with pytest.raises(ModelUnsupported, match=r"ids up to \d+, .* know 40 of them"):
        train(model, encoder, make_dataset(4), config(), print, output_dir=tmp_path / "out")

    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelUnsupported, match=r"ids up to 41, .* know 40 of them"):
        generate(model, encoder, [3, 41])
