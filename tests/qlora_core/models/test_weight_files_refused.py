"""Weight files that are not there, torn, misleading or no safetensors are refused with a sentence."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_core import load_model
from tests.qlora_core.models.refusals import edit_json, edit_weights, refusal
from tests.tiny_models import save_tiny_llama

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model", shard_bytes=60_000)


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


LONG = "x" * 100_000


@pytest.mark.parametrize("shard", [LONG, f"{LONG}.safetensors", "two\nlines.safetensors"], ids=len)
def test_a_shards_name_that_no_message_can_show(sharded: Path, shard: str) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map={WEIGHT: shard})

    assert refusal(sharded).code in {"model_weights_missing", "model_weights_pickle"}


def test_an_indexs_name_that_no_message_can_show(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0].name
    edit_json(sharded / "model.safetensors.index.json", weight_map={f"{LONG}\n": shard})

    assert refusal(sharded).code == "model_weights_invalid"
