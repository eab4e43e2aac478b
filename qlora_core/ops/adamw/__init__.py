"""A step of AdamW over one flat buffer of all trained tensors, with moments in 32 or in 8 bits."""
