"""Tests of the model of several layers against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Draws
from pyro import poutine
from torch import Tensor, nn

from ppl_vae.guides import MeanFieldGuide
from ppl_vae.guides.hierarchical import HierarchicalGuide
from ppl_vae.infer import log_weights
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE
from ppl_vae.models.hierarchical import HierarchicalVAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal


class Conditional(nn.Module):
    """A normal distribution given the layer above, with a linear mean."""

    def __init__(self, above: int, latent_dim: int, scale: float = 0.7) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(above, latent_dim), scale

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        loc = self.linear(context)
        return dist.Normal(loc, torch.full_like(loc, self.scale)).to_event(1)


def chain(skip: bool = False) -> HierarchicalVAE:
    """Return a linear-Gaussian model of two layers, z2 [2], z1 [3] and x [4]."""
    torch.manual_seed(0)
    decoder = nn.Linear(5 if skip else 3, 4)
    model = HierarchicalVAE(StandardNormal(2), [Conditional(2, 3)], Normal(decoder, scale=1.2), skip=skip)
    return model.double().requires_grad_(False).eval()


def exact(model: HierarchicalVAE) -> dist.MultivariateNormal:
    """Return p(x)."""
    layer, decoder = model.layers[0].linear, model.likelihood.decoder
    eye = torch.eye(9, dtype=torch.float64)
    noise_2, noise_1, noise_x = eye[:2], layer.weight @ eye[:2] + 0.7 * eye[2:5], 1.2 * eye[5:]
    loc = decoder.bias + decoder.weight[:, :3] @ layer.bias
    factor = decoder.weight[:, :3] @ noise_1 + noise_x
    if model.skip:
        factor = factor + decoder.weight[:, 3:] @ noise_2
    return dist.MultivariateNormal(loc, factor @ factor.mT)


skips = pytest.mark.parametrize("skip", [False, True], ids=["chain", "skip"])


@skips
def test_importance_sampled_evidence_is_exact_in_a_linear_gaussian_chain(skip: bool) -> None:
    model = chain(skip)
    guide = (
        HierarchicalGuide([MLP(4, hidden=3), MLP(3, hidden=3)], (3, 2)).double().requires_grad_(False).eval()
    )
    for head in guide.heads:  # normal distributions wider than the exact posterior
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    x, k = 0.6 * torch.randn(5, 4).double(), 60_000
    weights = log_weights(model, guide, x, num_particles=k).exp()
    error = weights.std(0) / k**0.5
    expected = exact(model).log_prob(x).exp()
    assert (error < 0.03 * expected).all()
    assert ((weights.mean(0) - expected).abs() < 4 * error).all()


@skips
def test_draws_are_of_the_exact_distribution(skip: bool) -> None:
    model, n = chain(skip), 50_000
    x, p = model(None, size=n), exact(model)
    deviations = x - p.mean
    products = deviations.unsqueeze(-1) * deviations.unsqueeze(-2)
    for found, expected in ((x, p.mean), (products, p.covariance_matrix)):
        assert ((found.mean(0) - expected).abs() < 4 * found.std(0) / n**0.5).all()


def test_one_layer_is_the_vae_exactly() -> None:
    torch.manual_seed(0)
    likelihood, encoder = Bernoulli(MLP(2, 4, hidden=3)), MLP(4, hidden=3)
    one = HierarchicalVAE(StandardNormal(2), (), likelihood).double()
    vae = VAE(StandardNormal(2), likelihood).double()
    guide, mean_field = HierarchicalGuide([encoder], [2]).double(), MeanFieldGuide(encoder, 2).double()
    mean_field.head.load_state_dict(guide.heads[0].state_dict())
    x = torch.bernoulli(torch.full((5, 4), 0.5, dtype=torch.float64))
    found = []
    for model, program in ((one, guide), (vae, mean_field)):
        torch.manual_seed(1)
        weights = log_weights(model, program, x, num_particles=7)
        weights.logsumexp(0).sum().backward()
        found.append([weights, *(p.grad.clone() for p in (*likelihood.parameters(), *encoder.parameters()))])
        model.zero_grad()
        program.zero_grad()
    assert all(map(torch.equal, *found))


def test_log_weights_are_the_sum_of_the_layers_terms() -> None:
    torch.manual_seed(0)
    conditionals = [Conditional(1, 2), Conditional(3, 3)]
    model = HierarchicalVAE(StandardNormal(1), conditionals, Bernoulli(nn.Linear(6, 4)), skip=True).double()
    guide = HierarchicalGuide([MLP(4, hidden=3), MLP(3, hidden=3), MLP(2, hidden=3)], (3, 2, 1)).double()
    x = torch.bernoulli(torch.full((5, 4), 0.5, dtype=torch.float64))
    noise = {f"z{i}": torch.randn(7, 5, size).double() for i, size in ((1, 3), (2, 2), (3, 1))}
    with Draws(**noise):
        weights = log_weights(model, guide, x, num_particles=7)
    log_q, below, z = 0.0, x.expand(7, 5, 4), {}
    for i in (1, 2, 3):
        loc, log_scale = guide.heads[i - 1](guide.encoders[i - 1](below)).chunk(2, -1)
        z[i] = below = loc + log_scale.exp() * noise[f"z{i}"]
        log_q = log_q + dist.Normal(loc, log_scale.exp()).log_prob(below).sum(-1)
    log_p = dist.Normal(0.0, 1.0).log_prob(z[3]).sum(-1)
    log_p = log_p + dist.Normal(conditionals[0].linear(z[3]), 0.7).log_prob(z[2]).sum(-1)
    above = torch.cat([z[2], z[3]], -1)
    log_p = log_p + dist.Normal(conditionals[1].linear(above), 0.7).log_prob(z[1]).sum(-1)
    logits = model.likelihood.decoder(torch.cat([z[1], above], -1))
    log_p = log_p + dist.Bernoulli(logits=logits).log_prob(x).sum(-1)
    torch.testing.assert_close(weights, log_p - log_q, rtol=1e-10, atol=1e-10)


@skips
def test_sites_are_in_the_data_plate_and_particles_on_its_left(skip: bool) -> None:
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(chain(skip)).get_trace(None, size=3)
    trace.compute_log_prob()
    shapes = {"z2": (4, 3, 2), "z1": (4, 3, 3), "x": (4, 3, 4)}
    assert [name for name in trace.nodes if name in shapes] == list(shapes)
    assert {name: trace.nodes[name]["value"].shape for name in shapes} == shapes
    assert all(trace.nodes[name]["log_prob"].shape == (4, 3) for name in shapes)


def test_bad_data_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"x: expected data of the likelihood's event shape \(4,\), got \(3,\)"
    ):
        chain()(torch.zeros(2, 3).double())
    with pytest.raises(ValueError, match="size: expected the number of data"):
        chain()()
