"""Base models: finding a folder's weights, building the architecture, loading it into NF4.

`load_model` is imported on first use: `files`, which says whether a folder can be used at all, needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_core.models.loading import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a module's attribute
    if name == "load_model":
        from qlora_core.models.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
