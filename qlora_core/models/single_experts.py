"""Mixtures that are stored expert by expert: which tensors make each expert's part of the fused parameter.

transformers' conversion gathers all tensors of a layer's experts, and holds them twice while it stacks them. Where it only
joins and stacks, one expert after the other can be made, with the same result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from qlora_core.errors import ModelWeightsInvalid, ModelWeightsMissing
from qlora_core.models.conversion import PlanStep
from qlora_core.models.header import TensorPlace
from qlora_core.quoting import quoted


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
        ModelWeightsInvalid: a tensor is of no expert by its name, of one that has it already, or has another shape
            than the first one.
    """
    if step.converter is None or not _only_joins_and_stacks(step.converter):
        return None
    parts: dict[str, dict[int, str]] = {pattern: {} for pattern in step.converter.source_patterns}
    for name, pattern in step.sources:
        _add(name, pattern, parts[pattern], step.target)
    count = max(len(names) for names in parts.values())
    for pattern, names in parts.items():
        _refuse_gaps(step.target, pattern, names, count)
    _refuse_unlike([name for names in parts.values() for name in names.values()], places)
    experts = [[names[i] for names in parts.values()] for i in range(count)]
    first = places[experts[0][0]]
    if not first.shape or len({places[name].dtype for name, _ in step.sources}) > 1:
        return None
    return SingleExperts(
        experts, torch.Size([count, first.shape[0] * len(parts), *first.shape[1:]])
    )


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


def _add(name: str, pattern: str, names: dict[int, str], target: str) -> None:
    """Add a tensor that matched ``pattern`` to ``names``, those of the pattern by their experts' numbers."""
    before, _, after = pattern.rpartition("*.")
    found = re.search(before.replace("*.", r".*\.") + r"([0-9]{1,9})\." + after, name)
    if found is None:
        raise ModelWeightsInvalid(
            f"{quoted(name)} has no expert's number in its name, but belongs to {target}"
        )
    number = int(found.group(1))
    first = names.setdefault(number, name)
    if first != name:
        raise ModelWeightsInvalid(
            f"the checkpoint's {quoted(first)} and {quoted(name)} are both {after} of expert {number} in {target}; "
            "only one of them can be"
        )


def _refuse_gaps(target: str, pattern: str, names: Mapping[int, str], count: int) -> None:
    """Refuse experts whose numbers do not run from 0 on: the tensors of different ones would be joined."""
    lacking = [one for one in range(count) if one not in names]
    if lacking:
        part = pattern.rpartition("*.")[2]
        raise ModelWeightsMissing(
            f"the checkpoint lacks {part} of expert {lacking[0]} in {target}, but has other tensors of it"
        )


def _refuse_unlike(names: list[str], places: Mapping[str, TensorPlace]) -> None:
    """Refuse matrices of different shapes, which a join would hide where their rows add up to the right number."""
    for name in names:
        if places[name].shape != places[names[0]].shape:
            raise ModelWeightsInvalid(
                f"{name} is {list(places[name].shape)} in the checkpoint, but {names[0]} is "
                f"{list(places[names[0]].shape)}"
            )
