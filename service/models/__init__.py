"""The catalog of base models, and the fine-tuned ones that jobs made."""
