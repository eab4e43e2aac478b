"""Micro-batches: examples of similar length, padded on the right to the longest.

No attention mask is made: with padding on the right and causal attention no real token sees one of
padding, and without a mask attention takes its fastest path. What padding computes is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_core.data.dataset import Dataset


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    Attributes:
        input_ids: int64 [rows, width].
        positions: int64 [trained]; flat places in [rows * width] whose next token carries loss.
        targets: int64 [trained]; those next tokens.
        n_tokens: real tokens, padding not counted.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    n_tokens: int

    def to(self, device: torch.device) -> Batch:
        """Return it on a device."""
        if device == self.input_ids.device:
            return self
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.n_tokens,
        )


def pass_tokens(device: torch.device) -> int:
    """Return what starting a forward and backward pass costs, in tokens of computing; a rough guess.

    On a CPU it is the calls themselves, on a GPU also that small products leave most of it idle.
    """
    return 64 if device.type == "cpu" else 512


def group_by_tokens(
    indices: Sequence[int], lengths: Sequence[int], *, max_tokens: int, pass_tokens: int
) -> list[list[int]]:
    """Split examples into the micro-batches that cost least; the longest come first.

    Args:
        indices: of the examples.
        lengths: of all examples, in tokens.
        max_tokens: of a micro-batch, padding included; a longer example gets one of its own.
        pass_tokens: what one more forward pass costs, in tokens: splitting further is worth it only
            where it saves more padding than this.

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


def collate(dataset: Dataset, indices: Sequence[int], *, pad_id: int) -> Batch:
    """Pad examples to the longest and find what is trained. On the CPU."""
    width = max(dataset.lengths[index] for index in indices)
    input_ids = torch.full((len(indices), width), pad_id, dtype=torch.int64)
    trained = torch.zeros((len(indices), width), dtype=torch.bool)
    for row, index in enumerate(indices):
        ids, mask = dataset.example(index)
        input_ids[row, : len(ids)] = ids
        trained[row, : len(mask)] = mask
    # The first token is never trained, so the place before each trained one is in its own row.
    places = trained.view(-1).nonzero().squeeze(1)
    return Batch(
        input_ids=input_ids,
        positions=places - 1,
        targets=input_ids.view(-1)[places],
        n_tokens=sum(dataset.lengths[index] for index in indices),
    )
