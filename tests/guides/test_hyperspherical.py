"""Tests of the guide on a sphere."""

import copy
import math
from typing import Any

import pyro
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from ppl_vae import evaluate
from ppl_vae.distributions import VonMisesFisher
from ppl_vae.guides import HypersphericalGuide, MeanFieldGuide
from ppl_vae.infer import IWAE, KL_ELBO, STL_ELBO, SVI, CompiledSVI, DReG, log_weights, tracing
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal, UniformSphere

ESTIMATORS = {
    "KL_ELBO": KL_ELBO,
    "KL_ELBO of draws": lambda: KL_ELBO(2, analytic_kl=False),
    "STL_ELBO": lambda: STL_ELBO(3),
    "DReG": lambda: DReG(3),
    "IWAE": lambda: IWAE(3),
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
}


def bits(n: int = 6) -> Tensor:
    return torch.bernoulli(torch.full((n, 4), 0.5, dtype=torch.float64))


def make(latent: int = 3) -> tuple[VAE, HypersphericalGuide]:
    model = VAE(UniformSphere(latent), Bernoulli(MLP(latent, 4, hidden=5))).double()
    return model, HypersphericalGuide(MLP(4, hidden=5), latent).double()


# A unit vector seen through noise has a von Mises-Fisher posterior.
LATENT, SCALE, LENGTH = 4, 0.6, 1.7


def exact() -> tuple[VAE, HypersphericalGuide, Tensor]:
    """Return a model and a guide that is its posterior, for data of one length."""
    model = VAE(UniformSphere(LATENT), Normal(nn.Identity(), scale=SCALE)).double()
    guide = HypersphericalGuide(nn.Identity(), LATENT, features=LATENT).double()
    with torch.no_grad():
        guide.head.weight.copy_(torch.eye(LATENT + 1, LATENT))
        guide.head.bias.zero_()
        guide.head.bias[-1] = math.log(math.expm1(LENGTH / SCALE**2 - 1))
    return model, guide, LENGTH * F.normalize(torch.randn(5, LATENT).double(), dim=-1)


def test_posterior_is_the_distribution_of_the_head() -> None:
    guide, x = make()[1], bits()
    out = guide.encoder(x) @ guide.head.weight.T + guide.head.bias
    posterior = guide.posterior(x)
    assert isinstance(posterior, VonMisesFisher)
    assert posterior.batch_shape == (6,)
    assert posterior.event_shape == (3,)
    torch.testing.assert_close(posterior.loc, out[:, :3] / out[:, :3].norm(dim=-1, keepdim=True))
    torch.testing.assert_close(posterior.concentration, 1 + (1 + out[:, 3].exp()).log())


def test_density_integrates_to_one_on_the_circle() -> None:
    posterior = make(2)[1].posterior(bits())
    angle = torch.arange(300, dtype=torch.float64) * (2 * math.pi / 300)
    points = torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(1)
    total = posterior.log_prob(points).exp().sum(0) * (2 * math.pi / 300)
    torch.testing.assert_close(total, torch.ones(6).double(), atol=1e-9, rtol=0)


def test_density_of_one_datum_is_that_in_a_batch() -> None:
    guide, x = make()[1], bits()
    z = guide.posterior(x).sample((4,))
    together = guide.posterior(x).log_prob(z)
    for i in range(6):
        alone = guide.posterior(x[i : i + 1]).log_prob(z[:, i : i + 1])
        torch.testing.assert_close(together[:, i : i + 1], alone)


@pytest.mark.parametrize(("start", "clamped"), [(-1e3, 1.0), (1e6, 1e4)])
def test_concentration_is_clamped(start: float, clamped: float) -> None:
    guide = make()[1]
    nn.init.constant_(guide.head.bias, start)
    posterior = guide.posterior(bits())
    torch.testing.assert_close(posterior.concentration, torch.full((6,), clamped).double())
    assert posterior.log_prob(posterior.sample()).isfinite().all()


def test_particles_share_one_run_of_the_encoder() -> None:
    rows = []
    guide, x = make()[1], bits(4)
    guide.encoder.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with pyro.plate("particles", 7, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    assert z.shape == (7, 4, 3)
    assert rows == [4]
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], guide.posterior(x).log_prob(z))


def test_gradients_reach_every_parameter() -> None:
    guide = make()[1]
    posterior = guide.posterior(bits())
    z = posterior.rsample((3,))
    (z.sin().sum() + z[..., 0].square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in guide.parameters())


def test_state_round_trip() -> None:
    one, other = make()[1], make()[1]
    x = bits()
    z = one.posterior(x).sample()
    assert not torch.equal(one.posterior(x).log_prob(z), other.posterior(x).log_prob(z))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(one.posterior(x).log_prob(z), other.posterior(x).log_prob(z))


# With a model


def test_kl_is_the_closed_form() -> None:
    torch.manual_seed(0)
    model, guide = make()
    x = bits(5)
    elbo = KL_ELBO()
    assert elbo.loss(model, guide, x).isfinite()
    assert elbo.analytic == {"z": True}
    k = guide.posterior(x).concentration.detach()
    cosine = torch.tanh(k).reciprocal() - k.reciprocal()  # three dimensions have it in plain functions
    expected = k * cosine + (k / k.sinh()).log()
    kl = torch.distributions.kl_divergence(guide.posterior(x), model.prior())
    torch.testing.assert_close(kl, expected)


def test_weights_of_the_exact_posterior_are_the_evidence() -> None:
    torch.manual_seed(0)
    model, guide, x = exact()
    k = LENGTH / SCALE**2
    half = LATENT / 2
    bessel = math.log(scipy.special.ive(half - 1, k)) + k
    # of the integral of exp(kappa mu^T z) over the sphere
    integral = half * math.log(2 * math.pi) - (half - 1) * math.log(k) + bessel
    area = math.log(2) + half * math.log(math.pi) - math.lgamma(half)
    evidence = -half * math.log(2 * math.pi * SCALE**2) - (LENGTH**2 + 1) / (2 * SCALE**2) + integral - area
    weights = log_weights(model, guide, x, num_particles=8)
    torch.testing.assert_close(weights, torch.full((8, 5), evidence, dtype=torch.float64))
    found = evaluate(model, guide, x, num_particles=10, progress=False)
    assert found.elbo.mean == pytest.approx(evidence)
    assert found.log_likelihood.mean == pytest.approx(evidence)


@pytest.mark.parametrize("make_elbo", [lambda: STL_ELBO(4), lambda: DReG(4)], ids=["STL_ELBO", "DReG"])
def test_path_gradients_are_zero_at_the_exact_posterior(make_elbo: Any) -> None:
    torch.manual_seed(0)
    model, guide, x = exact()
    make_elbo().differentiable_loss(model, guide, x).backward()
    for parameter in guide.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), atol=1e-10, rtol=0)


def test_gradients_of_estimators_agree() -> None:
    # each is the ELBO's in expectation; the standard errors are those over repeated batches of draws
    torch.manual_seed(0)
    model, guide = make()
    x = bits(4)
    found = {}
    for name in ("KL_ELBO", "STL_ELBO", "Trace_ELBO"):
        gradients = []
        for _ in range(60):
            guide.zero_grad()
            options = {"vectorize_particles": True, "max_plate_nesting": 1} if name == "Trace_ELBO" else {}
            elbo = {"KL_ELBO": KL_ELBO, "STL_ELBO": STL_ELBO, "Trace_ELBO": Trace_ELBO}[name](40, **options)
            elbo.differentiable_loss(model, guide, x).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
        found[name] = torch.stack(gradients)
    for name in ("STL_ELBO", "Trace_ELBO"):
        one, two = found["KL_ELBO"], found[name]
        error = ((one.var(0) + two.var(0)) / 60).sqrt()
        assert ((one.mean(0) - two.mean(0)).abs() <= 4.5 * error + 1e-12).all(), name


@pytest.mark.parametrize("name", ESTIMATORS)
def test_compiled_steps_are_plain_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        model, guide = make()
        svi = engine(model, guide, torch.optim.Adam, ESTIMATORS[name]())
        x = bits()
        torch.manual_seed(3)
        losses = [svi.step(x) for _ in range(6)]
        found.append([*losses, *model.state_dict().values(), *guide.state_dict().values()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_training_finds_the_posterior() -> None:
    torch.manual_seed(0)
    model, solution, x = exact()
    guide = HypersphericalGuide(nn.Identity(), LATENT, features=LATENT).double()
    svi = SVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.05), STL_ELBO(8))

    def gap() -> float:
        with torch.no_grad():
            return float(torch.distributions.kl_divergence(guide.posterior(x), solution.posterior(x)).mean())

    assert gap() > 1
    for _ in range(300):
        svi.step(x)
    assert gap() < 0.01


@pytest.mark.parametrize(
    ("latent_dim", "features", "error", "name", "number"),
    [
        (0, None, ValueError, "latent_dim", 0),
        (1, None, ValueError, "latent_dim", 1),
        (1.5, None, TypeError, "latent_dim", 0),
        (2, 0, ValueError, "features", 0),
        (2, "8", TypeError, "features", 0),
    ],
)
def test_wrong_arguments(
    latent_dim: int, features: int | None, error: type[Exception], name: str, number: int
) -> None:
    with pytest.raises(error, match=f"^{name}: expected a whole number above {number}.*, got "):
        HypersphericalGuide(MLP(3), latent_dim, features=features)


@pytest.mark.parametrize(
    ("prior", "guide"),
    [(StandardNormal(3), HypersphericalGuide(MLP(4), 3)), (UniformSphere(3), MeanFieldGuide(MLP(4), 3))],
    ids=["guide", "prior"],
)
def test_one_of_a_pair_on_the_sphere_is_refused(prior: nn.Module, guide: nn.Module) -> None:
    svi = SVI(VAE(prior, Bernoulli(MLP(3, 4))), guide, torch.optim.Adam, KL_ELBO())
    with pytest.raises(ValueError, match=r"model and guide disagree on where it is: .*on the sphere"):
        svi.step(torch.ones(2, 4))
