"""`nibble doctor`: what is wrong with a service and its machine, and what to do about each.

`finding.py` is what an examination says; `servers.py`, `queue.py`, `machine.py` and `gpus.py` examine; `command.py` runs them.
"""
