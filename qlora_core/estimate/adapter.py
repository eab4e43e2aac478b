"""Which layers an adapter goes over, and what is trained whole: by the names that `LoraConfig` takes.

The rules are those of `qlora_core.nn.targets` and `saved_modules`; a test holds them to each other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_core.errors import LoraTargetError
from qlora_core.estimate.architecture import EMBEDDINGS, HEAD, Architecture, Linear
from qlora_core.estimate.settings import ALL_LINEAR, LoraSettings

# transformers and the engine keep it plain: "all-linear" does not mean it, a name does.
_NOT_ALL_LINEAR = (HEAD,)


@dataclass(frozen=True)
class Adapter:
    """What a run trains.

    Attributes:
        ranks: of the adapted layers, by path.
        embeddings: whether the embeddings are trained whole; with a tied head that is the head, too.
        head: whether the output head is.
        tensors: elements of each trained tensor, those of `ranks` first, A before B.
        file_elements: of all tensors of the adapter's file, where a shared matrix is written under both its names.
    """

    ranks: dict[str, int]
    embeddings: bool
    head: bool
    tensors: tuple[int, ...]
    file_elements: int

    @property
    def elements(self) -> int:
        """Of all trained tensors."""
        return sum(self.tensors)


def choose_adapter(model: Architecture, lora: LoraSettings) -> Adapter:
    """Find what is trained.

    Raises:
        LoraTargetError: a name means nothing in this model, or nothing that can be estimated.
    """
    whole = _trained_whole(model, lora.modules_to_save)
    linears = {path: linear for path, linear in model.linears() if path not in whole}
    wanted = _wanted(list(linears), lora.target_modules, "no linear layer")
    if lora.target_modules == ALL_LINEAR:
        wanted -= set(_NOT_ALL_LINEAR)
    excluded = _wanted(list(linears), lora.exclude_modules, "exclude_modules: no linear layer")
    ranks = {path: lora.rank_of(path) for path in linears if path in wanted - excluded}
    if not ranks:
        raise LoraTargetError("exclude_modules leaves no linear layer to adapt")
    if HEAD in ranks and model.tied:
        raise LoraTargetError(f"{HEAD} shares its matrix with the embeddings: leave it out")
    tensors = [size for path, rank in ranks.items() for size in _factors(linears[path], rank)]
    matrix = model.vocabulary * model.hidden
    copies = len(whole) * matrix
    if whole:
        tensors += [matrix] * (1 if model.tied else len(whole))
    file_elements = sum(tensors) + (copies - matrix if whole and model.tied else 0)
    return Adapter(ranks, EMBEDDINGS in whole, HEAD in whole, tuple(tensors), file_elements)


def _factors(linear: Linear, rank: int) -> tuple[int, int]:
    return rank * linear.in_features, linear.out_features * rank


def _trained_whole(model: Architecture, names: Sequence[str]) -> set[str]:
    whole: set[str] = set()
    for name in names:
        found = {path for path in (EMBEDDINGS, HEAD) if _is_meant(path, name)}
        if not found:
            raise LoraTargetError(
                f"modules_to_save: {name} is neither the embeddings ({EMBEDDINGS}) nor the output head ({HEAD}); "
                "others are not estimated"
            )
        whole |= found
    return {EMBEDDINGS, HEAD} if whole and model.tied else whole


def _wanted(paths: list[str], names: str | Sequence[str], complaint: str) -> set[str]:
    if isinstance(names, str):
        if names == ALL_LINEAR:
            return set(paths)
        found = {path for path in paths if re.fullmatch(names, path)}
        if not found:
            raise LoraTargetError(f"{complaint} has a path that {names!r} matches whole")
        return found
    wanted: set[str] = set()
    for name in names:
        found = {path for path in paths if _is_meant(path, name)}
        if not found:
            known = sorted({path.rpartition(".")[2] for path in paths})
            raise LoraTargetError(f"{complaint} is called {name}; there are {', '.join(known)}")
        wanted |= found
    return wanted


def _is_meant(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
