"""The header of safetensors files, held to the safetensors library itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qlora_core.models.header import HeaderError, read_header, write_header

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
SHAPES = st.lists(st.integers(0, 4), max_size=3)
A, B = (
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    {
        "dtype": "U8",
        "shape": [3, 1],
        "data_offsets": [8, 11],
    },
)


def write(path: Path, header: Any, data: bytes = bytes(11)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name.isprintable() and name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES)), SHAPES),
        max_size=5,
    )
)
def test_tensors_are_where_the_library_finds_them(
    tmp_path: Path, tensors: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path / "any.safetensors"
    made = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    save_file(made, path, metadata={"format": "pt"})

    places = read_header(path)

    content = path.read_bytes()
    assert places.keys() == made.keys()
    for name, tensor in made.items():
        place = places[name]
        assert (place.dtype, place.shape) == (DTYPES[tensor.dtype], tuple(tensor.shape))
        found = content[place.start : place.start + place.nbytes]
        assert found == bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    header = write_header([("a", "F32", (2, 3)), ("b", "BF16", ()), ("ü", "U8", (0,))])
    path.write_bytes(header + torch.arange(6.0).numpy().tobytes() + b"\x80\x3f")

    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"a", "b", "ü"}
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("a"), torch.arange(6.0).view(2, 3))
        assert torch.equal(file.get_tensor("b"), torch.tensor(1.0, dtype=torch.bfloat16))
    assert len(header) % 8 == 0


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"{", "not readable JSON"),
        (b"\xff\xff", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        ([A], "no JSON object"),
        (
            b'{"a": {"dtype": "U8", "shape": [11], "data_offsets": [0, 11]}, "a": 1}',
            "names a twice",
        ),
        ({"a": 3}, "does not describe a"),
        ({"a": {**A, "dtype": "F99"}, "b": B}, "a has the unknown dtype F99"),
        ({"a": {**A, "dtype": None}, "b": B}, "a has the unknown dtype None"),
        ({"a": {**A, "shape": None}, "b": B}, "a has no readable shape"),
        ({"a": {**A, "shape": [-2]}, "b": B}, "a has no readable shape"),
        ({"a": {**A, "shape": [2.0]}, "b": B}, "a has no readable shape"),
        ({"a": {**A, "shape": [True]}, "b": B}, "a has no readable shape"),
        ({"a": {**A, "data_offsets": [0]}, "b": B}, "a has no readable offsets"),
        ({"a": {**A, "data_offsets": "08"}, "b": B}, "a has no readable offsets"),
        ({"a": {**A, "shape": [3]}, "b": B}, r"a of dtype F32 and shape \[3\] does not fill"),
        ({"a": {**A, "data_offsets": [8, 0]}, "b": B}, "a of dtype F32 .* does not fill"),
        ({"a": {**A, "shape": [2**62]}, "b": B}, "a of dtype F32 .* does not fill"),
        ({"a": A, "b": {**B, "data_offsets": [7, 10]}}, "overlap or leave a gap at byte"),
        ({"a": A, "b": {**B, "data_offsets": [9, 12]}}, "overlap or leave a gap at byte"),
        ({"a": A}, "its tensors end at byte"),
        ({}, "its tensors end at byte"),
    ],
)
def test_a_malformed_header_is_refused_as_the_library_does(
    tmp_path: Path, header: Any, told: str
) -> None:
    path = write(tmp_path / "bad.safetensors", header)

    with pytest.raises(HeaderError, match=told):
        read_header(path)
    if "twice" not in told:  # which the library lets pass
        with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
            pass


@pytest.mark.parametrize("length", [12, 2**40, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(
    tmp_path: Path, length: int
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")

    with pytest.raises(HeaderError, match="its header ends behind the file's 10 bytes"):
        read_header(path)


def test_a_header_of_unreasonable_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # a sparse file

    with pytest.raises(HeaderError, match="its header is 200000000 bytes long"):
        read_header(path)


@pytest.mark.parametrize(
    "shape", [[1] * 65, [0, 2**63], [0, 10**4000]], ids=["65", "2**63", "10**4000"]
)
def test_a_shape_that_torch_cannot_hold_is_refused(tmp_path: Path, shape: list[int]) -> None:
    entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, int(0 not in shape)]}
    path = write(tmp_path / "bad.safetensors", {"a": entry}, bytes(1))

    with pytest.raises(HeaderError, match="a has no readable shape"):
        read_header(path)
