"""One step: its gradient is that of one big batch, and its figures are what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_core import Dataset, TextEncoder, TrainConfig, load_model
from qlora_core.nn import LoraConfig, lora_modules
from qlora_core.train import Event, Notice, StepMetrics
from qlora_core.train.flops import training_flops
from qlora_core.train.loss import BatchLoss
from qlora_core.train.progress import Progress
from qlora_core.train.run import Run, prepare
from qlora_core.train.step import accumulate, take_step
from tests.tiny_models import save_tiny_llama

Prepare = Callable[..., tuple[Run, list[Event]]]


@pytest.fixture
def prepared(make_run: Callable[..., Run]) -> Prepare:
    """A run over seven examples in batches of four, with an adapter that is not zero."""

    def make(**settings: Any) -> tuple[Run, list[Event]]:
        events: list[Event] = []
        run = make_run(7, sink=events.append, **settings)
        torch.manual_seed(1)
        for adapter in lora_modules(run.model).values():
            torch.nn.init.normal_(adapter.lora_B, std=0.2)
        return run, events

    return make


def _one_big_batch(run: Run, window: list[int]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of transformers' own forward pass over the whole window, padded and masked."""
    width = max(run.dataset.lengths[index] for index in window)
    ids = torch.zeros(len(window), width, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, index in enumerate(window):
        tokens, trained = run.dataset.example(index)
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.where(trained, tokens.long(), -100)
        mask[row, : len(tokens)] = 1
    loss = run.model(input_ids=ids, attention_mask=mask, labels=labels).loss  # pyright: ignore[reportCallIssue]
    loss.backward()
    return float(loss.detach()), _taken_gradients(run)


def _taken_gradients(run: Run) -> list[torch.Tensor]:
    gradients = [parameter.grad.clone() for parameter in run.parameters if parameter.grad is not None]  # fmt: skip
    run.optimizer.zero_grad()
    assert len(gradients) == len(run.parameters)
    return gradients


@pytest.mark.parametrize("step", [0, 1], ids=["whole window", "last window of three"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"micro_batch_tokens": 60}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 1, "gradient_checkpointing": True}],
    ids=str,
)  # fmt: skip
def test_however_it_is_split_the_gradient_is_that_of_one_big_batch(
    settings: dict[str, Any], step: int, prepared: Prepare
) -> None:
    run, _ = prepared(**settings)
    window = run.window(Progress(step=step, window=step))
    assert len(window) == (4, 3)[step]
    # What plain averaging of the micro-batches would get wrong.
    assert len({run.dataset.trained_counts[index] for index in window}) > 1
    loss, expected = _one_big_batch(run, window)

    sums = accumulate(run, window)

    assert float(sums.loss) / sums.n_trained == pytest.approx(loss, rel=1e-5)
    for actual, wanted in zip(_taken_gradients(run), expected, strict=True):
        assert (actual / sums.n_trained - wanted).norm() <= 1e-5 * wanted.norm()


def test_many_tokens_in_a_step_leave_a_float16_gradient_what_it_is(
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    """A mean over thousands of tokens is so small to each of them that float16 rounds it away."""
    base = save_tiny_llama(tmp_path / "base")
    dataset, gradients = make_dataset(31, repeat=20), list[list[torch.Tensor]]()

    for dtype in (torch.float32, torch.float16):
        model = load_model(base, device="cpu", compute_dtype=dtype)
        run = prepare(
            model, encoder, dataset, config(batch_size=len(dataset)), lambda _: None,
            output_dir=tmp_path, validation=None, sample_prompts=(), base_model=None, adapter=None,
        )  # fmt: skip
        torch.manual_seed(1)
        for adapter in lora_modules(model).values():
            torch.nn.init.normal_(adapter.lora_B, std=0.02)
        accumulate(run, run.window(Progress()))
        gradients.append(_taken_gradients(run))

    differences = [
        float((actual - wanted).norm() / wanted.norm())
        for wanted, actual in zip(*gradients, strict=True)
    ]
    assert sum(dataset.trained_counts) > 5000
    assert max(differences) < 2e-3


def test_recomputed_activations_give_the_same_gradient_to_the_bit(prepared: Prepare) -> None:
    gradients: list[list[torch.Tensor]] = []

    for recomputed in (False, True):
        run, _ = prepared(gradient_checkpointing=recomputed, lora=LoraConfig(r=4, dropout=0.25))
        torch.manual_seed(5)
        accumulate(run, run.window(Progress()))
        gradients.append(_taken_gradients(run))

    assert all(map(torch.equal, *gradients))


def test_a_step_tells_the_figures_of_its_window(prepared: Prepare) -> None:
    run, events = prepared(learning_rate=0.02, lr_scheduler_type="linear", warmup_steps=2, n_epochs=3)  # fmt: skip
    run.peak_flops_per_s = 1e9
    window = run.window(Progress())
    loss, gradients = _one_big_batch(run, window)
    progress = Progress()

    take_step(run, progress)

    (step,) = events
    assert isinstance(step, StepMetrics)
    assert (step.step, step.total_steps, step.epoch) == (1, 6, 0.5)
    assert step.train_loss == pytest.approx(loss, rel=1e-5)
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    assert step.grad_norm == pytest.approx(norm, rel=1e-5)
    assert step.learning_rate == 0.01
    lengths = [run.dataset.lengths[index] for index in window]
    n_trained = sum(run.dataset.trained_counts[index] for index in window)
    assert step.tokens_per_s * step.step_time_s == pytest.approx(sum(lengths))
    assert step.trained_tokens == progress.trained_tokens == n_trained
    assert progress.seen_tokens == sum(lengths)
    assert step.mfu is not None
    flops = training_flops(run.shapes, lengths, n_trained)
    assert step.mfu * step.step_time_s * 1e9 == pytest.approx(flops)


def test_gradients_are_clipped_to_the_norm(prepared: Prepare) -> None:
    run, events = prepared(max_grad_norm=0.01)

    take_step(run, Progress())

    (step,) = events
    assert isinstance(step, StepMetrics)
    assert (step.grad_norm or 0.0) > 0.01
    # After one step the first moment is a tenth of the gradient.
    means = [state["exp_avg"].flatten() for state in run.optimizer.state.values()]
    assert float(torch.cat(means).norm()) == pytest.approx(0.001, rel=1e-3)


def test_a_loss_that_is_not_finite_leaves_everything_as_it_was_under_a_finite_gradient(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, events = prepared(weight_decay=0.1)
    loss_of = run.loss_of

    class Overflowing:
        """The true loss and gradient, told as beyond float32."""

        def __call__(self, batch: Any) -> BatchLoss:
            found = loss_of(batch)
            return BatchLoss(found.loss + math.inf, found.n_correct, found.example_losses)

    monkeypatch.setattr(run, "loss_of", Overflowing())
    before = [parameter.detach().clone() for parameter in run.parameters]
    progress = Progress()

    take_step(run, progress)

    notice, step = events
    assert isinstance(notice, Notice)
    assert notice.message == "Step 1 was skipped: its loss is inf."
    assert isinstance(step, StepMetrics)
    assert (step.train_loss, step.grad_norm, progress.not_finite_in_a_row) == (None, None, 1)
    assert all(map(torch.equal, run.parameters, before))
    assert not any(
        value.any() for state in run.optimizer.state.values() for value in state.values()
    )


@pytest.mark.parametrize("settings", [{}, {"packing": False}, {"micro_batch_tokens": 1}], ids=str)
def test_the_examples_with_the_highest_losses_are_named(
    settings: dict[str, Any], prepared: Prepare
) -> None:
    run, events = prepared(**settings)
    window = run.window(Progress())
    losses: dict[int, float] = {}
    for index in window:
        ids, trained = run.dataset.example(index)
        labels = torch.where(trained, ids.long(), -100)[None]
        with torch.no_grad():
            losses[index] = float(run.model(input_ids=ids.long()[None], labels=labels).loss)  # pyright: ignore[reportCallIssue]

    take_step(run, Progress())

    (step,) = events
    assert isinstance(step, StepMetrics)
    expected = sorted(window, key=lambda index: -losses[index])[:3]
    assert [told["example"] for told in step.highest_losses] == expected
    assert [told["line"] for told in step.highest_losses] == [
        run.dataset.lines[i] for i in expected
    ]
    assert [told["loss"] for told in step.highest_losses] == pytest.approx(
        [losses[index] for index in expected], rel=1e-5
    )


def test_a_cpu_has_no_utilization(prepared: Prepare) -> None:
    run, events = prepared()

    take_step(run, Progress())

    (step,) = events
    assert isinstance(step, StepMetrics)
    assert step.mfu is None


def test_accuracy_is_the_share_of_trained_tokens_that_the_model_would_say(
    prepared: Prepare,
) -> None:
    run, events = prepared(n_epochs=50, learning_rate=0.03)
    progress = Progress()
    for _ in range(8):  # so that it says something right
        take_step(run, progress)
        progress.window = 0
    hits, n_tokens = 0, 0
    for index in run.window(progress):
        ids, trained = run.dataset.example(index)
        with torch.no_grad():
            said = run.model(input_ids=ids.long()[None]).logits[0, :-1].argmax(-1)  # pyright: ignore[reportCallIssue]
        hits += int((said == ids[1:])[trained[1:]].sum())
        n_tokens += int(trained.sum())

    take_step(run, progress)

    step = events[-1]
    assert isinstance(step, StepMetrics)
    assert 0 < hits < n_tokens
    assert step.train_mean_token_accuracy == pytest.approx(hits / n_tokens)
