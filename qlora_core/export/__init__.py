"""Adapters on disk, in PEFT's format, with what a server needs to use them; and merged into plain checkpoints."""

from qlora_core.export.comparison import LogitDifference
from qlora_core.export.loading import load_adapter
from qlora_core.export.merging import MergeResult, merge
from qlora_core.export.saving import adapter_tensors, save_adapter
from qlora_core.export.serving import serving_warnings
from qlora_core.export.tokenizer import save_tokenizer_files

__all__ = [
    "LogitDifference",
    "MergeResult",
    "adapter_tensors",
    "load_adapter",
    "merge",
    "save_adapter",
    "save_tokenizer_files",
    "serving_warnings",
]
