"""Names in a checkpoint are those that lead back to the parameters when transformers loads it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_core.errors import ModelUnsupported
from qlora_core.models.naming import checkpoint_names
from tests.qlora_core.models.families import tiny_config


def skeleton(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family))


@pytest.mark.parametrize(
    ("family", "name", "stored"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("gpt_neox", "lm_head.weight", "embed_out.weight"),
        (
            "lfm3",
            "model.layers.1.self_attn.g_proj.weight",
            "model.layers.1.self_attn.gate_proj.weight",
        ),
        (
            "mixtral",
            "model.layers.0.mlp.gate.weight",
            "model.layers.0.block_sparse_moe.gate.weight",
        ),
        (
            "gemma3",
            "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
            "vision_tower.encoder.layers.0.mlp.fc1.weight",
        ),
        # A fused tensor of the checkpoint is split into these two: they keep their own names.
        (
            "hrm_text",
            "model.L_module.layers.0.mlp.gate_proj.weight",
            "model.L_module.layers.0.mlp.gate_proj.weight",
        ),
    ],
)
@pytest.mark.parametrize("quantized", [True, False])
def test_a_parameter_is_stored_under_the_name_that_its_family_has_on_disk(
    family: str, name: str, stored: str, quantized: bool
) -> None:
    names = checkpoint_names(skeleton(family), [name], [name] if quantized else [])

    assert names == {name: stored}


def test_a_name_that_nothing_leads_back_to_is_refused() -> None:
    with pytest.raises(ModelUnsupported, match=r"transformers computes model\.norm\.weight from"):
        checkpoint_names(skeleton("deepseek_v4"), ["model.norm.weight"], [])
