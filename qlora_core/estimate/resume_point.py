"""The bytes of a resume point on disk, from the sizes of the trained tensors; what is in one: `qlora_core.train.resume.points`."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_core.estimate.operations import FLOAT32
from qlora_core.estimate.optimizers import Optimizer

# Name, shape and place of a tensor in a safetensors header: a parameter's, and a moment's, whose name is a number.
_PARAMETER_HEADER_BYTES = 115
_MOMENT_HEADER_BYTES = 85
# State of torch's generator for a CPU; a GPU's takes 16 bytes.
_RANDOM_STATE_BYTES = 5056
# Settings, progress, execution plan, versions and sums.
_JSON_BYTES = 4096


def resume_point_bytes(tensors: Sequence[int], optimizer: Optimizer, *, keeps_best: bool) -> int:
    """Return the bytes of all files of a resume point.

    Args:
        tensors: elements of each trained tensor.
        optimizer: whose moments are saved.
        keeps_best: whether the adapter of the best validation is in it, too.
    """
    adapters = 2 if keeps_best else 1
    weights = adapters * (FLOAT32 * sum(tensors) + _PARAMETER_HEADER_BYTES * len(tensors))
    headers = optimizer.saved_per_tensor * _MOMENT_HEADER_BYTES * len(tensors)
    moments = optimizer.saved_bytes(tensors) + headers
    return weights + moments + _RANDOM_STATE_BYTES + _JSON_BYTES
