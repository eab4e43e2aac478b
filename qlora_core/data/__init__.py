"""Encoded datasets, their order, and the batches a model is fed."""

from qlora_core.data.batches import (
    Batch,
    Batching,
    collate,
    group_by_tokens,
    pack,
    pass_tokens,
)
from qlora_core.data.dataset import Dataset, load_dataset
from qlora_core.data.largest import largest_possible
from qlora_core.data.order import epoch_order, windows
from qlora_core.data.rows import pack_rows

__all__ = [
    "Batch",
    "Batching",
    "Dataset",
    "collate",
    "epoch_order",
    "group_by_tokens",
    "largest_possible",
    "load_dataset",
    "pack",
    "pack_rows",
    "pass_tokens",
    "windows",
]
