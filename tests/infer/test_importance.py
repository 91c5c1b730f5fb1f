"""Tests of the bounds' values: against the exact evidence, each other and formulas by hand."""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Draws
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from ppl_vae.infer import (
    CIWAE,
    CUBO,
    IWAE,
    KL_ELBO,
    MIWAE,
    PIWAE,
    STL_ELBO,
    TVO,
    VIMCO,
    DReG,
    Renyi,
    ScoreFunctionELBO,
    WakeSleep,
    log_weights,
)
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.scoring import score
from ppl_vae.models import LinearGaussian

Make = Callable[[int], Estimator]
# Float64 rounds at 1e-16; the sums here have fewer than 1000 terms of order 1 to 10.
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def divisor(k: int) -> int:
    return 2 if k % 2 == 0 else 1


LOWER: dict[str, Make] = {
    "IWAE": IWAE,
    "IWAE-STL": lambda k: IWAE(k, stick_the_landing=True),
    "CIWAE": lambda k: CIWAE(k, beta=0.3),
    "MIWAE": lambda k: MIWAE(k, num_groups=divisor(k)),
    "PIWAE": lambda k: PIWAE(k, num_groups=divisor(k)),
    "Renyi-0": lambda k: Renyi(k, alpha=0),
    "Renyi-0.3": lambda k: Renyi(k, alpha=0.3),
    "Renyi-1": lambda k: Renyi(k, alpha=1),
    "Renyi-2": lambda k: Renyi(k, alpha=2),
    "DReG": DReG,
    "DReG-0.5": lambda k: DReG(k, alpha=0.5),
    "VIMCO": VIMCO,
    "TVO": TVO,
    "WakeSleep": lambda k: WakeSleep(k, sleep=float(k == 1)),
    "STL": STL_ELBO,
    "KL": KL_ELBO,
    "KL-sampled": lambda k: KL_ELBO(k, analytic_kl=False),
    "ScoreFunction": ScoreFunctionELBO,
}
EVERY: dict[str, Make] = {**LOWER, "CUBO": CUBO, "CUBO-3": lambda k: CUBO(k, order=3.0)}
lower_bounds = pytest.mark.parametrize("make", LOWER.values(), ids=LOWER)
estimators = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


def sampled_elbo(k: int) -> Estimator:
    return KL_ELBO(k, analytic_kl=False)


class LinearGuide(nn.Module):
    """The posterior's mean, moved, and its marginal standard deviations, widened."""

    def __init__(self, model: LinearGaussian, *, shift: float = 0.0, spread: float = 1.0) -> None:
        super().__init__()
        eye = torch.eye(model.data_dim).to(model.bias)
        origin = model.posterior(torch.zeros_like(model.bias))
        self.gain = nn.Parameter((model.posterior(eye).mean - origin.mean).detach())
        self.shift = nn.Parameter((origin.mean + shift).detach())
        self.log_scale = nn.Parameter((spread * origin.stddev).log().detach())

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            normal = dist.Normal(x @ self.gain + self.shift, self.log_scale.exp())
            return pyro.sample("z", normal.to_event(1))


def pair(*, latent: int = 1, shift: float = 0.3, spread: float = 0.8) -> tuple[LinearGaussian, LinearGuide]:
    torch.manual_seed(0)
    model = LinearGaussian(latent, 3).double()
    return model, LinearGuide(model, shift=shift, spread=spread)


def exact_pair() -> tuple[LinearGaussian, Callable[..., Any]]:
    """Return a model of two latent dimensions and its posterior, which has a full covariance."""
    model, _ = pair(latent=2)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", model.posterior(x))

    return model, guide


def data(model: LinearGaussian, n: int) -> Tensor:
    return model(None, size=n).detach()


def objective(estimator: Estimator, model: Any, guide: Any, x: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return the objective per datum, with its gradient to both programs, on given noise."""
    with Draws(**({} if noise is None else {"z": noise})):
        # constant draws can't share noise; the value is that of any others
        gradient = "full" if estimator.gradient == "score" else estimator.gradient
        scores = score(model, guide, x, num_particles=estimator.num_particles, gradient=gradient)
    return estimator.objective(scores, 1.0)


def value(estimator: Estimator, model: Any, guide: Any, x: Tensor, noise: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return objective(estimator, model, guide, x, noise)


def noise_for(k: int, n: int, latent: int = 1) -> Tensor:
    return torch.randn(*([k] if k > 1 else []), n, latent).double()


def mean_and_error(v: Tensor) -> tuple[float, float]:
    return float(v.mean()), float(v.std() / math.sqrt(len(v)))


# Against the exact evidence


@lower_bounds
def test_lower_bound_is_below_the_evidence(make: Make) -> None:
    model, guide = pair()
    x = data(model, 20_000)
    gap, error = mean_and_error(model.log_prob(x).detach() - value(make(4), model, guide, x))
    assert 4 * error < gap < 1


@estimators
def test_every_bound_is_the_evidence_at_the_exact_posterior(make: Make) -> None:
    model, guide = exact_pair()
    x = data(model, 5)
    estimator = make(4)
    found = value(estimator, model, guide, x)
    expected = model.log_prob(x).detach()
    if isinstance(estimator, CUBO):
        expected = -expected
    if isinstance(estimator, KL_ELBO) and estimator.analytic_kl:  # the reconstruction is sampled
        x = x[:1].expand(20_000, -1)
        mean, error = mean_and_error(value(estimator, model, guide, x))
        assert error > 0 and abs(mean - float(expected[0])) < 4 * error
    else:
        torch.testing.assert_close(found, expected, **CLOSE)


def test_iwae_tightens_with_every_draw() -> None:
    model, guide = pair(shift=0.5, spread=0.7)
    x, noise = data(model, 4000), noise_for(100, 4000)
    values = [value(IWAE(k), model, guide, x, noise[:k] if k > 1 else noise[0]) for k in (1, 2, 5, 20, 100)]
    for looser, tighter in itertools.pairwise([*values, model.log_prob(x).detach()]):
        gain, error = mean_and_error(tighter - looser)
        assert gain > 4 * error


def test_iwae_of_many_draws_is_near_the_evidence() -> None:
    model, guide = pair(shift=0.1, spread=1.1)
    x = data(model, 200)
    gap, error = mean_and_error(model.log_prob(x).detach() - value(IWAE(1000), model, guide, x))
    assert abs(gap) < 0.01 and 4 * error < 0.01


@pytest.mark.parametrize("order", [1.5, 2.0, 3.0])
def test_chi_bound_is_above_the_evidence(order: float) -> None:
    model, guide = pair(shift=0.2, spread=1.4)
    x = data(model, 1000)
    gap, error = mean_and_error(-value(CUBO(1000, order=order), model, guide, x) - model.log_prob(x).detach())
    assert gap > 4 * error
    assert gap < 0.5


def test_chi_bound_has_its_exact_value() -> None:
    model, guide = pair(shift=0.2, spread=1.4)
    x = data(model, 400)
    posterior = model.posterior(x)
    p, q = posterior.mean.detach(), (x @ guide.gain + guide.shift).detach()
    s, t = posterior.stddev.detach(), guide.log_scale.exp().detach()
    # log of the integral of N(z; p, s)^2 / N(z; q, t)
    width = 2 / s**2 - 1 / t**2
    log_chi = (
        (t / (s**2 * width.sqrt())).log()
        + ((2 * p / s**2 - q / t**2) ** 2 / width / 2)
        + (q**2 / t**2 / 2 - p**2 / s**2)
    )
    exact = model.log_prob(x).detach() + 0.5 * log_chi.squeeze(-1)
    difference, error = mean_and_error(-value(CUBO(5000), model, guide, x) - exact)
    assert abs(difference) < 4 * error + 1e-3  # the bias of the logarithm, 1 / K times the relative variance


# Between the ELBO and the IWAE


@pytest.mark.parametrize("partitions", [1, 2, 5, 20])
@pytest.mark.parametrize("smallest", [1e-3, 0.1, 0.9])
def test_tvo_lies_between_elbo_and_iwae_draw_by_draw(partitions: int, smallest: float) -> None:
    model, guide = pair()
    x, noise = data(model, 50), noise_for(6, 50)
    tvo = value(TVO(6, num_partitions=partitions, smallest=smallest), model, guide, x, noise)
    elbo, iwae = (value(e, model, guide, x, noise) for e in (sampled_elbo(6), IWAE(6)))
    if partitions == 1:
        torch.testing.assert_close(tvo, elbo, **CLOSE)
    else:
        assert (elbo < tvo).all()
    assert (tvo < iwae).all()


def test_tvo_of_many_partitions_is_the_iwae() -> None:
    model, guide = pair()
    x, noise = data(model, 10), noise_for(6, 10)
    fine = value(TVO(6, num_partitions=5000, smallest=1e-5), model, guide, x, noise)
    elbo, iwae = (value(e, model, guide, x, noise) for e in (sampled_elbo(6), IWAE(6)))
    # a left sum's error is below the largest step times the rise of the integrand
    assert ((iwae - fine) < 0.02 * (iwae - elbo)).all()


ENDS: dict[str, tuple[Estimator, Estimator]] = {
    "CIWAE-1": (CIWAE(6, beta=1), sampled_elbo(6)),
    "CIWAE-0": (CIWAE(6, beta=0), IWAE(6)),
    "MIWAE-1": (MIWAE(6, num_groups=1), IWAE(6)),
    "MIWAE-K": (MIWAE(6, num_groups=6), sampled_elbo(6)),
    "PIWAE-1": (PIWAE(6, num_groups=1), IWAE(6)),
    "Renyi-0": (Renyi(6, alpha=0), IWAE(6)),
    "Renyi-1": (Renyi(6, alpha=1), sampled_elbo(6)),
    "DReG-1": (DReG(6, alpha=1), STL_ELBO(6)),
    "TVO-1": (TVO(6, num_partitions=1), sampled_elbo(6)),
    "VIMCO": (VIMCO(6), IWAE(6)),
    "ScoreFunction": (ScoreFunctionELBO(6), sampled_elbo(6)),
}


@pytest.mark.parametrize(("estimator", "end"), ENDS.values(), ids=ENDS)
def test_ends_have_value_and_gradient_of_elbo_and_iwae(estimator: Estimator, end: Estimator) -> None:
    model, guide = pair(latent=2)
    x, noise = data(model, 4), noise_for(6, 4, 2)
    parameters = [*model.parameters(), *guide.parameters()]
    found, expected = (objective(e, model, guide, x, noise) for e in (estimator, end))
    torch.testing.assert_close(found, expected, **CLOSE)
    steps = [torch.autograd.grad(v.sum(), parameters) for v in (found, expected)]
    for ours, theirs in zip(*steps, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_piwae_of_one_draw_per_group_has_the_elbos_gradient_for_the_guide_alone() -> None:
    model, guide = pair(latent=2)
    x, noise = data(model, 4), noise_for(6, 4, 2)
    found = objective(PIWAE(6, num_groups=6), model, guide, x, noise)
    iwae, elbo = (objective(e, model, guide, x, noise) for e in (IWAE(6), sampled_elbo(6)))
    torch.testing.assert_close(found, iwae, **CLOSE)
    for module, expected, other in ((model, iwae, elbo), (guide, elbo, iwae)):
        parameters = list(module.parameters())
        ours, theirs, wrong = (
            torch.autograd.grad(v.sum(), parameters, retain_graph=True) for v in (found, expected, other)
        )
        for a, b, c in zip(ours, theirs, wrong, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
            assert not torch.allclose(a, c, rtol=1e-3)


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize(
    ("estimator", "of_guide", "sign"),
    [
        (PIWAE(6, num_groups=2), MIWAE(6, num_groups=2), 1),
        (PIWAE(6, num_groups=3), MIWAE(6, num_groups=3), 1),
        (CUBO(6, order=2.0), Renyi(6, alpha=-1.0), -1),
        (CUBO(6, order=3.0), Renyi(6, alpha=-2.0), -1),
    ],
    ids=["PIWAE-2", "PIWAE-3", "CUBO-2", "CUBO-3"],
)
def test_two_objectives_have_the_gradients_of_both_on_the_same_draws(
    estimator: Estimator, of_guide: Estimator, sign: int, far: bool
) -> None:
    model, guide = pair(latent=2, shift=20.0 if far else 0.3)  # far: shares of the weights underflow
    x, noise = data(model, 4), noise_for(6, 4, 2)
    found, expected = (objective(e, model, guide, x, noise) for e in (estimator, of_guide))
    iwae = objective(IWAE(6), model, guide, x, noise)
    for module, reference in ((model, iwae), (guide, sign * expected)):
        ours, theirs = (
            torch.autograd.grad(v.sum(), list(module.parameters()), retain_graph=True)
            for v in (found, reference)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("dreg", [False, True])
@pytest.mark.parametrize("sleep", [0.0, 0.5])
def test_wake_sleep_has_the_iwaes_value(dreg: bool, sleep: float) -> None:
    model, guide = pair()
    x, noise = data(model, 4), noise_for(6, 4)
    found = value(WakeSleep(6, sleep=sleep, dreg=dreg), model, guide, x, noise)
    torch.testing.assert_close(found, value(IWAE(6), model, guide, x, noise), **CLOSE)


@pytest.mark.parametrize(("alpha", "extreme"), [(math.inf, torch.amin), (-math.inf, torch.amax)])
def test_renyi_of_infinite_order_is_an_extreme_weight(alpha: float, extreme: Any) -> None:
    model, guide = pair()
    x, noise = data(model, 4), noise_for(6, 4)
    with Draws(z=noise):
        weights = log_weights(model, guide, x, num_particles=6).detach()
    torch.testing.assert_close(value(Renyi(6, alpha=alpha), model, guide, x, noise), extreme(weights, 0))


# Against formulas by hand, on the axes [draws, data]


def mean_log(w: NDArray[np.float64]) -> Any:
    return np.logaddexp.reduce(w) - math.log(len(w))


def tvo_by_hand(w: NDArray[np.float64]) -> float:
    betas, total = [0.0, 0.1, math.sqrt(0.1), 1.0], 0.0
    for beta, end in itertools.pairwise(betas):
        share = np.exp(beta * w - np.logaddexp.reduce(beta * w))
        total += (end - beta) * (share * w).sum()
    return total


Formula = Callable[[NDArray[np.float64]], Any]  # of one datum's log weights
FORMULAS: dict[str, tuple[Make, Formula]] = {
    "IWAE": (IWAE, mean_log),
    "CIWAE": (lambda k: CIWAE(k, beta=0.3), lambda w: 0.3 * w.mean() + 0.7 * mean_log(w)),
    "MIWAE": (lambda k: MIWAE(k, num_groups=3), lambda w: np.mean([mean_log(g) for g in np.split(w, 3)])),
    "PIWAE": (lambda k: PIWAE(k, num_groups=3), mean_log),
    "Renyi": (lambda k: Renyi(k, alpha=0.3), lambda w: mean_log(0.7 * w) / 0.7),
    "Renyi-2": (lambda k: Renyi(k, alpha=2), lambda w: -mean_log(-w)),
    "Renyi--1": (lambda k: Renyi(k, alpha=-1), lambda w: mean_log(2 * w) / 2),
    "DReG": (DReG, mean_log),
    "DReG-0.5": (lambda k: DReG(k, alpha=0.5), lambda w: mean_log(0.5 * w) / 0.5),
    "CUBO": (lambda k: CUBO(k, order=3.0), lambda w: -mean_log(3 * w) / 3),
    "TVO": (lambda k: TVO(k, num_partitions=3), tvo_by_hand),
    "VIMCO": (VIMCO, mean_log),
    "WakeSleep": (WakeSleep, mean_log),
    "STL": (STL_ELBO, np.mean),
    "ScoreFunction": (ScoreFunctionELBO, np.mean),
}


@pytest.mark.parametrize(("make", "formula"), FORMULAS.values(), ids=FORMULAS)
@pytest.mark.parametrize(("k", "n"), [(6, 5), (3, 7), (12, 1)])
def test_value_is_the_formula_of_each_datums_weights(make: Make, formula: Formula, k: int, n: int) -> None:
    model, guide = pair(latent=2)
    x, noise = data(model, n), noise_for(k, n, 2)
    with Draws(z=noise):
        weights = log_weights(model, guide, x, num_particles=k).detach()
    expected = torch.tensor([float(formula(column.numpy())) for column in weights.T], dtype=torch.float64)
    torch.testing.assert_close(value(make(k), model, guide, x, noise), expected, **CLOSE)


# Per datum


@estimators
@given(n=st.integers(1, 6), k=st.integers(1, 6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=6)
def test_a_datum_has_the_same_value_in_every_batch(make: Make, n: int, k: int, seed: int) -> None:
    model, guide = pair()
    torch.manual_seed(seed)
    x, noise, order = data(model, n), noise_for(k, n), torch.randperm(n)
    together = value(make(k), model, guide, x, noise)
    assert together.shape == (n,)
    shuffled = value(make(k), model, guide, x[order], noise[..., order, :])
    torch.testing.assert_close(shuffled, together[order], **CLOSE)
    for i in range(n):
        alone = value(make(k), model, guide, x[i : i + 1], noise[..., i : i + 1, :])
        torch.testing.assert_close(alone, together[i : i + 1], **CLOSE)


@estimators
def test_a_datums_gradient_is_its_own(make: Make) -> None:
    model, guide = pair()
    x, noise = data(model, 4), noise_for(4, 4).requires_grad_()
    x.requires_grad_()
    of_second = torch.autograd.grad(objective(make(4), model, guide, x, noise)[1], x)[0]
    assert of_second[1].abs().max() > 1e-6
    assert (of_second[[0, 2, 3]] == 0).all()


# One draw, one datum


@estimators
def test_one_draw_gives_the_elbo(make: Make) -> None:
    model, guide = pair()
    x, noise = data(model, 3), noise_for(1, 3)
    estimator = make(1)
    expected = value(KL_ELBO() if make is KL_ELBO else sampled_elbo(1), model, guide, x, noise)
    found = value(estimator, model, guide, x, noise)
    torch.testing.assert_close(-found if isinstance(estimator, CUBO) else found, expected, **CLOSE)


@estimators
@pytest.mark.parametrize("k", [1, 2])
def test_one_datum_has_a_finite_loss_and_gradient(make: Make, k: int) -> None:
    model, guide = pair()
    estimator = make(k)
    loss = estimator.differentiable_loss(model, guide, data(model, 1))
    assert loss.shape == () and loss.isfinite()
    gradients = torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


# Extreme weights


@pytest.mark.parametrize(
    "name", ["IWAE", "CIWAE", "MIWAE", "PIWAE", "Renyi-2", "DReG", "TVO", "VIMCO", "CUBO"]
)
def test_weights_far_apart_overflow_nowhere(name: str) -> None:
    model, guide = pair(shift=40.0)
    x = data(model, 3) * 100
    loss = EVERY[name](6).differentiable_loss(model, guide, x)
    assert loss.isfinite()
    gradients = torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])
    assert all(g.isfinite().all() for g in gradients)


# Settings


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: IWAE(0), ValueError, "num_particles"),
        (lambda: IWAE(2.5), TypeError, "num_particles"),  # type: ignore[arg-type]
        (lambda: IWAE(kl_weight=-1.0), ValueError, "kl_weight"),
        (lambda: CIWAE(beta=1.5), ValueError, "beta: expected a share in [0, 1], got 1.5"),
        (lambda: CIWAE(beta=-0.5), ValueError, "beta"),
        (
            lambda: MIWAE(5, num_groups=2),
            ValueError,
            "num_groups: expected a divisor of num_particles=5, got 2",
        ),
        (lambda: MIWAE(4, num_groups=0), ValueError, "num_groups"),
        (
            lambda: PIWAE(5, num_groups=3),
            ValueError,
            "num_groups: expected a divisor of num_particles=5, got 3",
        ),
        (lambda: Renyi(alpha=math.nan), ValueError, "alpha: expected a number, got nan"),
        (lambda: DReG(alpha=math.inf), ValueError, "alpha: expected a finite number, got inf"),
        (lambda: CUBO(order=1.0), ValueError, "order: expected a number above 1, got 1"),
        (lambda: CUBO(order=0.5), ValueError, "order"),
        (lambda: TVO(smallest=1.0), ValueError, "smallest: expected a number in (0, 1), got 1.0"),
        (lambda: TVO(num_partitions=0), ValueError, "num_partitions"),
    ],
)
def test_wrong_settings(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize("make", [IWAE, CIWAE, MIWAE, PIWAE, Renyi, DReG, CUBO, STL_ELBO, KL_ELBO])
def test_draws_without_a_gradient_are_refused(make: Make) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.4)).to_event(1))

    expected = r"site 'z': expected a reparameterised distribution .* got Bernoulli"
    with pytest.raises(ValueError, match=expected):
        make(4).differentiable_loss(model, guide, torch.zeros(3, 1).double())
