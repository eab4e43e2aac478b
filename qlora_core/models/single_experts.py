"""Mixtures that are stored expert by expert: which tensors make each expert's part of the fused parameter.

transformers' conversion gathers all tensors of a layer's experts, and holds them twice while it stacks them. Where it only
joins and stacks, one expert after the other can be made, with the same result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from qlora_core.errors import ModelWeightsInvalid, ModelWeightsMissing
from qlora_core.models.conversion import PlanStep
from qlora_core.models.header import TensorPlace


@dataclass(frozen=True)
class SingleExperts:
    """The checkpoint tensors of a parameter that stacks the matrices of a layer's experts.

    Attributes:
        names: for each expert those whose rows, under each other, are its matrix.
        shape: of the parameter, [experts, rows, …].
    """

    names: list[list[str]]
    shape: torch.Size


def find_single_experts(step: PlanStep, places: Mapping[str, TensorPlace]) -> SingleExperts | None:
    """Find out which tensors make each expert's part of a step's parameter.

    Args:
        step: of the plan.
        places: of the checkpoint's tensors, by name.

    Returns:
        None where transformers' conversion does more than to join and to stack: it has to see all tensors at once.

    Raises:
        ModelWeightsMissing: an expert lacks a tensor that others have.
        ModelWeightsInvalid: an expert's tensor has another shape than the first one's.
    """
    if step.converter is None or not _only_joins_and_stacks(step.converter):
        return None
    parts: dict[str, list[str]] = {pattern: [] for pattern in step.converter.source_patterns}
    for name, pattern in step.sources:
        parts[pattern].append(name)
    count = max(len(names) for names in parts.values())
    for pattern, names in parts.items():
        _refuse_gaps(step.target, pattern, names, count)
        _refuse_unlike(names, places)
    of_first = [places[names[0]] for names in parts.values()]
    kinds = {(places[name].dtype, places[name].shape[1:]) for name, _ in step.sources}
    if len(kinds) > 1 or not all(place.shape for place in of_first):
        return None
    rows = sum(place.shape[0] for place in of_first)
    shape = torch.Size([count, rows, *of_first[0].shape[1:]])
    return SingleExperts([list(names) for names in zip(*parts.values(), strict=True)], shape)


def _only_joins_and_stacks(converter: WeightConverter) -> bool:
    """Whether part i of the target is each source pattern's tensor i, one under the other.

    Nearly every mixture's conversion is of this form.
    """
    stack, *joins = converter.operations
    return (
        type(stack) is MergeModulelist
        and stack.dim == 0
        and len(joins) == (len(converter.source_patterns) > 1)
        and all(type(join) is Concatenate and join.dim == 1 for join in joins)
    )


def _refuse_gaps(target: str, pattern: str, names: Sequence[str], count: int) -> None:
    """Refuse experts whose numbers do not run from 0 on: the tensors of different ones would be joined."""
    before, _, after = pattern.rpartition("*.")
    number = re.compile(before.replace("*.", r".*\.") + r"(\d+)\." + after)
    found = [number.search(name) for name in names]
    numbers = {int(one.group(1)) for one in found if one is not None}
    lacking = [one for one in range(count) if one not in numbers]
    if lacking and None not in found:
        raise ModelWeightsMissing(
            f"the checkpoint lacks {after} of expert {lacking[0]} in {target}, but has other tensors of it"
        )


def _refuse_unlike(names: Sequence[str], places: Mapping[str, TensorPlace]) -> None:
    for name in names:
        if places[name].shape != places[names[0]].shape:
            raise ModelWeightsInvalid(
                f"{name} is {list(places[name].shape)} in the checkpoint, but {names[0]} is "
                f"{list(places[names[0]].shape)}"
            )
