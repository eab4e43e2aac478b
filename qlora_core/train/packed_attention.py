"""Attention over a packed row: each example attends to itself alone, and nothing is computed across examples.

Registered in transformers' attention interface under names of its own (``packed_sdpa``, ``packed_eager``).
A model set to one of them attends as before, except inside `packed_row`: there the mask that its forward
pass makes is a `PackedMask`, which travels to every layer like any other mask (through recomputation, too),
and the family's own attention is run on one example after the other. So grouped queries, sliding windows,
soft caps and attention sinks are the family's own; only the masks across examples are never made.

On a GPU, 16-bit examples with plain causal attention (with a window or not) take one kernel for the
whole row: `torch.nn.attention.varlen`, where torch has it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, add_offsets_to_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PREFIX = "packed_"
# transformers' own implementations that can be run on one example after the other.
_BASES = ("sdpa", "eager")
# What the one kernel for a whole row does not know; each is a tensor or number that changes attention.
_BEYOND_VARLEN = ("softcap", "s_aux", "position_bias")
# The kernel's limit; wider heads go the other way.
_VARLEN_HEAD_DIM = 256

_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("lengths", default=None)


@contextmanager
def packed_row(lengths: Sequence[int]) -> Iterator[None]:
    """Take the row of each forward pass inside the block as examples of these lengths, one after the other."""
    token = _lengths.set(tuple(lengths))
    try:
        yield
    finally:
        _lengths.reset(token)


def packed_name(implementation: str | None) -> str | None:
    """Return the name under which packed rows can be attended to as ``implementation`` does, or None."""
    if implementation not in _BASES:
        return None
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _attention_over(implementation))
        AttentionMaskInterface.register(name, _mask_over(implementation))
    return name


class PackedMask:
    """Stands for the mask of a packed row; makes the mask of one example when it is asked for.

    Args:
        base: the implementation whose masks are made.
        lengths: of the examples, in the row's order.
        settings: what transformers asked a mask for the whole row with.

    Attributes:
        lengths: of the examples.
        window: how many tokens attention reaches back, the token itself counted; None for no limit.
        is_chunked: whether it reaches back to the last multiple of ``window`` instead (Llama 4).
        starts: int32 [examples + 1] on the row's device: where each example begins, and the row's end.
    """

    def __init__(self, base: str, lengths: tuple[int, ...], settings: dict[str, Any]) -> None:
        self.lengths = lengths
        self.window: int | None = settings.get("local_size")
        self.is_chunked = bool(getattr(settings["config"], "attention_chunk_size", None))
        self._base, self._settings = base, settings
        self._plain: dict[int, Tensor | None] = {}
        device = settings["device"]
        ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.starts = ends.to(device, non_blocking=True)

    def of(self, example: int) -> Tensor | None:
        """Return the mask of one example, as the base implementation wants it."""
        length = self.lengths[example]
        if self.window is not None and length > self.window:
            start = sum(self.lengths[:example])
            # The row's mask function, asked about this example's part of the row.
            inside = add_offsets_to_mask_function(self._settings["mask_function"], start, start)
            return self._make(length, mask_function=inside, allow_is_causal_skip=False)
        if length not in self._plain:
            self._plain[length] = self._make(length, allow_is_causal_skip=True)
        return self._plain[length]

    def _make(self, length: int, **settings: Any) -> Tensor | None:  # noqa: ANN401 - transformers' own
        kept = {name: self._settings[name] for name in ("batch_size", "dtype", "config", "device")}
        make = ALL_MASK_ATTENTION_FUNCTIONS[self._base]
        return make(q_length=length, kv_length=length, **kept, **settings)


def _mask_over(base: str) -> Callable[..., Any]:
    """Return what makes masks for ``packed_<base>``; transformers calls it once or twice a forward pass."""

    def mask(**settings: Any) -> Any:  # noqa: ANN401 - transformers' own
        lengths = _lengths.get()
        # Not where a family has put something of its own over the causal mask, or wants none that is causal.
        is_special = settings.get("use_vmap") or settings.get("allow_is_bidirectional_skip")
        if lengths is None or is_special or settings["q_length"] != sum(lengths):
            return ALL_MASK_ATTENTION_FUNCTIONS[base](**settings)
        return PackedMask(base, lengths, settings)

    return mask


def _attention_over(base: str) -> Callable[..., Any]:
    """Return the attention function of ``packed_<base>``."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,  # noqa: ANN401
        **options: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(attention_mask, PackedMask):
            return _base_attention(base, module)(
                module, query, key, value, attention_mask, **options
            )
        if base == "sdpa" and _takes_varlen(query, value, attention_mask, options):
            return _varlen(query, key, value, attention_mask, options.get("scaling")), None
        attend, lengths = _base_attention(base, module), attention_mask.lengths
        # `split` and not slices: its backward pass is one concatenation.
        parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        found = [
            attend(module, q, k, v, attention_mask.of(index), **options)[0]
            for index, (q, k, v) in enumerate(parts)
        ]
        return torch.cat(found, dim=1), None

    return attention


def _base_attention(base: str, module: nn.Module) -> Callable[..., Any]:
    """Return transformers' function; the eager one is the family's own and stands beside its classes."""
    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]
    return sys.modules[type(module).__module__].eager_attention_forward


def _takes_varlen(query: Tensor, value: Tensor, mask: PackedMask, options: dict[str, Any]) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= _VARLEN_HEAD_DIM
        and not options.get("dropout")
        and all(options.get(name) is None for name in _BEYOND_VARLEN)
        and not mask.is_chunked
        and "window_size" in _varlen_parameters()
    )


def _varlen_parameters() -> frozenset[str]:
    """Return the names of `varlen_attn`'s parameters in this torch; empty where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scale: float | None
) -> Tensor:
    """Attend over the whole row at once; query [1, heads, tokens, width], the result [1, tokens, heads, width]."""
    from torch.nn.attention.varlen import varlen_attn

    heads = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if heads > 1 and "enable_gqa" in _varlen_parameters():
        options["enable_gqa"] = True
    elif heads > 1:
        key, value = (x.repeat_interleave(heads, dim=1) for x in (key, value))
    longest = max(mask.lengths)
    reach = -1 if mask.window is None else mask.window - 1
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    found: Any = varlen_attn(
        q, k, v, mask.starts, mask.starts, longest, longest,
        scale=scale, window_size=(reach, 0), **options,
    )  # fmt: skip
    return found[None]
