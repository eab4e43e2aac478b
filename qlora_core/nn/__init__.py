"""The layers a QLoRA model is made of: frozen NF4 linears, LoRA over them, and how they get there."""

from qlora_core.nn.config import LoraConfig
from qlora_core.nn.inject import add_lora, find_targets, lora_disabled, lora_modules
from qlora_core.nn.lora import LoraLinear
from qlora_core.nn.nf4_linear import NF4Linear

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "NF4Linear",
    "add_lora",
    "find_targets",
    "lora_disabled",
    "lora_modules",
]
