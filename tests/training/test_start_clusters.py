"""Tests of where the clusters of a Gaussian mixture model start."""

import pytest
import torch
from torch import Tensor, nn

from ppl_vae import fit
from ppl_vae.evaluation import clustering_accuracy
from ppl_vae.guides import GaussianMixtureGuide, LowRankGuide, MeanFieldGuide
from ppl_vae.infer import EnumELBO
from ppl_vae.likelihoods import Normal
from ppl_vae.models import VAE, GaussianMixtureVAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.training import start_clusters

CLUSTERS, LATENT, SIZE = 3, 2, 6


def groups(n: int = 600) -> tuple[Tensor, Tensor]:
    """Return data of three groups, whose covariances differ, and their numbers."""
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2, 2])[torch.arange(n) % 4]
    centres = 4 * torch.randn(CLUSTERS, SIZE)
    stretch = 0.5 * torch.randn(CLUSTERS, SIZE, SIZE)
    return centres[y] + torch.einsum("nij,nj->ni", stretch[y], torch.randn(n, SIZE)), y


def trained(x: Tensor, epochs: int = 20) -> tuple[nn.Module, MeanFieldGuide]:
    """Return the likelihood and the guide of a trained VAE."""
    torch.manual_seed(1)
    likelihood = Normal(MLP(LATENT, SIZE, 16), scale=0.5)
    start = MeanFieldGuide(MLP(SIZE, hidden=16), LATENT)
    fit(VAE(StandardNormal(LATENT), likelihood), start, x, epochs=epochs, learning_rate=1e-2, progress=False)
    return likelihood, start


@pytest.mark.parametrize("per_cluster", [True, False])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_clusters_are_found_at_the_start_and_stay_in_training(covariance: str, per_cluster: bool) -> None:
    x, y = groups()
    likelihood, start = trained(x)
    model = GaussianMixtureVAE(CLUSTERS, LATENT, likelihood, covariance=covariance)
    guide = GaussianMixtureGuide(MLP(SIZE, hidden=16), LATENT, CLUSTERS, per_cluster=per_cluster)
    before, stream = start.head.weight.clone(), torch.get_rng_state()
    start_clusters(model, guide, start, x)
    assert torch.equal(start.head.weight, before) and torch.equal(torch.get_rng_state(), stream)
    assert start.training and guide.training
    assert clustering_accuracy(guide.predict(x), y) > 0.98
    with torch.no_grad():  # z is where it was, with every cluster
        expected = start.posterior(x)
        given = guide.posterior(x, torch.arange(CLUSTERS).unsqueeze(-1))
        torch.testing.assert_close(given.mean, expected.mean.expand(CLUSTERS, -1, -1))
        torch.testing.assert_close(given.variance, expected.variance.expand(CLUSTERS, -1, -1))
        every = torch.arange(CLUSTERS)
        log_joint = model.cluster(every).log_prob(expected.mean.unsqueeze(1)) + model.log_probs
        assert clustering_accuracy(log_joint.argmax(-1), y) > 0.98
        for k in range(CLUSTERS):  # moments of the means in each cluster
            found = expected.mean[guide.predict(x) == k]
            tolerance = 0.1 * float(found.std(0).max())
            torch.testing.assert_close(model.cluster(every).mean[k], found.mean(0), atol=tolerance, rtol=0)
            torch.testing.assert_close(model.cluster(every).variance[k], found.var(0), atol=0, rtol=0.1)
    assert sorted(model.probs.tolist()) == pytest.approx([0.25, 0.25, 0.5], abs=0.02)
    shares = guide.predict(x).bincount(minlength=CLUSTERS) / len(x)
    torch.testing.assert_close(model.probs.detach(), shares, atol=0.02, rtol=0)
    fit(model, guide, x, elbo=EnumELBO(), epochs=3, progress=False)
    assert clustering_accuracy(guide.predict(x), y) > 0.98


def test_the_same_seed_starts_the_same_clusters_and_another_other_data() -> None:
    x, _ = groups()
    likelihood, start = trained(x, epochs=5)
    found = []
    for seed in (3, 3, 4):
        model = GaussianMixtureVAE(CLUSTERS, LATENT, likelihood, weights="equal")
        guide = GaussianMixtureGuide(MLP(SIZE, hidden=16), LATENT, CLUSTERS)
        start_clusters(model, guide, start, x, size=300, seed=seed)
        found.append((model.loc.clone(), guide.head.weight.clone()))
        assert model.probs.tolist() == pytest.approx([1 / 3] * 3)
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    assert not torch.equal(found[0][0], found[2][0])


def test_bad_arguments_are_named() -> None:
    x = torch.randn(20, SIZE)
    likelihood = Normal(MLP(LATENT, SIZE, 16))
    start = MeanFieldGuide(MLP(SIZE, hidden=16), LATENT)
    model = GaussianMixtureVAE(CLUSTERS, LATENT, likelihood)
    guide = GaussianMixtureGuide(MLP(SIZE, hidden=16), LATENT, CLUSTERS)
    with pytest.raises(TypeError, match="start: expected a MeanFieldGuide, got LowRankGuide"):
        start_clusters(model, guide, LowRankGuide(MLP(SIZE, hidden=16), LATENT, rank=1), x)
    with pytest.raises(TypeError, match="model: expected a GaussianMixtureVAE, got VAE"):
        start_clusters(VAE(StandardNormal(2), likelihood), guide, start, x)
    sticks = GaussianMixtureVAE(CLUSTERS, LATENT, likelihood, weights="stick-breaking")
    with pytest.raises(ValueError, match="model: expected equal or learned weights, got those of sticks"):
        start_clusters(sticks, guide, start, x)
    with pytest.raises(ValueError, match="guide: expected 3 components, got 4"):
        start_clusters(model, GaussianMixtureGuide(MLP(SIZE, hidden=16), LATENT, 4), start, x)
    with pytest.raises(ValueError, match="start: expected latent_dim 2, got 5"):
        start_clusters(model, guide, MeanFieldGuide(MLP(SIZE, hidden=16), 5), x)
    with pytest.raises(ValueError, match="guide: expected an encoder as that of `start`"):
        start_clusters(model, guide, MeanFieldGuide(MLP(SIZE, hidden=8), LATENT), x)
    with pytest.raises(ValueError, match="x: expected at least 3 data, one for each cluster, got 2"):
        start_clusters(model, guide, start, x[:2])
    with pytest.raises(ValueError, match="size: expected a whole number above 0, got 0"):
        start_clusters(model, guide, start, x, size=0)
