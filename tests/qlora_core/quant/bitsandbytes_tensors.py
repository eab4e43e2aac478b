"""A weight in bitsandbytes' form, ways to spoil it, and what a refusal has to say."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_core import NF4Weight, quantize_nf4
from qlora_core.errors import ModelWeightsInvalid

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def tensors_of(**settings: Any) -> dict[str, Tensor]:
    return quantize_nf4(matrix(160, 130), **settings).to_bitsandbytes(NAME)


def with_state(tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    state = json.loads(bytes(tensors[STATE].tolist()))
    text = bytearray(json.dumps({**state, **changes}), "utf-8")
    return {**tensors, STATE: torch.frombuffer(text, dtype=torch.uint8)}


def refusal(
    tensors: dict[str, Tensor], error: type[Exception] = ModelWeightsInvalid, *, names: str
) -> str:
    with pytest.raises(error) as told:
        NF4Weight.from_bitsandbytes(tensors, NAME)
    message = str(told.value)
    assert names in message
    assert "\n" not in message
    return message
