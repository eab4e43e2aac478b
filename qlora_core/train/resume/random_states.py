"""The states of the random generators of every device, saved and brought back."""

from __future__ import annotations

import re

import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """Return the states by device: uint8, on the CPU, for the CPU and each GPU if any was used."""
    states = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda:{index}"] = state
    return states


def check_random_states(states: dict[str, Tensor]) -> None:
    """Refuse what `random_states` cannot have given.

    Raises:
        ValueError: the CPU's is missing or no such state, or one is of no device; the message ends a sentence.
    """
    unknown = [name for name in states if not re.fullmatch(r"cpu|cuda:[0-9]{1,4}", name)]
    if unknown or "cpu" not in states:
        raise ValueError("its random states are not one of the CPU and one of each GPU")
    try:
        torch.Generator().set_state(states["cpu"])
    except (RuntimeError, TypeError) as error:
        raise ValueError("the random state of the CPU is none") from error


def restore_random_states(states: dict[str, Tensor]) -> list[str]:
    """Bring every generator back to its state.

    Returns:
        Sentences on those that could not be: their device is not there.
    """
    n_gpus = torch.cuda.device_count()
    lost: list[str] = []
    for device, state in states.items():
        if device == "cpu":
            torch.random.set_rng_state(state)
        elif int(device.removeprefix("cuda:")) < n_gpus:
            torch.cuda.set_rng_state(state, device)
        else:
            lost.append(f"The random state of {device} is lost: there is no such device here.")
    return lost
