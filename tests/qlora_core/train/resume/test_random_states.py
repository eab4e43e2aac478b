"""Every device's random generator goes on where it was."""

from __future__ import annotations

import pytest
import torch

from qlora_core.train.resume.random_states import random_states, restore_random_states


def test_the_cpus_generator_goes_on_where_it_was() -> None:
    torch.manual_seed(5)
    saved = random_states()
    expected = torch.rand(7)

    lost = restore_random_states(saved)

    assert torch.equal(torch.rand(7), expected)
    assert lost == []


def test_the_states_of_devices_that_are_gone_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    saved = random_states() | {"cuda:1": torch.zeros(16, dtype=torch.uint8)}

    lost = restore_random_states(saved)

    assert lost == ["The random state of cuda:1 is lost: there is no such device here."]


def test_all_gpus_are_saved_and_each_gets_its_own_state_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = [torch.full((16,), index, dtype=torch.uint8) for index in range(3)]
    brought_back: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: brought_back.update({device: state})
    )

    lost = restore_random_states(random_states())

    assert lost == []
    assert brought_back == {"cuda:0": states[0], "cuda:1": states[1], "cuda:2": states[2]}


@pytest.mark.gpu
def test_a_gpus_generator_goes_on_where_it_was() -> None:
    torch.manual_seed(5)
    torch.rand(3, device="cuda")
    saved = random_states()
    expected = torch.rand(7, device="cuda")

    restore_random_states(saved)

    assert torch.equal(torch.rand(7, device="cuda"), expected)
