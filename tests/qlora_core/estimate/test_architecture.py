"""What is derived from a config.json against the model that transformers builds of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core import add_lora, estimate, load_model
from qlora_core.errors import LoraTargetError
from qlora_core.estimate.adapter import choose_adapter
from qlora_core.estimate.describing import describe
from qlora_core.estimate.settings import read_settings
from qlora_core.models.census import take_census
from qlora_core.nn import LoraConfig
from qlora_core.train.memory.meter import base_bytes
from tests.qlora_core.estimate.families import FAMILIES, config_of


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., PreTrainedModel]:
    def load_family(family: str, **changes: Any) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=torch.float32)
        model.save_pretrained(tmp_path)
        return load_model(tmp_path, device="cpu", compute_dtype=torch.float32)

    return load_family


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_bytes_are_those_of_the_loaded_model(
    family: str, load: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = load(family)

    found = estimate(tmp_path, device="cpu")

    census = take_census(model)
    assert found.parameters.nf4 == census.quantized
    assert found.parameters.embeddings == census.embeddings
    assert found.parameters.other == census.others
    # Beside them there may be a few numbers more in buffers, such as a second rotary embedding.
    assert found.memory.base_bytes == pytest.approx(base_bytes(model), abs=512)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "lora",
    [
        {"r": 3},
        {"r": 3, "target_modules": ("o_proj",)},
        {"r": 3, "target_modules": r".*layers\.[12]\..*_proj", "exclude_modules": ("o_proj",)},
        {"r": 4, "rank_pattern": {r"layers\.0\..*": 2, "o_proj": 7}},
        {"r": 2, "modules_to_save": ("embed_tokens", "lm_head")},
    ],
    ids=["all-linear", "by name", "by expression", "by pattern", "with embeddings"],
)
def test_an_adapter_has_as_many_elements_as_the_engine_makes(
    family: str, lora: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    add_lora(model, LoraConfig(**lora))

    found = choose_adapter(
        describe(config_of(family).to_dict(), "config"), read_settings({"lora": lora}).lora
    )

    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert Counter(found.tensors) == Counter(trained)


def test_a_tied_head_that_is_trained_whole_is_written_under_both_names() -> None:
    model = describe(config_of("gemma").to_dict(), "config")

    alone = choose_adapter(model, read_settings({}).lora)
    found = choose_adapter(model, read_settings({"lora": {"modules_to_save": ["lm_head"]}}).lora)

    matrix = model.vocabulary * model.hidden
    assert found.elements == alone.elements + matrix
    assert found.file_elements == alone.file_elements + 2 * matrix


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["query"]}, "no linear layer is called query; there are down_proj"),
        ({"target_modules": "nothing.*"}, "'nothing.*' matches whole"),
        ({"exclude_modules": ["wqkv"]}, "exclude_modules"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leaves no linear layer"),
        ({"modules_to_save": ["score"]}, "modules_to_save: score"),
        ({"target_modules": ["lm_head"]}, "shares its matrix"),
    ],
)
def test_names_of_nothing_are_refused(lora: dict[str, Any], words: str) -> None:
    with pytest.raises(LoraTargetError) as raised:
        estimate(config_of("gemma").to_dict(), {"lora": lora})

    assert words in raised.value.message


def test_the_head_can_be_adapted_by_name_where_it_is_its_own() -> None:
    config = config_of("llama")

    found = estimate(config.to_dict(), {"lora": {"r": 4, "target_modules": ["lm_head"]}})

    assert found.parameters.adapter == 4 * (config.hidden_size + config.vocab_size)


def linear_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_have_transformers_paths(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)

    paths = {path for path, _ in describe(config_of(family).to_dict(), "config").linears()}

    assert paths == linear_paths(model)
