"""Which layers a config means, and the sentences for those it does not."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_core import LoraConfig, LoraTargetError, add_lora, load_model
from qlora_core.nn import find_targets, left_out, lora_modules
from tests.qlora_core.models.families import save_tiny
from tests.tiny_models import save_tiny_llama, save_tiny_qwen2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return load_model(folder, device="cpu", compute_dtype=torch.float32)


Q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
UP = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), Q),
        (("mlp.up_proj",), UP),
        (("model.layers.1.mlp.up_proj",), UP[1:]),
        (("up_proj", "q_proj"), [Q[0], UP[0], Q[1], UP[1]]),
        (r".*\.(q|up)_proj", [Q[0], UP[0], Q[1], UP[1]]),
        (r"model\.layers\.1\..*(q|up)_proj", [Q[1], UP[1]]),
        ("lm_head", ["lm_head"]),
        (("lm_head",), ["lm_head"]),
    ],
    ids=str,
)
def test_a_list_gives_names_and_a_string_an_expression_for_the_whole_path(
    model: PreTrainedModel, targets: str | tuple[str, ...], expected: list[str]
) -> None:
    assert add_lora(model, LoraConfig(r=2, target_modules=targets)) == expected


@pytest.mark.parametrize(
    ("excludes", "expected"),
    [
        (("down_proj", "layers.0.mlp.gate_proj"), ["0.mlp.up_proj", "1.mlp.gate_proj", "1.mlp.up_proj"]),
        (r".*layers\.0\..*|.*down_proj", ["1.mlp.gate_proj", "1.mlp.up_proj"]),
    ],
    ids=str,
)  # fmt: skip
def test_excludes_take_out_of_the_targets(
    model: PreTrainedModel, excludes: str | tuple[str, ...], expected: list[str]
) -> None:
    config = LoraConfig(target_modules=r".*\.mlp\..*", exclude_modules=excludes)

    assert find_targets(model, config) == [f"model.layers.{one}" for one in expected]


@pytest.mark.parametrize("target", ["query", "proj", "self_attn", "embed_tokens", "norm"])
def test_a_target_that_is_no_linear_layer_is_refused_by_name(
    model: PreTrainedModel, target: str
) -> None:
    with pytest.raises(LoraTargetError, match=f"under the name {target}; it has .*q_proj") as told:
        add_lora(model, LoraConfig(target_modules=("q_proj", target)))

    assert told.value.code == "invalid_lora_target_modules"
    assert not lora_modules(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": "q_proj"}, "'q_proj' matches the whole path of no linear layer; paths are like "
                                       r"model\.layers\.0\.self_attn\.q_proj.* give a list of names"),
        ({"exclude_modules": ("query",)}, "exclude_modules: no linear layer of the model has the name query"),
        ({"exclude_modules": "down_proj"}, "exclude_modules: the regular expression 'down_proj' matches"),
        ({"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)}, "exclude_modules leaves no linear layer"),
        ({"rank_pattern": {"q_proj": 2, "query": 3}}, "rank_pattern has 'query', which matches no adapted layer"),
        ({"target_modules": ("v_proj",), "alpha_pattern": {"q_proj": 2}}, "alpha_pattern has 'q_proj'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_name_that_changes_nothing_is_refused(
    model: PreTrainedModel, settings: dict[str, object], message: str
) -> None:
    config = LoraConfig(**settings)  # pyright: ignore[reportArgumentType]

    with pytest.raises(LoraTargetError, match=message):
        add_lora(model, config)

    assert not lora_modules(model)


def test_a_head_that_is_the_embeddings_too_is_no_target(tmp_path: Path) -> None:
    folder = save_tiny_qwen2(tmp_path / "qwen2")
    model = load_model(folder, device="cpu", compute_dtype=torch.float32)

    with pytest.raises(LoraTargetError, match="lm_head shares its matrix with the embeddings"):
        add_lora(model, LoraConfig(target_modules=("q_proj", "lm_head")))


def test_nothing_is_left_out_of_a_llama(model: PreTrainedModel) -> None:
    assert left_out(model) == []


@pytest.mark.parametrize("quantize", [True, False], ids=["nf4", "dense"])
def test_of_a_mixture_experts_and_routers_are_left_out_and_named(
    tmp_path: Path, quantize: bool
) -> None:
    save_tiny("mixtral", tmp_path)
    model = load_model(tmp_path, device="cpu", compute_dtype=torch.float32, quantize=quantize)

    paths = add_lora(model, LoraConfig(r=2))

    assert {path.rpartition(".")[2] for path in paths} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert sorted(left_out(model)) == [
        "2 x model.layers.*.mlp.experts.down_proj [4, 64, 128]",
        "2 x model.layers.*.mlp.experts.gate_up_proj [4, 256, 64]",
        "2 x model.layers.*.mlp.gate.weight [4, 64]",
    ]


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(LoraTargetError, match="no linear layers to adapt"):
        add_lora(nn.Sequential(nn.Embedding(3, 4)), LoraConfig())


def test_a_linear_layer_of_an_unknown_kind_is_left_out_and_named() -> None:
    class Gated(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input).sigmoid()

    model = nn.Sequential(nn.Linear(4, 4), Gated(4, 5))

    assert find_targets(model, LoraConfig()) == ["0"]
    assert left_out(model) == ["1 x *.weight [5, 4]"]
