"""A run decides how it is executed once, and another can follow it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_core import Dataset, TextEncoder, TrainConfig, train
from qlora_core.errors import ConfigError
from qlora_core.train import Event, StepMetrics
from qlora_core.train.plan import ExecutionPlan, followed
from qlora_core.train.run import Run
from qlora_core.train.surroundings import callers_kept


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    with callers_kept():
        yield


@pytest.fixture
def prepared(make_run: Callable[..., Run]) -> Callable[..., Run]:
    return partial(make_run, 9)


def test_it_says_what_the_run_does(prepared: Callable[..., Run]) -> None:
    plan = prepared(micro_batch_tokens=77, gradient_checkpointing=True).plan

    assert (plan.device, plan.threads, plan.deterministic) == ("cpu", 1, True)
    assert (plan.packing, plan.micro_batch_tokens) == ("by example", 77)
    assert (plan.recompute, plan.inputs_on_host, plan.notch) == (True, False, 0)
    assert plan.kernels in ("compiled", "tables")
    assert (plan.product_dtype, plan.attention) == ("float32", "packed_sdpa")


def test_it_is_the_same_after_json(prepared: Callable[..., Run]) -> None:
    plan = prepared().plan

    assert ExecutionPlan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_one_of_another_version_is_refused(prepared: Callable[..., Run]) -> None:
    values = prepared().plan.as_dict()
    del values["notch"]

    with pytest.raises(ConfigError, match="another version of the engine: notch"):
        ExecutionPlan.from_dict(values)


def test_a_run_goes_by_the_plan_that_it_follows(prepared: Callable[..., Run]) -> None:
    run = prepared()
    then = replace(
        run.plan, threads=2, micro_batch_tokens=33, pass_tokens=5, recompute=True, loss_chunk_tokens=7, notch=2
    )  # fmt: skip

    reasons = run.follow(then)

    assert reasons == []
    assert run.plan == then
    assert torch.get_num_threads() == 2
    assert (run.batching.max_tokens, run.batching.pass_tokens) == (33, 5)
    assert run.loss_of.chunk_tokens == 7
    assert any(getattr(module, "gradient_checkpointing", False) for module in run.model.modules())


def test_recomputing_ends_where_the_plan_has_none(prepared: Callable[..., Run]) -> None:
    then = prepared(gradient_checkpointing=False).plan
    run = prepared(gradient_checkpointing=True)

    run.follow(replace(then, asked=run.plan.asked))

    assert not any(getattr(one, "gradient_checkpointing", False) for one in run.model.modules())


@pytest.mark.parametrize(
    ("setting", "before", "after", "words"),
    [
        ("micro_batch_tokens", 64, 4096, "micro_batch_tokens is 4,096, and was 64."),
        ("packing", False, True, "packing is on, and was off."),
        ("gradient_checkpointing", True, False, "gradient_checkpointing is off, and was on."),
    ],
)
def test_a_setting_that_was_changed_wins(
    setting: str, before: Any, after: Any, words: str, prepared: Callable[..., Run]
) -> None:
    then, run = prepared(**{setting: before}).plan, prepared(**{setting: after})
    own = run.plan

    reasons = run.follow(replace(then, notch=1))

    assert reasons == [words]
    assert run.plan == replace(own, notch=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "NVIDIA H100"}, "The device is cpu, and was NVIDIA H100."),
        ({"processor": "abacus"}, ", and was abacus."),
        ({"kernels": "triton"}, ", and was triton."),
        ({"packing": "by mask"}, "How examples share a forward pass is by example, and was by mask."),
        ({"loss_chunk_tokens": None}, "The output head runs over all tokens at once in one of the two runs."),
    ],
)  # fmt: skip
def test_what_cannot_be_as_it_was_is_named(
    change: dict[str, Any], words: str, prepared: Callable[..., Run]
) -> None:
    now = prepared().plan

    plan, reasons = followed(replace(now, **change), now)

    assert plan == now
    assert len(reasons) == 1
    assert reasons[0].endswith(words)


def test_a_layer_input_has_no_other_home_on_a_cpu(prepared: Callable[..., Run]) -> None:
    now = prepared().plan

    plan, reasons = followed(replace(now, device="NVIDIA H100", inputs_on_host=True), now)

    assert not plan.inputs_on_host
    assert len(reasons) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_training_is_deterministic_and_the_callers_state_comes_back(
    strict: bool,
    load: Callable[[], PreTrainedModel],
    encoder: TextEncoder,
    config: Callable[..., TrainConfig],
    make_dataset: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    torch.use_deterministic_algorithms(strict)
    seen: list[tuple[bool, int]] = []

    def sink(event: Event) -> None:
        if isinstance(event, StepMetrics):
            seen.append((torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()))
            torch.set_num_threads(2)

    train(load(), encoder, make_dataset(4), config(n_epochs=1), sink, output_dir=tmp_path)

    assert seen == [(True, 1)]
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled() is strict
    deterministic: Any = torch.utils.deterministic
    assert deterministic.fill_uninitialized_memory is True
