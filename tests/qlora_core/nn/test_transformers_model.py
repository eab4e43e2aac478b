"""A model with adapters is still transformers' own: it trains, answers, is copied, moved and cast as before."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_core import AdapterError, LoraConfig, add_lora, load_model
from qlora_core.nn import lora_modules
from tests.tiny_models import save_tiny_llama, save_tiny_qwen2

CONFIG = LoraConfig(r=4, modules_to_save=("embed_tokens", "lm_head"))


@pytest.fixture(scope="module", params=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("models")
    return (
        save_tiny_llama(parent / "llama")
        if request.param == "untied"
        else save_tiny_qwen2(parent / "qwen2")
    )


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def adapted(folder: Path, config: LoraConfig = CONFIG) -> PreTrainedModel:
    """A model whose adapters do something."""
    model = load_model(folder, device="cpu", compute_dtype=torch.float32)
    add_lora(model, config)
    generator = torch.Generator().manual_seed(3)
    for adapter in lora_modules(model).values():
        adapter.lora_B.data.normal_(generator=generator, std=0.3)
    return model


def checkpointed(model: PreTrainedModel) -> PreTrainedModel:
    with warnings.catch_warnings():
        # transformers 5.23 has another name for it, which 5.17 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def gradients(model: PreTrainedModel, **inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(**inputs, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("quantize", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss(
    folder: Path, ids: Tensor, quantize: bool, checkpointing: bool
) -> None:
    model = load_model(folder, device="cpu", compute_dtype=torch.float32, quantize=quantize)
    add_lora(model, LoraConfig(r=4, dropout=0.1))
    model.train()
    if checkpointing:
        checkpointed(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses: list[float] = []

    for _ in range(4):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients(
    folder: Path, ids: Tensor, dropout: float
) -> None:
    config = LoraConfig(r=4, dropout=dropout, modules_to_save=("lm_head",))
    model = adapted(folder, config).train()
    kept = gradients(model, input_ids=ids, labels=ids)

    recomputed = gradients(checkpointed(model), input_ids=ids, labels=ids)

    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_embedded_inputs_give_the_same_gradients_as_their_ids(folder: Path, ids: Tensor) -> None:
    model = adapted(folder)
    from_ids = gradients(model, input_ids=ids, labels=ids)

    embedded = model.get_input_embeddings()(ids)
    from_embeddings = gradients(model, inputs_embeds=embedded, labels=ids)

    for name, gradient in from_ids.items():
        torch.testing.assert_close(from_embeddings[name], gradient)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_generating_gives_the_likeliest_tokens_in_every_mode(
    folder: Path, ids: Tensor, training: bool, checkpointing: bool
) -> None:
    model = adapted(folder).train(training)
    if checkpointing:
        checkpointed(model)
    prompt = ids[:1, :5]
    expected = prompt
    for _ in range(4):
        best = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)

    # In training, transformers' checkpointed layers drop the cache that its generate relies on, adapters or not.
    for use_cache in (False,) if training and checkpointing else (False, True):
        answer = model.generate(  # pyright: ignore[reportCallIssue] - transformers types it so
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=None,
        )
        assert torch.equal(answer, expected)


def test_generating_from_embedded_inputs_works(folder: Path, ids: Tensor) -> None:
    model = adapted(folder)
    prompt = ids[:1, :5]
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}

    from_ids = model.generate(prompt, **options)  # pyright: ignore[reportCallIssue]
    from_embeddings = model.generate(  # pyright: ignore[reportCallIssue]
        inputs_embeds=model.get_input_embeddings()(prompt), **options
    )

    assert torch.equal(from_embeddings, from_ids[:, 5:])


def test_a_copy_is_equal_and_of_its_own(folder: Path, ids: Tensor) -> None:
    model = adapted(folder)
    before = model(ids).logits

    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.data += 1

    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(twin(ids).logits, before)
    tied = model.config.tie_word_embeddings
    assert (
        twin.get_parameter("lm_head.weight") is twin.get_parameter("model.embed_tokens.weight")
    ) == tied


def test_a_state_goes_into_another_model_with_adapters(folder: Path, ids: Tensor) -> None:
    model = adapted(folder)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.5
    other = load_model(folder, device="cpu", compute_dtype=torch.float32)
    add_lora(other, CONFIG, seed=9)

    other.load_state_dict(model.state_dict())

    assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_casting_the_model_leaves_what_is_trained_in_float32(
    folder: Path, ids: Tensor, cast: torch.dtype
) -> None:
    model = adapted(folder)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {
        n: (p.detach().clone(), p.grad.clone()) for n, p in trained.items() if p.grad is not None
    }

    model.to(cast)  # pyright: ignore[reportArgumentType] - transformers types it so

    assert (
        model.get_submodule("model.layers.0.input_layernorm").get_parameter("weight").dtype == cast
    )
    assert before.keys() == trained.keys()
    for name, parameter in trained.items():
        value, gradient = before[name]
        assert model.get_parameter(name) is parameter
        assert torch.equal(parameter, value)
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    assert model(ids).logits.dtype == cast
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()


def test_saving_as_a_whole_model_is_refused_with_what_to_do_instead(
    folder: Path, tmp_path: Path
) -> None:
    model = adapted(folder)

    for one in (model, copy.deepcopy(model)):
        with pytest.raises(
            AdapterError, match=r"use qlora_core\.save_adapter .* or qlora_core\.merge"
        ):
            one.save_pretrained(tmp_path / "saved")

    assert not (tmp_path / "saved").exists()
