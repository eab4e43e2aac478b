"""bitsandbytes on a GPU: its public calls, and its compiled kernels through its own library handle.

Where it cannot be used the reason is told, its rows are missing, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_core.quant.weight import NF4Weight


@cache
def why_absent(device: str) -> str | None:
    """Say why bitsandbytes cannot be used on a device, or give None when it can."""
    try:
        quantize(torch.ones(64, device=device), block_size=64, double_quant=False)
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@dataclass(frozen=True)
class State:
    """A weight in bitsandbytes' own objects, over the same memory as an `NF4Weight`."""

    packed: Tensor
    state: Any

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """Call `bitsandbytes.functional.dequantize_4bit`, its public way back."""
        from bitsandbytes import functional

        return functional.dequantize_4bit(self.packed, self.state, out=out)


def state_of(weight: NF4Weight) -> State:
    """Give what bitsandbytes would hold for a weight; it dequantizes to the weight's own dtype."""
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    nested = None
    if weight.nested_absmax is not None:
        nested = QuantState(
            absmax=weight.nested_absmax,
            blocksize=256,
            code=create_dynamic_map().to(weight.device),
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=weight.absmax,
        shape=weight.shape,
        code=get_4bit_type("nf4", device=str(weight.device)),
        blocksize=weight.block_size,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=weight.offset,
        state2=nested,
    )
    return State(weight.packed.view(-1, 1), state)


def dequantize_raw(packed: Tensor, absmax: Tensor, out: Tensor, *, block_size: int) -> None:
    """Launch the compiled kernel behind it: scales are float32, ``out`` is bfloat16 and there."""
    from bitsandbytes.cextension import lib

    kernel: Any = lib.cdequantize_blockwise_bf16_nf4  # pyright: ignore[reportAttributeAccessIssue]
    kernel(
        None,
        packed.data_ptr(),
        absmax.data_ptr(),
        out.data_ptr(),
        block_size,
        out.numel(),
        torch.cuda.current_stream().cuda_stream,
    )


def quantize(values: Tensor, *, block_size: int, double_quant: bool) -> tuple[Tensor, Any]:
    """Call `bitsandbytes.functional.quantize_4bit`: its packed codes and its state."""
    from bitsandbytes import functional

    return functional.quantize_4bit(
        values, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )
