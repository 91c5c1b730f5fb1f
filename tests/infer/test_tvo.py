"""The thermodynamic variational objective where the model rules draws out: log weights of -inf."""

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from ppl_vae.infer import IWAE, TVO


def by_hand(log_weights: list[float], partitions: int, smallest: float) -> float:
    """Return the left Riemann sum, where a share of zero times -inf is zero."""
    ratio = smallest ** (-1 / max(partitions - 1, 1))
    ends = [0.0, *(smallest * ratio**i for i in range(partitions - 1)), 1.0]
    total = 0.0
    for low, high in pairwise(ends):
        weights = [math.exp(low * w) if w > -math.inf else float(low == 0) for w in log_weights]
        terms = [v * w for v, w in zip(weights, log_weights, strict=True) if v > 0]
        total += (high - low) * (sum(terms) / sum(weights) if terms else -math.inf)
    return total


@pytest.mark.parametrize("partitions", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_of_zero_has_no_share_and_no_nan(partitions: int, dtype: torch.dtype) -> None:
    columns = [
        [-1.0, -2.0, -0.5],
        [-1.0, -math.inf, -0.5],
        [-math.inf, -math.inf, 3.0],
        [-math.inf, -math.inf, -math.inf],
        [-1e20, -1.0, 2.0],
    ]
    log_weights = torch.tensor(columns, dtype=dtype).T.requires_grad_()
    bound = TVO(3, num_partitions=partitions, smallest=0.2)._bound(log_weights)
    expected = torch.tensor([by_hand(column, partitions, 0.2) for column in columns], dtype=dtype)
    torch.testing.assert_close(bound, expected)
    assert bound[1:4].isneginf().all()
    (gradient,) = torch.autograd.grad(bound.sum(), log_weights)
    assert gradient.isfinite().all()
    # what is ruled out has the share of the first partition alone, 1 / K
    first = (1.0 if partitions == 1 else 0.2) / 3
    torch.testing.assert_close(gradient[:, 3], torch.full((3,), first, dtype=dtype))
    assert gradient[1, 1].item() == pytest.approx(first)
    numbers = log_weights[
        [0, 2], 1
    ].detach()  # the finite part of the sum, without the draw that is ruled out
    step = 1e-3 if dtype == torch.float64 else 1e-2

    def finite(values: Tensor) -> float:
        column = [float(values[0]), -1e3, float(values[1])]
        return by_hand(column, partitions, 0.2)

    for i, row in enumerate((0, 2)):
        shift = step * torch.eye(2, dtype=dtype)[i]
        slope = (finite(numbers + shift) - finite(numbers - shift)) / (2 * step)
        assert gradient[row, 1].item() == pytest.approx(slope, abs=1e-3)


class Ruled(nn.Module):
    """A model under which z below 0 is impossible: its observation has probability 0 there."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.shift, 1.0).to_event(1), obs=x)
            impossible = torch.where(z.squeeze(-1) > 0, 0.0, -math.inf)
            pyro.factor("possible", impossible)


class Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.full((), 0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc + 0.1 * x, 1.0).to_event(1))


def test_gradients_of_a_model_that_rules_draws_out_are_finite() -> None:
    torch.manual_seed(0)
    model, guide, x = Ruled(), Guide(), torch.ones(20, 1, dtype=torch.float64)
    loss = TVO(8, num_partitions=4).differentiable_loss(model, guide, x)
    assert loss.item() == math.inf  # the ELBO, whose share is that of the first partition, is -inf
    gradients = torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])
    assert all(g.isfinite().all() and g.abs() > 1e-3 for g in gradients)
    torch.manual_seed(0)
    assert IWAE(8).differentiable_loss(model, guide, x).isfinite()  # some draws of each datum are possible
