"""What else is set in the process or stands in the folder: loading heeds what it should, and leaves the rest alone."""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_core import LoraConfig, add_lora, load_model
from tests.tiny_models import save_tiny_llama, save_tiny_qwen2

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def load(folder: Path, **settings: object) -> PreTrainedModel:
    return load_model(folder, **{"device": "cpu", "compute_dtype": torch.float32, **settings})  # pyright: ignore[reportArgumentType]


def test_progress_counts_the_bytes_up_to_all_of_them(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, shard_bytes=60_000)
    told: list[tuple[int, int]] = []

    load(folder, on_progress=lambda done, total: told.append((done, total)))

    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert len(told) > 10
    assert {whole for _, whole in told} == {total}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, total)


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)
    before = torch.random.get_rng_state()

    load(folder)

    assert torch.equal(torch.random.get_rng_state(), before)


def test_loaded_in_inference_mode_a_model_is_trained_outside_of_it(tmp_path: Path) -> None:
    folder = save_tiny_qwen2(tmp_path)  # with biases and a tied head
    with torch.inference_mode():
        model = load(folder)

    add_lora(model, LoraConfig(r=4))
    model(IDS, labels=IDS).loss.backward()

    assert not any(one.is_inference() for one in [*model.parameters(), *model.buffers()])
    trained = [one for one in model.parameters() if one.requires_grad]
    assert trained
    assert all(one.grad is not None for one in trained)


@pytest.mark.parametrize("name", ["meta", "cpu"])
def test_torchs_default_device_is_not_asked(tmp_path: Path, name: str) -> None:
    folder = save_tiny_llama(tmp_path)
    expected = load(folder)(IDS).logits

    with torch.device(name):
        model = load(folder)

    assert {one.device.type for one in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert torch.equal(model(IDS).logits, expected)


def test_torchs_default_dtype_is_not_asked(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)
    expected = load(folder)

    torch.set_default_dtype(torch.bfloat16)
    try:
        model = load(folder)
    finally:
        torch.set_default_dtype(torch.float32)

    wanted = {name: one.dtype for name, one in expected.named_buffers()}
    assert {name: one.dtype for name, one in model.named_buffers()} == wanted
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_the_folders_generation_settings_are_used(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)
    settings = {"eos_token_id": [2, 7], "temperature": 0.5, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))

    model = load(folder)

    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == [2, 7]
    assert model.name_or_path == str(folder)


def test_several_threads_may_load_at_once(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)
    expected = load(folder, compute_dtype=torch.bfloat16)(IDS).logits
    together = threading.Barrier(3)

    def load_beside_others() -> PreTrainedModel:
        together.wait()
        return load(folder, compute_dtype=torch.bfloat16)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as threads:
            models = [
                asked.result()
                for _ in range(5)
                for asked in [threads.submit(load_beside_others) for _ in range(3)]
            ]
    finally:
        sys.setswitchinterval(before)

    assert all(torch.equal(model(IDS).logits, expected) for model in models)
    layer = nn.Linear(2, 2)
    assert layer.weight.device.type == "cpu"
    assert layer.weight.dtype == torch.float32


def test_a_layer_made_in_another_thread_meanwhile_has_its_weights(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path)
    done = threading.Event()

    def make_layers() -> set[str]:
        devices: set[str] = set()
        while not done.is_set():
            devices.add(nn.Linear(2, 2).weight.device.type)
        return devices

    with ThreadPoolExecutor(1) as other:
        made = other.submit(make_layers)
        for _ in range(5):
            load(folder)
        done.set()

    assert made.result() == {"cpu"}
