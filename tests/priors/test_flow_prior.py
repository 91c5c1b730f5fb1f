"""Tests of the prior of a flow."""

import pyro.distributions as dist
import pytest
import torch
from densities import integral, log_prob_by_jacobian
from torch import nn

from ppl_vae.flows import (
    AffineCoupling,
    InverseAutoregressive,
    MaskedAutoregressive,
    Planar,
    SplineAutoregressive,
    SplineCoupling,
)
from ppl_vae.priors.flow_prior import FlowPrior

FLOWS = {
    "AffineCoupling": lambda **k: AffineCoupling(2, depth=2, hidden=6, **k),
    "InverseAutoregressive": lambda **k: InverseAutoregressive(2, depth=2, hidden=6, **k),
    "MaskedAutoregressive": lambda **k: MaskedAutoregressive(2, depth=2, hidden=6, **k),
    "SplineAutoregressive": lambda **k: SplineAutoregressive(2, depth=2, hidden=6, **k),
    "SplineCoupling": lambda **k: SplineCoupling(2, depth=2, hidden=6, **k),
}


@pytest.mark.parametrize("name", FLOWS)
def test_density_is_the_change_of_variables(name: str) -> None:
    prior = FlowPrior(FLOWS[name]()).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    base = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
    for noise in torch.randn(3, 2).double():
        z = prior.flow()(noise)
        expected = log_prob_by_jacobian(prior.flow(), base, noise)
        torch.testing.assert_close(prior().log_prob(z), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(FLOWS.keys() - {"InverseAutoregressive"}))  # which starts narrower
def test_starts_near_the_standard_normal(name: str) -> None:
    z = torch.randn(50, 2)
    expected = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(z)
    torch.testing.assert_close(FlowPrior(FLOWS[name]())().log_prob(z), expected, atol=0.3, rtol=0)


def test_a_flow_with_a_context_is_a_conditional_prior() -> None:
    prior = FlowPrior(FLOWS["MaskedAutoregressive"](context_dim=3)).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    labels = torch.tensor([0, 2, 1, 2])
    given = prior(labels)
    assert given.batch_shape == (4,) and given.event_shape == (2,)
    one_hot = nn.functional.one_hot(labels, 3).double()
    z = torch.randn(5, 4, 2).double()
    log_prob = given.log_prob(z)
    assert log_prob.shape == (5, 4)
    assert torch.equal(log_prob, prior(one_hot).log_prob(z))
    torch.testing.assert_close(log_prob[:, 1], prior(labels[3:]).log_prob(z[:, 1:2])[:, 0])
    assert given.sample((5,)).shape == (5, 4, 2)
    with torch.no_grad():
        total = integral(given, points=301)
    torch.testing.assert_close(total, torch.ones(4).double(), atol=1e-3, rtol=0)


def test_a_conditional_prior_without_a_context() -> None:
    prior = FlowPrior(FLOWS["MaskedAutoregressive"](context_dim=3))
    with pytest.raises(ValueError, match=r"^context: expected "):
        prior()
    with pytest.raises(ValueError, match=r"^context: expected "):
        prior(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"^context: expected "):
        prior(torch.tensor([0, 3]))


def test_flows_that_it_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"flow: expected one that scores values .* got Planar"):
        FlowPrior(Planar(2))
    with pytest.raises(TypeError, match=r"flow: expected a flow of ppl_vae\.flows, got Linear"):
        FlowPrior(nn.Linear(2, 2))
