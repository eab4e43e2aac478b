"""Every causal language model of transformers comes back as transformers itself loads it, or is refused by name."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_core import NF4Linear, load_model, save_quantized
from qlora_core.errors import ModelUnsupported
from qlora_core.nn.nf4_experts import NF4Stack
from tests.qlora_core.models.families import FAMILIES, save_tiny

# transformers 5.23 cannot make these from a configuration, on a machine without images and downloads.
NOT_BUILT = {
    "gemma3n": "its vision tower needs packages that are not installed",
    "gemma4_assistant": "its configuration cannot be made without the model it assists",
    "gemma4_unified_assistant": "its configuration cannot be made without the model it assists",
    "musicgen": "AutoModelForCausalLM gives it the configuration of another class",
    "musicgen_melody": "AutoModelForCausalLM gives it the configuration of another class",
}
# What cannot be quantized, and the part that is named.
REFUSED = {
    "dbrx": "DbrxExpertGLU",
    "deepseek_v4": "DeepseekV4GroupedLinear",
    "inkling_text": "InklingSharedExperts",
    "jetmoe": "JetMoeParallelExperts",
    "llama4": "Llama4TextExperts",
    "llama4_text": "Llama4TextExperts",
    "longcat_flash": "LongcatFlashExperts",
    "rwkv": "RwkvModel",
    "xlnet": "XLNetRelativeAttention",
    "zamba": "share their weight",
    "zamba2": "share their weight",
}
# Enough for tests that take long. Each for something that the others do not have: a transposed weight, a fused one, experts with and without gate, bias
# and transposition, mixers, an encoder's vocabulary, several configurations in one, a linear layer of its own kind.
DIVERSE = (
    "gpt2",
    "falcon",
    "mixtral",
    "gpt_oss",
    "nemotron_h",
    "mamba",
    "deepseek_v3",
    "qwen3_next",
    "gemma3n_text",
    "mllama",
    "bart",
    "blt",
)
# Linear layers that stay dense besides the output head and what is tied to an embedding.
DENSE = re.compile(
    r"(^|\.)lm_head(\.|$)"  # named to be skipped
    r"|\.(dt_proj|correction_coefs|prediction_coefs)$"  # read by the module above them
    r"|indexer\.weights_proj$"  # wanted in float32
    r"|head\.attention\.out_proj$"  # of a torch.nn.MultiheadAttention, which reads it
    r"|\.(router|gate)(\.|$)"  # sends tokens to experts
)
IDS = torch.randint(3, 100, (1, 8), generator=torch.Generator().manual_seed(0))

every_family = pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in NOT_BUILT]
)


def transformers_own(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    return load_model(folder, device="cpu", compute_dtype=dtype, **settings)


def logits(model: PreTrainedModel) -> torch.Tensor:
    uncached = "use_cache" in inspect.signature(model.forward).parameters
    torch.manual_seed(0)  # for the hashes of a reformer
    return model(IDS, **({"use_cache": False} if uncached else {})).logits


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def tensors_of_its_own(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def dequantize_into(expected: PreTrainedModel, model: PreTrainedModel) -> None:
    """Write what the quantized layers of ``model`` stand for into ``expected``."""
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            layer: Any = expected.get_submodule(path)
            weight = module.nf4.dequantize()
            layer.weight.data.copy_(weight.T if isinstance(layer, Conv1D) else weight)
        elif isinstance(module, NF4Stack):
            owner: Any = expected.get_submodule(path.rpartition(".")[0])
            stack = torch.stack([module.nf4(expert).dequantize() for expert in range(len(module))])
            expected.get_parameter(path).data.copy_(stack.mT if owner.is_transposed else stack)


@every_family
@torch.no_grad()
def test_without_quantizing_everything_is_what_transformers_loads(
    tmp_path: Path, family: str
) -> None:
    save_tiny(family, tmp_path)

    for dtype in (torch.bfloat16, torch.float32):
        model = load(tmp_path, dtype, quantize=False)

        expected = transformers_own(tmp_path, dtype)
        actual, wanted = tensors_of(model), tensors_of(expected)
        assert actual.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert actual[name].dtype == tensor.dtype, name
            assert torch.equal(actual[name], tensor), name
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)


@every_family
@torch.no_grad()
def test_quantized_everything_that_should_be_is_in_nf4_or_the_model_is_refused_by_name(
    tmp_path: Path, family: str
) -> None:
    save_tiny(family, tmp_path)
    if family in REFUSED:
        with pytest.raises(ModelUnsupported, match=REFUSED[family]):
            load(tmp_path)
        return

    model = load(tmp_path)

    expected = transformers_own(tmp_path, torch.float32)
    expected.set_experts_implementation("eager")
    dequantize_into(expected, model)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    head = model.get_output_embeddings()
    embeddings = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            known = module is head or id(module.weight) in embeddings or DENSE.search(path)
            assert known, f"{path} is dense"
    stacks = {name for name, one in model.named_parameters() if "expert" in name and one.dim() > 2}
    assert not stacks


@every_family
@torch.no_grad()
def test_saved_it_is_what_transformers_and_bitsandbytes_load_or_it_is_refused_by_name(
    tmp_path: Path, family: str
) -> None:
    if family in REFUSED:
        return
    save_tiny(family, tmp_path / "dense")
    model = load(tmp_path / "dense")
    if any(isinstance(one, NF4Stack) for one in model.modules()) or family == "falcon":
        with pytest.raises(ModelUnsupported, match=r"holds experts in NF4|FalconLinear"):
            save_quantized(model, tmp_path / "nf4")
        return

    save_quantized(model, tmp_path / "nf4")

    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", output_loading_info=True)
    theirs, told = loaded
    assert not any(told.values()), told
    expected = dict(theirs.named_parameters(remove_duplicate=False)) | dict(theirs.named_buffers())
    for path, module in model.named_modules():
        layer = theirs.get_submodule(path)
        assert isinstance(module, NF4Linear) == isinstance(layer, Linear4bit), path
        if isinstance(module, NF4Linear):
            stored = module.nf4.to_bitsandbytes("weight")
            for key, tensor in layer.weight.quant_state.as_dict(packed=True).items():
                if "quant_state" not in key:
                    assert torch.equal(stored[f"weight.{key}"], tensor), f"{path}: {key}"
            assert torch.equal(stored["weight"], layer.weight.data)
            continue
        for name, tensor in tensors_of_its_own(module).items():
            assert torch.equal(tensor, expected[f"{path}.{name}".lstrip(".")]), f"{path}.{name}"
    assert torch.equal(logits(load(tmp_path / "nf4")), logits(model))


def test_the_tables_name_families_that_there_are() -> None:
    assert {*NOT_BUILT, *REFUSED, *DIVERSE} <= set(FAMILIES)
    assert not NOT_BUILT.keys() & {*REFUSED, *DIVERSE}
