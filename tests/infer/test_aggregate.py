"""Tests of the estimators that look at the aggregate posterior, against loops and numpy."""

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
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae import fit
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import DIP_ELBO, BetaTC_ELBO
from ppl_vae.infer.scoring import Scores, score
from ppl_vae.likelihoods import Normal
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

Program = Callable[..., Any]
# Float64 rounds at 1e-16; the sums here have fewer than 1000 terms of order 1 to 100.
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
samplings = pytest.mark.parametrize("sampling", ["weighted", "stratified"])
kinds = pytest.mark.parametrize("kind", ["I", "II"])


def vae_pair(latent: int = 2) -> tuple[VAE, MeanFieldGuide]:
    """Return a small pair in float64 whose posterior is neither the prior nor symmetric."""
    model = VAE(StandardNormal(latent), Normal(MLP(latent, 3, hidden=5), scale="learned"))
    return model.double(), MeanFieldGuide(MLP(3, hidden=5), latent).double()


class FullRank(nn.Module):
    """A guide with one covariance for all data, as a multivariate normal of either kind."""

    def __init__(self, latent: int = 2, *, low_rank: bool = False) -> None:
        super().__init__()
        self.low_rank = low_rank
        self.weight = nn.Parameter(torch.randn(3, latent).double())
        self.factor = nn.Parameter(torch.randn(latent, 2).double())
        self.diagonal = nn.Parameter(torch.linspace(0.2, 0.5, latent).double())

    def covariance(self) -> Tensor:
        return self.factor @ self.factor.mT + self.diagonal.diag()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            mean = 0.5 * x @ self.weight
            if self.low_rank:
                fn: Any = dist.LowRankMultivariateNormal(mean, self.factor, self.diagonal)
            else:
                fn = dist.MultivariateNormal(mean, self.covariance())
            pyro.sample("z", fn)


def posteriors(guide: Any, x: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return each datum's mean and covariance."""
    with torch.no_grad():
        if isinstance(guide, FullRank):
            return [(m, guide.covariance().numpy()) for m in (0.5 * x @ guide.weight).numpy()]
        q = guide.posterior(x).base_dist
        return [(m, np.diag(s**2)) for m, s in zip(q.mean.numpy(), q.stddev.numpy(), strict=True)]


def density(z: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    z, mean, covariance = np.atleast_1d(z), np.atleast_1d(mean), np.atleast_2d(covariance)
    distance = (z - mean) @ np.linalg.solve(covariance, z - mean)
    return float(np.exp(-0.5 * distance) / np.sqrt(np.linalg.det(2 * np.pi * covariance)))


def share(i: int, j: int, n: int, size: int, sampling: str) -> float:
    """Return the weight of posterior j of a batch in q(z) at a draw of posterior i, of Chen et al. (2018).

    Stratified: the datum itself, then M - 1 of the M others, then the last of them.
    """
    if sampling == "weighted":
        return 1 / (n * size)
    m = n - 1
    if i == j:
        return 1 / size
    return (size - m) / (size * m) if j == (i + 1) % n else 1 / m


def run(model: Program, guide: Program, x: Tensor, k: int = 1, **noise: Tensor) -> Scores:
    with Draws(**noise):
        return score(model, guide, x, num_particles=k)


GUIDES: dict[str, Callable[[int], nn.Module]] = {
    "mean field": lambda latent: MeanFieldGuide(MLP(3, hidden=5), latent).double(),
    "full rank": lambda latent: FullRank(latent),
    "low rank": lambda latent: FullRank(latent, low_rank=True),
}
guides = pytest.mark.parametrize("kind", GUIDES)


# beta-TCVAE: the parts


@samplings
@guides
@given(
    n=st.integers(1, 5), latent=st.integers(1, 3), k=st.integers(1, 3), more=st.sampled_from([0, 1, 7, 10**6])
)
def test_parts_sum_to_the_kl_of_each_draw(
    kind: str, sampling: Any, n: int, latent: int, k: int, more: int
) -> None:
    model, guide = vae_pair(latent)[0], GUIDES[kind](latent)
    scores = run(model, guide, 2 * torch.randn(n, 3).double(), k)
    parts = BetaTC_ELBO(n + more, sampling=sampling).decompose(scores)
    assert list(parts) == ["mutual_information", "total_correlation", "dimension_kl"]
    assert all(part.shape == (k, n) for part in parts.values())
    torch.testing.assert_close(sum(parts.values()), scores.kl("z"), rtol=0, atol=1e-10)
    if latent == 1:
        assert parts["total_correlation"].abs().max() < 1e-10


@samplings
@guides
@pytest.mark.parametrize(("n", "size", "k"), [(4, 9, 2), (2, 5, 1), (3, 3, 2), (1, 4, 2)])
def test_parts_are_those_of_a_loop_over_the_batch(
    kind: str, sampling: Any, n: int, size: int, k: int
) -> None:
    latent = 3
    model, guide = vae_pair(latent)[0], GUIDES[kind](latent)
    x = torch.randn(n, 3).double()
    scores = run(model, guide, x, k)
    parts = BetaTC_ELBO(size, sampling=sampling).decompose(scores)
    q = posteriors(guide, x)
    z = scores.draws["z"].detach().view(k, n, latent).numpy()
    for a in range(k):
        for i in range(n):
            # a batch of one has no other data to stand for the rest
            shares = [share(i, j, n, size, sampling) if n > 1 else 1 / size for j in range(n)]
            each = [density(z[a, i], *q[j]) for j in range(n)]
            joint = math.log(sum(w * p for w, p in zip(shares, each, strict=True)))
            marginals = 0.0
            for d in range(latent):
                one = [density(z[a, i, d], m[d], c[d, d]) for m, c in q]
                marginals += math.log(sum(w * p for w, p in zip(shares, one, strict=True)))
            prior = sum(math.log(density(v, np.zeros(1), np.eye(1))) for v in z[a, i])
            expected = {
                "mutual_information": math.log(each[i]) - joint,
                "total_correlation": joint - marginals,
                "dimension_kl": marginals - prior,
            }
            for name, value in expected.items():
                assert float(parts[name][a, i].detach()) == pytest.approx(value, rel=1e-9, abs=1e-9)


def average_of_all_batches(sampling: Any, latent: int = 2) -> tuple[Tensor, Tensor]:
    """Return the mean estimate of q(z) over all ordered batches of 3 of 5, and q(z), at a draw per datum."""
    size, n = 5, 3
    model, guide = vae_pair(latent)
    x, noise = 2 * torch.randn(size, 3).double(), torch.randn(size, latent).double()
    elbo = BetaTC_ELBO(size, sampling=sampling)
    totals, counts = torch.zeros(size).double(), torch.zeros(size)
    with torch.no_grad():
        for batch in itertools.permutations(range(size), n):
            rows = list(batch)
            scores = run(model, guide, x[rows], z=noise[rows])
            log_q = scores.guide["z"] - elbo.decompose(scores)["mutual_information"]
            totals[rows] += log_q[0].exp()
            counts[rows] += 1
        q = guide.posterior(x)
        z = q.base_dist.mean + q.base_dist.stddev * noise
        exact = q.log_prob(z.unsqueeze(1)).exp().mean(1)
    assert (counts == 36).all()
    return totals / counts, exact


def test_stratified_estimate_of_the_aggregate_posterior_is_unbiased() -> None:
    torch.testing.assert_close(*average_of_all_batches("stratified"), **CLOSE)


def test_weighted_estimate_of_the_aggregate_posterior_is_biased() -> None:
    mean, exact = average_of_all_batches("weighted")
    assert ((mean / exact - 1).abs() > 0.1).any()


@guides
def test_total_correlation_of_all_data_is_that_of_the_mixture(kind: str) -> None:
    """With all data in one batch and many draws, weighted sampling but for its 1 / N is exact."""
    n, k = 4, 20_000
    model, guide = vae_pair(2)[0], GUIDES[kind](2)
    x = 2 * torch.randn(n, 3).double()
    with torch.no_grad():
        parts = BetaTC_ELBO(n, sampling="weighted").decompose(run(model, guide, x, k))
    # log q(z) is too low by log N, the marginals' product by that per dimension
    draws = (parts["total_correlation"] - math.log(n)).mean(1)
    total = correlation(posteriors(guide, x))
    error = float(draws.std()) / math.sqrt(k)
    assert error < 0.02
    assert abs(float(draws.mean()) - total) < 4 * error + 1e-6  # of the integral


def correlation(q: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the total correlation of a mixture in two dimensions, by quadrature."""
    side = np.linspace(-15, 15, 1501)
    step = side[1] - side[0]
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), -1)
    joint = np.zeros(grid.shape[:2])
    for mean, covariance in q:
        away = grid - mean
        distance = (away * (away @ np.linalg.inv(covariance))).sum(-1)
        joint += np.exp(-0.5 * distance) / np.sqrt(np.linalg.det(2 * np.pi * covariance)) / len(q)
    assert abs(joint.sum() * step**2 - 1) < 1e-6
    marginals = np.outer(joint.sum(1) * step, joint.sum(0) * step)
    safe = np.where(joint > 1e-300, joint, 1.0)
    ratio = np.log(safe) - np.log(np.where(joint > 1e-300, marginals, 1.0))
    return float((joint * ratio).sum() * step**2)


# beta-TCVAE: the objective


@samplings
@pytest.mark.parametrize("k", [1, 3])
def test_all_weights_one_is_the_elbo(sampling: Any, k: int) -> None:
    model, guide = vae_pair()
    x, noise = torch.randn(5, 3).double(), torch.randn(k, 5, 2).double()
    reference = Trace_ELBO(num_particles=k, vectorize_particles=True, max_plate_nesting=1)
    elbo = BetaTC_ELBO(9, beta=1.0, sampling=sampling, num_particles=k)
    with Draws(z=noise):
        ours = elbo.differentiable_loss(model, guide, x)
        theirs = reference.differentiable_loss(model, guide, x)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    parameters = [*model.parameters(), *guide.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, **CLOSE)


@samplings
def test_weights_multiply_the_parts(sampling: Any) -> None:
    model, guide = vae_pair()
    x, noise = torch.randn(5, 3).double(), torch.randn(2, 5, 2).double()
    elbo = BetaTC_ELBO(9, alpha=0.5, beta=3.0, gamma=2.0, sampling=sampling, num_particles=2)
    with Draws(z=noise):
        loss = elbo.loss(model, guide, x)
    scores = run(model, guide, x, 2, z=noise)
    parts = elbo.decompose(scores)
    weighted = 0.5 * parts["mutual_information"] + 3 * parts["total_correlation"] + 2 * parts["dimension_kl"]
    torch.testing.assert_close(loss, -(scores.reconstruction - weighted).mean(0).sum().detach(), **CLOSE)
    assert elbo.parts.keys() == parts.keys()
    for name, part in elbo.parts.items():
        assert not part.requires_grad
        torch.testing.assert_close(part, parts[name].mean().detach(), **CLOSE)


def two_site_pair(weight: float = 1.0) -> tuple[Program, Program]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            with poutine.scale(scale=weight):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                w = pyro.sample("w", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([z, w], -1), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=weight):
            pyro.sample("z", dist.Normal(x[:, :2], 0.5).to_event(1))
            pyro.sample("w", dist.Normal(x[:, 2:], 0.5).to_event(1))

    return model, guide


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_other_sites_keep_their_kl_and_all_keep_their_weights(weight: float) -> None:
    model, guide = two_site_pair(weight)
    x = torch.randn(4, 3).double()
    noise = {"z": torch.randn(4, 2).double(), "w": torch.randn(4, 1).double()}
    elbo = BetaTC_ELBO(9, beta=5.0)
    with Draws(**noise):
        loss = elbo.loss(model, guide, x)
    scores = run(model, guide, x, **noise)
    total = elbo.decompose(scores)["total_correlation"]
    kl = scores.kl("z") + scores.kl("w") + 4 * total
    torch.testing.assert_close(loss, -(scores.reconstruction - weight * kl).sum(), **CLOSE)


def test_another_site_can_be_named() -> None:
    model, guide = two_site_pair()
    scores = run(model, guide, torch.randn(4, 3).double())
    parts = BetaTC_ELBO(9, site="w").decompose(scores)
    torch.testing.assert_close(sum(parts.values()), scores.kl("w"), **CLOSE)
    assert DIP_ELBO(site="w").covariance(scores).shape == (1, 1)


class FlowGuide(nn.Module):
    """A guide without known marginals."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2).double()
        self.flow = dist.transforms.affine_autoregressive(2, hidden_dims=[4]).double()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            base = dist.Normal(self.head(x), 0.5).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


@pytest.mark.parametrize("elbo", [BetaTC_ELBO(9), DIP_ELBO(), DIP_ELBO(kind="II")])
def test_a_guide_without_known_marginals_is_refused(elbo: Any) -> None:
    message = r"site 'z': expected a distribution in the guide with known marginals.*TransformedDistribution"
    with pytest.raises(ValueError, match=message):
        elbo.loss(vae_pair()[0], FlowGuide(), torch.randn(4, 3).double())


@pytest.mark.parametrize("elbo", [BetaTC_ELBO(9), DIP_ELBO(), DIP_ELBO(kind="II")])
@pytest.mark.parametrize("k", [1, 3])
def test_a_site_without_an_event_is_refused(elbo: Any, k: int) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0))

    scores = run(model, guide, torch.randn(4).double(), k)
    with pytest.raises(ValueError, match=r"site 'z': expected .*known marginals.* got Normal"):
        elbo.objective(scores, 1.0)


@pytest.mark.parametrize("elbo", [BetaTC_ELBO(9), DIP_ELBO(), DIP_ELBO(kind="II")])
@pytest.mark.parametrize("masked", ["model", "guide"])
def test_a_masked_site_is_refused(elbo: Any, masked: str) -> None:
    pair = dict(zip(("model", "guide"), vae_pair(), strict=True))
    pair[masked] = poutine.mask(pair[masked], mask=torch.tensor([True, False, True, True]))
    with pytest.raises(ValueError, match="site 'z': expected no mask"):
        elbo.loss(pair["model"], pair["guide"], torch.randn(4, 3).double())


@pytest.mark.parametrize("elbo", [BetaTC_ELBO(9, site="y"), DIP_ELBO(site="y")])
def test_an_unknown_site_is_refused(elbo: Any) -> None:
    message = re.escape("site: expected a latent site of model and guide, ['z'], got 'y'")
    with pytest.raises(ValueError, match=message):
        elbo.loss(*vae_pair(), torch.randn(4, 3).double())


@samplings
def test_a_batch_larger_than_the_data_is_refused(sampling: Any) -> None:
    elbo = BetaTC_ELBO(4, sampling=sampling)
    assert elbo.loss(*vae_pair(), torch.randn(4, 3).double()).isfinite()
    with pytest.raises(ValueError, match="size: expected at least the batch's 5 data, got 4"):
        elbo.loss(*vae_pair(), torch.randn(5, 3).double())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BetaTC_ELBO(0), ValueError, "size: expected a whole number above 0, got 0"),
        (lambda: BetaTC_ELBO(9.5), TypeError, "size: expected a whole number above 0, got 9.5"),
        (lambda: BetaTC_ELBO(9, alpha=-1), ValueError, "alpha: expected a finite number from 0, got -1"),
        (lambda: BetaTC_ELBO(9, beta=math.inf), ValueError, "beta: expected a finite number from 0, got inf"),
        (lambda: BetaTC_ELBO(9, gamma="1"), TypeError, "gamma: expected a number from 0, got '1'"),
        (lambda: BetaTC_ELBO(9, sampling="stratify"), ValueError, "(did you mean 'stratified'?)"),
        (lambda: BetaTC_ELBO(9, num_particles=0), ValueError, "expected a whole number above 0, got 0"),
        (lambda: DIP_ELBO(-1.0), ValueError, "off_diagonal: expected a finite number from 0, got -1.0"),
        (lambda: DIP_ELBO(1.0, -2.0), ValueError, "diagonal: expected a finite number from 0, got -2.0"),
        (lambda: DIP_ELBO("ten"), TypeError, "off_diagonal: expected a number from 0, got 'ten'"),
        (lambda: DIP_ELBO(kind="III"), ValueError, "kind: unknown 'III'"),
    ],
)
def test_wrong_settings(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


# DIP-VAE


@kinds
@pytest.mark.parametrize("k", [1, 3])
def test_covariance_and_penalty_by_hand(kind: Any, k: int) -> None:
    loc = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [3.0, 4.0]]).double()
    scale = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 2.0], [3.0, 1.0]]).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    x, noise = torch.randn(4, 2).double(), torch.randn(k, 4, 2).double()
    expected = np.cov(loc.numpy().T, bias=True)
    if kind == "II":
        expected = expected + np.diag([5.0, 3.25])  # the mean variances
    scores = run(model, guide, x, k, z=noise)
    elbo = DIP_ELBO(2.0, 0.5, kind=kind, num_particles=k)
    torch.testing.assert_close(elbo.covariance(scores), torch.from_numpy(expected), **CLOSE)
    penalty = 2.0 * 2 * expected[0, 1] ** 2 + 0.5 * ((expected[0, 0] - 1) ** 2 + (expected[1, 1] - 1) ** 2)
    assert penalty > 1
    with Draws(z=noise):
        loss = elbo.loss(model, guide, x)
        plain = DIP_ELBO(0.0, 0.0, kind=kind, num_particles=k).loss(model, guide, x)
        reference = Trace_ELBO(num_particles=k, vectorize_particles=True, max_plate_nesting=1)
        elbo_of_pyro = reference.loss(model, guide, x)
    assert float(plain) == pytest.approx(elbo_of_pyro, rel=1e-10)
    assert float(loss) == pytest.approx(elbo_of_pyro + 4 * penalty, rel=1e-10)


@guides
@given(n=st.integers(2, 6), latent=st.integers(1, 3), k=st.integers(1, 3))
def test_covariance_is_that_of_numpy(kind: str, n: int, latent: int, k: int) -> None:
    model, guide = vae_pair(latent)[0], GUIDES[kind](latent)
    x = torch.randn(n, 3).double()
    scores, q = run(model, guide, x, k), posteriors(guide, x)
    first = np.cov(np.stack([mean for mean, _ in q]).T, bias=True).reshape(latent, latent)
    second = first + np.mean([covariance for _, covariance in q], axis=0)
    for version, expected in (("I", first), ("II", second)):
        ours = DIP_ELBO(kind=version).covariance(scores)
        torch.testing.assert_close(ours.detach(), torch.from_numpy(expected), **CLOSE)


@guides
def test_covariance_is_that_of_many_draws(kind: str) -> None:
    k, latent = 20_000, 2
    model, guide = vae_pair(latent)[0], GUIDES[kind](latent)
    x = 2 * torch.randn(5, 3).double()
    with torch.no_grad():
        scores = run(model, guide, x, k)
        ours = DIP_ELBO(kind="II").covariance(scores)
        z = scores.draws["z"]  # [k, n, latent]
        centre = torch.stack([torch.from_numpy(mean) for mean, _ in posteriors(guide, x)]).mean(0)
        products = ((z - centre).unsqueeze(-1) * (z - centre).unsqueeze(-2)).mean(1)
        error = products.std(0) / math.sqrt(k)
    assert (error < 0.05).all()
    assert ((products.mean(0) - ours).abs() < 4 * error).all()
    assert ((products.mean(0) - DIP_ELBO(kind="I").covariance(scores)).abs() > 8 * error).any()


@kinds
def test_gradient_of_the_penalty(kind: Any) -> None:
    model, guide = vae_pair()
    x, noise = 2 * torch.randn(6, 3).double(), torch.randn(6, 2).double()
    with Draws(z=noise):
        ours = DIP_ELBO(3.0, 0.7, kind=kind).differentiable_loss(model, guide, x)
        plain = Trace_ELBO().differentiable_loss(model, guide, x)
    q = guide.posterior(x).base_dist
    away = q.mean - q.mean.mean(0)
    covariance = away.T @ away / 6
    if kind == "II":
        covariance = covariance + (q.stddev**2).mean(0).diag()
    off = covariance - covariance.diagonal().diag()
    penalty = 3 * (off**2).sum() + 0.7 * ((covariance.diagonal() - 1) ** 2).sum()
    expected = plain + 6 * penalty
    torch.testing.assert_close(ours, expected, **CLOSE)
    parameters = [*model.parameters(), *guide.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, **CLOSE)


def test_default_weights_of_the_diagonal() -> None:
    assert DIP_ELBO(3.0).diagonal == 30.0
    assert DIP_ELBO(3.0, kind="II").diagonal == 3.0
    assert DIP_ELBO(3.0, 0.0).diagonal == 0.0


@kinds
def test_one_datum_has_no_covariance(kind: Any) -> None:
    with pytest.raises(ValueError, match="data: expected a batch of at least 2 data for a covariance, got 1"):
        DIP_ELBO(kind=kind).loss(*vae_pair(), torch.randn(1, 3).double())


# Training


@pytest.mark.parametrize("elbo", [BetaTC_ELBO(40, num_particles=2), DIP_ELBO(kind="II")])
def test_records_hold_the_true_elbo(elbo: Any) -> None:
    model, guide = vae_pair()
    x = torch.randn(40, 3).double()
    run_ = fit(model, guide, x, elbo=elbo, epochs=2, batch_size=20, progress=False)
    for record in run_.history:
        expected = record["train_reconstruction"] - record["train_kl_z"]
        assert record["train_elbo"] == pytest.approx(expected, rel=1e-9)
        assert abs(record["train_loss"] + record["train_elbo"]) > 1e-3
    assert run_.config["elbo"]["class"].endswith(type(elbo).__name__)
