import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "triton")


@pytest.mark.parametrize(
    "module",
    [
        "worker.app",
        "worker.crew",
        "worker.supervisor",
        "worker.child.validate",
        "service.queue.kick",
    ],
)
def test_neither_the_workers_parent_nor_a_validating_child_loads_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_the_api_can_ring_without_the_worker() -> None:
    code = "import sys, service.queue.kick; print('worker' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"
