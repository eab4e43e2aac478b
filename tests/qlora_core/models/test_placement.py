"""What a model computes in where nobody says."""

import pytest
import torch

from qlora_core.models.placement import usual_compute_dtype


def test_a_cpu_computes_in_float32() -> None:
    assert usual_compute_dtype("cpu") == torch.float32
    assert usual_compute_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(("in_hardware", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float16(
    in_hardware: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_torch_says(including_emulation: bool = True) -> bool:
        return in_hardware or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", as_torch_says)

    assert usual_compute_dtype("cuda") == dtype
