"""NF4Linear: the frozen linear layer, held to a dense one over the dequantized weight."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qlora_core import NF4Linear, ShapeError, quantize_nf4
from qlora_core.nn.nf4_linear import product_dtype


def layer(
    out_features: int = 24, in_features: int = 40, *, bias: bool = False
) -> tuple[NF4Linear, nn.Linear]:
    """A quantized layer and the dense one that it must equal."""
    generator = torch.Generator().manual_seed(3)
    weight = quantize_nf4(torch.randn(out_features, in_features, generator=generator))
    bias_values = torch.randn(out_features, generator=generator) if bias else None
    dense = nn.Linear(in_features, out_features, bias=bias)
    dense.weight.data.copy_(weight.dequantize())
    if bias_values is not None:
        dense.bias.data.copy_(bias_values)
    return NF4Linear(weight, bias_values, compute_dtype=torch.float32), dense


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(4))
    return values.to(dtype).requires_grad_()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (7, 13), (1, 1), (65, 3)], ids=str)
@pytest.mark.parametrize("tokens", [(1,), (5,), (2, 3), (0,)], ids=str)
def test_output_and_input_gradient_equal_the_dense_layers(
    tokens: tuple[int, ...], shape: tuple[int, int], bias: bool
) -> None:
    quantized, dense = layer(*shape, bias=bias)
    x, x_dense = inputs(*tokens, shape[1]), inputs(*tokens, shape[1])
    grad = torch.randn(*tokens, shape[0])

    y = quantized(x)
    y.backward(grad)

    y_dense = dense(x_dense)
    y_dense.backward(grad)
    torch.testing.assert_close(y, y_dense)
    torch.testing.assert_close(x.grad, x_dense.grad)


def test_nothing_in_it_is_trainable() -> None:
    quantized, _ = layer(bias=True)

    quantized(inputs(3, 40)).sum().backward()

    assert [name for name, _ in quantized.named_parameters()] == ["bias"]
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    assert quantized.bias is not None
    assert quantized.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cpu_multiplies_in_float32_and_answers_in_the_inputs_dtype(dtype: torch.dtype) -> None:
    quantized, dense = layer()
    x = inputs(5, 40, dtype=dtype)

    y = quantized(x)

    assert product_dtype(dtype, torch.device("cpu")) == torch.float32
    assert product_dtype(dtype, torch.device("cuda")) == dtype
    torch.testing.assert_close(y, dense(x.float()).to(dtype), rtol=0, atol=0)


def test_casting_the_model_moves_no_scale_to_another_dtype() -> None:
    quantized, dense = layer(bias=True)

    model = nn.Sequential(quantized).to(torch.bfloat16)

    assert quantized.bias is not None
    assert quantized.bias.dtype == torch.bfloat16
    assert quantized.nested_absmax is not None
    assert quantized.nested_absmax.dtype == torch.float32
    assert torch.equal(quantized.nf4.dequantize(torch.float32), dense.weight)
    assert model(inputs(2, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_moving_the_model_moves_the_codes_and_scales() -> None:
    quantized, _ = layer(bias=True)

    quantized.to("meta")

    assert {tensor.device.type for tensor in quantized.state_dict().values()} == {"meta"}


def test_survives_a_copy_and_a_state_dict() -> None:
    quantized, _ = layer(bias=True)
    other, _ = layer(bias=True)
    other.packed.zero_()

    other.load_state_dict(quantized.state_dict())
    copied = copy.deepcopy(quantized)

    x = inputs(2, 40)
    assert torch.equal(other(x), quantized(x))
    assert torch.equal(copied(x), quantized(x))


def test_refuses_a_weight_that_is_no_matrix_and_a_bias_that_does_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"needs a matrix, not shape \[64\]"):
        NF4Linear(quantize_nf4(torch.ones(64)), compute_dtype=torch.float32)
    with pytest.raises(ShapeError, match=r"bias must be \[4\], not \[5\]"):
        NF4Linear(quantize_nf4(torch.ones(4, 64)), torch.ones(5), compute_dtype=torch.float32)
