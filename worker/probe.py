"""Whether a kernel really runs on this machine's GPUs, found out in a process of its own before any work is taken.

Triton compiles a small C driver at run time, so a machine with a GPU may still lack a compiler or Python's headers.
"""

import subprocess
import sys

_LONGEST_S = 300.0  # a first import of torch and a first compilation, on a slow disk


def why_unusable() -> str | None:
    """Launch one kernel in a child; None: it ran; else one sentence that says what to install."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "worker.child.probe"],
            capture_output=True,
            text=True,
            timeout=_LONGEST_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return (
            f"A first kernel did not end within {_LONGEST_S:.0f} seconds; look at the GPU's driver."
        )
    if done.returncode == 0:
        return None
    said = [line for line in done.stdout.splitlines() if line.strip()]
    return said[-1] if said else f"The probe ended with status {done.returncode}."
