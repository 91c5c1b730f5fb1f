"""Tests of Student's t likelihood."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from ppl_vae.likelihoods.student_t import StudentT, _StableStudentT
from ppl_vae.networks import MLP

SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=3)
CHOICES = st.one_of(st.floats(0.1, 3.0), st.sampled_from(["learned", "network"]))


@given(batch=SIZES, event=SIZES, scale=CHOICES, df=CHOICES)
def test_log_prob_is_scipys_for_any_batch_shape(
    batch: list[int], event: list[int], scale: Any, df: Any
) -> None:
    count = 1 + (scale == "network") + (df == "network")
    decoder = MLP(2, (count * event[0], *event[1:]), hidden=4)
    likelihood = StudentT(decoder, scale, df).double()
    for parameter in (getattr(likelihood, name, None) for name in ("log_scale", "raw_df")):
        if parameter is not None:
            nn.init.constant_(parameter, -0.5)
    z, x = torch.randn(*batch, 2).double(), 5 * torch.randn(*batch, *event).double()
    loc, *rest = decoder(z).detach().split(event[0], len(batch))
    half = torch.tensor(-0.5).double()
    log_scale = half if scale == "learned" else rest[0] if scale == "network" else torch.tensor(scale).log()
    nu = df
    if isinstance(df, str):
        nu = 1 + nn.functional.softplus(half if df == "learned" else rest[-1]).numpy()
    distribution = likelihood(z)
    assert (distribution.batch_shape, distribution.event_shape) == (tuple(batch), tuple(event))
    expected = torch.as_tensor(stats.t.logpdf(x.numpy(), nu, loc.numpy(), log_scale.double().exp().numpy()))
    found = distribution.log_prob(x)
    torch.testing.assert_close(found, expected.flatten(len(batch)).sum(-1), rtol=1e-6, atol=1e-6)


def test_learned_numbers_start_at_scale_one_and_four_degrees_of_freedom() -> None:
    base = StudentT(MLP(2, 3), "learned", "learned")(torch.zeros(5, 2)).base_dist
    torch.testing.assert_close(base.scale, torch.ones(5, 3))
    torch.testing.assert_close(base.df, torch.full((5, 3), 4.0))


def test_mean_is_the_location_and_nan_where_there_is_none() -> None:
    z = torch.randn(5, 2)
    likelihood = StudentT(MLP(2, 3))
    torch.testing.assert_close(likelihood(z).mean, likelihood.decoder(z))
    assert StudentT(MLP(2, 3), df=1.0)(z).mean.isnan().all()


@pytest.mark.parametrize("extreme", [-1e4, 1e4])
def test_gradients_at_extreme_outputs_are_finite(extreme: float) -> None:
    out = torch.tensor([[0.5, extreme, extreme]], requires_grad=True)
    likelihood = StudentT(nn.Identity(), "network", "network")
    for x in (0.5, -100.0):
        log_prob = likelihood(out).log_prob(torch.tensor([[x]]))
        assert log_prob.isfinite().all()
        log_prob.sum().backward()
    assert out.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scale": 0.0}, ValueError, r"^scale: expected a finite number above 0, got 0.0$"),
        ({"df": -1}, ValueError, r"^df: expected a finite number above 0, got -1$"),
        ({"df": "learnt"}, ValueError, r"^df: unknown 'learnt' \(did you mean 'learned'\?\)"),
        ({"scale": None}, TypeError, r"^scale: expected a number above 0, got None$"),
    ],
)
def test_refuses(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StudentT(MLP(2, 3), **arguments)


def test_draws_have_the_distribution_function() -> None:
    # Kolmogorov-Smirnov on 20,000 draws
    torch.manual_seed(0)
    x = StudentT(nn.Identity(), 0.5, 3.0)(torch.tensor([2.0]).double()).sample((20_000,))
    assert stats.kstest(x[:, 0].numpy(), stats.t(3.0, 2.0, 0.5).cdf).pvalue > 1e-3


def test_training_finds_scipys_maximum_and_beats_the_normal_on_heavy_tails() -> None:
    torch.manual_seed(0)
    x = torch.distributions.StudentT(2.5, 1.0, 0.3).sample((500, 1)).double()
    likelihood = StudentT(nn.Linear(1, 1), "learned", "learned").double()
    z = torch.zeros(500, 1).double()
    optimizer = torch.optim.LBFGS(likelihood.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -likelihood(z).log_prob(x).mean()
        value.backward()
        return value.detach()

    optimizer.step(loss)
    best = stats.t.logpdf(x[:, 0].numpy(), *stats.t.fit(x[:, 0].numpy())).mean()
    assert -float(loss()) == pytest.approx(best, abs=1e-5)
    normal = -0.5 * math.log(2 * math.pi * float(x.var(correction=0))) - 0.5
    assert best > normal + 0.1


@pytest.mark.parametrize("df", [2.0, 29.9, 30.1, 1e3, 1e5, 1e7])
def test_density_and_its_gradient_keep_their_digits_at_any_degrees_of_freedom(df: float) -> None:
    x = torch.linspace(-4, 4, 9)
    found = []
    for dtype in (torch.float32, torch.float64):
        number = torch.tensor(df, dtype=dtype, requires_grad=True)
        density = _StableStudentT(number, torch.zeros(9, dtype=dtype), torch.ones(9, dtype=dtype))
        log_prob = density.log_prob(x.to(dtype))
        found.append((log_prob, torch.autograd.grad(log_prob.sum(), number)[0]))
    exact = torch.tensor(stats.t(df).logpdf(x.double().numpy()))
    torch.testing.assert_close(found[1][0], exact, rtol=1e-9, atol=1e-8)  # scipy's own digits
    torch.testing.assert_close(found[0][0].double(), exact, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(found[0][1].double(), found[1][1], rtol=0.02, atol=1e-11)
