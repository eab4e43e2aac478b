"""Keeps trained parameters in float32 whatever dtype their model is cast to.

An optimizer's step is often smaller than the spacing of 16-bit numbers; a cast there and back would also round away
what was learned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def apply_but_keep_float32(module: nn.Module, apply: Callable[[], object]) -> None:
    """Run ``apply``, which moves or casts the module, and undo casts of the module's own parameters.

    Args:
        module: its own parameters are kept in float32, and so are their gradients; those of its submodules are not.
        apply: what `torch.nn.Module.to` and its like do.
    """
    # Other tensors over the same memory: `apply` changes what the parameter and its gradient refer to.
    before = {
        name: (p.detach(), None if p.grad is None else p.grad.detach())
        for name, p in module.named_parameters(recurse=False)
    }
    apply()
    for name, (value, grad) in before.items():
        parameter = module.get_parameter(name)
        if parameter.dtype == torch.float32:
            continue
        parameter.data = value.to(parameter.device)
        if grad is not None:
            parameter.grad = grad.to(parameter.device)
