"""Modules trained whole: their masters, what they share, and the base model's own answers."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_core import LoraConfig, LoraTargetError, add_lora, load_model, lora_disabled
from qlora_core.nn import SavedModule, find_targets, saved_modules
from tests.tiny_models import save_tiny_gemma2, save_tiny_llama, save_tiny_qwen2

EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {
        "untied": save_tiny_llama(parent / "llama"),
        "tied": save_tiny_qwen2(parent / "qwen2"),
        "scaled": save_tiny_gemma2(parent / "gemma2"),
    }


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    return load_model(folder, device="cpu", compute_dtype=dtype, **options)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def config(*names: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=names)


def trainable(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]


@pytest.mark.parametrize("kind", ["untied", "tied", "scaled"])
def test_answers_do_not_change_at_first_and_come_back_when_disabled(
    folders: dict[str, Path], kind: str, ids: Tensor
) -> None:
    model = load(folders[kind])
    before = model(ids).logits

    add_lora(model, config("embed_tokens", "lm_head", "norm"))

    assert torch.equal(model(ids).logits, before)
    for module in saved_modules(model).values():
        for parameter in module.trained.values():
            parameter.data += 1
    assert not torch.allclose(model(ids).logits, before, atol=0.1)
    with lora_disabled(model):
        assert torch.equal(model(ids).logits, before)


def test_embeddings_and_head_of_their_own_are_trained_apart(folders: dict[str, Path]) -> None:
    model = load(folders["untied"])

    add_lora(model, config("lm_head", "embed_tokens"))

    assert trainable(model) == [f"{EMBEDDINGS}.weight", f"{HEAD}.weight"]
    assert list(saved_modules(model)) == [EMBEDDINGS, HEAD]


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_tied_embeddings_and_head_are_one_matrix_whichever_is_named(
    folders: dict[str, Path], name: str, ids: Tensor
) -> None:
    model = load(folders["tied"])
    reference = copy.deepcopy(model)  # the same, trained by nothing but autograd
    add_lora(model, config(name))

    model(input_ids=ids, labels=ids).loss.backward()

    assert trainable(model) == [f"{EMBEDDINGS}.weight"]
    assert list(saved_modules(model)) == [EMBEDDINGS, HEAD]
    embeddings, head = model.get_submodule(EMBEDDINGS), model.get_submodule(HEAD)
    assert embeddings.get_parameter("weight") is head.get_parameter("weight")
    matrix = reference.get_input_embeddings().get_parameter("weight").requires_grad_()
    reference(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(embeddings.get_parameter("weight").grad, matrix.grad)


@pytest.mark.parametrize("kind", ["untied", "tied", "scaled"])
def test_gradients_are_autograds(folders: dict[str, Path], kind: str, ids: Tensor) -> None:
    model = load(folders[kind])
    reference = copy.deepcopy(model)
    add_lora(model, config("embed_tokens", "lm_head", "model.norm"))

    model(input_ids=ids, labels=ids).loss.backward()

    names = trainable(model)
    for name in names:
        reference.get_parameter(name).requires_grad_()
    reference(input_ids=ids, labels=ids).loss.backward()
    for name in names:
        torch.testing.assert_close(
            model.get_parameter(name).grad, reference.get_parameter(name).grad
        )


def test_masters_are_float32_over_a_sixteen_bit_model_and_sum_in_float32(
    folders: dict[str, Path],
) -> None:
    model = load(folders["untied"], torch.bfloat16)
    add_lora(model, config("embed_tokens", "lm_head"))
    embeddings = model.get_input_embeddings()

    out = embeddings(torch.full((1, 4096), 7))
    (out * 1.01).sum().backward()

    assert out.dtype == torch.bfloat16
    weight = embeddings.get_parameter("weight")
    assert weight.dtype == torch.float32
    assert weight.grad is not None
    # 4,096 ones would not be summed beyond 256 in bfloat16.
    assert weight.grad[7].mean().item() == pytest.approx(4096, rel=0.02)
    assert model(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16


def test_a_quantized_head_is_trained_from_what_its_codes_stand_for(
    folders: dict[str, Path], ids: Tensor
) -> None:
    model = load(folders["untied"], skip_modules=())
    before = model(ids).logits

    add_lora(model, config("lm_head"))

    torch.testing.assert_close(model(ids).logits, before)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_parameter("lm_head.weight").grad is not None


def test_what_is_trained_whole_is_no_target(folders: dict[str, Path]) -> None:
    model = load(folders["untied"])

    with pytest.raises(LoraTargetError, match="under the name lm_head"):
        add_lora(
            model, LoraConfig(target_modules=("q_proj", "lm_head"), modules_to_save=("lm_head",))
        )
    everything = find_targets(model, LoraConfig(target_modules=".*"), saved=[HEAD])

    assert HEAD not in everything


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wte", "no module of the model has the name wte; .* are called embed_tokens and lm_head"),
        ("mlp", "model.layers.0.mlp is a LlamaMLP, which has layers of its own"),
        (
            "rotary_emb",
            "model.rotary_emb is a LlamaRotaryEmbedding, whose weights are quantized or",
        ),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(
    folders: dict[str, Path], name: str, message: str
) -> None:
    model = load(folders["untied"])

    with pytest.raises(LoraTargetError, match=message):
        add_lora(model, config(name))

    assert not saved_modules(model)


def test_what_the_original_has_is_still_found(folders: dict[str, Path]) -> None:
    model = load(folders["scaled"])
    add_lora(model, config("embed_tokens"))
    embeddings = model.get_input_embeddings()

    assert isinstance(embeddings, SavedModule)
    assert embeddings.num_embeddings == 384
    assert embeddings.embed_scale.item() == 8
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        embeddings.nothing  # noqa: B018
