"""Tests of the Gaussian mixture model against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_vae.guides.gaussian_mixture import GaussianMixtureGuide
from ppl_vae.infer import log_weights
from ppl_vae.likelihoods import Normal
from ppl_vae.models.gaussian_mixture_vae import GaussianMixtureVAE
from ppl_vae.networks import MLP


class Linear(nn.Module):
    """A decoder ``[*batch, 2] -> [*batch, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.8, -0.3], [0.2, 0.9], [-0.5, 0.4], [0.6, 0.1]]))

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.weight.mT


def linear_model(weights: str = "learned", covariance: str = "diagonal") -> GaussianMixtureVAE:
    torch.manual_seed(0)
    likelihood = Normal(Linear(), scale=1.2)
    model = GaussianMixtureVAE(3, 2, likelihood, weights=weights, covariance=covariance).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.log_scale.sub_(0.4)
    return model


def exact(model: GaussianMixtureVAE) -> dist.Distribution:
    """Return p(x), a mixture of three normal distributions."""
    weight = model.likelihood.decoder.weight
    factor = model.log_scale.exp().diag_embed()
    if model.covariance == "full":
        factor = factor + model.below_diagonal.tril(-1)
    covariance = weight @ factor @ factor.mT @ weight.mT
    noise = model.likelihood.scale**2 * torch.eye(4, dtype=torch.float64)
    normals = dist.MultivariateNormal(model.loc @ weight.mT, covariance + noise)
    return dist.MixtureSameFamily(dist.Categorical(probs=model.probs), normals)


WEIGHTS = ("learned", "equal", "stick-breaking")
KINDS = [*((weights, "diagonal") for weights in WEIGHTS), ("learned", "full")]


@pytest.mark.parametrize(("weights", "covariance"), KINDS)
def test_importance_sampled_evidence_is_that_of_the_exact_mixture(weights: str, covariance: str) -> None:
    model = linear_model(weights, covariance).requires_grad_(False).eval()
    guide = GaussianMixtureGuide(MLP(4, hidden=5), 2, 3).double().requires_grad_(False).eval()
    nn.init.zeros_(guide.head.weight)  # equal clusters and standard normals, wider than the exact posterior
    nn.init.zeros_(guide.head.bias)
    torch.manual_seed(1)
    x, k = 0.6 * torch.randn(5, 4).double(), 60_000
    weights_of_draws = log_weights(model, guide, x, num_particles=k).exp()
    error = weights_of_draws.std(0) / k**0.5
    expected = exact(model).log_prob(x).exp()
    assert (error < 0.04 * expected).all()
    assert ((weights_of_draws.mean(0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize(("weights", "covariance"), KINDS)
def test_draws_are_of_the_exact_mixture(weights: str, covariance: str) -> None:
    model, n = linear_model(weights, covariance).requires_grad_(False).eval(), 50_000
    torch.manual_seed(2)
    x, p = model(None, size=n), exact(model)
    for found, expected in ((x, p.mean), (x.square(), p.variance + p.mean.square())):
        assert ((found.mean(0) - expected).abs() < 4 * found.std(0) / n**0.5).all()


def test_weights_of_sticks_are_shares_of_what_is_left_and_their_prior_is_beta() -> None:
    model = GaussianMixtureVAE(4, 2, nn.Identity(), weights="stick-breaking", concentration=3.0).double()
    torch.testing.assert_close(model.probs, torch.tensor([0.25, 0.1875, 0.140625, 0.421875]).double())
    model.stick_logits.data = torch.tensor([0.4, -1.2, 0.7]).double()
    v = model.stick_logits.sigmoid()
    a, b, c = v.tolist()
    expected = [a, (1 - a) * b, (1 - a) * (1 - b) * c, (1 - a) * (1 - b) * (1 - c)]
    assert model.probs.tolist() == pytest.approx(expected, rel=1e-12)
    density = dist.Beta(torch.ones(3).double(), 3.0).log_prob(v).sum()
    torch.testing.assert_close(model.log_prior(), density)


def test_weights_of_one_component_are_one() -> None:
    for weights in WEIGHTS:
        assert GaussianMixtureVAE(1, 2, nn.Identity(), weights=weights).probs.tolist() == [1.0]


def test_other_weights_are_equal_at_the_start_and_have_no_sticks() -> None:
    for weights in ("learned", "equal"):
        model = GaussianMixtureVAE(4, 2, nn.Identity(), weights=weights)
        assert model.probs.tolist() == pytest.approx([0.25] * 4)
        with pytest.raises(ValueError, match="weights: expected 'stick-breaking'.*got '" + weights):
            model.log_prior()


def test_prior_of_a_cluster_takes_any_shape_of_clusters() -> None:
    model = linear_model()
    y = torch.tensor([[2, 0, 1], [1, 1, 0]])
    found = model.cluster(y)
    assert found.batch_shape == (2, 3) and found.event_shape == (2,)
    torch.testing.assert_close(found.mean, model.loc[y])
    torch.testing.assert_close(found.variance, (2 * model.log_scale[y]).exp())
    assert model.cluster(torch.tensor([[0], [1], [2]])).batch_shape == (3, 1)


def test_draws_of_a_cluster_come_from_conditioning_on_it() -> None:
    model = linear_model().requires_grad_(False).eval()
    y = torch.full((20_000,), 1)
    torch.manual_seed(3)
    x = poutine.condition(model, {"y": y})(None, size=len(y))
    expected = model.loc[1] @ model.likelihood.decoder.weight.mT
    assert ((x.mean(0) - expected).abs() < 4 * x.std(0) / len(y) ** 0.5).all()


def test_sites_are_in_the_data_plate_and_particles_on_its_left() -> None:
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(linear_model()).get_trace(None, size=3)
    trace.compute_log_prob()
    shapes = {"y": (4, 3), "z": (4, 3, 2), "x": (4, 3, 4)}
    assert {name: trace.nodes[name]["value"].shape for name in shapes} == shapes
    assert all(trace.nodes[name]["log_prob"].shape == (4, 3) for name in shapes)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="components: expected a whole number above 0, got 0"):
        GaussianMixtureVAE(0, 2, nn.Identity())
    with pytest.raises(ValueError, match=r"weights: unknown 'stick'.*did you mean 'stick-breaking'"):
        GaussianMixtureVAE(3, 2, nn.Identity(), weights="stick")
    with pytest.raises(ValueError, match=r"covariance: unknown 'ful'.*did you mean 'full'"):
        GaussianMixtureVAE(3, 2, nn.Identity(), covariance="ful")
    with pytest.raises(ValueError, match="concentration: expected a finite number above 0, got 0"):
        GaussianMixtureVAE(3, 2, nn.Identity(), concentration=0)
    with pytest.raises(
        ValueError, match=r"x: expected data of the likelihood's event shape \(4,\), got \(3,\)"
    ):
        linear_model()(torch.zeros(2, 3).double())
    with pytest.raises(ValueError, match="size: expected the number of data"):
        linear_model()()
