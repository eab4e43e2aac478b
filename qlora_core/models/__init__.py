"""Base models: finding a folder's weights, building the architecture, loading it into NF4, saving it again.

Names are imported on first use: `files`, which says whether a folder can be used at all, needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_core.models.loading import load_model
    from qlora_core.models.saving import save_quantized

__all__ = ["load_model", "save_quantized"]

_HOMES = {"load_model": "loading", "save_quantized": "saving"}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module's attribute
    if name in _HOMES:
        return getattr(import_module(f"qlora_core.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
