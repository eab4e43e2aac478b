"""Adapters on disk, in PEFT's format, with what a server needs to use them."""

from qlora_core.export.peft import load_adapter, save_adapter
from qlora_core.export.tokenizer import save_tokenizer_files

__all__ = ["load_adapter", "save_adapter", "save_tokenizer_files"]
