"""The layers a QLoRA model is made of: frozen NF4 linears, LoRA over them, and how they get there."""

from qlora_core.nn.config import LoraConfig
from qlora_core.nn.inject import adapter_modules, add_lora, lora_disabled, lora_modules
from qlora_core.nn.lora import LoraLinear
from qlora_core.nn.nf4_linear import NF4Linear
from qlora_core.nn.saved_modules import SavedModule, find_saved, saved_modules
from qlora_core.nn.targets import find_targets, left_out

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "NF4Linear",
    "SavedModule",
    "adapter_modules",
    "add_lora",
    "find_saved",
    "find_targets",
    "left_out",
    "lora_disabled",
    "lora_modules",
    "saved_modules",
]
