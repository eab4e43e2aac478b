"""A tensor's copy in 16 bits is taken only while it is what the tensor is rounded to."""

import copy

import pytest
import torch
from torch import nn

from qlora_core.ops.working_copy import WorkingCopy


def kept(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Parameter, WorkingCopy]:
    master = nn.Parameter(torch.randn(33, 7, generator=torch.Generator().manual_seed(0)))
    return master, WorkingCopy(master, torch.full((33, 7), torch.nan, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_begins_as_what_the_tensor_is_rounded_to(dtype: torch.dtype) -> None:
    master, working = kept(dtype)

    found = working.of(master, dtype)

    assert found is not None
    assert torch.equal(found, master.detach().to(dtype))


def test_it_is_not_taken_for_another_dtype_or_another_tensor() -> None:
    master, working = kept()

    assert working.of(master, torch.float16) is None
    assert working.of(nn.Parameter(master.detach().clone()), torch.bfloat16) is None


@torch.no_grad()
def test_whoever_writes_to_the_tensor_puts_it_out_of_use_until_it_is_renewed() -> None:
    master, working = kept()
    for write in (
        lambda: master.copy_(torch.ones(33, 7)),
        master.detach()[3].zero_,
        lambda: nn.init.normal_(master),
        lambda: setattr(master, "data", torch.full((33, 7), 2.0)),
    ):
        write()

        assert not working.current
        assert working.of(master, torch.bfloat16) is None
        working.renew()
        found = working.of(master, torch.bfloat16)
        assert found is not None
        assert torch.equal(found, master.detach().bfloat16())


def test_a_copied_module_does_not_take_the_originals() -> None:
    master, working = kept()

    other_master, other = copy.deepcopy((master, working))
    with torch.no_grad():
        other_master.zero_()

    assert other.of(other_master, torch.bfloat16) is None
    assert working.of(master, torch.bfloat16) is not None
