"""Tensors come out of the files as the safetensors library reads them, and their memory is used again."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_core.errors import ModelUnsupported, ModelWeightsInvalid
from qlora_core.models.files import find_weights
from qlora_core.models.header import write_header
from qlora_core.models.reading import Staging, TensorReader

CPU = torch.device("cpu")
TENSORS = {
    "matrix": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(1)).half(),
    "brain": torch.randn(11, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "bytes": torch.arange(9, dtype=torch.uint8),
    "number": torch.tensor(3),
    "flags": torch.tensor([True, False]),
    "nothing": torch.empty(0, 4),
    "small": torch.ones(2).to(torch.float8_e4m3fn),
}


def reader(folder: Path, tensors: dict[str, Tensor] = TENSORS, **settings: object) -> TensorReader:
    save_file(tensors, folder / "model.safetensors")
    return TensorReader(find_weights(folder), CPU, **settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("way", ["take", "lend"])
def test_a_tensor_is_read_as_it_was_saved(tmp_path: Path, way: str, name: str) -> None:
    with reader(tmp_path) as open_reader:
        tensor = getattr(open_reader, way)(name)

        assert (tensor.dtype, tensor.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), TENSORS[name].view(-1).view(torch.uint8)
        )


def test_lent_memory_is_used_again_and_taken_memory_is_not(tmp_path: Path) -> None:
    with reader(tmp_path) as open_reader:
        taken = open_reader.take("matrix")
        lent = open_reader.lend("half")
        again = open_reader.lend("matrix")

    assert lent.data_ptr() == again.data_ptr()
    assert torch.equal(taken, TENSORS["matrix"])
    assert torch.equal(again, TENSORS["matrix"])
    assert not torch.equal(lent, TENSORS["half"])


@pytest.mark.parametrize(
    "shapes", [[(7, 5)], [(7, 5), (3, 5), (1, 5)], [(2,), (3,)], [(2, 0)]], ids=str
)
def test_lent_tensors_are_joined_along_their_first_dimension(
    tmp_path: Path, shapes: list[tuple[int, ...]]
) -> None:
    tensors = {f"{i}": torch.randn(shape).bfloat16() for i, shape in enumerate(shapes)}
    with reader(tmp_path, tensors) as open_reader:
        joined = open_reader.lend_joined(list(tensors))

        assert torch.equal(joined, torch.cat(list(tensors.values())))


def test_progress_counts_what_was_read(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with reader(
        tmp_path, on_progress=lambda done, total: told.append((done, total))
    ) as open_reader:
        for name in TENSORS:
            open_reader.lend(name)

    nbytes = [tensor.nbytes for tensor in TENSORS.values()]
    total = (tmp_path / "model.safetensors").stat().st_size
    assert told == [(sum(nbytes[: i + 1]), total) for i in range(len(nbytes))]


def test_files_are_closed_at_the_end(tmp_path: Path) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    with reader(tmp_path) as open_reader:
        open_reader.take("matrix")

    assert set(Path("/proc/self/fd").iterdir()) <= before


def test_a_file_that_shrinks_meanwhile_is_an_error_and_no_crash(tmp_path: Path) -> None:
    with reader(tmp_path, {"a": torch.ones(1000), "b": torch.ones(1000)}) as open_reader:
        open_reader.lend("a")
        os.truncate(tmp_path / "model.safetensors", 1000)

        with pytest.raises(ModelWeightsInvalid, match=r"tensor b cannot be read from model\.safe"):
            open_reader.lend("b")


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with reader(tmp_path) as open_reader:
        (tmp_path / "model.safetensors").unlink()

        with pytest.raises(ModelWeightsInvalid, match=r"matrix cannot be read .*No such file"):
            open_reader.take("matrix")


def test_a_dtype_that_torch_does_not_have_is_refused_by_the_tensors_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(write_header([("odd", "F4", (4,))]) + b"\0\0")

    with (
        TensorReader(find_weights(tmp_path), CPU) as open_reader,
        pytest.raises(ModelUnsupported, match="odd is F4 in the checkpoint"),
    ):
        open_reader.take("odd")


@pytest.mark.parametrize("buffer_bytes", [1, 7, 100, 1000])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_staging_moves_every_byte_in_pieces(tmp_path: Path, device: str, buffer_bytes: int) -> None:
    content = torch.randint(0, 256, (500,), dtype=torch.uint8)
    path = tmp_path / "bytes"
    path.write_bytes(bytes(content.tolist()))
    out = torch.zeros(300, dtype=torch.uint8, device=device)
    staging = Staging(torch.device(device), buffer_bytes)

    with path.open("rb") as file:
        staging.fill(out, file.fileno(), 100)
        staging.fill(out[:5], file.fileno(), 0)

    assert torch.equal(out[5:].cpu(), content[105:400])
    assert torch.equal(out[:5].cpu(), content[:5])
