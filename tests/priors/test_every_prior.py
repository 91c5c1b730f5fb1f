"""What the learned priors have in common."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from densities import ELBOS, integral, moments_agree
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.description import library_classes
from ppl_vae.flows import MaskedAutoregressive, SplineCoupling
from ppl_vae.guides import FullRankGuide, MeanFieldGuide
from ppl_vae.infer import SVI, CompiledSVI, log_weights, tracing
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal, UniformSphere
from ppl_vae.priors.autoregressive_prior import AutoregressivePrior
from ppl_vae.priors.conditional_normal import ConditionalNormal
from ppl_vae.priors.flow_prior import FlowPrior
from ppl_vae.priors.gaussian_mixture import GaussianMixture
from ppl_vae.priors.vamp_prior import VampPrior
from ppl_vae.training import fit, load_run

MAKES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "GaussianMixture": lambda guide: GaussianMixture(2, 3),
    "VampPrior": lambda guide: VampPrior(guide, 4, 3, bounds=(-2.0, 2.0)),
    "VampPrior-weights": lambda guide: VampPrior(guide, 4, 3, bounds=None, learn_weights=True),
    "FlowPrior-masked": lambda guide: FlowPrior(MaskedAutoregressive(2, depth=2, hidden=6)),
    "FlowPrior-spline": lambda guide: FlowPrior(SplineCoupling(2, depth=2, hidden=6, bins=4)),
    "AutoregressivePrior": lambda guide: AutoregressivePrior(2, hidden=6),
    "AutoregressivePrior-mixture": lambda guide: AutoregressivePrior(2, hidden=6, components=3),
}
GUIDES = {"mean-field": MeanFieldGuide, "full-rank": FullRankGuide}
CASES = [(name, "mean-field") for name in MAKES] + [("VampPrior", "full-rank")]


@pytest.fixture(params=CASES, ids="-".join)
def made(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    return make(*request.param)


def make(name: str, family: str) -> tuple[nn.Module, nn.Module]:
    """Return a prior away from its start, and the guide, in float64."""
    guide = GUIDES[family](MLP(4, hidden=3), 2).double()
    prior = MAKES[name](guide).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return prior, guide


def test_density_integrates_to_one(made: Any) -> None:
    with torch.no_grad():
        total = integral(made[0]().expand([1]), points=401)
    torch.testing.assert_close(total, torch.ones(1).double(), atol=1e-3, rtol=0)


def test_draws_are_of_the_density(made: Any) -> None:
    assert moments_agree(made[0]().expand([1]), points=401)


def test_every_shape_of_draws_and_of_values(made: Any) -> None:
    prior = made[0]()
    assert prior.batch_shape == () and prior.event_shape == (2,)
    assert prior.sample().shape == (2,)
    z = prior.sample((4, 3))
    assert z.shape == (4, 3, 2) and not z.requires_grad
    log_prob = prior.log_prob(z)
    assert log_prob.shape == (4, 3)
    for k in range(4):
        for i in range(3):
            torch.testing.assert_close(log_prob[k, i], prior.log_prob(z[k, i]), rtol=1e-10, atol=1e-11)
    expanded = prior.expand([4, 3])
    assert expanded.batch_shape == (4, 3) and expanded.sample((5,)).shape == (5, 4, 3, 2)
    torch.testing.assert_close(expanded.log_prob(z), log_prob)
    torch.testing.assert_close(expanded.log_prob(z[0, 0]), log_prob[0, 0].expand(4, 3))


def test_is_independent_of_a_context(made: Any) -> None:
    z = torch.randn(5, 2).double()
    assert torch.equal(made[0](torch.arange(5)).log_prob(z), made[0]().log_prob(z))
    for prior in (StandardNormal(2).double(), UniformSphere(2).double()):
        unit = nn.functional.normalize(z, dim=-1)
        assert torch.equal(prior(torch.arange(5)).log_prob(unit), prior().log_prob(unit))


def test_gradients_of_the_density_are_finite_differences(made: Any) -> None:
    prior, guide = made
    z, found = torch.randn(5, 2).double(), []
    names = [name for name, _ in prior.named_parameters() if prior.get_parameter(name).requires_grad]
    prior().log_prob(z).sum().backward()
    for name in names:
        parameter = prior.get_parameter(name)
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        direction = parameter.grad / parameter.grad.norm()
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * direction
                values.append(prior().log_prob(z).sum())
                parameter -= step * direction
        found.append(((values[0] - values[1]) / 2e-5, parameter.grad.norm()))
        assert parameter.grad.abs().max() > 0, name
    for difference, gradient in found:
        torch.testing.assert_close(difference, gradient, rtol=1e-5, atol=1e-7)
    through_guide = isinstance(prior, VampPrior)
    assert all((p.grad is not None and bool(p.grad.any())) == through_guide for p in guide.parameters())


def test_reparameterised_draws_have_the_gradient_of_the_mean(made: Any) -> None:
    # d E[sin(z1) + z1 z2] / d parameter, by draws and by quadrature of the density.
    prior = made[0]
    if not prior().has_rsample:
        pytest.skip("its draws have no gradient")
    parameter = next(p for p in prior.parameters() if p.requires_grad)
    axis = torch.linspace(-9, 9, 201, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)

    def f(z: Tensor) -> Tensor:
        return z[..., 0].sin() + z[..., 0] * z[..., 1]

    mean = (prior().log_prob(grid).exp() * f(grid)).sum() * (axis[1] - axis[0]) ** 2
    (exact,) = torch.autograd.grad(mean, parameter)
    direction = exact / exact.norm()
    rows = []
    for _ in range(30):
        (drawn,) = torch.autograd.grad(f(prior().rsample((400,))).mean(), parameter)
        rows.append((drawn * direction).sum())
    found = torch.stack(rows)
    assert (found.mean() - exact.norm()).abs() < 4 * found.std() / 30**0.5 + 1e-3 * exact.norm()


def test_float32_is_float64_to_the_digits_of_float32(made: Any) -> None:
    prior, guide = made
    z = prior().sample((200,)).float()
    exact = prior().log_prob(z.double())
    prior.float(), guide.float()
    found = prior().log_prob(z)
    assert found.dtype == prior().sample().dtype == torch.float32
    assert ((found - exact).abs() < 1e-4 * (1 + exact.abs())).all()


def test_is_traced_and_replayed(made: Any) -> None:
    prior, _ = made
    with pyro.validation_enabled(False):
        graph = make_fx(lambda z: prior().log_prob(z))(torch.randn(7, 3, 2).double())
        z = torch.randn(7, 3, 2).double()
        torch.testing.assert_close(graph(z), prior().log_prob(z), rtol=1e-10, atol=1e-11)


def test_wrong_values_raise(made: Any) -> None:
    with pytest.raises(ValueError, match=r"[Tt]he value argument|support"):
        dist.Independent(dist.Normal(torch.zeros(2), 1.0), 1).log_prob(torch.tensor([torch.nan, 0.0]))
    with pytest.raises(ValueError, match="support"):
        made[0]().log_prob(torch.tensor([torch.nan, 0.0]).double())


@given(latent=st.integers(1, 4), batch=st.lists(st.integers(1, 3), max_size=2), components=st.integers(1, 4))
def test_any_number_of_dimensions(latent: int, batch: list[int], components: int) -> None:
    guide = MeanFieldGuide(MLP(4, hidden=3), latent)
    priors = [
        GaussianMixture(latent, components),
        VampPrior(guide, 4, components),
        AutoregressivePrior(latent, 5, components),
        FlowPrior(MaskedAutoregressive(latent, depth=2, hidden=5)),
    ]
    for prior in priors:
        z = prior().sample(torch.Size(batch))
        assert z.shape == (*batch, latent)
        assert prior().log_prob(z).shape == tuple(batch)


def test_functions_are_no_classes_that_a_saved_run_can_name() -> None:
    assert all(isinstance(value, type) for value in library_classes().values())


def test_conditional_normal_is_a_prior_of_each_label() -> None:
    prior = ConditionalNormal(MLP(3, hidden=4), 2, num_classes=3).double()
    with torch.no_grad():
        total = integral(prior(torch.tensor([0, 2, 1])), points=401)
    torch.testing.assert_close(total, torch.ones(3).double(), atol=1e-3, rtol=0)


# In models


def test_weights_of_particles_are_their_loop(made: Any) -> None:
    prior, guide = made
    model = VAE(prior, Normal(MLP(2, 4, hidden=3))).double()
    x = torch.randn(3, 4).double()
    torch.manual_seed(3)
    weights = log_weights(model, guide, x, num_particles=5)
    torch.manual_seed(3)
    with torch.no_grad(), pyro.plate("particles", 5, dim=-2):
        z = guide(x)
    expected = (
        prior().log_prob(z) + model.likelihood(z).log_prob(x) - guide.posterior(x).log_prob(z)
    ).detach()
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10)


def test_model_draws_from_the_prior(made: Any) -> None:
    model = VAE(made[0], Bernoulli(MLP(2, 4, hidden=3))).double()
    with pyro.plate("particles", 5, dim=-2):
        trace = poutine.trace(model).get_trace(None, size=3)
    assert trace.nodes["z"]["value"].shape == (5, 3, 2)
    assert trace.nodes["x"]["value"].shape == (5, 3, 4)


@pytest.mark.parametrize(
    ("case", "elbo"),
    [
        (("GaussianMixture", "mean-field"), "KL_ELBO"),
        (("VampPrior", "mean-field"), "IWAE"),
        (("VampPrior-weights", "mean-field"), "STL_ELBO"),
        (("VampPrior", "full-rank"), "Trace_ELBO"),
        (("FlowPrior-masked", "mean-field"), "Trace_ELBO"),
        (("AutoregressivePrior-mixture", "mean-field"), "IWAE"),
    ],
    ids=str,
)
def test_compiled_steps_are_plain_steps(
    case: tuple[str, str], elbo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        prior, guide = make(*case)
        model = VAE(prior, Bernoulli(MLP(2, 4, hidden=3))).double()
        x = torch.bernoulli(torch.full((6, 4), 0.5, dtype=torch.float64))
        svi = engine(model, guide, torch.optim.Adam, ELBOS[elbo]())
        losses = [svi.step(x) for _ in range(4)]
        assert not getattr(svi, "plain", False)
        found.append([*losses, *model.state_dict().values(), *guide.state_dict().values()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


def test_training_lowers_the_loss_and_moves_every_parameter(made: Any) -> None:
    prior, guide = made
    model = VAE(prior, Normal(MLP(2, 4, hidden=8), scale=0.5)).double()
    x = torch.randn(64, 2).double() @ torch.randn(2, 4).double() + 3 * torch.randn(64, 1).double().sign()
    before = {name: p.detach().clone() for name, p in prior.named_parameters() if p.requires_grad}
    svi = SVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.02), Trace_ELBO())
    losses = [float(svi.step(x)) / 64 for _ in range(120)]
    assert sum(losses[-20:]) / 20 < sum(losses[:5]) / 5 - 3
    for name, value in before.items():
        assert not torch.equal(prior.get_parameter(name), value), name


def test_stock_svi_of_pyro_trains_it(made: Any) -> None:
    prior, guide = made
    model = VAE(prior, Bernoulli(MLP(2, 4, hidden=3))).double()
    x = torch.bernoulli(torch.full((6, 4), 0.5, dtype=torch.float64))
    before = {name: p.detach().clone() for name, p in prior.named_parameters() if p.requires_grad}
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(2):
        svi.step(x)
    for name, value in before.items():
        assert not torch.equal(prior.get_parameter(name), value), name


def test_a_saved_pair_is_loaded(made: Any, tmp_path: Path) -> None:
    prior, guide = made
    model = VAE(prior, Bernoulli(MLP(2, 4, hidden=3))).double()
    x = torch.bernoulli(torch.full((6, 4), 0.5, dtype=torch.float64))
    fit(model, guide, x, epochs=1, output=tmp_path / "run", progress=False)
    loaded = load_run(tmp_path / "run", classes=(type(prior),))
    z = torch.randn(5, 2).double()
    assert torch.equal(loaded.model.prior().log_prob(z), prior().log_prob(z))


def test_a_saved_prior_of_one_dimension_is_loaded(tmp_path: Path) -> None:
    prior = AutoregressivePrior(1, components=2)
    model, guide = VAE(prior, Bernoulli(MLP(1, 4, hidden=3))), MeanFieldGuide(MLP(4, hidden=3), 1)
    x = torch.bernoulli(torch.full((6, 4), 0.5))
    fit(model, guide, x, epochs=1, output=tmp_path / "run", progress=False)
    loaded = load_run(tmp_path / "run", classes=(AutoregressivePrior,))
    z = torch.randn(5, 1)
    assert torch.equal(loaded.model.prior().log_prob(z), prior().log_prob(z))
