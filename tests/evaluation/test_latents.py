"""Tests of the flat, unconstrained view of a model's latents: against brute force and quadrature."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from ppl_vae.evaluation._latents import Latents
from ppl_vae.models import LinearGaussian

X = torch.tensor([[0.5], [1.5], [2.5]], dtype=torch.float64)


def constrained(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        top = pyro.sample("z2", dist.Gamma(x.new_tensor([2.0, 3.0]), 1.0).to_event(1))
        share = pyro.sample("z1", dist.Dirichlet(x.new_tensor([1.0, 2.0, 3.0])))
        # a support that depends on another site
        z = pyro.sample("z", dist.Uniform(-top[..., :1], top[..., 1:]).to_event(1))
        pyro.sample("x", dist.Normal(z + share[..., :1], 1.0).to_event(1), obs=x)


def scalar(fn: Any) -> Any:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", fn.expand([1]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    return model


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("chains", [(), (4,), (2, 3)])
def test_values_come_back_and_densities_have_the_chains_shape(chains: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    latents = Latents(constrained, (X,))
    assert latents.size == 2 + 2 + 1 and list(latents.shapes) == ["z2", "z1", "z"]
    u = torch.randn(*chains, 3, latents.size)
    values = latents.unflatten(u)
    assert {name: z.shape for name, z in values.items()} == {
        "z2": (*chains, 3, 2),
        "z1": (*chains, 3, 3),
        "z": (*chains, 3, 1),
    }
    assert bool((values["z2"] > 0).all()) and bool((values["z"] < values["z2"][..., 1:]).all())
    torch.testing.assert_close(values["z1"].sum(-1), torch.ones(*chains, 3))
    torch.testing.assert_close(latents.flatten(values), u)
    for density in (latents.log_joint(u), latents.log_prior(u), *latents.log_parts(u)):
        assert density.shape == (*chains, 3)
    if chains:  # every chain apart
        torch.testing.assert_close(latents.log_joint(u)[0], latents.log_joint(u[0]))


def test_densities_are_those_of_the_sites_times_the_jacobian_by_brute_force() -> None:
    torch.manual_seed(0)
    latents = Latents(constrained, (X,))
    u = torch.randn(4, 3, latents.size)
    z = latents.unflatten(u)
    log_prior = dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1).log_prob(z["z2"])
    log_prior = log_prior + dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])).log_prob(z["z1"])
    log_prior = log_prior + dist.Uniform(-z["z2"][..., :1], z["z2"][..., 1:]).to_event(1).log_prob(z["z"])
    log_likelihood = dist.Normal(z["z"] + z["z1"][..., :1], 1.0).to_event(1).log_prob(X)

    def free(u: Tensor) -> Tensor:  # the coordinates of one datum that determine the others
        values = latents.unflatten(u.expand(3, -1))
        return torch.cat([values["z2"], values["z1"][:, :2], values["z"]], -1)[0]

    jacobians = [torch.autograd.functional.jacobian(free, row) for row in u.reshape(-1, latents.size)]
    log_jacobian = torch.stack([j.det().abs().log() for j in jacobians]).reshape(4, 3)
    torch.testing.assert_close(latents.log_parts(u)[0], log_prior + log_jacobian)
    torch.testing.assert_close(latents.log_parts(u)[1], log_likelihood)
    torch.testing.assert_close(latents.log_joint(u), log_prior + log_jacobian + log_likelihood)


@pytest.mark.parametrize(
    "fn",
    [dist.Normal(0.0, 1.0), dist.Gamma(2.0, 3.0), dist.LogNormal(0.0, 0.5), dist.Beta(2.0, 2.0)],
    ids=["Normal", "Gamma", "LogNormal", "Beta"],
)
def test_the_prior_of_u_integrates_to_one(fn: Any) -> None:
    latents = Latents(scalar(fn), (X,))
    u = torch.linspace(-30, 30, 20_001)
    log_prior = latents.log_prior(u[:, None, None].expand(-1, 3, 1))
    torch.testing.assert_close(
        torch.trapezoid(log_prior.exp(), u, dim=0), torch.ones(3), rtol=1e-6, atol=1e-6
    )


def test_guides_are_scored_at_any_point_with_the_jacobian_of_the_model() -> None:
    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(0.3))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.LogNormal(self.shift * x, 0.7).to_event(1))

    torch.manual_seed(0)
    latents = Latents(scalar(dist.Gamma(2.0, 3.0)), (X,))
    u = torch.randn(2, 5, 3, 1)
    # of the log of a log-normal value
    expected = dist.Normal(0.3 * X, 0.7).to_event(1).log_prob(u)
    torch.testing.assert_close(latents.log_guide(Guide(), u), expected)
    drawn = latents.draw_guide(Guide(), 4000)
    assert drawn.shape == (4000, 3, 1)
    assert bool(((drawn.mean(0) - 0.3 * X).abs() < 4 * 0.7 / math.sqrt(4000)).all())


def test_supports_of_fewer_dimensions_than_their_values_and_sites_of_fewer_chains_are_flattened() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            factor = pyro.sample("factor", dist.LKJCholesky(3, 1.0))  # a matrix, of three numbers
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) + factor[..., 1, :1], 1.0).to_event(1), obs=x)

    torch.manual_seed(0)
    latents = Latents(model, (X,))
    assert latents.shapes == {"z": (), "factor": (3,)} and latents.size == 4
    u = torch.randn(5, 3, 4)
    values = latents.unflatten(u)
    assert values["factor"].shape == (5, 3, 3, 3)
    torch.testing.assert_close(latents.flatten(values), u)
    assert latents.draw_prior(2).shape == (2, 3, 4)
    values["z"] = values["z"][0]
    torch.testing.assert_close(latents.flatten(values)[..., 1:], u[..., 1:])
    torch.testing.assert_close(latents.flatten(values)[..., 0], u[0, :, 0].expand(5, 3))


def test_prior_draws_are_of_the_prior() -> None:
    torch.manual_seed(0)
    latents = Latents(scalar(dist.Gamma(2.0, 3.0)), (X,))
    drawn = latents.unflatten(latents.draw_prior(4000))["z"]
    assert drawn.shape == (4000, 3, 1)
    assert bool(((drawn.mean(0) - 2 / 3).abs() < 4 * math.sqrt(2 / 9 / 4000)).all())


def test_the_model_sees_chains_as_particles_and_the_caller_nothing() -> None:
    seen = []

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            seen.append((tuple(z.shape), len(index)))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    latents = Latents(model, (X,))
    latents.log_joint(torch.zeros(4, 5, 3, 2))
    assert seen[-1] == ((20, 3, 2), 3)
    assert not list(pyro.get_param_store().keys())


def discrete(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        y = pyro.sample("kind", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(y.unsqueeze(-1), 1.0).to_event(1), obs=x)


def on_sphere(x: Tensor) -> None:
    from ppl_vae.distributions import HypersphericalUniform

    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", HypersphericalUniform(3))
        pyro.sample("x", dist.Normal(z[..., :1], 1.0).to_event(1), obs=x)


def without_data(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def without_latents(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1), obs=x)


def outside(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(z, 1.0).expand([1]).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (discrete, "site 'kind': expected a continuous latent site.*Bernoulli"),
        (on_sphere, "site 'z': expected a support that unconstrained space is mapped to"),
        (without_data, "model: expected an observed site"),
        (without_latents, "model: expected a latent site, found none"),
        (outside, "site 'z': expected per-datum randomness"),
    ],
)
def test_models_that_have_no_such_view_are_named(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Latents(model, (X,))


def test_wrong_values_points_and_guides_are_named() -> None:
    latents = Latents(LinearGaussian(2, 1), (X,))
    with pytest.raises(ValueError, match=r"u: expected shape \[\*chains, n, size\] of n=3 and size=2"):
        latents.log_joint(torch.zeros(4, 3, 1))
    with pytest.raises(ValueError, match=r"values: expected those of all latent sites, \['z'\] are missing"):
        latents.flatten({})
    with pytest.raises(ValueError, match="values: site 'z': expected shape"):
        latents.flatten({"z": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"guide: lacks the model's latent sites \['z'\]"):
        latents.log_guide(lambda x: None, torch.zeros(4, 3, 2))

    def auxiliary(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(a.unsqueeze(-1), 1.0).expand([len(x), 2]).to_event(1))

    with pytest.raises(ValueError, match="guide: site 'a': expected latent sites"):
        latents.log_guide(auxiliary, torch.zeros(4, 3, 2))
