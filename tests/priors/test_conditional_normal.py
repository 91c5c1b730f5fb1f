"""Tests of the conditional normal prior."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from densities import integral, moments_agree
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.networks import MLP
from ppl_vae.priors.conditional_normal import ConditionalNormal


def of_labels() -> ConditionalNormal:
    return ConditionalNormal(MLP(3, hidden=4), 2, num_classes=3).double()


def test_is_the_normal_that_the_network_says() -> None:
    prior, labels = of_labels(), torch.tensor([2, 0, 1, 2])
    loc, log_scale = prior.head(prior.network(torch.eye(3).double()[labels])).chunk(2, -1)
    z = torch.randn(5, 4, 2).double()
    expected = dist.Normal(loc, log_scale.exp()).to_event(1).log_prob(z)
    found = prior(labels)
    assert found.batch_shape == (4,) and found.event_shape == (2,)
    torch.testing.assert_close(found.log_prob(z), expected)
    torch.testing.assert_close(prior(torch.eye(3).double()[labels]).log_prob(z), expected)


def test_numbers_go_to_the_network_as_they_are() -> None:
    prior = ConditionalNormal(nn.Flatten(), 2, features=6).double()
    x = torch.randn(4, 1, 2, 3).double()
    loc, log_scale = prior.head(x.flatten(1)).chunk(2, -1)
    torch.testing.assert_close(prior(x).mean, loc)
    torch.testing.assert_close(prior(x).variance, (2 * log_scale).exp())


def test_densities_integrate_to_one_and_are_those_of_draws() -> None:
    prior = of_labels()(torch.tensor([0, 1, 2]))
    with torch.no_grad():
        total = integral(prior, points=301)
    torch.testing.assert_close(total, torch.ones(3).double(), atol=1e-3, rtol=0)
    assert moments_agree(prior, points=301)


def test_kl_to_a_normal_posterior_has_the_closed_form() -> None:
    prior = of_labels()(torch.tensor([0, 1, 2]))
    posterior = dist.Normal(torch.randn(3, 2).double(), 0.5).to_event(1)
    kl = torch.distributions.kl_divergence(posterior, prior)
    z = posterior.sample((20_000,))
    drawn = posterior.log_prob(z) - prior.log_prob(z)
    assert ((drawn.mean(0) - kl).abs() < 4 * drawn.std(0) / 20_000**0.5).all()


def test_gradients_reach_every_parameter() -> None:
    prior = of_labels()
    prior(torch.arange(3)).log_prob(torch.randn(3, 2).double()).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in prior.parameters())


def test_is_traced_and_replayed_on_other_labels() -> None:
    prior, z = of_labels(), torch.randn(3, 2).double()
    with pyro.validation_enabled(False):
        graph = make_fx(lambda y: prior(y).log_prob(z))(torch.tensor([0, 1, 2]))
        other = torch.tensor([2, 2, 0])
        torch.testing.assert_close(graph(other), prior(other).log_prob(z))


def test_contexts_that_it_does_not_take() -> None:
    prior = of_labels()
    with pytest.raises(ValueError, match=r"^context: expected labels or what else .* got None$"):
        prior()
    with pytest.raises(ValueError, match=r"^context: expected labels in \[0, 3\), got 3$"):
        prior(torch.tensor([0, 3]))
    plain = ConditionalNormal(MLP(3, hidden=4), 2)
    with pytest.raises(TypeError, match=r"^context: expected floating point as num_classes is None, got"):
        plain(torch.tensor([0, 1]))


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="features: expected the number of features that Flatten gives"):
        ConditionalNormal(nn.Flatten(), 2)
    with pytest.raises(ValueError, match="num_classes: expected a whole number above 0"):
        ConditionalNormal(MLP(3, hidden=4), 2, num_classes=0)
    with pytest.raises(ValueError, match="latent_dim: expected a whole number above 0"):
        ConditionalNormal(MLP(3, hidden=4), 0)
