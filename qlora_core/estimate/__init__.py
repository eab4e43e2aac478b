"""Estimate: what a run will take, from config.json and its settings alone. No torch, no transformers.

`estimate` goes through the largest forward and backward pass of a step as torch would, with sizes in the place of
tensors (`tape`); families of models differ by data (`families`). The service may import this.

``qlora_core.estimate`` is this package and, as the engine's public name, the function in it: once the package is imported
Python binds it to that name, so the package itself can be called as `estimate`.
"""

import sys
from types import ModuleType
from typing import Any

from qlora_core.estimate.estimating import estimate
from qlora_core.estimate.fitting import Fitting, largest_fitting
from qlora_core.estimate.memory import MemoryEstimate
from qlora_core.estimate.parameters import ParameterCounts
from qlora_core.estimate.result import Estimate
from qlora_core.estimate.step_time import StepTime

__all__ = [
    "Estimate",
    "Fitting",
    "MemoryEstimate",
    "ParameterCounts",
    "StepTime",
    "estimate",
    "largest_fitting",
]


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Estimate:  # noqa: ANN401 - estimate's own
        return estimate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
