"""Where the weights that an adapter is merged into come from: the quantized model in memory, or a folder of originals.

All give parameters by their names in the architecture and in its shapes, dense, a few at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_core.errors import ModelUnsupported, ModelWeightsInvalid
from qlora_core.models.conversion import plan_loading
from qlora_core.models.files import find_weights
from qlora_core.models.prequantized import group_tensors
from qlora_core.models.reading import TensorReader
from qlora_core.nn import LoraLinear, NF4Linear, SavedModule
from qlora_core.nn.lora import is_conv1d
from qlora_core.nn.nf4_experts import NF4Stack

# NF4's own error is about a tenth; with large blocks and rare large values it may be twice that.
_MOST_ERROR = 0.3


class BaseWeights(Protocol):
    """Gives dense weights of a base model."""

    def take(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Give these parameters and buffers, of any float dtype if they are floats; they are not to be written to."""
        ...


class InMemory:
    """The base model under a model's adapters; what is in NF4 is given in float32.

    Args:
        model: with or without adapters.
        skeleton: its architecture as transformers builds it; its parameters may be on the meta device.
    """

    def __init__(self, model: nn.Module, skeleton: nn.Module) -> None:
        self._model = model
        self._skeleton = skeleton
        self._modules = dict(model.named_modules())

    def take(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Give these parameters, dequantized where they are in NF4."""
        return {name: self._take(name) for name in names}

    def _take(self, name: str) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        stack = self._modules.get(name)
        if isinstance(stack, NF4Stack):
            return self._stacked(owner, stack)
        module = self._modules[owner]
        if isinstance(module, LoraLinear):
            module = module.base
        elif isinstance(module, SavedModule):
            module = module.original
        if isinstance(module, NF4Linear) and attribute == "weight":
            weight = module.nf4.dequantize(torch.float32)
            return weight.T if is_conv1d(self._skeleton.get_submodule(owner)) else weight
        return getattr(module, attribute).detach()

    def _stacked(self, owner: str, stack: NF4Stack) -> Tensor:
        experts = [stack.nf4(expert).dequantize(torch.float32) for expert in range(len(stack))]
        dense = torch.stack(experts)
        transposed = getattr(self._skeleton.get_submodule(owner), "is_transposed", False)
        return dense.mT if transposed else dense


class Originals:
    """The weights that a model was quantized from, each held against what the model has of it.

    Args:
        weights: of the folder that should be the original's.
        quantized: of the model.
        names: of the parameters that it has in NF4.
        folder: for the message.
    """

    def __init__(
        self, weights: InFolder, quantized: InMemory, names: Collection[str], folder: Path
    ) -> None:
        self._weights = weights
        self._quantized = quantized
        self._names = names
        self._folder = folder

    def take(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Give these parameters.

        Raises:
            ModelWeightsInvalid: the folder does not have one of them, or other values than were quantized.
        """
        names = list(names)
        originals = self._weights.take(names)
        for name in names:
            if name in self._names:
                self._check(name, originals[name].float(), self._quantized.take([name])[name])
        return originals

    def _check(self, name: str, original: Tensor, quantized: Tensor) -> None:
        error = float((quantized - original).norm() / original.norm().clamp_min(1e-30))
        if error > _MOST_ERROR:
            raise ModelWeightsInvalid(
                f"{name} in {self._folder} is {error:.0%} away from what the model has of it in NF4, where quantizing "
                "leaves about 10%; these are not the weights that the model was quantized from"
            )


class InFolder:
    """A checkpoint's weights, read when they are asked for; use it as a context manager.

    Args:
        folder: of a model whose weights are not quantized.
        skeleton: the architecture to which they should belong; its parameters may be on the meta device.
        device: where they go.

    Raises:
        ModelWeightsMissing, ModelWeightsPickle, ModelWeightsInvalid: the folder's weights cannot be used.
        ModelUnsupported: they are quantized.
    """

    def __init__(self, folder: Path, skeleton: PreTrainedModel, device: torch.device) -> None:
        self._folder = folder
        self._skeleton = skeleton
        self._wanted = dict(skeleton.state_dict())
        files = find_weights(folder)
        if group_tensors(files.places):
            raise ModelUnsupported(
                f"the weights in {folder} are quantized; name the folder of the original ones"
            )
        steps, _ = plan_loading(skeleton, files.places)
        self._step_of = {step.target: step for step in steps}
        # transformers ties either way round: the checkpoint may have the other name of a shared matrix.
        tied = skeleton.all_tied_weights_keys
        self._other_name = {source: target for target, source in tied.items()} | dict(tied)
        self._reader = TensorReader(files, device)

    def __enter__(self) -> Self:
        self._reader.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.__exit__(kind, error, trace)

    def take(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Give these parameters; ask for those of a layer together, as a checkpoint may hold them in one tensor.

        Raises:
            ModelWeightsInvalid: the folder does not have one of them, or has it in another shape.
        """
        made: dict[str, Tensor] = {}
        for name in names:
            source = name if name in self._step_of else self._other_name.get(name, name)
            if source in self._step_of:
                # A step gathers tensors when it is run, so that the same one runs only once.
                for path, tensor in deepcopy(self._step_of[source]).run(
                    self._skeleton, self._reader
                ):
                    made[name if path == source else path] = tensor.clone()
        for name in names:
            wanted = self._wanted[name].shape
            if name not in made or made[name].shape != wanted:
                found = list(made[name].shape) if name in made else "missing"
                raise ModelWeightsInvalid(
                    f"the model needs {name} as {list(wanted)}, but in {self._folder} it is {found}"
                )
        return made
