"""AdamW against its formula in float64, step by step."""

from __future__ import annotations

import pytest
import torch

from qlora_core.errors import ConfigError
from qlora_core.optim import build_optimizer


def test_adamw_follows_the_papers_formula() -> None:
    torch.manual_seed(0)
    start = torch.randn(7, 5)
    param = torch.nn.Parameter(start.clone())
    optimizer = build_optimizer("adamw", [param], learning_rate=0.1, weight_decay=0.2)
    expected, m, v = start.double(), torch.zeros(7, 5).double(), torch.zeros(7, 5).double()

    for step in range(1, 6):
        grad = torch.randn(7, 5)
        rate = 0.1 / step
        optimizer.param_groups[0]["lr"] = rate
        param.grad = grad.clone()
        optimizer.step()

        expected *= 1 - rate * 0.2
        m = 0.9 * m + 0.1 * grad.double()
        v = 0.999 * v + 0.001 * grad.double() ** 2
        root = (v / (1 - 0.999**step)).sqrt() + 1e-8
        expected -= rate * (m / (1 - 0.9**step)) / root

    torch.testing.assert_close(param.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_adamw_8bit_keeps_two_bytes_and_a_share_of_two_scales_per_element() -> None:
    param = torch.nn.Parameter(torch.zeros(512))

    optimizer = build_optimizer("adamw_8bit", [param], learning_rate=0.1)

    kept = {name: value.nbytes for name, value in optimizer.state[param].items()}
    assert kept == {
        "step": 4,
        "exp_avg": 512,
        "exp_avg_sq": 512,
        "exp_avg_absmax": 8,
        "exp_avg_sq_absmax": 8,
    }


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"one of adamw, .*, paged_adamw_8bit, not 'sgd'"):
        build_optimizer("sgd", [torch.nn.Parameter(torch.zeros(1))], learning_rate=0.1)
