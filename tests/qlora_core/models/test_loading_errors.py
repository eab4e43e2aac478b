"""Every folder that cannot be loaded is refused with its code and a sentence that says why."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_core import ModelError, load_model
from qlora_core.errors import ConfigError
from tests.tiny_models import save_tiny_llama

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model", shard_bytes=60_000)


def refusal(folder: Path, **settings: Any) -> ModelError:
    with pytest.raises(ModelError) as told:
        load_model(folder, **{"device": "cpu", "compute_dtype": torch.float32, **settings})
    assert "\n" not in told.value.message
    assert len(told.value.message) < 1000
    return told.value


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere")

    assert error.code == "model_not_found"
    assert "nowhere" in error.message


def test_a_folder_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()

    error = refusal(folder)

    assert error.code == "model_not_found"
    assert "no config.json" in error.message


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", '{"model_type": 3}', "{}"], ids=repr)
def test_a_config_that_cannot_be_read(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))

    error = refusal(folder)

    assert error.code == "model_unsupported"
    assert "config.json" in error.message


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_model"},
        {"model_type": "t5"},
        {"num_attention_heads": 0},
        {"hidden_size": -64},
        {"hidden_size": "wide"},
        {"hidden_size": 2**40},
        {"hidden_size": None},
        {"vocab_size": [384]},
        {"rope_parameters": "long"},
        {"hidden_act": 3},
        {"num_hidden_layers": {}},
    ],
    ids=str,
)
def test_a_config_that_no_causal_language_model_has(folder: Path, changes: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **changes)

    assert refusal(folder).code == "model_unsupported"


def test_code_in_the_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    (folder / "evil.py").write_text(f"from pathlib import Path; Path({str(proof)!r}).touch()")
    edit_json(
        folder / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )

    error = refusal(folder)

    assert error.code == "model_unsupported"
    assert not proof.exists()


def test_a_checkpoint_that_is_quantized_already(folder: Path) -> None:
    edit_json(
        folder / "config.json",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )

    error = refusal(folder)

    assert error.code == "model_unsupported"
    assert "quantized already" in error.message


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    error = refusal(folder)

    assert error.code == "model_weights_missing"
    assert "model.safetensors" in error.message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_weights_that_are_only_there_as_pickle_are_never_opened(
    folder: Path, tmp_path: Path, name: str
) -> None:
    proof = tmp_path / "it ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (proof,))

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Evil()))

    error = refusal(folder)

    assert error.code == "model_weights_pickle"
    assert name in error.message
    assert not proof.exists()


def test_a_pickle_beside_safetensors_is_not_looked_at(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")

    load_model(folder, device="cpu", compute_dtype=torch.float32)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.999], ids=str)
def test_a_truncated_file(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert "model.safetensors is truncated" in error.message


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])

    error = refusal(sharded)

    assert error.code == "model_weights_invalid"
    assert shard.name in error.message


def test_a_file_with_more_than_its_header_says(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")

    assert refusal(folder).code == "model_weights_invalid"


def test_a_shard_that_is_not_there(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()

    error = refusal(sharded)

    assert error.code == "model_weights_missing"
    assert shard.name in error.message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_that_cannot_be_read(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)

    error = refusal(sharded)

    assert error.code == "model_weights_invalid"
    assert "model.safetensors.index.json" in error.message


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "", "a/b", 3])
def test_an_index_that_leads_out_of_the_folder(sharded: Path, name: Any) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map={WEIGHT: name})

    error = refusal(sharded)

    assert error.code == "model_weights_invalid"
    assert "no plain name" in error.message


def test_an_index_that_names_a_pickle_file(sharded: Path) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map={WEIGHT: "weights.bin"})

    assert refusal(sharded).code == "model_weights_pickle"


def test_an_index_that_names_a_tensor_that_no_shard_has(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map={**weight_map, "model.more.weight": weight_map[WEIGHT]})

    error = refusal(sharded)

    assert error.code == "model_weights_invalid"
    assert "model.more.weight" in error.message


def test_a_shard_without_any_tensor(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")

    error = refusal(folder)

    assert error.code == "model_weights_missing"
    assert "hold no tensors" in error.message


def test_an_empty_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({WEIGHT: torch.empty(0, 64)}))

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert f"{WEIGHT} is [0, 64] in the checkpoint" in error.message


def test_a_header_that_is_longer_than_its_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert "its header ends behind the file's" in error.message


def test_a_tensor_that_the_header_names_twice(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(header)[WEIGHT])
    doubled = header[:-1] + f', "{WEIGHT}": {entry}}}'.encode()
    path.write_bytes(len(doubled).to_bytes(8, "little") + doubled + content[8 + length :])

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert f"names {WEIGHT} twice" in error.message


def test_shards_may_be_links_out_of_the_folder_as_the_hubs_cache_has_them(
    sharded: Path, tmp_path: Path
) -> None:
    (tmp_path / "blobs").mkdir()
    for number, shard in enumerate(sorted(sharded.glob("*.safetensors"))):
        shard.rename(tmp_path / "blobs" / str(number))
        shard.symlink_to(f"../blobs/{number}")

    load_model(sharded, device="cpu", compute_dtype=torch.float32)


def test_a_shard_that_is_a_link_to_nowhere(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to("../blobs/gone")

    error = refusal(sharded)

    assert error.code == "model_weights_missing"
    assert shard.name in error.message


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_weights_that_are_no_file_are_not_opened(folder: Path, make: Callable[[Path], Any]) -> None:
    (folder / "model.safetensors").unlink()
    make(folder / "model.safetensors")

    assert refusal(folder).code == "model_weights_missing"


def test_an_index_that_disagrees_with_its_shards(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map[WEIGHT])
    edit_json(path, weight_map={**weight_map, WEIGHT: other})

    error = refusal(sharded)

    assert error.code == "model_weights_invalid"
    assert WEIGHT in error.message


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)

    error = refusal(sharded)

    assert error.code == "model_weights_invalid"
    assert "in two files" in error.message


@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_is_not_there(folder: Path, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.__delitem__(name))

    error = refusal(folder)

    assert error.code == "model_weights_missing"
    assert f"lacks 1 tensors that the model needs ({name})" in error.message


def test_a_tensor_that_the_model_has_no_place_for(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update(extra=torch.ones(3)))

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert "(extra)" in error.message


def test_a_tensor_that_is_there_under_two_names(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(64)}))

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert "model.norm.weight" in error.message
    assert "only one of them" in error.message


@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_tensor_of_another_shape(folder: Path, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(5, 7)}))

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert f"{name} is [5, 7] in the checkpoint" in error.message


def test_a_transposed_tensor_is_not_taken_for_the_right_one(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].T.contiguous()}))

    assert refusal(folder).code == "model_weights_invalid"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", [WEIGHT, "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_a_tensor_that_is_not_finite(folder: Path, name: str, bad: float) -> None:
    edit_weights(folder, lambda tensors: tensors[name].view(-1)[37].fill_(bad))

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert f"{name} holds NaN or infinity" in error.message


@pytest.mark.parametrize("settings", [{"quantize": False}, {"skip_modules": ("up_proj",)}], ids=str)
def test_a_linear_layer_that_stays_dense_and_is_not_finite(
    folder: Path, settings: dict[str, Any]
) -> None:
    edit_weights(folder, lambda tensors: tensors[WEIGHT][3].fill_(torch.nan))

    error = refusal(folder, **settings)

    assert error.code == "model_weights_invalid"
    assert f"{WEIGHT} holds NaN or infinity" in error.message


@pytest.mark.parametrize(
    ("compute_dtype", "value"), [(torch.float16, 66_000.0), (torch.bfloat16, 3.4e38)], ids=str
)
@pytest.mark.parametrize("name", [WEIGHT, "model.norm.weight"])
def test_a_tensor_that_the_compute_dtype_cannot_hold(
    folder: Path, name: str, compute_dtype: torch.dtype, value: float
) -> None:
    edit_weights(folder, lambda tensors: tensors[name].view(-1)[37].fill_(value))

    error = refusal(folder, compute_dtype=compute_dtype)

    assert error.code == "model_weights_invalid"
    assert f"{name} holds numbers that are too large for {compute_dtype}" in error.message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_tensor_of_a_dtype_that_is_no_weights(folder: Path, dtype: torch.dtype) -> None:
    edit_weights(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(dtype)}))

    error = refusal(folder)

    assert error.code == "model_unsupported"
    assert f"{WEIGHT} is {dtype}" in error.message


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": LONG},
        {"hidden_act": LONG},
        {"hidden_size": LONG},
        {"quantization_config": {"quant_method": LONG}},
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": LONG}},
        {"quantization_config": LONG},
    ],
    ids=[
        "model_type",
        "hidden_act",
        "hidden_size",
        "quant_method",
        "quant_type",
        "quantization_config",
    ],
)
def test_a_long_value_in_the_config_does_not_make_a_long_message(
    folder: Path, changes: dict[str, Any]
) -> None:
    edit_json(folder / "config.json", **changes)

    assert refusal(folder).code == "model_unsupported"


@pytest.mark.parametrize("name", [LONG, "two\nlines", "\x1b[31mred", ""], ids=lambda name: name[:9])
def test_a_tensors_name_that_no_message_can_show(folder: Path, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: torch.ones(3)}))

    error = refusal(folder)

    assert error.code == "model_weights_invalid"
    assert "\x1b" not in error.message


@pytest.mark.parametrize("shard", [LONG, f"{LONG}.safetensors", "two\nlines.safetensors"], ids=len)
def test_a_shards_name_that_no_message_can_show(sharded: Path, shard: str) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map={WEIGHT: shard})

    assert refusal(sharded).code in {"model_weights_missing", "model_weights_pickle"}


def test_an_indexs_name_that_no_message_can_show(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0].name
    edit_json(sharded / "model.safetensors.index.json", weight_map={f"{LONG}\n": shard})

    assert refusal(sharded).code == "model_weights_invalid"


@pytest.mark.parametrize("value", ["float32", None, torch.float64, torch.int8, "auto"], ids=str)
def test_a_compute_dtype_that_there_is_not(folder: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"compute_dtype must be torch\.float16, .* not "):
        load_model(folder, device="cpu", compute_dtype=value)


@pytest.mark.parametrize(
    "value", ["meta", "mps", "gpu", "", None, 1.5, LONG], ids=lambda v: f"{v}"[:9]
)
def test_a_device_that_there_is_not(folder: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"device must be cpu or cuda, not ") as told:
        load_model(folder, device=value, compute_dtype=torch.float32)

    assert len(told.value.message) < 300


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        load_model(folder, device="cuda", compute_dtype=torch.float32)


@pytest.mark.gpu
def test_a_gpu_beyond_those_there_are(folder: Path) -> None:
    with pytest.raises(ConfigError, match="device is cuda:99, but there "):
        load_model(folder, device="cuda:99", compute_dtype=torch.float32)


def test_a_generation_config_that_cannot_be_read(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")

    error = refusal(folder)

    assert error.code == "model_unsupported"
    assert "generation_config.json" in error.message


def test_a_layer_that_is_read_past_its_call_is_refused_in_a_sentence(folder: Path) -> None:
    model = load_model(folder, device="cpu", compute_dtype=torch.float32)

    with pytest.raises(ModelError, match="reads the weight of a linear layer directly"):
        _ = model.get_submodule("model.layers.0.mlp.up_proj").weight
