"""Every figure we quote has a command here, and a result file under `results/`."""
