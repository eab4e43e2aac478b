"""The same layers on a GPU: what Triton and bfloat16 give is what the CPU gives in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_core import LoraConfig, NF4Linear, add_lora, load_model, merge, quantize_nf4
from qlora_core.nn import LoraLinear, lora_modules
from tests.tiny_models import save_tiny_llama, save_tiny_qwen2

pytestmark = pytest.mark.gpu


def adapter(device: str, *, dropout: float = 0.0) -> LoraLinear:
    generator = torch.Generator().manual_seed(5)
    weight = quantize_nf4((torch.randn(192, 256, generator=generator) / 16).to(device))
    a = torch.randn(8, 256, generator=generator) / 16
    b = torch.randn(192, 8, generator=generator)
    base = NF4Linear(weight, compute_dtype=torch.bfloat16)
    return LoraLinear(base, a.to(device), b.to(device), alpha=16, dropout=dropout)


def step(layer: LoraLinear, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.float().square().mean().backward()
    assert x.grad is not None
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    return y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad


def test_quantizing_gives_the_cpus_codes() -> None:
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(1))

    on_gpu, on_cpu = quantize_nf4(weight.cuda()), quantize_nf4(weight)

    assert torch.equal(on_gpu.packed.cpu(), on_cpu.packed)
    # The mean of the scales may be summed in another order, so the 8-bit codes may differ by one.
    assert (on_gpu.absmax.cpu().int() - on_cpu.absmax.int()).abs().max() <= 1


def test_a_training_step_equals_the_cpus_within_bfloat16() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(6)).bfloat16()

    on_gpu, on_cpu = step(adapter("cuda"), x.cuda()), step(adapter("cpu"), x)

    for actual, expected in zip(on_gpu, on_cpu, strict=True):
        error = (actual.cpu().float() - expected.float()).norm() / expected.float().norm()
        assert error < 0.02


def test_dropout_on_a_gpu_follows_the_global_seed() -> None:
    layer = adapter("cuda", dropout=0.5)
    x = torch.randn(64, 256).bfloat16().cuda()

    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)

    assert torch.equal(layer(x), first)


def test_memory_holds_no_dense_weight_between_forward_and_backward() -> None:
    weight = quantize_nf4(torch.randn(4096, 4096, device="cuda"))
    layer = NF4Linear(weight, compute_dtype=torch.bfloat16)
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()

    y = layer(x)

    # Output only; the weight would be 32 MiB.
    assert torch.cuda.memory_allocated() - before < 2**20
    y.sum().backward()


@pytest.mark.parametrize("save", [save_tiny_llama, save_tiny_qwen2], ids=["untied", "tied"])
def test_a_whole_models_step_equals_the_cpus_within_bfloat16(save: Any, tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    config = LoraConfig(r=4, modules_to_save=("embed_tokens", "lm_head"))
    ids = torch.randint(3, 300, (2, 64), generator=torch.Generator().manual_seed(0))
    gradients: list[dict[str, Tensor]] = []

    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model = load_model(base, device=device, compute_dtype=dtype)
        add_lora(model, config)
        for module in lora_modules(model).values():
            module.lora_B.data.fill_(0.01)
        model(input_ids=ids.to(device), labels=ids.to(device)).loss.backward()
        gradients.append(
            {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        )

    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert (gradients[1][name] - expected).norm() / expected.norm() < 0.05, name


def test_trained_parameters_move_and_stay_float32_and_shared(tmp_path: Path) -> None:
    model = load_model(save_tiny_qwen2(tmp_path), device="cpu", compute_dtype=torch.float32)
    add_lora(model, LoraConfig(r=4, modules_to_save=("lm_head",)))

    model.to("cuda", torch.bfloat16)  # pyright: ignore[reportArgumentType] - transformers types it so

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.device.type, parameter.dtype) == ("cuda", torch.float32), name
    head, embeddings = (
        model.get_parameter(f"{one}.weight") for one in ("lm_head", "model.embed_tokens")
    )
    assert head is embeddings


def test_a_merge_on_a_gpu_is_the_cpus(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base")
    folders: list[Path] = []

    for device in ("cpu", "cuda"):
        model = load_model(base, device=device, compute_dtype=torch.float32)
        add_lora(model, LoraConfig(r=4))
        for module in lora_modules(model).values():
            module.lora_B.data.fill_(0.01)
        folders.append(merge(model, "dequantized", output_folder=tmp_path / device).folder)

    on_cpu, on_gpu = (load_file(folder / "model.safetensors") for folder in folders)
    assert on_cpu.keys() == on_gpu.keys()
    for name, expected in on_cpu.items():
        # The 8-bit codes of a few scales may differ by one.
        assert (on_gpu[name] - expected).norm() <= 1e-3 * expected.norm(), name
