"""Whether a kernel really runs on a GPU, found out in a process of its own before any work is taken."""

import os
import subprocess
import sys
from collections.abc import Mapping

_LONGEST_S = 300.0  # a first import of torch and a first compilation, on a slow disk


def why_unusable(environment: Mapping[str, str]) -> str | None:
    """Launch one kernel in a child that sees the GPU which `environment` names.

    Returns:
        None: it ran; else one sentence that says what to install.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "worker.child.probe", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # stderr is the worker's own: a traceback belongs into its log
            text=True,
            timeout=_LONGEST_S,
            check=False,
            env=dict(environment),
        )
    except subprocess.TimeoutExpired:
        return f"A first kernel did not end within {_LONGEST_S:.0f} seconds; look at the GPU and its driver."
    if done.returncode == 0:
        return None
    said = [line for line in done.stdout.splitlines() if line.strip()]
    return said[-1] if said else f"The probe of the GPU ended with status {done.returncode}."
