"""The demo: a real fine-tune on a fresh machine, from text that is already there."""
