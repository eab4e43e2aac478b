"""Base models: finding a folder's weights, building the architecture, loading it into NF4."""

from qlora_core.models.loading import load_model

__all__ = ["load_model"]
