"""Tests of the likelihoods of counts: Poisson and negative binomial."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor, nn

from ppl_vae import fit
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.likelihoods.negative_binomial import NegativeBinomial
from ppl_vae.likelihoods.poisson import Poisson
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=3)
CHOICES = st.one_of(st.floats(0.1, 100.0), st.sampled_from(["learned", "elementwise", "network"]))


def counts(*shape: int) -> Tensor:
    return torch.poisson(torch.full(shape, 3.0)).double()


@given(batch=SIZES, event=SIZES)
def test_poisson_is_scipys_for_any_batch_shape(batch: list[int], event: list[int]) -> None:
    likelihood = Poisson(MLP(2, event, hidden=4)).double()
    z, x = torch.randn(*batch, 2).double(), counts(*batch, *event)
    distribution = likelihood(z)
    assert (distribution.batch_shape, distribution.event_shape) == (tuple(batch), tuple(event))
    mean = likelihood.decoder(z).exp()
    expected = torch.as_tensor(stats.poisson.logpmf(x.numpy(), mean.detach().numpy()))
    torch.testing.assert_close(distribution.log_prob(x), expected.flatten(len(batch)).sum(-1))
    torch.testing.assert_close(distribution.mean, mean)


@given(batch=SIZES, event=SIZES, total_count=CHOICES)
def test_negative_binomial_is_scipys_for_any_batch_shape(
    batch: list[int], event: list[int], total_count: Any
) -> None:
    shape = (2 * event[0], *event[1:]) if total_count == "network" else event
    likelihood = NegativeBinomial(MLP(2, shape, hidden=4), total_count).double()
    z, x = torch.randn(*batch, 2).double(), counts(*batch, *event)
    out = likelihood.decoder(z)
    if total_count == "network":
        out, raw = out.split(event[0], len(batch))
        r = nn.functional.softplus(raw) + 1e-4
    elif isinstance(total_count, str):
        assert likelihood.raw_total_count.shape == (tuple(event) if total_count == "elementwise" else ())
        with torch.no_grad():
            likelihood.raw_total_count.add_(torch.randn_like(likelihood.raw_total_count))
        r = nn.functional.softplus(likelihood.raw_total_count).expand_as(out) + 1e-4
    else:
        r = torch.full_like(out, total_count)
    mean, r = out.exp().detach(), r.detach()
    expected = torch.as_tensor(stats.nbinom.logpmf(x.numpy(), r.numpy(), (r / (r + mean)).numpy()))
    distribution = likelihood(z)
    assert (distribution.batch_shape, distribution.event_shape) == (tuple(batch), tuple(event))
    torch.testing.assert_close(distribution.log_prob(x), expected.flatten(len(batch)).sum(-1))
    torch.testing.assert_close(distribution.mean, mean)
    torch.testing.assert_close(distribution.variance, mean + mean**2 / r)


@pytest.mark.parametrize("choice", ["learned", "elementwise"])
def test_a_learned_total_count_starts_at_one(choice: Any) -> None:
    total_count = NegativeBinomial(MLP(2, 3), choice)(torch.zeros(4, 2)).base_dist.total_count
    torch.testing.assert_close(total_count, torch.full((4, 3), 1.0001))


@pytest.mark.parametrize("r", [1e-4, 0.5, 29.999, 30.001, 1e3])
@pytest.mark.parametrize("mean", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_probabilities_of_all_counts_sum_to_one(
    r: float, mean: float, dtype: torch.dtype, close: float
) -> None:
    # The tail beyond is scipy's.
    last = 5000
    x = torch.arange(last + 1, dtype=dtype)[:, None]
    likelihood = NegativeBinomial(nn.Identity(), r).to(dtype)
    total = likelihood(torch.tensor([mean], dtype=dtype).log()).log_prob(x).double().exp().sum()
    tail = stats.nbinom.sf(last, r, r / (r + mean))
    assert float(total) + tail == pytest.approx(1.0, abs=close)


@pytest.mark.parametrize("r", [1.0, 31.0, 1e4, 1e6])
def test_float32_keeps_its_precision_up_to_the_limit_of_the_poisson(r: float) -> None:
    x = torch.tensor([0.0, 1.0, 4.0, 30.0, 1000.0])[:, None]
    for mean in (0.1, 5.0, 800.0):
        likelihood = NegativeBinomial(nn.Identity(), r)
        single = likelihood(torch.tensor([mean]).log()).log_prob(x)
        exact = torch.as_tensor(stats.nbinom.logpmf(x[:, 0].double().numpy(), r, 1 / (1 + mean / r)))
        # Terms are as large as x log(mean): 1000 log(800) = 7000, each right to 6e-8 of it, several times.
        torch.testing.assert_close(single.double(), exact, rtol=2e-6, atol=2e-3 if mean > 100 else 2e-4)


def test_gradients_are_those_of_finite_differences_on_both_sides_of_the_series() -> None:
    likelihood = NegativeBinomial(nn.Identity(), "network").double()
    out = torch.tensor([[0.5, 0.5, -1.0, 50.0], [2.0, 3.0, 29.5, 1e3]]).double().requires_grad_()
    x = torch.tensor([[0.0, 3.0], [7.0, 40.0]]).double()
    assert torch.autograd.gradcheck(lambda o: likelihood(o).log_prob(x), (out,), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [Poisson, lambda d: NegativeBinomial(d, "network")], ids=["Poisson", "NB"])
@pytest.mark.parametrize("extreme", [-1e4, 1e4])
def test_extreme_outputs_give_finite_values_gradients_and_draws(make: Any, extreme: float) -> None:
    out = torch.full((3, 4), extreme, requires_grad=True)
    distribution = make(nn.Identity())(out)
    x = torch.tensor([0.0, 1.0, 1e4])[:, None].expand(3, distribution.event_shape[0])
    log_prob = distribution.log_prob(x)
    assert log_prob.isfinite().all()
    log_prob.sum().backward()
    assert out.grad.isfinite().all()
    assert distribution.support.check(distribution.sample()).all()


@pytest.mark.parametrize(
    "make", [Poisson, lambda d: NegativeBinomial(d, 2.0)], ids=["Poisson", "NegativeBinomial"]
)
def test_draws_have_the_probabilities(make: Any) -> None:
    distribution = make(nn.Identity())(torch.tensor([1.0]).double())
    torch.manual_seed(0)
    x = distribution.sample((20_000,)).squeeze(-1)
    top = 7  # all counts from here are one class
    observed = x.clamp(max=top).long().bincount(minlength=top + 1)
    expected = 20_000 * distribution.log_prob(torch.arange(top + 1.0).double()[:, None]).exp()
    expected[top] = 20_000 - expected[:top].sum()
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("value", [-1.0, 0.5])
@pytest.mark.parametrize("make", [Poisson, NegativeBinomial])
def test_what_is_no_count_is_refused_with_one_line(make: Any, value: float) -> None:
    x = torch.ones(6, 3)
    x[4, 1] = value
    model, guide = VAE(StandardNormal(2), make(MLP(2, 3))), MeanFieldGuide(MLP(3), 2)
    message = r"^data: datum 4 is outside the support of site 'x', .*IntegerGreaterThan\(lower_bound=0\)"
    with pytest.raises(ValueError, match=message):
        fit(model, guide, x, epochs=1)


@pytest.mark.parametrize("choice", ["Poisson", "learned", "network"])
def test_starts_at_the_data_mean(choice: Any) -> None:
    x = counts(50, 3)
    x[:, 2] = 0.0
    decoder = MLP(2, 6 if choice == "network" else 3, hidden=4).double()
    likelihood = Poisson(decoder) if choice == "Poisson" else NegativeBinomial(decoder, choice).double()
    for name, parameter in likelihood.named_parameters():
        if name.endswith("weight"):
            nn.init.zeros_(parameter)
    likelihood.init_bias(x)
    mean = likelihood(torch.randn(5, 2).double()).mean
    torch.testing.assert_close(mean, x.mean(0).clamp(min=1e-3).expand(5, 3))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NegativeBinomial(MLP(2, 3), 0.0), ValueError, "total_count: expected a finite number above"),
        (lambda: NegativeBinomial(MLP(2, 3), "netwrk"), ValueError, "total_count: unknown 'netwrk' (did you"),
        (
            lambda: NegativeBinomial(nn.Linear(2, 3), "elementwise"),
            TypeError,
            "total_count: needs a decoder with an `out_shape`, the shape of x, got Linear",
        ),
    ],
)
def test_refuses(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        make()


def test_trained_dispersion_is_the_maximum_that_scipy_finds() -> None:
    torch.manual_seed(0)
    mean, r = 5.0, 2.0
    x = torch.distributions.NegativeBinomial(r, logits=torch.tensor(mean / r).log()).sample((500, 1)).double()
    likelihood = NegativeBinomial(nn.Linear(1, 1).double(), "learned").double()
    z = torch.zeros(500, 1).double()
    optimizer = torch.optim.LBFGS(likelihood.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -likelihood(z).log_prob(x).mean()
        value.backward()
        return value.detach()

    before = float(loss())
    optimizer.step(loss)

    def negative(p: Any) -> float:
        return -stats.nbinom.logpmf(x[:, 0].numpy(), p[0], p[0] / (p[0] + p[1])).mean()

    best = optimize.minimize(
        negative, [1.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12}
    )
    assert float(loss()) == pytest.approx(best.fun, abs=1e-6)
    assert float(loss()) < before - 1
    fitted = likelihood(z[:1])
    assert fitted.base_dist.total_count.item() == pytest.approx(best.x[0], rel=1e-3)
    assert fitted.mean.item() == pytest.approx(best.x[1], rel=1e-3)
