"""Which adapters get copies in 16 bits, and that a training step leaves them right."""

from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_core import LoraConfig, NF4Linear, add_lora, load_model, quantize_nf4
from qlora_core.nn import LoraLinear, lora_modules
from qlora_core.optim import build_optimizer
from qlora_core.train.working_copies import copy_dtype_of, give_working_copies
from tests.tiny_models import save_tiny_llama


def layer(base: nn.Module, *, rows: int, columns: int, device: str) -> LoraLinear:
    a, b = torch.ones(4, columns, device=device), torch.ones(rows, 4, device=device)
    return LoraLinear(base, a, b, alpha=4, dropout=0.0)


def dense(dtype: torch.dtype, device: str) -> LoraLinear:
    base = nn.Linear(40, 24, device=device, dtype=dtype).requires_grad_(False)
    return layer(base, rows=24, columns=40, device=device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_are_in_the_dtype_of_products_where_these_are_in_16_bits(dtype: torch.dtype) -> None:
    # "meta" stands for a GPU; on a CPU products are in float32.
    on_gpu, on_cpu = [[dense(dtype, device) for _ in range(2)] for device in ("meta", "cpu")]

    assert copy_dtype_of(on_gpu, n_trained=4) == dtype
    assert copy_dtype_of(on_cpu, n_trained=4) is None
    assert copy_dtype_of([dense(torch.float32, "meta")], n_trained=2) is None


def test_no_copies_are_kept_where_nothing_is_adapted_dtypes_differ_or_a_module_is_trained_whole() -> (
    None
):
    bfloat16, float16 = dense(torch.bfloat16, "meta"), dense(torch.float16, "meta")

    assert copy_dtype_of([], n_trained=1) is None
    assert copy_dtype_of([bfloat16, float16], n_trained=4) is None
    assert copy_dtype_of([bfloat16], n_trained=3) is None


def test_a_layer_gets_the_copies_of_its_own_a_and_b_and_none_where_there_are_none() -> None:
    weight = quantize_nf4(torch.randn(24, 40, generator=torch.Generator().manual_seed(1)))
    base = NF4Linear(weight, compute_dtype=torch.bfloat16)
    layers = [layer(base, rows=24, columns=40, device="cpu") for _ in range(2)]
    params = [param for each in layers for param in (each.lora_A, each.lora_B)]

    for dtype in (torch.bfloat16, None):
        optimizer = build_optimizer("adamw", params, learning_rate=0.1, copy_dtype=dtype)
        give_working_copies(layers, optimizer)

        for each in layers:
            if dtype is None:
                assert each.working_copies is None
                continue
            assert each.working_copies is not None
            of_a, of_b = each.working_copies
            for copy, master in ((of_a, each.lora_A), (of_b, each.lora_B)):
                found = copy.of(master, dtype)
                assert found is not None
                assert torch.equal(found, master.detach().to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer_name", ["adamw", "adamw_8bit"])
def test_on_a_gpu_steps_with_copies_are_those_without_to_the_bit(
    optimizer_name: str, tmp_path: Path
) -> None:
    folder = save_tiny_llama(tmp_path / "base")
    found: list[list[torch.Tensor]] = []

    for with_copies in (True, False):
        model = load_model(folder, device="cuda", compute_dtype=torch.bfloat16)
        add_lora(model, LoraConfig(r=4), seed=1)
        layers = list(lora_modules(model).values())
        params = [param for param in model.parameters() if param.requires_grad]
        dtype = copy_dtype_of(layers, n_trained=len(params))
        assert dtype == torch.bfloat16
        optimizer = build_optimizer(
            optimizer_name, params, learning_rate=0.01, copy_dtype=dtype if with_copies else None
        )
        give_working_copies(layers, optimizer)
        for step in range(3):
            ids = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(step)).cuda()
            model(input_ids=ids, labels=ids).loss.backward()  # pyright: ignore[reportCallIssue]
            optimizer.step()
            optimizer.zero_grad()
        found.append([param.detach().clone() for param in params])

    assert all(map(torch.equal, *found))
