"""Plans which checkpoint tensors make which parameters, with transformers' own conversion.

transformers 5 renames, splits and fuses checkpoint tensors on loading. Its mapping is applied here
to names alone; tensors are read later, one plan step at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qlora_core.errors import EngineError, ModelUnsupported, ModelWeightsInvalid
from qlora_core.models.reading import TensorReader


@dataclass
class PlanStep:
    """Checkpoint tensors that together make one parameter, or several.

    Attributes:
        target: the parameter's path, or the first of several.
        sources: checkpoint names, in order, each with the pattern it matched (itself if none).
        converter: what makes the parameters of them; None where the tensor is taken as it is.
    """

    target: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    converter: WeightConverter | None = None

    def run(self, model: PreTrainedModel, reader: TensorReader) -> Iterable[tuple[str, Tensor]]:
        """Read the step's tensors and give the parameters they make, by path.

        What it gives may lie in memory that the reader uses again for the next step.

        Raises:
            ModelWeightsInvalid: a tensor cannot be read.
            ModelUnsupported: transformers' conversion does not accept them.
        """
        if self.converter is None:
            return [(self.target, reader.lend(self.sources[0][0]))]
        reader.forget()
        for name, pattern in self.sources:
            self.converter.add_tensor(self.target, name, pattern, partial(reader.take, name))  # pyright: ignore[reportArgumentType]
        try:
            made = self.converter.convert(self.target, model=model, config=model.config)
        except EngineError:
            raise
        # Whatever the conversion's operations raise on tensors they were not written for.
        except Exception as error:
            raise ModelUnsupported(
                f"transformers cannot convert the checkpoint's {self.sources[0][0]} to {self.target}"
            ) from error
        return [
            (path, value[0] if isinstance(value, list) else value) for path, value in made.items()
        ]


def _refuse_rivals(step: PlanStep) -> None:
    """Refuse checkpoint tensors of which only one could become the parameter, and none would miss the other."""
    patterns = [] if step.converter is None else step.converter.source_patterns
    alone = [name for name, pattern in step.sources if pattern not in patterns]
    others = [name for name, _ in step.sources if name not in alone[:1]]
    if alone and others:
        raise ModelWeightsInvalid(
            f"the checkpoint's {alone[0]} and {others[0]} are both {step.target}; only one of them can be"
        )


def plan_loading(model: PreTrainedModel, names: Iterable[str]) -> tuple[list[PlanStep], list[str]]:
    """Plan how the checkpoint tensors ``names`` fill the model.

    Returns:
        The steps in the order of the checkpoint's names, and the names that fit nowhere.

    Raises:
        ModelWeightsInvalid: tensors of which only one can be a parameter claim to be it.
    """
    wanted = dict(model.state_dict())
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: one for one in converters for pattern in one.source_patterns}

    steps: dict[str, PlanStep] = {}
    unexpected: list[str] = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = _target_of(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted:
            unexpected.append(name)
            continue
        step = steps.setdefault(target, PlanStep(target))
        if pattern is not None and step.converter is None:
            step.converter = deepcopy(converter_of[pattern])
        step.sources.append((name, pattern or name))
    for step in steps.values():
        _refuse_rivals(step)
    return list(steps.values()), unexpected


def _target_of(
    name: str,
    renamings: list[WeightRenaming],
    converters: list[WeightConverter],
    prefix: str,
    wanted: dict[str, torch.Tensor],
) -> tuple[str, str | None]:
    """Give the parameter a checkpoint name leads to and the converter's pattern it matched."""
    target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
    if target not in wanted and name in wanted:
        return name, None
    return target, pattern
