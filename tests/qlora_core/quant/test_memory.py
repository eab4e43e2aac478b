"""New memory for results: large or small, it is a tensor like any other and ends with it."""

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from qlora_core.quant.memory import empty

LARGE = 8 * 2**20  # bytes


def mapped_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * 4096


@pytest.mark.parametrize("n", [0, 1, 1000, LARGE // 4, LARGE // 4 + 1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_it_can_be_written_and_read(n: int, dtype: torch.dtype) -> None:
    tensor = empty(n, dtype)

    tensor.fill_(3)

    assert tensor.shape == (n,)
    assert tensor.dtype == dtype
    assert tensor.eq(3).all()


def test_a_large_one_can_be_copied_saved_and_shared() -> None:
    tensor = empty(LARGE // 4, torch.float32).fill_(2)

    assert torch.equal(load(save({"x": tensor}))["x"], tensor)
    assert torch.equal(tensor.clone().share_memory_(), tensor)
    assert torch.equal(torch.nn.Parameter(tensor) * 2, tensor + 2)


def test_views_keep_it_and_the_last_one_frees_it() -> None:
    before = mapped_bytes()
    view = empty(64 * 2**20, torch.uint8).fill_(7).view(8, -1)[3]

    during = mapped_bytes()
    holds = bool(view.eq(7).all())
    del view
    gc.collect()

    assert holds
    assert during >= before + 60 * 2**20
    assert mapped_bytes() <= before + 32 * 2**20  # other tests' threads map their stacks
