"""Encoded datasets in memory, their order, and the batches a model is fed."""

from qlora_core.data.batches import Batch, collate, group_by_tokens, pass_tokens
from qlora_core.data.dataset import Dataset, load_dataset
from qlora_core.data.order import epoch_order, windows

__all__ = [
    "Batch",
    "Dataset",
    "collate",
    "epoch_order",
    "group_by_tokens",
    "load_dataset",
    "pass_tokens",
    "windows",
]
