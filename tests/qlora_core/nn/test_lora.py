"""LoRA over a frozen layer: its own backward pass against autograd, and what it keeps meanwhile."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlora_core import NF4Linear, quantize_nf4
from qlora_core.nn import LoraLinear
from qlora_core.nn.lora import LoraLinearFn
from qlora_core.ops.working_copy import WorkingCopy

SHAPES = [(24, 40, 4), (7, 13, 3), (1, 1, 1), (65, 3, 8)]


def lora(
    out_features: int,
    in_features: int,
    r: int,
    *,
    bias: bool = False,
    dropout: float = 0.0,
    quantize: bool = True,
) -> tuple[LoraLinear, Tensor, Tensor | None]:
    """An adapter with random A and B, and the dense weight and the bias under it."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(out_features, in_features, generator=generator)
    bias_values = torch.randn(out_features, generator=generator) if bias else None
    if quantize:
        nf4 = quantize_nf4(weight)
        base = NF4Linear(nf4, bias_values, compute_dtype=torch.float32)
        weight = nf4.dequantize()
    else:
        base = nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
        base.weight.copy_(weight)
        if bias_values is not None:
            base.bias.copy_(bias_values)
    lora_a = torch.randn(r, in_features, generator=generator)
    lora_b = torch.randn(out_features, r, generator=generator)
    return LoraLinear(base, lora_a, lora_b, alpha=1.5 * r, dropout=dropout), weight, bias_values


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6)).requires_grad_()


@pytest.mark.parametrize("quantize", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [(1,), (5,), (2, 3), (0,)], ids=str)
def test_output_and_gradients_equal_autograds_over_the_dense_weight(
    tokens: tuple[int, ...], shape: tuple[int, int, int], bias: bool, quantize: bool
) -> None:
    adapter, weight, bias_values = lora(*shape, bias=bias, quantize=quantize)
    x = inputs(*tokens, shape[1])
    grad = torch.randn(*tokens, shape[0])

    y = adapter(x)
    y.backward(grad)

    # In float64, so that the comparison's error is all the engine's.
    exact = [t.detach().double().requires_grad_() for t in (x, adapter.lora_A, adapter.lora_B)]
    expected = exact[0] @ weight.double().T + 1.5 * (exact[0] @ exact[1].T) @ exact[2].T
    if bias_values is not None:
        expected = expected + bias_values.double()
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    for actual, wanted in zip((x, adapter.lora_A, adapter.lora_B), exact, strict=True):
        assert actual.grad is not None
        torch.testing.assert_close(actual.grad.double(), wanted.grad, rtol=1e-5, atol=1e-4)


def test_the_first_layer_needs_no_gradient_of_its_input() -> None:
    adapter, _, _ = lora(24, 40, 4)
    x = inputs(5, 40).detach()

    adapter(x).sum().backward()

    assert x.grad is None
    assert adapter.lora_A.grad is not None
    assert adapter.lora_B.grad is not None


def test_with_dropout_gradients_are_those_of_the_mask_that_was_drawn() -> None:
    adapter, _, _ = lora(24, 40, 4, dropout=0.5)
    x, grad = inputs(30, 40), torch.randn(30, 24)

    def loss(*tensors: Tensor) -> Tensor:
        """The loss at other inputs and adapters, with the very same mask."""
        with torch.no_grad():
            for parameter, value in zip((adapter.lora_A, adapter.lora_B), tensors[1:], strict=True):
                parameter.copy_(value)
        torch.manual_seed(0)
        return (adapter(tensors[0]) * grad).sum()

    point = [t.detach().clone() for t in (x, adapter.lora_A, adapter.lora_B)]
    loss(x, *point[1:]).backward()
    gradients = [t.grad for t in (x, adapter.lora_A, adapter.lora_B)]

    for i, gradient in enumerate(gradients):
        # The loss is linear in each of the three, so a difference quotient is exact but for rounding.
        direction = torch.randn_like(point[i])
        there = [*point]
        there[i] = point[i] + direction
        assert gradient is not None
        slope = (gradient * direction).sum()
        torch.testing.assert_close(loss(*there) - loss(*point), slope, rtol=1e-3, atol=1e-2)


def test_dropout_drops_the_wanted_share_and_keeps_the_mean() -> None:
    adapter, weight, _ = lora(1, 1, 1, dropout=0.25)
    adapter.lora_A.data.fill_(1)
    adapter.lora_B.data.fill_(1)
    x = torch.ones(40_000, 1)

    update = (adapter(x) - weight.item()) / 1.5

    assert update.unique().tolist() == pytest.approx([0, 4 / 3], abs=1e-5)
    assert update.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert update.mean().item() == pytest.approx(1, abs=0.02)


def test_dropout_is_off_outside_training() -> None:
    adapter, _, _ = lora(24, 40, 4, dropout=0.5)
    x = inputs(5, 40)
    adapter.eval()

    assert torch.equal(adapter(x), adapter(x))


def test_dropout_follows_the_global_seed_and_differs_from_call_to_call() -> None:
    adapter, _, _ = lora(24, 40, 4, dropout=0.5)
    x = inputs(5, 40)

    torch.manual_seed(11)
    first, second = adapter(x), adapter(x)
    torch.manual_seed(11)
    again = adapter(x)

    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_checkpointing_recomputes_the_same_mask() -> None:
    adapter, _, _ = lora(24, 40, 4, dropout=0.5)
    grads: list[Tensor] = []

    for recompute in (False, True):
        x = inputs(5, 40)
        torch.manual_seed(1)
        y = checkpoint(adapter, x, use_reentrant=False) if recompute else adapter(x)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)

    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_graph_saves_x_and_small_things_only(dropout: float) -> None:
    adapter, weight, _ = lora(256, 320, 4, dropout=dropout)
    x = inputs(10, 320)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter(x)

    adapters = adapter.lora_A.nbytes + adapter.lora_B.nbytes
    assert sum(saved.values()) == x.nbytes + adapters + 10 * 4 * 4
    assert sum(saved.values()) < weight.nbytes


def test_no_dense_copy_of_a_weight_outlives_its_product() -> None:
    layers = [lora(256, 256, 4)[0] for _ in range(4)]
    y = inputs(10, 256)
    before = dense_tensors(256 * 256)  # tables that are kept for good, from other tests

    for adapter in layers:
        y = adapter(y)
    during = dense_tensors(256 * 256)
    y.sum().backward()
    after = dense_tensors(256 * 256)

    # One buffer per thread, shared by all layers, may stay: see `quant.workspace`.
    assert during <= before + 1
    assert after <= before + 1


def test_nothing_of_a_finished_step_stays_alive() -> None:
    adapter, _, _ = lora(24, 40, 4)
    x = inputs(5, 40)
    y = adapter(x)
    watched = weakref.ref(y)

    y.sum().backward()
    del y

    assert watched() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_inputs_give_sixteen_bit_outputs_and_float32_gradients(
    dtype: torch.dtype,
) -> None:
    adapter, _, _ = lora(24, 40, 4)
    x = inputs(5, 40)

    y = adapter(x.to(dtype))
    y.sum().backward()

    assert y.dtype == dtype
    assert adapter.lora_A.grad is not None
    assert adapter.lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(y, adapter(x.to(dtype).float()).to(dtype))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_working_copies_change_no_bit_of_output_or_gradients(
    dtype: torch.dtype, dropout: float
) -> None:
    found: list[list[Tensor]] = []

    for with_copies in (False, True):
        adapter, weight, _ = lora(24, 40, 4)
        copies = (None, None)
        if with_copies:
            masters = (adapter.lora_A, adapter.lora_B)
            copies = tuple(WorkingCopy(each, torch.empty_like(each, dtype=dtype)).values for each in masters)  # fmt: skip
        x = inputs(5, 40)
        torch.manual_seed(3)
        y: Tensor = LoraLinearFn.apply(
            x, adapter.lora_A, adapter.lora_B, None, weight, 1.5, dropout, dtype, copies
        )  # pyright: ignore[reportAssignmentType]
        y.backward(inputs(5, 24).detach())
        found.append([y, *(each.grad for each in (x, adapter.lora_A, adapter.lora_B) if each.grad is not None)])  # fmt: skip

    assert len(found[0]) == 4
    assert all(map(torch.equal, *found))


class Casts(TorchDispatchMode):
    """Counts how often tensors of a shape are cast."""

    def __init__(self, *shapes: torch.Size) -> None:
        super().__init__()
        self.shapes, self.n = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.ops.aten._to_copy.default and args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "casts"), [(False, 4), (True, 6)])
def test_with_working_copies_neither_a_nor_b_is_cast_in_a_step(recompute: bool, casts: int) -> None:
    # Of tensors without numbers, as on a GPU: on a CPU products are in float32, and nothing is cast.
    base = nn.Linear(40, 24, bias=False, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    weights = torch.empty(4, 40, device="meta"), torch.empty(24, 4, device="meta")
    adapter = LoraLinear(base, *weights, alpha=4, dropout=0.0)
    masters = (adapter.lora_A, adapter.lora_B)
    counted: list[int] = []

    for with_copies in (False, True):
        if with_copies:
            of_a, of_b = (WorkingCopy(each, torch.empty_like(each, dtype=torch.bfloat16)) for each in masters)  # fmt: skip
            adapter.working_copies = of_a, of_b
        x = torch.empty(5, 40, device="meta", dtype=torch.bfloat16, requires_grad=True)
        with Casts(*(each.shape for each in masters)) as mode:
            y = checkpoint(adapter, x, use_reentrant=False) if recompute else adapter(x)
            assert isinstance(y, Tensor)
            y.sum().backward()
        counted.append(mode.n)

    # What is left are the two gradients, on their way to float32.
    assert counted == [casts + 2, 2]


@torch.no_grad()
def test_an_adapter_that_someone_writes_to_answers_with_what_was_written() -> None:
    adapter, _, _ = lora(24, 40, 4)
    x = inputs(5, 40).detach()
    of_a, of_b = (WorkingCopy(each, each.detach().clone()) for each in (adapter.lora_A, adapter.lora_B))  # fmt: skip
    adapter.working_copies = of_a, of_b
    before = adapter(x)

    adapter.lora_B.copy_(-adapter.lora_B)
    written = adapter(x)

    other, _, _ = lora(24, 40, 4)
    other.lora_B.copy_(-other.lora_B)
    assert torch.equal(written, other(x))
    assert not torch.equal(written, before)


def test_the_base_alone_answers_while_disabled() -> None:
    adapter, weight, _ = lora(24, 40, 4)
    x = inputs(5, 40)
    adapter.enabled = False

    torch.testing.assert_close(adapter(x), x @ weight.T)


def dense_tensors(n: int) -> int:
    """How many live float tensors own at least n elements."""
    gc.collect()
    # By type alone: isinstance would wake lazy objects of torch that warn.
    tensors: list[Tensor] = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return len(
        {
            t.data_ptr()
            for t in tensors
            if t.is_floating_point() and t.numel() >= n and t.device.type == "cpu"
        }
    )
