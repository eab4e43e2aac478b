"""An adapter's folder: what PEFT and servers read in it, and what they would get wrong."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_core import LoraConfig, load_adapter, save_adapter
from qlora_core.errors import AdapterError
from qlora_core.export import serving_warnings
from qlora_core.nn import lora_modules
from tests.qlora_core.export.bases import dequantized, load, logits, with_adapter
from tests.qlora_core.models.families import save_tiny
from tests.tiny_models import save_tiny_llama, save_tiny_qwen2

# peft 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def test_the_folder_is_what_servers_accept(base: Path, tmp_path: Path) -> None:
    model = with_adapter(base, LoraConfig(r=4, alpha=8))

    written = save_adapter(model, tmp_path, base_model_name_or_path='my/"base"')

    assert sorted(path.name for path in written) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = config_in(tmp_path)
    assert config["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8, True)
    assert (config["modules_to_save"], config["rank_pattern"], config["alpha_pattern"]) == (
        None,
        {},
        {},
    )
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (4, 64)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nbase_model: "my/\\"base\\""\n')
    assert "## Serving" not in card


@pytest.mark.parametrize(
    ("name", "loaded"),
    [
        ("some/model", 'base_model = "some/model"\n'),
        # Nobody has that on a hub, or a stranger has.
        ("tiny-llama", 'base_model = "path/of/the/base/model"  # tiny-llama\n'),
    ],
)
def test_the_card_loads_the_base_from_where_it_can_be(
    base: Path, tmp_path: Path, name: str, loaded: str
) -> None:
    save_adapter(with_adapter(base, LoraConfig(r=4)), tmp_path, base_model_name_or_path=name)

    assert loaded in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_base_is_named_as_it_was_loaded_if_nothing_else_is_said(
    base: Path, tmp_path: Path
) -> None:
    save_adapter(with_adapter(base, LoraConfig(r=4)), tmp_path)

    assert config_in(tmp_path)["base_model_name_or_path"] == str(base)


def test_a_target_that_names_more_than_was_trained_is_written_in_full(
    base: Path, tmp_path: Path
) -> None:
    only_one = "model.layers.1.mlp.up_proj"
    model = with_adapter(base, LoraConfig(r=4, target_modules=(only_one, "q_proj")))

    save_adapter(model, tmp_path)

    assert config_in(tmp_path)["target_modules"] == [only_one, "q_proj"]
    loaded = peft.PeftModel.from_pretrained(dequantized(base), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_an_adapter_over_the_head_carries_no_base_weight(base: Path, tmp_path: Path) -> None:
    model = with_adapter(base, LoraConfig(r=4, target_modules=("q_proj", "lm_head")))

    save_adapter(model, tmp_path / "ours")

    names = [
        name for name in load_file(tmp_path / "ours/adapter_model.safetensors") if "head" in name
    ]
    assert names == [f"base_model.model.lm_head.lora_{half}.weight" for half in "AB"]
    loaded: Any = peft.PeftModel.from_pretrained(dequantized(base), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        loaded.save_pretrained(str(tmp_path / "theirs"))
    assert any(
        "base_layer" in name for name in load_file(tmp_path / "theirs/adapter_model.safetensors")
    )
    again = load(base)
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_ranks_and_alphas_of_single_layers_are_written_by_the_shortest_names_that_fit(
    base: Path, tmp_path: Path
) -> None:
    config = LoraConfig(
        r=4,
        alpha=8,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        alpha_pattern={".*down_proj": 3},
    )

    save_adapter(with_adapter(base, config), tmp_path)

    written = config_in(tmp_path)
    assert (written["r"], written["lora_alpha"]) == (4, 8)
    assert written["rank_pattern"] == {"q_proj": 2, "model.layers.1.mlp.up_proj": 6}
    assert written["alpha_pattern"] == {"down_proj": 3}


@pytest.mark.parametrize("pattern", [{}, {"q_proj": 9}], ids=["one rank", "two ranks"])
def test_rslora_folded_into_alpha_is_the_same_adapter_without_it(
    base: Path, tmp_path: Path, pattern: dict[str, int]
) -> None:
    config = LoraConfig(r=4, alpha=10, use_rslora=True, rank_pattern=pattern)
    model = with_adapter(base, config)

    save_adapter(model, tmp_path, fold_rslora=True)

    written = config_in(tmp_path)
    assert written["use_rslora"] is False
    assert written["lora_alpha"] == 20
    assert written["alpha_pattern"] == ({"q_proj": 30} if pattern else {})
    loaded = peft.PeftModel.from_pretrained(dequantized(base), str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert {one.use_rslora for one in lora_modules(model).values()} == {
        True
    }  # the model is as it was


def test_a_shared_matrix_is_there_under_both_names(tmp_path: Path) -> None:
    base = save_tiny_qwen2(tmp_path / "qwen2")
    model = with_adapter(base, LoraConfig(r=4, modules_to_save=("lm_head",)))

    save_adapter(model, tmp_path / "adapter")

    config = config_in(tmp_path / "adapter")
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert config["ensure_weight_tying"] is True
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    head, embeddings = (
        tensors[f"base_model.model.{one}.weight"] for one in ("lm_head", "model.embed_tokens")
    )
    assert torch.equal(head, embeddings)


def test_a_model_without_adapters_has_nothing_to_save(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no LoRA adapters"):
        save_adapter(load(base), tmp_path / "adapter")

    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LoraConfig(r=16), []),
        (LoraConfig(r=24), ["vLLM takes rank 24 only when started with --max-lora-rank 32."]),
        (LoraConfig(r=8, rank_pattern={"q_proj": 128}), ["--max-lora-rank 128", "vLLM ignores rank_pattern"]),
        (LoraConfig(r=600), ["vLLM serves no adapter of a rank above 512; this one has 600."]),
        (LoraConfig(alpha_pattern={"q_proj": 1}), ["vLLM ignores alpha_pattern", "llama.cpp ignores alpha_pattern"]),
        (LoraConfig(use_rslora=True), ["llama.cpp does not know rsLoRA"]),
        (LoraConfig(modules_to_save=("lm_head",)), ["vLLM refuses adapters with modules_to_save (lm_head)",
                                                    "llama.cpp converts no adapter with"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_servers_refuse_or_get_wrong_is_said(config: LoraConfig, expected: list[str]) -> None:
    warnings = serving_warnings(config)

    assert len(warnings) == len(expected)
    for warning, part in zip(warnings, expected, strict=True):
        assert part in warning


def test_the_card_says_what_servers_get_wrong(base: Path, tmp_path: Path) -> None:
    model = with_adapter(base, LoraConfig(r=4, use_rslora=True, modules_to_save=("lm_head",)))

    save_adapter(model, tmp_path)

    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "scaled by alpha / sqrt(rank)" in card
    assert "Trained whole: lm_head." in card
    assert "- llama.cpp does not know rsLoRA" in card.partition("## Serving")[2]


def test_it_is_said_where_peft_would_leave_adapters_out(tmp_path: Path) -> None:
    save_tiny("glm4_moe", tmp_path / "base")
    model = with_adapter(tmp_path / "base", LoraConfig(r=2))

    save_adapter(model, tmp_path / "adapter")

    card = (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
    assert "PEFT 0.21 with transformers 5 takes gate_proj, up_proj, down_proj of a glm4_moe" in card
    attention = with_adapter(
        tmp_path / "base", LoraConfig(r=2, target_modules=("q_proj", "o_proj"))
    )
    assert serving_warnings(LoraConfig(r=2), attention) == []


@contextmanager
def room_for(nbytes: int) -> Iterator[None]:
    """Let no file grow larger than this: the machine's own refusal, like that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_there_is_no_room_the_folder_is_named_and_nothing_is_left(
    base: Path, tmp_path: Path
) -> None:
    model = with_adapter(base, LoraConfig(r=4))

    with room_for(4096), pytest.raises(OSError, match="File too large") as told:
        save_adapter(model, tmp_path / "adapter")

    assert (told.value.errno, told.value.filename) == (errno.EFBIG, str(tmp_path / "adapter"))
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_room_the_adapter_before_stays(base: Path, tmp_path: Path) -> None:
    save_adapter(with_adapter(base, LoraConfig(r=2)), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with room_for(4096), pytest.raises(OSError, match="File too large"):
        save_adapter(with_adapter(base, LoraConfig(r=8)), tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
