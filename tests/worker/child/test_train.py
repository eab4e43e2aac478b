"""What the training child decides for the engine."""

import torch

from worker.child.train import compute_dtype


def test_a_cpu_computes_in_float32() -> None:
    assert compute_dtype("cpu") == torch.float32
