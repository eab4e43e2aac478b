"""The tensors in which bitsandbytes keeps a 4-bit weight on disk, to and from our own.

The layout is that of its ``QuantState.as_dict(packed=True)``, which transformers writes into safetensors files;
docs/formats/bitsandbytes.md describes it. bitsandbytes itself is never imported. What a file says is checked here
once, since a wrong length would have a kernel read past the end of a tensor.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qlora_core.errors import ModelUnsupported, ModelWeightsInvalid
from qlora_core.quant.checks import FLOATS
from qlora_core.quant.codebook import (
    BLOCK_SIZES,
    NESTED_BLOCK_SIZE,
    dynamic_levels,
    nf4_levels,
)

if TYPE_CHECKING:
    from qlora_core.quant.weight import NF4Weight

STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"
"""Follows the weight's name in the key that marks a tensor as NF4."""

FP4_STATE_SUFFIX = ".quant_state.bitsandbytes__fp4"
SUFFIXES = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    STATE_SUFFIX,
)
"""What follows a weight's name in the keys of the tensors beside it."""

# Codes may be stored under the guise of another dtype, which sharding by FSDP wants; the bytes are the same.
_STORAGE = (
    torch.uint8,
    torch.int8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_MOST_ELEMENTS = 2**48
_MOST_DIMENSIONS = 64  # as many as torch has
_MOST_CHARACTERS = 80  # of a file's value that an error repeats
# Two tools may compute a level of the dynamic map one unit in the last place apart.
_ONE_ULP = 2.0**-22


class Fields(NamedTuple):
    """The fields of an `NF4Weight`, in its order."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    block_size: int
    dtype: torch.dtype


def write(weight: NF4Weight, name: str) -> dict[str, Tensor]:
    """Give the tensors that stand for ``weight`` in a checkpoint, by key.

    Args:
        weight: any `NF4Weight`.
        name: of the weight, such as ``model.layers.0.mlp.up_proj.weight``.

    Returns:
        ``name`` uint8 [bytes, 1] and the tensors beside it, on the weight's device. The codes and scales are views
        of the weight's own; the small rest is new.
    """
    device = weight.device
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {
        name: weight.packed.view(-1, 1),
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": nf4_levels(device).clone(),
    }
    if weight.nested_absmax is not None and weight.offset is not None:
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax
        tensors[f"{name}.nested_quant_map"] = dynamic_levels(device).clone()
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            # A float32 as a decimal of a float64: it comes back to the bit.
            "nested_offset": weight.offset.item(),
        }
    text = bytearray(json.dumps(state), "utf-8")
    tensors[f"{name}{STATE_SUFFIX}"] = torch.frombuffer(text, dtype=torch.uint8).to(device)
    return tensors


def read(tensors: Mapping[str, Tensor], name: str) -> Fields:
    """Read a weight's fields from the tensors of a checkpoint.

    Args:
        tensors: by key; keys that do not begin with ``name`` are not looked at.
        name: of the weight, as in `write`.

    Returns:
        The fields; tensors are views of those given where that is possible.

    Raises:
        ModelWeightsInvalid: a tensor is missing, one too many, or of another dtype, length or content than its
            neighbours say.
        ModelUnsupported: the weight is not in NF4, or in a form of it that bitsandbytes does not write.
    """
    _refuse_strangers(tensors, name)
    state_key = f"{name}{STATE_SUFFIX}"
    state = _read_state(_take(tensors, state_key), state_key)
    shape, block_size, dtype = _read_geometry(state, state_key)
    n_blocks = -(-shape.numel() // block_size)

    packed = _as_bytes(_take(tensors, name), name)
    _check_length(packed, -(-shape.numel() // 2), name, f"bytes for the shape {list(shape)}")
    _check_map(tensors, f"{name}.quant_map", nf4_levels(torch.device("cpu")))
    absmax_key, nested_key = f"{name}.absmax", f"{name}.nested_absmax"
    absmax = _take(tensors, absmax_key).reshape(-1)
    _check_length(absmax, n_blocks, absmax_key, f"scales in blocks of {block_size}")
    if not ({nested_key, f"{name}.nested_quant_map"} & tensors.keys() or "nested_offset" in state):
        _check_scales(absmax, absmax_key)
        return Fields(packed, absmax, None, None, shape, block_size, dtype)

    if absmax.dtype != torch.uint8:
        raise ModelWeightsInvalid(
            f"{absmax_key} is {absmax.dtype}, but beside {nested_key} it must be torch.uint8"
        )
    _check_map(tensors, f"{name}.nested_quant_map", dynamic_levels(torch.device("cpu")))
    nested_absmax = _take(tensors, nested_key).reshape(-1)
    _check_length(nested_absmax, -(-n_blocks // NESTED_BLOCK_SIZE), nested_key, "nested scales")
    _check_scales(nested_absmax, nested_key)
    offset = _read_offset(state, state_key).to(absmax.device)
    return Fields(packed, absmax, nested_absmax, offset, shape, block_size, dtype)


def _refuse_strangers(tensors: Mapping[str, Tensor], name: str) -> None:
    if f"{name}{FP4_STATE_SUFFIX}" in tensors:
        raise ModelUnsupported(
            f"{name} is in FP4 ({name}{FP4_STATE_SUFFIX}); only NF4 can be loaded: "
            "quantize the model again with bnb_4bit_quant_type nf4"
        )
    known = {f"{name}{suffix}" for suffix in SUFFIXES}
    strange = sorted(key for key in tensors if key.startswith(f"{name}.") and key not in known)
    if strange:
        raise ModelWeightsInvalid(f"{strange[0]} is no part of a 4-bit weight that is known here")


def _take(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    tensor = tensors.get(key)
    if tensor is None:
        raise ModelWeightsInvalid(f"the 4-bit weight lacks the tensor {key}")
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ModelWeightsInvalid(
            f"{key} holds no values that can be read: it is {'on meta' if tensor.is_meta else 'sparse'}"
        )
    return tensor


def _read_state(tensor: Tensor, key: str) -> dict[str, Any]:
    if tensor.dtype != torch.uint8:
        raise ModelWeightsInvalid(f"{key} is {tensor.dtype}, but it holds text as torch.uint8")
    try:
        state = json.loads(bytes(tensor.reshape(-1).tolist()))
    except (ValueError, RecursionError) as error:
        raise ModelWeightsInvalid(f"{key} is not readable JSON ({error})") from error
    if not isinstance(state, dict):
        raise ModelWeightsInvalid(f"{key} must hold a JSON object")
    return state


def _read_geometry(state: dict[str, Any], key: str) -> tuple[torch.Size, int, torch.dtype]:
    quant_type = state.get("quant_type")
    if quant_type != "nf4":
        raise ModelUnsupported(
            f"{key} says quant_type {_shown(quant_type)}; only nf4 can be loaded"
        )
    shape = state.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMENSIONS
        or not all(_is_count(size) for size in shape)
        or math.prod(shape) > _MOST_ELEMENTS
    ):
        raise ModelWeightsInvalid(f"{key} says shape {_shown(shape)}, which no weight has")
    block_size = state.get("blocksize")
    if not _is_count(block_size) or block_size not in BLOCK_SIZES:
        raise ModelUnsupported(
            f"{key} says blocksize {_shown(block_size)}; "
            f"it can be {', '.join(map(str, BLOCK_SIZES))}"
        )
    dtype = state.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ModelUnsupported(f"{key} says dtype {_shown(dtype)}; it can be {', '.join(_DTYPES)}")
    return torch.Size(shape), block_size, _DTYPES[dtype]


def _read_offset(state: dict[str, Any], key: str) -> Tensor:
    nested_block_size, nested_dtype = state.get("nested_blocksize"), state.get("nested_dtype")
    if nested_block_size != NESTED_BLOCK_SIZE or nested_dtype != "float32":
        raise ModelUnsupported(
            f"{key} says nested_blocksize {_shown(nested_block_size)} "
            f"and nested_dtype {_shown(nested_dtype)}; "
            f"only {NESTED_BLOCK_SIZE} and 'float32' can be loaded"
        )
    value = state.get("nested_offset")
    known = isinstance(value, float) or (isinstance(value, int) and abs(value) < _MOST_ELEMENTS)
    offset = torch.tensor(
        math.nan if value is True or not known else value, dtype=torch.float32, device="cpu"
    )
    if not bool(torch.isfinite(offset)):
        raise ModelWeightsInvalid(
            f"{key} says nested_offset {_shown(value)}, which is no finite number"
        )
    return offset


def _shown(value: object) -> str:
    """Give a value as an error repeats it: in short, whatever a file holds."""
    text = reprlib.repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _as_bytes(packed: Tensor, name: str) -> Tensor:
    if packed.dtype not in _STORAGE:
        raise ModelWeightsInvalid(
            f"{name} is {packed.dtype}, in which bitsandbytes stores no 4-bit codes"
        )
    return packed.reshape(-1).view(torch.uint8)


def _check_length(tensor: Tensor, wanted: int, key: str, what: str) -> None:
    if tensor.numel() != wanted:
        raise ModelWeightsInvalid(f"{key} must hold {wanted} {what}, not {tensor.numel()}")


def _check_scales(scales: Tensor, key: str) -> None:
    if scales.dtype != torch.float32:
        raise ModelWeightsInvalid(f"{key} is {scales.dtype}, but must be torch.float32")
    if not bool(torch.isfinite(scales).all()):
        raise ModelWeightsInvalid(f"{key} holds NaN or infinity")


def _check_map(tensors: Mapping[str, Tensor], key: str, wanted: Tensor) -> None:
    found = _take(tensors, key)
    if found.dtype != torch.float32:
        raise ModelWeightsInvalid(f"{key} is {found.dtype}, but must be torch.float32")
    _check_length(found, wanted.numel(), key, "levels")
    if not torch.allclose(found.reshape(-1).cpu(), wanted, rtol=_ONE_ULP, atol=1e-12):
        raise ModelUnsupported(f"{key} holds other levels than the format's")
