"""Gives a model's tensors the names under which transformers looks for them in a checkpoint.

transformers 5 renames a checkpoint's tensors on loading, and back on saving. Backwards its patterns are not always the
exact inverse, so each name is sent through the way of loading again, and one that does not come back is not used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from qlora_core.errors import ModelUnsupported
from qlora_core.quant.bitsandbytes import SUFFIXES


def checkpoint_names(
    skeleton: PreTrainedModel, names: Iterable[str], quantized: Collection[str]
) -> dict[str, str]:
    """Give the checkpoint's name of each parameter or buffer.

    Args:
        skeleton: the architecture as transformers builds it; its parameters may be on the meta device.
        names: paths of the parameters and saved buffers to store.
        quantized: those of them that are stored in NF4, which takes several keys.

    Raises:
        ModelUnsupported: a tensor has no name that leads back to it; transformers makes it of others by computing.
    """
    wanted = dict(skeleton.state_dict())
    forward = _Renaming(skeleton, wanted)
    backward = _backward_renamings(skeleton)
    found: dict[str, str] = {}
    for name in names:
        suffixes = ("", *SUFFIXES) if name in quantized else ("",)
        fitting = [
            one
            for one in (_rename_back(name, backward), name)
            if all(forward.leads(one + suffix, name) for suffix in suffixes)
        ]
        if not fitting:
            raise ModelUnsupported(
                f"transformers computes {name} from other tensors of a checkpoint, which cannot be undone for "
                "quantized ones; this model cannot be saved"
            )
        found[name] = fitting[0]
    return found


class _Renaming:
    """The way of loading that transformers takes for a bitsandbytes checkpoint, for names alone."""

    def __init__(self, skeleton: PreTrainedModel, wanted: dict[str, Tensor]) -> None:
        mapping = get_model_conversion_mapping(skeleton)
        self._wanted, self._prefix = wanted, skeleton.base_model_prefix
        self._renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        # What transformers' quantizer appends, the bare weight last as there, since transformers 5.17 takes the first that
        # fits; the operation does not matter here.
        self._gathering = [f"weight{suffix}" for suffix in (*SUFFIXES, "")]
        self._converters = [
            *converters,
            WeightConverter(self._gathering, "weight", [Concatenate()]),
        ]

    def leads(self, key: str, name: str) -> bool:
        """Whether transformers takes the tensor ``key`` for the parameter ``name``, as it is."""
        target, pattern = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._wanted
        )
        return target == name and (pattern is None or pattern in self._gathering)


def _backward_renamings(skeleton: PreTrainedModel) -> list[WeightRenaming]:
    mapping = get_model_conversion_mapping(skeleton, add_legacy=False)
    renamings = [
        one
        for one in mapping
        if isinstance(one, WeightRenaming) and not isinstance(one, PrefixChange)
    ]
    return [one.reverse_transform() for one in reversed(renamings)]  # pyright: ignore[reportReturnType]


def _rename_back(name: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
