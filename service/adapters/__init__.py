"""Adapters offered for download, their files and manifest."""
