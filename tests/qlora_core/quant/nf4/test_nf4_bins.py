"""The quantize kernel's table of bins: what makes one look-up and one comparison exact."""

import torch

from qlora_core.quant.codebook import NF4_THRESHOLDS
from qlora_core.quant.nf4.bins import BINS_PER_UNIT, ROUNDER, bin_of, code_bins

CPU = torch.device("cpu")


def around_thresholds() -> torch.Tensor:
    """Each threshold, and both its neighbours among float32 values."""
    on = torch.tensor(NF4_THRESHOLDS)
    far = torch.tensor(2.0)
    return torch.cat([on, on.nextafter(far), on.nextafter(-far)])


def test_bins_never_descend_with_the_value() -> None:
    dense = torch.linspace(-1, 1, 1_000_001)
    values = torch.cat([dense, around_thresholds()]).sort().values

    bins = (bin_of(values) + 16) % 32  # negative bins are 16 to 31

    assert (bins[1:] >= bins[:-1]).all()


def test_no_bin_holds_two_thresholds() -> None:
    bins = bin_of(torch.tensor(NF4_THRESHOLDS))

    assert len(set(bins.tolist())) == len(NF4_THRESHOLDS)


def test_a_fused_multiply_add_finds_the_same_bins_at_the_thresholds() -> None:
    # In float64 the product is exact and the sum is rounded only when it becomes float32.
    values = around_thresholds()
    fused = (values.double() * BINS_PER_UNIT + ROUNDER).float()

    bins = (fused.view(torch.int32) & 0x7C) >> 2

    assert torch.equal(bins.long(), bin_of(values))


def test_the_table_gives_every_value_the_number_of_thresholds_below_it() -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(100_000, generator=generator) * 2 - 1
    edges = torch.tensor([-1.0, -0.0, 0.0, 1.0, 1.0000001, -1.0000001, 1e-45, -1e-45])
    values = torch.cat([around_thresholds(), random, edges])

    found = code_bins(CPU)[bin_of(values)]
    threshold = found.to(torch.int32).view(torch.float32)
    codes = (found >> 32) + (values > threshold)

    expected = (values[:, None] > torch.tensor(NF4_THRESHOLDS)).sum(dim=1)
    assert torch.equal(codes, expected)
