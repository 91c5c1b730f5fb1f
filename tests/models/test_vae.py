"""Tests of the VAE's model."""

import re

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE
from ppl_vae.networks import MLP, ConvDecoder
from ppl_vae.priors import StandardNormal
from ppl_vae.priors.gaussian_mixture import GaussianMixture


def test_density_is_prior_times_likelihood() -> None:
    model = VAE(StandardNormal(2), Normal(MLP(2, 3, hidden=4), scale=0.5)).double()
    x, z = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x)
    trace.compute_log_prob()
    prior = dist.Normal(torch.zeros(2).double(), 1.0).log_prob(z).sum(-1)
    likelihood = dist.Normal(model.likelihood.decoder(z), 0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], prior)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], likelihood)
    assert torch.equal(trace.nodes["_RETURN"]["value"], x)


@pytest.mark.parametrize("decoder", [MLP(2, (1, 5, 4), hidden=8), ConvDecoder(2, (1, 5, 4), 8, (3,))])
def test_draws_from_the_prior(decoder: nn.Module) -> None:
    model = VAE(StandardNormal(2), Bernoulli(decoder))
    x = model(None, size=6)
    assert x.shape == (6, 1, 5, 4)
    assert x.unique().tolist() == [0.0, 1.0]
    assert not torch.equal(x, model(None, size=6))


def test_trap_15_data_in_a_batch_are_not_a_prior_draw() -> None:
    # Given data come back as they are: to generate, the batch must be None.
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, 3)))
    x = torch.ones(4, 3)
    assert model(x) is x
    assert not torch.equal(model(None, size=4), x)


@pytest.mark.parametrize("shape", [(4, 1, 5, 5), (4, 20), (4, 5, 4), (4, 2, 5, 4)])
def test_data_of_another_shape(shape: tuple[int, ...]) -> None:
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, (1, 5, 4))))
    message = f"x: expected data of the likelihood's event shape (1, 5, 4), got {shape[1:]}"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(torch.zeros(shape))


def test_needs_data_or_a_size() -> None:
    with pytest.raises(
        ValueError, match=r"^size: expected the number of data to draw when x is None, got None$"
    ):
        VAE(StandardNormal(2), Bernoulli(MLP(2, 3)))()


def test_with_prior_has_the_same_likelihood_and_changes_neither_model() -> None:
    model = VAE(StandardNormal(2), Normal(MLP(2, 3, hidden=4), scale=0.5)).double().eval()
    first = model.prior
    prior = GaussianMixture(2, 3).double()
    other = model.with_prior(prior)
    assert type(other) is VAE and other is not model
    assert other.likelihood is model.likelihood and other.prior is prior and model.prior is first
    assert not other.training and prior.training and not model.likelihood.training
    x, z = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    traces = [poutine.trace(poutine.condition(m, {"z": z})).get_trace(x) for m in (model, other)]
    for trace in traces:
        trace.compute_log_prob()
    torch.testing.assert_close(traces[1].nodes["z"]["log_prob"], prior().log_prob(z))
    assert torch.equal(traces[0].nodes["x"]["log_prob"], traces[1].nodes["x"]["log_prob"])
    names = [{name for name, site in t.nodes.items() if site["type"] == "param"} for t in traces]
    assert names[0] and names[1] and not names[0] & names[1]
