"""Tests of priors that are fitted after training."""

import copy
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae.evaluation import sample_aggregate_posterior
from ppl_vae.flows import MaskedAutoregressive
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import SVI, log_weights
from ppl_vae.likelihoods import Normal
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.priors.autoregressive_prior import AutoregressivePrior
from ppl_vae.priors.conditional_normal import ConditionalNormal
from ppl_vae.priors.flow_prior import FlowPrior
from ppl_vae.priors.gaussian_mixture import GaussianMixture
from ppl_vae.priors.vamp_prior import VampPrior
from ppl_vae.training import fit_prior


def banana(n: int) -> Tensor:
    z = torch.randn(n, 2)
    return torch.stack([z[:, 0], 0.3 * z[:, 1] + z[:, 0] ** 2 - 1], -1)


def entropy_of_banana() -> float:
    return float(1 + torch.tensor(2 * torch.pi).log() + torch.tensor(0.3).log())


@pytest.mark.parametrize(
    ("make", "excess"),
    [
        (lambda: FlowPrior(MaskedAutoregressive(2, depth=2, hidden=16)), 0.12),
        (lambda: AutoregressivePrior(2, hidden=16), 0.1),
        (lambda: GaussianMixture(2, 10), 0.25),
    ],
    ids=["FlowPrior", "AutoregressivePrior", "GaussianMixture"],
)
def test_comes_near_the_entropy_of_the_draws(make: Callable[[], nn.Module], excess: float) -> None:
    # The best normal's cross entropy is 1.5 nats above that of the draws, N(0, I)'s more.
    prior, z = make(), banana(4000)
    losses = fit_prior(prior, z, steps=500, learning_rate=0.02, progress=False)
    assert len(losses) == 500
    with torch.no_grad():
        log_prob = prior().log_prob(banana(4000))
    error = float(log_prob.std()) / 4000**0.5
    assert -float(log_prob.mean()) - entropy_of_banana() < excess + 4 * error


def test_is_the_same_for_the_same_seed_and_leaves_the_stream_alone() -> None:
    z, found = banana(300), []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        prior = GaussianMixture(2, 3)
        state = torch.get_rng_state()
        found.append(fit_prior(prior, z, steps=5, batch_size=20, seed=seed, progress=False))
        assert torch.equal(state, torch.get_rng_state())
    assert found[0] == found[1] != found[2]


def test_conditional_priors_are_fitted_with_their_context() -> None:
    labels = torch.arange(600) % 3
    z = torch.tensor([[-4.0, 0.0], [0.0, 4.0], [4.0, 0.0]])[labels] + 0.5 * torch.randn(600, 2)
    prior = ConditionalNormal(MLP(3, hidden=8), 2, num_classes=3)
    fit_prior(prior, z, steps=400, context=labels, learning_rate=0.05, progress=False)
    means = prior(torch.arange(3)).mean
    for label in range(3):
        # the maximum likelihood's mean is that of the draws; minibatches leave a remainder
        torch.testing.assert_close(means[label], z[labels == label].mean(0), atol=0.1, rtol=0)


def test_the_guide_of_a_vamp_prior_stays() -> None:
    guide = MeanFieldGuide(MLP(4, hidden=5), 2)
    prior = VampPrior(guide, 4, 5, bounds=None)
    before = [p.detach().clone() for p in guide.parameters()]
    losses = fit_prior(prior, 0.5 * torch.randn(300, 2), steps=60, learning_rate=0.05, progress=False)
    assert sum(losses[-10:]) < sum(losses[:10]) - 1
    assert all(torch.equal(p, old) for p, old in zip(guide.parameters(), before, strict=True))
    assert all(p.grad is None for p in (*guide.parameters(), *prior.parameters()))


@pytest.mark.parametrize(
    ("prior", "z", "options", "message"),
    [
        (StandardNormal(2), torch.zeros(3, 2), {}, "prior: expected a prior with trainable parameters"),
        (GaussianMixture(2, 2), torch.zeros(3), {}, r"z: expected draws \[n, latent\], got shape \[3\]"),
        (GaussianMixture(2, 2), torch.zeros(3, 2), {"steps": 0}, "steps: expected a whole number above 0"),
        (GaussianMixture(2, 2), torch.zeros(3, 2), {"seed": -1}, "seed: expected a whole number from 0"),
        (GaussianMixture(2, 2), torch.zeros(3, 2), {"learning_rate": 0}, "learning_rate: expected"),
        (
            GaussianMixture(2, 2),
            torch.zeros(3, 2),
            {"context": torch.zeros(2)},
            "context: expected one for each",
        ),
    ],
)
def test_wrong_arguments(prior: nn.Module, z: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_prior(prior, z, progress=False, **options)


def test_a_loss_that_is_not_finite_raises() -> None:
    prior = GaussianMixture(2, 2)
    with torch.no_grad():
        prior.loc.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"), pyro.validation_enabled(False):
        fit_prior(prior, torch.zeros(3, 2), progress=False)


def test_draws_of_the_aggregate_posterior_are_one_for_each_datum() -> None:
    guide, x = MeanFieldGuide(MLP(4, hidden=5), 2), torch.randn(2500, 4)
    state = torch.get_rng_state()
    z = sample_aggregate_posterior(guide, x, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert z.shape == (2500, 2) and not z.requires_grad and guide.training
    assert torch.equal(z, sample_aggregate_posterior(guide, x, seed=3))
    assert not torch.equal(z, sample_aggregate_posterior(guide, x, seed=4))
    q = guide.posterior(x)
    deviations = ((z - q.mean) / q.variance.sqrt()).detach()  # standard normal, if each draw is of its datum
    assert ((deviations.mean(0)).abs() < 4 / 2500**0.5).all()
    assert ((deviations.square().mean(0) - 1).abs() < 4 * (2 / 2500) ** 0.5).all()


def test_what_has_no_aggregate_posterior() -> None:
    guide = MeanFieldGuide(MLP(4, hidden=5), 2)
    with pytest.raises(TypeError, match="batch: expected tensors, the data first, got"):
        sample_aggregate_posterior(guide)
    with pytest.raises(ValueError, match="guide: expected a latent site 'z', found none"):
        sample_aggregate_posterior(
            lambda x: pyro.sample("w", dist.Normal(x, 1.0).to_event(2)), torch.ones(3, 4)
        )


def test_with_prior_closes_the_gap_between_aggregate_posterior_and_prior() -> None:
    # Two clusters: the marginal KL(q(z) || p(z)) is what another prior can gain, nothing else changes.
    torch.manual_seed(2)
    x = torch.randn(400, 1).sign() * torch.ones(4) * 2 + 0.1 * torch.randn(400, 4)
    model = VAE(StandardNormal(2), Normal(MLP(2, 4, hidden=16), scale=0.5))
    guide = MeanFieldGuide(MLP(4, hidden=16), 2)
    svi = SVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.01), Trace_ELBO())
    for _ in range(200):
        svi.step(x)
    z, held_out = (sample_aggregate_posterior(guide, x.repeat(10, 1), seed=seed) for seed in (0, 1))
    q = guide.posterior(x)
    with torch.no_grad():
        log_q = torch.logsumexp(q.log_prob(held_out.unsqueeze(1)), 1) - torch.log(torch.tensor(400.0))

    def marginal_kl(prior: nn.Module) -> float:
        with torch.no_grad():
            return float((log_q - prior().log_prob(held_out)).mean())

    before = marginal_kl(model.prior)
    flow = FlowPrior(MaskedAutoregressive(2, depth=2, hidden=16))
    fit_prior(flow, z, steps=400, learning_rate=0.02, progress=False)
    for prior in (GaussianMixture.from_samples(z, 4), flow):
        better = model.with_prior(prior)
        assert marginal_kl(prior) < 0.6 * before
        elbo = []
        for pair in (model, better):
            torch.manual_seed(0)
            elbo.append(log_weights(pair, guide, x, num_particles=10).detach().mean())
        gain = elbo[1] - elbo[0]
        assert gain > 0.4 * before


def test_batch_norm_in_the_guide_of_a_vamp_prior_stays_as_it_is() -> None:
    guide = MeanFieldGuide(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), 2, features=4)
    prior, before = VampPrior(guide, 3, 5), copy.deepcopy(guide.state_dict())
    fit_prior(prior, torch.randn(50, 2), steps=3, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in guide.state_dict().items())
    assert all(module.training for module in guide.modules())
