"""API keys: made once, shown once, stored hashed."""
