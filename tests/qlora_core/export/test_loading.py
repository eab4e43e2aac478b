"""Adapters put over a base again: to be trained on, or refused with a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_core import LoraConfig, load_adapter, save_adapter
from qlora_core.errors import AdapterError, ConfigError, LoraTargetError
from qlora_core.nn import adapter_modules, lora_modules, saved_modules
from tests.qlora_core.export.bases import IDS, dequantized, load, logits, with_adapter
from tests.tiny_models import save_tiny_llama, save_tiny_qwen2

# peft 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

EVERYTHING = LoraConfig(
    r=4,
    alpha=10,
    dropout=0.25,
    target_modules=("q_proj", "up_proj", "layers.1.mlp.down_proj"),
    use_rslora=True,
    rank_pattern={"q_proj": 2},
    alpha_pattern={r".*\.1\..*": 3},
    modules_to_save=("embed_tokens", "lm_head"),
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {"untied": save_tiny_llama(parent / "llama"), "tied": save_tiny_qwen2(parent / "qwen2")}


def saved(base: Path, folder: Path, config: LoraConfig) -> Any:
    model = with_adapter(base, config)
    save_adapter(model, folder)
    return model


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_loaded_adapter_is_trained_on_as_if_it_had_never_been_away(
    bases: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    model = saved(bases[kind], tmp_path, EVERYTHING)
    again = load(bases[kind])

    config = load_adapter(again, tmp_path)

    assert torch.equal(logits(again), logits(model))
    assert (config.use_rslora, config.dropout) == (True, 0.25)
    trainable = [
        {n for n, p in one.named_parameters() if p.requires_grad} for one in (model, again)
    ]
    assert trainable[0] == trainable[1]
    for one in (model, again):
        one.train()
        torch.manual_seed(4)
        one(input_ids=IDS, labels=IDS).loss.backward()
    for name in trainable[0]:
        gradients = [one.get_parameter(name).grad for one in (model, again)]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    if kind == "tied":
        masters = [
            again.get_parameter(f"{one}.weight") for one in ("lm_head", "model.embed_tokens")
        ]
        assert masters[0] is masters[1]


def test_what_is_expected_may_be_said_in_other_words_and_have_another_dropout(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    saved(
        bases["untied"],
        tmp_path,
        LoraConfig(r=4, alpha=10, use_rslora=True, target_modules=("q_proj",)),
    )
    model = load(bases["untied"])

    config = load_adapter(
        model,
        tmp_path,
        expected=LoraConfig(r=4, alpha=20, dropout=0.5, target_modules=r".*\.q_proj"),
    )

    assert config.dropout == 0.5
    assert {one.dropout for one in lora_modules(model).values()} == {0.5}


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (LoraConfig(r=8, alpha=10, target_modules=("q_proj", "up_proj")),
         "over model.layers.0.self_attn.q_proj and 3 more it has rank 4 and scale 2.5, the config rank 8 and scale 1.25"),
        (LoraConfig(r=4, alpha=12, target_modules=("q_proj", "up_proj")), "rank 4 and scale 2.5, the config rank 4 and scale 3"),
        (LoraConfig(r=4, alpha=10, use_rslora=True, target_modules=("q_proj", "up_proj")), "the config rank 4 and scale 5"),
        (LoraConfig(r=4, alpha=10, target_modules=("q_proj",)),
         "it adapts model.layers.0.mlp.up_proj and 1 more, the config does not"),
        (LoraConfig(r=4, alpha=10, target_modules=("q_proj", "up_proj", "layers.0.mlp.down_proj")),
         "the config adapts model.layers.0.mlp.down_proj, it does not"),
        (LoraConfig(r=4, alpha=10, target_modules=("q_proj", "up_proj"), modules_to_save=("lm_head",)),
         "the config has trained whole lm_head, it does not"),
    ],
    ids=["rank", "alpha", "rslora", "more", "fewer", "whole"],
)  # fmt: skip
def test_an_adapter_that_differs_from_what_is_expected_is_refused_with_the_difference(
    bases: dict[str, Path], tmp_path: Path, expected: LoraConfig, message: str
) -> None:
    saved(
        bases["untied"], tmp_path, LoraConfig(r=4, alpha=10, target_modules=("q_proj", "up_proj"))
    )
    model = load(bases["untied"])

    with pytest.raises(AdapterError, match="is not the one that the config describes: ") as told:
        load_adapter(model, tmp_path, expected=expected)

    assert message in told.value.message
    assert not adapter_modules(model)


def test_an_expectation_that_fits_no_layer_is_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    saved(bases["untied"], tmp_path, LoraConfig(r=4))

    with pytest.raises(LoraTargetError, match="under the name query"):
        load_adapter(
            load(bases["untied"]), tmp_path, expected=LoraConfig(r=4, target_modules=("query",))
        )


def test_layers_that_peft_chose_by_number_are_those_of_the_tensors(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    settings = peft.LoraConfig(
        r=3, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers", task_type="CAUSAL_LM"
    )  # fmt: skip
    peft.get_peft_model(dequantized(bases["untied"]), settings).save_pretrained(str(tmp_path))
    model = load(bases["untied"])

    load_adapter(model, tmp_path)

    assert list(lora_modules(model)) == ["model.layers.1.self_attn.q_proj"]


def test_embeddings_and_head_that_were_trained_apart_do_not_go_over_a_base_that_ties_them(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    for names in (["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]):
        settings = peft.LoraConfig(
            r=3, target_modules=["q_proj"], modules_to_save=names, task_type="CAUSAL_LM"
        )
        with pytest.warns(UserWarning, match="tie_word_embeddings"):
            theirs: Any = peft.get_peft_model(dequantized(bases["tied"]), settings)
        theirs.base_model.model.get_submodule(
            "lm_head" if "lm_head" in names else "model.embed_tokens"
        ).modules_to_save["default"].weight.data += 1
        theirs.save_pretrained(str(tmp_path / "-".join(names)))

        with pytest.raises(AdapterError, match="it needs a base model that does not tie them"):
            load_adapter(load(bases["tied"]), tmp_path / "-".join(names))


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        path.write_text(json.dumps(config), encoding="utf-8")

    return edit


def _edit_tensors(edit_tensors: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit_tensors(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


PREFIX = "base_model.model."
Q_A = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD = f"{PREFIX}lm_head.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model"),
    "torn weights": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x08" * 20), "cannot be read"),
    "config is not json": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not valid JSON"),
    "config is no object": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not describe a LoRA"),
    "another method": (_edit_config(peft_type="IA3"), "does not describe a LoRA adapter"),
    "dora": (_edit_config(use_dora=True), r"uses use_dora \(true\), which this engine cannot apply"),
    "bias": (_edit_config(bias="lora_only"), r'uses bias \("lora_only"\)'),
    "lora bias": (_edit_config(lora_bias=True), "uses lora_bias"),
    "new tokens": (_edit_config(trainable_token_indices=[3]), "uses trainable_token_indices"),
    "stacked experts": (_edit_config(target_parameters=["experts.down_proj"]), "uses target_parameters"),
    "something new": (_edit_config(use_tomorrow=True), "uses use_tomorrow"),
    "a start that changed the base": (_edit_config(init_lora_weights="pissa_niter_4"), "started with pissa_niter_4"),
    "rank of another type": (_edit_config(r="4"), "r must be a whole number"),
    "no rank": (_edit_config(r=None), "does not give r"),
    "no targets": (_edit_config(target_modules=None), "does not give target_modules"),
    "another rank": (_edit_config(r=8), "rank 8 need"),
    "another rank pattern": (_edit_config(rank_pattern={"q_proj": 2}), "rank 2 need"),
    "unknown tensor": (_edit_tensors(lambda t: t.update(x=torch.zeros(1))), "unknown tensor x"),
    "lora over embeddings": (_edit_tensors(lambda t: t.update({f"{PREFIX}e.lora_embedding_A": torch.zeros(1)})),
                             "unknown tensor .*lora_embedding_A"),
    "half a pair": (_edit_tensors(lambda t: t.pop(Q_A)), "lacks the tensor .*q_proj.lora_A.weight"),
    "other shape": (_edit_tensors(lambda t: t.update({Q_A: torch.zeros(4, 5)})), "need \\[4, 64\\]"),
    "other model": (_edit_tensors(lambda t: t.update({k.replace("q_proj", "query"): t.pop(k) for k in list(t)})),
                    "no linear layer .*query"),
    "whole module without its name": (_edit_config(modules_to_save=None), "unknown tensor .*lm_head.weight"),
    "whole module without its tensor": (_edit_tensors(lambda t: t.pop(HEAD)), "lacks the weights of lm_head"),
    "whole module of another shape": (_edit_tensors(lambda t: t.update({HEAD: torch.zeros(5, 64)})),
                                      r"lm_head.weight is \[5, 64\], but the model needs \[384, 64\]"),
    "whole module of another model": (_edit_tensors(lambda t: t.update({f"{PREFIX}score.weight": t.pop(HEAD)})),
                                      "no module score"),
    "resized head": (_edit_tensors(lambda t: t.update({f"{PREFIX}lm_head.base_layer.weight": torch.zeros(390, 64)})),
                     r"\[390, 64\] weights in lm_head, this one \[384, 64\]; its vocabulary was resized"),
    "nothing": (_edit_tensors(lambda t: [t.pop(k) for k in list(t) if "lora" in k]), "holds no LoRA tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_applied_is_refused(
    bases: dict[str, Path], name: str, tmp_path: Path
) -> None:
    spoil, message = BROKEN[name]
    saved(bases["untied"], tmp_path, LoraConfig(r=4, alpha=8, modules_to_save=("lm_head",)))
    spoil(tmp_path)
    fresh = load(bases["untied"])

    with pytest.raises(AdapterError, match=message):
        load_adapter(fresh, tmp_path)

    assert not adapter_modules(fresh)
    assert not saved_modules(fresh)


def test_adapters_do_not_stack(bases: dict[str, Path], tmp_path: Path) -> None:
    model = saved(bases["untied"], tmp_path, LoraConfig(r=4))

    with pytest.raises(ConfigError, match="adapters already"):
        load_adapter(model, tmp_path)
