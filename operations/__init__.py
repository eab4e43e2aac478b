"""Running Nibble on one machine: start it, show it, examine it, save and restore it."""
