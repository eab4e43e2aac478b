"""What would fit is what the estimate says fits, and the next larger does not."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_core import TrainConfig, estimate
from qlora_core.estimate import largest_fitting

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "batch_size": 8, "context_length": 256, "micro_batch_tokens": 1024, "lora": {"r": 64},
}  # fmt: skip


def total(settings: dict[str, Any], **options: Any) -> int:
    return estimate(LLAMA, settings, **options).memory.total_bytes


def changed(**changes: Any) -> dict[str, Any]:
    return {**SETTINGS, **changes}


FRUGAL = {"gradient_checkpointing": True, "optimizer": "paged_adamw_8bit"}


def test_what_fits_stays_as_it_is() -> None:
    room = total(SETTINGS)

    found = largest_fitting(LLAMA, SETTINGS, room_bytes=room)

    assert (found.fits, found.settings) == (True, {})
    assert found.estimate == estimate(LLAMA, SETTINGS)
    assert "as it is" in found.sentence


def test_only_what_is_needed_changes() -> None:
    given = changed(gradient_checkpointing=False)

    found = largest_fitting(LLAMA, given, room_bytes=total(given) - 1)

    assert found.fits
    assert len(found.settings) == 1
    assert set(found.settings) <= set(FRUGAL)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("tokens", [256, 300, 512, 777, 950])
def test_the_micro_batch_is_the_largest_that_fits(tokens: int, packing: bool) -> None:
    given, options = changed(packing=packing), {"longest_tokens": 200, "mean_tokens": 150.0}
    room = total({**given, **FRUGAL, "micro_batch_tokens": tokens}, **options)

    found = largest_fitting(LLAMA, given, room_bytes=room, **options)

    best = found.settings["micro_batch_tokens"]
    again = total({**given, **found.settings}, **options)
    larger = [
        total({**given, **FRUGAL, "micro_batch_tokens": one}, **options)
        for one in range(tokens + 1, 1025)
    ]
    assert again == found.estimate.memory.total_bytes <= room
    assert found.estimate.largest_pass_tokens == best <= tokens
    assert min(larger) >= room


def test_below_one_example_the_context_gets_shorter() -> None:
    shorter = {"context_length": 180, "micro_batch_tokens": 180}
    room = total(changed(**FRUGAL, **shorter))

    found = largest_fitting(LLAMA, SETTINGS, room_bytes=room)

    assert found.fits
    assert found.settings == {"optimizer": "paged_adamw_8bit", **shorter}
    assert "context_length = 180 and micro_batch_tokens = 180" in found.sentence


def test_below_the_least_context_the_rank_gets_smaller() -> None:
    least = {"context_length": 128, "micro_batch_tokens": 128}
    room = total(changed(**FRUGAL, **least, lora={"r": 9}))

    found = largest_fitting(LLAMA, SETTINGS, room_bytes=room)

    assert found.fits
    rank = found.settings.pop("lora.r")
    assert found.settings == {"optimizer": "paged_adamw_8bit", **least}
    assert found.estimate.memory.total_bytes <= room
    assert 9 <= rank < 64
    assert total(changed(**FRUGAL, **least, lora={"r": rank + 1})) > room


def test_where_nothing_fits_the_smallest_is_named_with_the_base_models_share() -> None:
    found = largest_fitting(LLAMA, SETTINGS, room_bytes=100)

    assert not found.fits
    assert found.settings["lora.r"] == 1
    assert "nothing fits into 0.0 MiB" in found.sentence
    assert "for the base model" in found.sentence


def test_on_a_cpu_nothing_is_paged() -> None:
    given = changed(optimizer="adamw")
    room = total({**given, **FRUGAL, "micro_batch_tokens": 256}, device="cpu")

    found = largest_fitting(LLAMA, given, room_bytes=room, device="cpu")

    assert found.settings == {"optimizer": "adamw_8bit", "micro_batch_tokens": 256}


def test_settings_are_taken_as_a_run_has_them_and_left_alone() -> None:
    config = TrainConfig.from_dict(SETTINGS)
    room = total(changed(**FRUGAL, micro_batch_tokens=512))

    by_object = largest_fitting(LLAMA, config, room_bytes=room)

    assert by_object == largest_fitting(LLAMA, SETTINGS, room_bytes=room)
    assert config == TrainConfig.from_dict(SETTINGS)
    assert by_object.as_dict() == {
        "fits": True,
        "settings": {"optimizer": "paged_adamw_8bit", "micro_batch_tokens": 512},
        "total_bytes": room,
        "sentence": by_object.sentence,
    }
