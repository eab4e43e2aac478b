"""Models with state-space layers are trained as every other: no weight is read past its adapter."""

from pathlib import Path

import pytest
import torch

from qlora_core import LoraConfig
from qlora_core.nn import lora_modules
from tests.qlora_core.export.bases import IDS, with_adapter
from tests.qlora_core.models.families import save_tiny


@pytest.mark.parametrize(
    "family", ["mamba", "falcon_mamba", "mamba2", "bamba", "falcon_h1", "nemotron_h"]
)
def test_in_training_every_adapter_of_a_state_space_model_has_its_part(
    family: str, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path)
    model = with_adapter(tmp_path, LoraConfig(r=2))
    with torch.no_grad():
        expected = model.eval()(IDS, use_cache=False).logits

    found = model.train()(IDS, use_cache=False).logits
    found.float().square().mean().backward()

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    adapters = lora_modules(model)
    assert any(path.endswith("out_proj") for path in adapters)
    for path, adapter in adapters.items():
        assert adapter.lora_B.grad is not None, path
        assert adapter.lora_B.grad.abs().max() > 0, path


def test_dropout_stays_in_the_layers_of_a_mixer(tmp_path: Path) -> None:
    save_tiny("mamba", tmp_path)
    model = with_adapter(tmp_path, LoraConfig(r=2, dropout=0.5)).train()

    with torch.no_grad():
        once, again = (model(IDS, use_cache=False).logits for _ in range(2))

    assert not torch.equal(once, again)
