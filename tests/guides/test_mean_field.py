"""Tests of the mean-field guide."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor, nn

from ppl_vae.guides import MeanFieldGuide
from ppl_vae.networks import MLP, ConvEncoder


@given(n=st.integers(1, 4), features=st.integers(1, 4), latent=st.integers(1, 4))
def test_posterior_is_the_normal_of_the_head(n: int, features: int, latent: int) -> None:
    guide = MeanFieldGuide(MLP(3, hidden=(5, features)), latent).double()
    x = torch.randn(n, 3).double()
    out = guide.encoder(x) @ guide.head.weight.T + guide.head.bias
    posterior = guide.posterior(x)
    assert posterior.batch_shape == (n,)
    assert posterior.event_shape == (latent,)
    torch.testing.assert_close(posterior.mean, out[:, :latent])
    torch.testing.assert_close(posterior.variance, (2 * out[:, latent:]).exp())


def test_program_draws_z_from_its_posterior() -> None:
    guide = MeanFieldGuide(MLP(3), 2).double()
    x = torch.randn(4, 3).double()
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    assert list(trace.stochastic_nodes) == ["data", "z"]
    assert z.shape == (4, 2)
    assert trace.nodes["_RETURN"]["value"] is z
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], guide.posterior(x).log_prob(z))


def test_particles_share_one_run_of_the_encoder() -> None:
    rows = []
    guide = MeanFieldGuide(MLP(3), 2)
    guide.encoder.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with pyro.plate("particles", 7, dim=-2):
        assert guide(torch.randn(4, 3)).shape == (7, 4, 2)
    assert rows == [4]


@pytest.mark.parametrize(("start", "clamped"), [(-100.0, -7.0), (100.0, 7.0)])
def test_log_scale_is_clamped(start: float, clamped: float) -> None:
    guide = MeanFieldGuide(MLP(3), 2)
    nn.init.constant_(guide.head.bias, start)
    scale = guide.posterior(torch.zeros(1, 3)).stddev
    torch.testing.assert_close(scale, torch.full((1, 2), math.exp(clamped)))


def test_encoders() -> None:
    images = torch.zeros(5, 1, 6, 7)
    assert MeanFieldGuide(ConvEncoder((1, 6, 7), 8, (3,)), 2)(images).shape == (5, 2)
    assert MeanFieldGuide(MLP((1, 6, 7), hidden=8), 2)(images).shape == (5, 2)
    own = nn.Sequential(nn.Flatten(), nn.Linear(42, 8), nn.Tanh())
    assert MeanFieldGuide(own, 2, features=8)(images).shape == (5, 2)
    assert MeanFieldGuide(nn.Linear(3, 8), 2).head.in_features == 8  # it has `out_features`


def test_analytic_kl_to_the_prior() -> None:
    posterior = MeanFieldGuide(MLP(3), 2).double().posterior(torch.randn(4, 3).double())
    prior = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1).expand((4,))
    mean, variance = posterior.mean, posterior.variance
    expected = 0.5 * (mean**2 + variance - 1 - variance.log()).sum(-1)
    torch.testing.assert_close(torch.distributions.kl_divergence(posterior, prior), expected)


def test_unknown_number_of_features() -> None:
    message = (
        r"^features: expected the number of features that Sequential gives, since it has no `out_features`, "
        r"got None$"
    )
    with pytest.raises(TypeError, match=message):
        MeanFieldGuide(nn.Sequential(nn.Linear(3, 8)), 2)


@pytest.mark.parametrize(
    ("latent_dim", "features", "error", "name"),
    [
        (0, None, ValueError, "latent_dim"),
        (1.5, None, TypeError, "latent_dim"),
        (True, None, TypeError, "latent_dim"),
        (2, 0, ValueError, "features"),
        (2, "8", TypeError, "features"),
    ],
)
def test_wrong_arguments(latent_dim: int, features: int | None, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name}: expected a whole number above 0, got "):
        MeanFieldGuide(MLP(3), latent_dim, features=features)


def test_data_of_another_shape() -> None:
    def run(x: Tensor) -> Tensor:
        return MeanFieldGuide(MLP((1, 6, 7)), 2)(x)

    with pytest.raises(ValueError, match=r"^x: expected shape \[\*batch, 1, 6, 7\], got \[4, 1, 7, 6\]$"):
        run(torch.zeros(4, 1, 7, 6))
