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


def group_by_tokens(
    indices: Sequence[int], lengths: Sequence[int], *, max_tokens: int
) -> list[list[int]]:
    """Split examples into micro-batches of at most ``max_tokens``, padding included; longest first.

    An example longer than ``max_tokens`` gets a micro-batch of its own.
    """
    groups: list[list[int]] = []
    width = 0
    # The index settles ties, so that the grouping does not depend on the order of the window.
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * width <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            width = lengths[index]
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
