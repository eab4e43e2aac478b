"""A model's weights with its adapters merged in, layer by layer, under the names of a checkpoint.

The sum is taken in float32 and rounded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qlora_core.errors import ModelUnsupported
from qlora_core.export.base_weights import BaseWeights
from qlora_core.export.layers import by_layer
from qlora_core.models.conversion import plan_loading
from qlora_core.nn import LoraLinear, NF4Linear, SavedModule, adapter_modules
from qlora_core.nn.lora import is_conv1d
from qlora_core.nn.nf4_experts import NF4Stack


class MergedWeights:
    """Merges a model's adapters into a base's weights.

    Args:
        model: with adapters; only read.
        skeleton: its architecture as transformers builds it, on the meta device.
        base: what the adapters are merged into.
        dtype: of all weights that are floats. None: `own_dtype`; but what was neither quantized nor trained keeps its
            dtype where another would round it.

    Attributes:
        groups: the names of the parameters by layer, without the second names of shared ones.

    Raises:
        ModelUnsupported: transformers' conversion of this architecture's checkpoints cannot be undone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        skeleton: PreTrainedModel,
        base: BaseWeights,
        dtype: torch.dtype | None,
    ) -> None:
        self._skeleton = skeleton
        self._base = base
        self._adapters = adapter_modules(model)
        self._quantized = quantized_names(model)
        self._narrow = dtype or own_dtype(model)
        self._cast_all = dtype is not None
        ignored = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}  # noqa: SLF001
        names = [name for name in skeleton.state_dict() if name not in ignored]
        self.groups = by_layer(skeleton, names)
        self._reverts = self._find_naming(names)

    def sizes(self) -> dict[str, int]:
        """Estimate the bytes of each group."""
        shapes = {name: value.shape for name, value in self._skeleton.state_dict().items()}
        return {
            layer: sum(shapes[name].numel() for name in names) * self._narrow.itemsize
            for layer, names in self.groups.items()
        }

    def take(self, layer: str) -> dict[str, Tensor]:
        """Give the weights of a group by their names in a checkpoint, on the CPU."""
        base = self._base.take(self.groups[layer])
        merged = {name: self._merge(name, base[name]).cpu() for name in self.groups[layer]}
        return self._named(merged, reverts=self._reverts)

    def _merge(self, name: str, base: Tensor) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        adapter = self._adapters.get(owner)
        if isinstance(adapter, LoraLinear) and attribute == "weight":
            delta = adapter.lora_B.detach() @ adapter.lora_A.detach()
            if is_conv1d(self._skeleton.get_submodule(owner)):
                delta = delta.T
            return torch.add(base.float(), delta, alpha=adapter.scaling).to(self._narrow)
        if isinstance(adapter, SavedModule) and attribute in adapter.trained:
            return adapter.trained[attribute].detach().to(self._narrow)
        return self._round(name, base)

    def _round(self, name: str, weight: Tensor) -> Tensor:
        if not weight.is_floating_point() or weight.dtype == self._narrow:
            return weight
        narrow = weight.to(self._narrow)
        may_round = self._cast_all or name in self._quantized
        return narrow if may_round or torch.equal(narrow.to(weight.dtype), weight) else weight

    def _find_naming(self, names: Sequence[str]) -> bool:
        """Whether transformers' conversion is to be undone so that every name leads back to its parameter."""
        shapes = self._skeleton.state_dict()
        for reverts in (True, False):
            stored: list[str] = []
            for group in self.groups.values():
                like = {name: torch.empty(shapes[name].shape, device="meta") for name in group}
                stored += self._named(like, reverts=reverts)
            if _leads_back(self._skeleton, stored, names):
                return reverts
        raise ModelUnsupported(
            f"transformers computes weights of a {type(self._skeleton).__name__} from others of a checkpoint in a way "
            "that cannot be undone; such a model cannot be merged"
        )

    def _named(self, tensors: dict[str, Tensor], *, reverts: bool) -> dict[str, Tensor]:
        return revert_weight_conversion(self._skeleton, tensors) if reverts else tensors


def own_dtype(model: PreTrainedModel) -> torch.dtype:
    """Give the dtype that most of a model's quantized weights had; that of the model where none is quantized."""
    dtypes = Counter(
        module.original_dtype
        for module in model.modules()
        if isinstance(module, NF4Linear | NF4Stack)
    )
    return dtypes.most_common(1)[0][0] if dtypes else model.dtype


def quantized_names(model: PreTrainedModel) -> set[str]:
    """Give the names of the parameters that a model has in NF4, as they are called without adapters."""
    names: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, NF4Stack):
            names.add(path)
        elif isinstance(module, NF4Linear):
            # Under an adapter the layer's own path is that of the adapter.
            names.add(f"{path.removesuffix('.base').removesuffix('.original')}.weight")
    return names


def _leads_back(skeleton: PreTrainedModel, stored: Sequence[str], names: Sequence[str]) -> bool:
    """Whether transformers makes the parameters ``names`` of a checkpoint with the tensors ``stored``."""
    steps, unexpected = plan_loading(skeleton, stored)
    targets = {step.target for step in steps}
    # A step that makes several parameters is known by the first of them.
    several = any(step.converter and len(step.converter.target_patterns) > 1 for step in steps)
    return not unexpected and targets <= set(names) and (several or len(targets) == len(names))
