"""Adapters on disk, in PEFT's format, with what a server needs to use them."""

from qlora_core.export.loading import load_adapter
from qlora_core.export.saving import adapter_tensors, save_adapter
from qlora_core.export.serving import serving_warnings
from qlora_core.export.tokenizer import save_tokenizer_files

__all__ = [
    "adapter_tensors",
    "load_adapter",
    "save_adapter",
    "save_tokenizer_files",
    "serving_warnings",
]
