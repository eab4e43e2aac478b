"""Whether a model can be trained on packed rows, found by trying: packed logits against separate ones.

What stands in the way is rarely said in a config: positions that a family counts for itself, biases by
distance, state that runs along the row. So nothing is assumed of a family; a few tokens tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_core.train.packed_attention import packed_name, packed_row

# Of the examples it is tried with: one of a single token, and the longest last, so that all others come before it.
_PROBE_LENGTHS = (7, 1, 12, 5, 17)
_NOT_PACKABLE = (
    AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


class Packing(Enum):
    """How the examples of a row are kept apart.

    Attributes:
        BY_EXAMPLE: attention is run on one example after the other (`packed_attention`).
        BY_MASK: transformers makes a mask for the whole row from the positions; as exact, but it computes and
            masks what lies across examples.
        NONE: not at all; examples are padded instead.
    """

    BY_EXAMPLE = "by example"
    BY_MASK = "by mask"
    NONE = "none"


def choose_packing(model: PreTrainedModel) -> Packing:
    """Find the best way of packing that gives this model's own logits, and set the model up for it."""
    configs = _attention_configs(model)
    before = [config._attn_implementation for config in configs]  # noqa: SLF001
    names = [packed_name(implementation) or implementation for implementation in before]
    if names != before:
        _set_attention(configs, names)
        if _is_exact(model):
            return Packing.BY_EXAMPLE
        _set_attention(configs, before)
    return Packing.BY_MASK if _is_exact(model) else Packing.NONE


def alone_above(model: PreTrainedModel) -> int | None:
    """Return the tokens above which an example shares no row, since it would change the others; None for no limit.

    Rotary embeddings of two kinds choose their frequencies by the longest example of a forward pass, and
    attention in chunks is counted from the row's beginning by transformers before 5.18.
    """
    config = model.config.get_text_config()
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in (rope, *rope.values()) if isinstance(one, dict)]
    limits = [
        one.get("original_max_position_embeddings") or config.max_position_embeddings
        for one in kinds
        if one.get("rope_type") in ("dynamic", "longrope")
    ]
    if getattr(config, "attention_chunk_size", None):
        limits.append(config.attention_chunk_size)
    return min(limits, default=None)


def attention_names(model: PreTrainedModel) -> str:
    """Name the implementations of attention that the model's parts are set to."""
    names = [str(config._attn_implementation) for config in _attention_configs(model)]  # noqa: SLF001
    return ", ".join(dict.fromkeys(names))


def _attention_configs(model: PreTrainedModel) -> list[Any]:
    """Return the configs that say how modules attend, each once: that of the model and those of its parts."""
    configs = {id(model.config): model.config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
    return list(configs.values())


def _set_attention(configs: Sequence[Any], names: Sequence[str | None]) -> None:
    # In this order, since a config hands what it is told on to its parts.
    for config, name in zip(configs, names, strict=True):
        config._attn_implementation = name  # noqa: SLF001


@torch.no_grad()
def _is_exact(model: PreTrainedModel) -> bool:
    """Whether packed examples get the logits they get alone, within the rounding of the dtype."""
    examples = _probe_examples(model)
    was_training = model.training
    model.eval()
    try:
        alone = [_logits(model, ids, positions=None) for ids in examples]
        with packed_row(_PROBE_LENGTHS):
            positions = torch.cat([torch.arange(len(ids)) for ids in examples]).to(model.device)
            packed = _logits(model, torch.cat(examples), positions).split(_PROBE_LENGTHS)
    except _NOT_PACKABLE:
        return False
    finally:
        model.train(was_training)
    tolerance = 1e-4 if alone[0].dtype == torch.float32 else 3e-2
    return all(
        (one - other).float().norm() <= tolerance * one.float().norm()
        for one, other in zip(alone, packed, strict=True)
    )


def _probe_examples(model: PreTrainedModel) -> list[Tensor]:
    """Return ids that have little in common, the same each time."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(sum(_PROBE_LENGTHS)) * 7919 + 11).remainder(vocabulary)
    return list(ids.to(model.device).split(_PROBE_LENGTHS))


def _logits(model: Any, ids: Tensor, positions: Tensor | None) -> Tensor:  # noqa: ANN401
    options = {} if positions is None else {"position_ids": positions[None]}
    return model(input_ids=ids[None], use_cache=False, **options).logits[0]
