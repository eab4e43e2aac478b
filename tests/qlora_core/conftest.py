"""Where Triton kernels run in tests: on the GPU, or else in Triton's interpreter on CPU tensors."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture
def kernel_device() -> Iterator[str]:
    """The device on which a kernel can be launched here; the interpreter is mended first."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    from triton import knobs

    # The root conftest sets TRITON_INTERPRET before anything can import triton.
    assert knobs.runtime.interpret, "triton was imported without TRITON_INTERPRET=1"
    from tests.qlora_core.triton_interpreter import mend

    mend()
    # A GPU divides by zero without a word; numpy, behind the interpreter, would warn.
    with np.errstate(all="ignore"):
        yield "cpu"
