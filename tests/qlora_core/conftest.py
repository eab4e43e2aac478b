"""Where Triton kernels run in tests: in Triton's interpreter on CPU tensors, or on the GPU."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device on which a kernel can be launched here; the interpreter is mended first."""
    if request.param == "cuda":
        yield "cuda"
        return
    from triton import knobs

    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, kernels are compiled for it and not interpreted")
    # The root conftest sets TRITON_INTERPRET before anything can import triton.
    assert knobs.runtime.interpret, "triton was imported without TRITON_INTERPRET=1"
    from tests.qlora_core.triton_interpreter import mend

    mend()
    # A GPU divides by zero without a word; numpy, behind the interpreter, would warn.
    with np.errstate(all="ignore"):
        yield "cpu"
