"""Micro-batches: examples packed into one row without padding, or padded on the right to the longest.

A packed row needs attention that keeps its examples apart (`qlora_core.train.packed_attention`); their
positions begin at 0 each. For padded rows no attention mask is made: with padding on the right and causal
attention no real token sees one of padding, and what padding computes is never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_core.data.dataset import Dataset
from qlora_core.data.rows import pack_rows

# Small enough that an evaluation of millions of examples is not planned at once, large enough to pack well.
_EXAMPLES_AT_ONCE = 2048


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    Attributes:
        input_ids: int64 [rows, width].
        positions: int64 [trained]; flat places in [rows * width] whose next token carries loss, example by example.
        targets: int64 [trained]; those next tokens.
        examples: which of the dataset's, in order.
        trained_ends: int64 [examples]; how many trained tokens there are up to each example's end.
        n_tokens: real tokens, padding not counted.
        position_ids: int64 [1, width], from 0 for each example of a packed row; None for padded rows.
        lengths: of a packed row's examples, which fill it; None for padded rows.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    examples: tuple[int, ...]
    trained_ends: Tensor
    n_tokens: int
    position_ids: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> Batch:
        """Return it on a device."""
        if device == self.input_ids.device:
            return self

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=moved(self.input_ids),
            positions=moved(self.positions),
            targets=moved(self.targets),
            trained_ends=moved(self.trained_ends),
            position_ids=None if self.position_ids is None else moved(self.position_ids),
        )


@dataclass(frozen=True)
class Batching:
    """How the examples of an optimizer step become forward passes.

    Attributes:
        max_tokens: of a forward pass, padding included; a longer example gets one of its own.
        packed: put examples into one row instead of padding them.
        pad_id: what padding is made of.
        pass_tokens: what one more forward pass costs, in tokens (`pass_tokens`); for padded rows.
        alone_above: an example longer than this shares a forward pass with none; None for no limit.
    """

    max_tokens: int
    packed: bool
    pad_id: int
    pass_tokens: int
    alone_above: int | None = None

    def split(self, dataset: Dataset, indices: Sequence[int]) -> Iterator[Batch]:
        """Yield the micro-batches of some examples; the one with the most tokens comes first."""
        for group in self.groups(dataset.lengths, indices):
            if self.packed:
                yield pack(dataset, group)
            else:
                yield collate(dataset, group, pad_id=self.pad_id)

    def groups(self, lengths: Sequence[int], indices: Sequence[int]) -> list[list[int]]:
        """Return which examples share a micro-batch; ``lengths`` are those of all examples."""
        if self.packed:
            return pack_rows(
                indices, lengths, max_tokens=self.max_tokens, alone_above=self.alone_above
            )
        return group_by_tokens(
            indices,
            lengths,
            max_tokens=self.max_tokens,
            pass_tokens=self.pass_tokens,
            alone_above=self.alone_above,
        )

    def split_all(self, dataset: Dataset) -> Iterator[Batch]:
        """Yield the micro-batches of a whole dataset, planned some thousand examples at a time."""
        for start in range(0, len(dataset), _EXAMPLES_AT_ONCE):
            end = min(start + _EXAMPLES_AT_ONCE, len(dataset))
            yield from self.split(dataset, range(start, end))


def pass_tokens(device: torch.device) -> int:
    """Return what starting a forward and backward pass costs, in tokens of computing; a rough guess.

    On a CPU it is the calls themselves, on a GPU also that small products leave most of it idle.
    """
    return 64 if device.type == "cpu" else 512


def group_by_tokens(
    indices: Sequence[int],
    lengths: Sequence[int],
    *,
    max_tokens: int,
    pass_tokens: int,
    alone_above: int | None = None,
) -> list[list[int]]:
    """Split examples into the padded micro-batches that cost least; the longest come first.

    Args:
        indices: of the examples.
        lengths: of all examples, in tokens.
        max_tokens: of a micro-batch, padding included; a longer example gets one of its own.
        pass_tokens: what one more forward pass costs, in tokens: splitting further is worth it only
            where it saves more padding than this.
        alone_above: a longer example gets a micro-batch of its own.

    Returns:
        Groups of indices, whatever order they came in.
    """
    # The index settles ties, so that the grouping does not depend on the order of the window.
    longest_first = sorted(indices, key=lambda i: (-lengths[i], i))
    n = len(longest_first)
    # cost[i]: of the best split of the examples from i on; end[i]: where its first group ends.
    cost, end = [0] * (n + 1), [n] * (n + 1)
    for start in range(n - 1, -1, -1):
        width = lengths[longest_first[start]]
        cost[start], end[start] = width + pass_tokens + cost[start + 1], start + 1
        if alone_above is not None and width > alone_above:
            continue
        largest = min(n - start, max_tokens // width)
        for rows in range(2, largest + 1):
            total = rows * width + pass_tokens + cost[start + rows]
            if total < cost[start]:
                cost[start], end[start] = total, start + rows
    groups: list[list[int]] = []
    start = 0
    while start < n:
        groups.append(longest_first[start : end[start]])
        start = end[start]
    return groups


def pack(dataset: Dataset, indices: Sequence[int]) -> Batch:
    """Put examples one after the other into one row, and find what is trained. On the CPU."""
    found = [dataset.example(index) for index in indices]
    input_ids = torch.cat([ids for ids, _ in found]).to(torch.int64)
    trained = torch.cat([mask for _, mask in found])
    lengths = tuple(len(ids) for ids, _ in found)
    places = trained.nonzero().squeeze(1)
    return Batch(
        input_ids=input_ids[None],
        # The first token is never trained, so the place before each trained one is in its own example.
        positions=places - 1,
        targets=input_ids[places],
        examples=tuple(indices),
        trained_ends=_trained_ends(dataset, indices),
        n_tokens=len(input_ids),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        lengths=lengths,
    )


def collate(dataset: Dataset, indices: Sequence[int], *, pad_id: int) -> Batch:
    """Pad examples to the longest, one in each row, and find what is trained. On the CPU."""
    width = max(dataset.lengths[index] for index in indices)
    input_ids = torch.full((len(indices), width), pad_id, dtype=torch.int64)
    trained = torch.zeros((len(indices), width), dtype=torch.bool)
    for row, index in enumerate(indices):
        ids, mask = dataset.example(index)
        input_ids[row, : len(ids)] = ids
        trained[row, : len(mask)] = mask
    places = trained.view(-1).nonzero().squeeze(1)
    return Batch(
        input_ids=input_ids,
        positions=places - 1,
        targets=input_ids.view(-1)[places],
        examples=tuple(indices),
        trained_ends=_trained_ends(dataset, indices),
        n_tokens=sum(dataset.lengths[index] for index in indices),
    )


def _trained_ends(dataset: Dataset, indices: Sequence[int]) -> Tensor:
    counts = [dataset.trained_counts[index] for index in indices]
    return torch.tensor(counts, dtype=torch.int64).cumsum(0)
