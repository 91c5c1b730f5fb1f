"""Tests of the guides that move their draws along the model's gradient."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from ppl_vae.flows import Planar
from ppl_vae.guides import FlowGuide, MeanFieldGuide
from ppl_vae.guides._moved_draws import _MovedDraws
from ppl_vae.guides.annealed import AnnealedGuide
from ppl_vae.guides.hamiltonian import HamiltonianGuide
from ppl_vae.guides.local import LocalGuide
from ppl_vae.guides.model_based import log_joint
from ppl_vae.guides.semi_amortized import SemiAmortizedGuide
from ppl_vae.infer import (
    DIP_ELBO,
    IWAE,
    KL_ELBO,
    STL_ELBO,
    SVI,
    VIMCO,
    BetaTC_ELBO,
    CompiledSVI,
    DReG,
    ScoreFunctionELBO,
    WakeSleep,
    log_weights,
    tracing,
)
from ppl_vae.models import LinearGaussian
from ppl_vae.models.indexed import IndexedModel
from ppl_vae.networks import MLP
from ppl_vae.training import fit, load_run

Make = Callable[..., Any]
MAKES: dict[str, Make] = {
    "plain": HamiltonianGuide,
    "tempered": partial(HamiltonianGuide, tempering=0.4),
    "annealed": AnnealedGuide,
    "annealed, momentum refreshed": partial(AnnealedGuide, persistence=0.0),
}
guides = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
SCORES_ALONE = r"^guide: a \w+Guide scores its own last draws alone, .* as WakeSleep, "


def pair(make: Make, *, prior: bool = False, **options: Any) -> tuple[LinearGaussian, Any, Tensor]:
    """Return a model, a guide and data; with ``prior``, its start is N(0, I) whatever x is."""
    torch.manual_seed(0)
    model = LinearGaussian(2, 4).double()
    start = MeanFieldGuide(MLP(4, hidden=5), 2).double()
    if prior:
        nn.init.zeros_(start.head.weight)
        nn.init.zeros_(start.head.bias)
    return model, make(start, model, **options).double(), model(None, size=6).detach()


# The weights


@guides
@pytest.mark.parametrize("steps", [1, 4])
def test_mean_weight_is_the_evidence(make: Make, steps: int) -> None:
    # 4 standard errors of 20,000 draws, seed 0.
    model, guide, x = pair(make, prior=True, steps=steps, step_size=0.3)
    x = x / 2  # within reach of the start
    with torch.no_grad():
        ratio = (log_weights(model, guide, x, num_particles=20_000) - model.log_prob(x)).exp()
    error = ratio.std(0) / 20_000**0.5
    assert error.max() < 0.03  # else the test could hardly fail
    assert ((ratio.mean(0) - 1).abs() < 4 * error).all()


@guides
def test_elbo_rises_with_the_steps(make: Make) -> None:
    gaps = []
    for steps in (1, 4, 16):
        model, guide, x = pair(make, prior=True, steps=steps, step_size=0.25)
        with torch.no_grad():
            weights = log_weights(model, guide, x, num_particles=2000)
            gaps.append(float((model.log_prob(x) - weights.mean(0)).mean()))
    assert gaps[0] > gaps[1] > 0
    if isinstance(guide, AnnealedGuide):  # the other's energy goes to and fro
        assert gaps[1] > gaps[2] > 0


def test_annealing_reaches_the_evidence() -> None:
    # The gap falls as 1 / steps; at the start it is above 1 nat.
    gaps = []
    for steps in (100, 400):
        model, guide, x = pair(AnnealedGuide, prior=True, steps=steps, step_size=0.3)
        with torch.no_grad():
            weights = log_weights(model, guide, x, num_particles=1000)
            gaps.append(float((model.log_prob(x) - weights.mean(0)).mean()))
    assert gaps[1] < 0.1
    assert 3 < gaps[0] / gaps[1] < 5


@pytest.mark.parametrize("name", sorted(MAKES.keys() - {"tempered"}))  # which changes the energy
def test_small_steps_from_the_posterior_keep_its_energy(name: str) -> None:
    # Leapfrog's error in the energy is of the order of step_size ** 2.
    model, guide, x = pair(MAKES[name], steps=8, step_size=1e-3)
    exact = model.posterior(x)
    guide.guide.posterior = lambda x, y=None: exact
    weights = log_weights(model, guide, x, num_particles=50)
    torch.testing.assert_close(weights, model.log_prob(x).expand(50, 6), rtol=0, atol=1e-3)


@pytest.mark.parametrize("tempering", [None, 0.3])
def test_leapfrog_keeps_volume(tempering: float | None) -> None:
    _, guide, x = pair(HamiltonianGuide, steps=3, tempering=tempering)
    size = torch.tensor([0.4, 0.2]).double()

    def flow(both: Tensor) -> Tensor:
        return torch.cat(guide.leapfrog(both[:, :2], both[:, 2:], size, x[:1]), -1)

    jacobian = torch.autograd.functional.jacobian(flow, torch.randn(1, 4).double())
    determinant = torch.linalg.det(jacobian.reshape(4, 4))
    torch.testing.assert_close(determinant, torch.tensor(1.0).double())


def test_leapfrog_of_a_normal_is_its_closed_form() -> None:
    # One step: z + s (p + s g / 2), with the gradient g of log p(x, z).
    model, guide, x = pair(HamiltonianGuide, steps=1)
    size = torch.tensor([0.3, 0.1]).double()
    z, p = torch.randn(6, 2).double(), torch.randn(6, 2).double()

    def gradient(z: Tensor) -> Tensor:
        return (x - z @ model.weight.T - model.bias) @ model.weight - z

    half = p + size / 2 * gradient(z)
    moved = z + size * half
    found = guide.leapfrog(z, p, size, x)
    torch.testing.assert_close(found[0], moved)
    torch.testing.assert_close(found[1], half + size / 2 * gradient(moved))


def test_tempering_starts_where_it_is_told() -> None:
    _, guide, _ = pair(HamiltonianGuide, tempering=0.25)
    torch.testing.assert_close(guide.log_tempering.exp() + 1, torch.tensor(2.0).double())


@guides
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("latent", [2, 20])
def test_default_steps_of_a_stiff_posterior_do_not_diverge(
    make: Make, dtype: torch.dtype, latent: int
) -> None:
    # The same draws with and without the steps, which may lose no more energy than their error.
    torch.manual_seed(0)
    model = LinearGaussian(latent, 3 * latent, scale=0.01).to(dtype)
    guide = make(MeanFieldGuide(MLP(3 * latent, hidden=5), latent), model).to(dtype)
    x = model(None, size=300).detach()
    start = guide.guide.posterior(x)
    z = start.rsample()
    moved, score = guide._move((x,), guide.sizes(start, (x,)), start, z)
    before, after = log_joint(model, z, (x,)) - start.log_prob(z), log_joint(model, moved, (x,)) - score
    assert (after > 1.2 * before).all()  # of about -5e4 and -5e5 nats; steps of 0.1 end at -1e30
    assert after.mean() > before.mean()
    after.sum().backward()
    for name, p in guide.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("make", [HamiltonianGuide, AnnealedGuide])
def test_trains_on_a_stiff_posterior_from_the_start(make: Make) -> None:
    torch.manual_seed(0)
    model = LinearGaussian(2, 4, scale=0.02).double().requires_grad_(False)
    guide = make(MeanFieldGuide(nn.Linear(4, 4), 2), model, steps=2).double()
    x = model(None, size=100).detach()
    svi = SVI(model, guide, partial(torch.optim.Adam, lr=0.05), KL_ELBO(), clip_norm=10.0)
    bounds = []
    for steps in (0, 120):
        for _ in range(steps):
            svi.step(x)
        with torch.no_grad():
            bounds.append((log_weights(model, guide, x, num_particles=20) - model.log_prob(x)).mean())
    assert bounds[0] < -1000
    assert bounds[1] > -10


def test_steps_are_in_standard_deviations_of_the_start() -> None:
    _, guide, x = pair(HamiltonianGuide, step_size=1e-4)
    start = guide.guide.posterior(x)
    torch.testing.assert_close(guide.sizes(start, (x,)), 1e-4 * start.stddev, rtol=1e-3, atol=0)
    flow = dist.TransformedDistribution(start, [dist.transforms.AffineTransform(0.0, 3.0, event_dim=1)])
    ratio = torch.stack([guide.sizes(flow, (x,)) / (3e-4 * start.stddev) for _ in range(200)])
    # the mean standard deviation of four standard normal draws is 0.92, its standard error 0.028
    torch.testing.assert_close(ratio.mean(0), torch.full((6, 2), 0.921).double(), rtol=0, atol=0.11)


@guides
def test_training_raises_the_bound_of_its_start(make: Make) -> None:
    gains = []
    for train in (False, True):
        model, guide, x = pair(make, steps=3)
        if train:
            fit(model, guide, model(None, size=200).detach(), epochs=20, learning_rate=0.02, progress=False)
        with torch.no_grad():
            gains.append(log_weights(model, guide, x, num_particles=500).mean() - model.log_prob(x).mean())
    assert gains[1] > gains[0]
    assert gains[1] < 0


# The program


@guides
@pytest.mark.parametrize(
    "elbo",
    [
        KL_ELBO(2),
        IWAE(3),
        VIMCO(3),
        ScoreFunctionELBO(3),
        Trace_ELBO(),
        TraceMeanField_ELBO(),
        Trace_ELBO(2, 1, vectorize_particles=True),
    ],
)
@pytest.mark.filterwarnings("ignore:TraceMeanField")
def test_estimators_reach_every_parameter(make: Make, elbo: Any) -> None:
    model, guide, x = pair(make)
    elbo.loss_and_grads(model, guide, x)
    for name, p in (*model.named_parameters(), *guide.named_parameters()):
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@pytest.mark.parametrize("elbo", [STL_ELBO(), DReG(2)])
def test_estimators_that_score_other_draws_say_so(elbo: Any) -> None:
    model, guide, x = pair(HamiltonianGuide)
    with pytest.raises(ValueError, match="expected distributions in the guide that can score a value"):
        elbo.loss_and_grads(model, guide, x)


@pytest.mark.parametrize("elbo", [BetaTC_ELBO(6), DIP_ELBO()])
def test_estimators_that_need_marginals_say_so(elbo: Any) -> None:
    model, guide, x = pair(HamiltonianGuide)
    with pytest.raises(ValueError, match="expected a distribution in the guide with known marginals"):
        elbo.loss_and_grads(model, guide, x)


@pytest.mark.parametrize("sleep", [0.0, 1.0])
@pytest.mark.parametrize("make", [HamiltonianGuide, AnnealedGuide])
def test_wake_sleep_says_that_it_would_train_the_model(make: Make, sleep: float) -> None:
    model, guide, x = pair(make)
    with pytest.raises(ValueError, match=f"^guide: .*leave the model alone, got {make.__name__}"):
        WakeSleep(3, sleep=sleep).loss_and_grads(model, guide, x)


@guides
def test_gradient_is_that_of_finite_differences(make: Make) -> None:
    model, guide, x = pair(make, steps=2)
    model.requires_grad_(False).eval()
    names = [name for name, _ in guide.named_parameters()]

    def elbo(*parameters: Tensor) -> Tensor:
        torch.manual_seed(1)
        state = dict(zip(names, parameters, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(guide, state):
            return log_weights(model, guide, x[:1]).sum()

    values = tuple(p.detach().clone().requires_grad_() for p in guide.parameters())
    assert torch.autograd.gradcheck(elbo, values, fast_mode=True)


@guides
def test_particles_and_plates(make: Make) -> None:
    _, guide, x = pair(make)
    rows = []
    guide.guide.encoder.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert rows == [6]
    assert list(trace.stochastic_nodes) == ["data", "z"]
    assert site["value"].shape == (4, 6, 2)
    assert site["log_prob"].shape == (4, 6)
    assert len(site["value"].unique(dim=0)) == 4


@guides
def test_draws_of_data_and_particles_are_apart(make: Make) -> None:
    _, guide, x = pair(make, steps=2)

    def draw(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return guide.posterior(x).rsample((3,))

    reached = torch.autograd.functional.jacobian(draw, x).abs().sum((0, 2, 4))
    assert (reached.diagonal() > 0).all()
    assert torch.equal(reached, reached.diagonal().diag())
    noise = torch.randn(3, 2, 6, 2).double()
    z, p = noise.unbind(1)
    if isinstance(guide, HamiltonianGuide):
        size = torch.rand(6, 2).double() / 5
        together = guide.leapfrog(z, p, size, x)[0]
        for k in range(3):
            for i in range(6):
                alone = guide.leapfrog(z[k, i : i + 1], p[k, i : i + 1], size[i : i + 1], x[i : i + 1])[0]
                torch.testing.assert_close(together[k, i : i + 1], alone)


@guides
def test_without_gradients_the_draws_are_the_same(make: Make) -> None:
    results = []
    for grad in (True, False):
        model, guide, x = pair(make)
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            results.append(log_weights(model, guide, x, num_particles=3))
        assert results[-1].requires_grad is grad
    torch.testing.assert_close(*results)


@guides
@pytest.mark.parametrize("frozen", ["model", "guide"])
def test_a_frozen_half(make: Make, frozen: str) -> None:
    model, guide, x = pair(make)
    half = {"model": model, "guide": guide}[frozen].requires_grad_(False).eval()
    SVI(model, guide, torch.optim.Adam, KL_ELBO()).step(x)
    other = guide if half is model else model
    assert all(p.grad is None for p in half.parameters())
    assert all(p.grad is not None for p in other.parameters())


@guides
def test_compiled_steps_are_plain_steps(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    found = []
    for engine in (SVI, CompiledSVI):
        model, guide, x = pair(make, steps=2)
        svi = engine(model, guide, torch.optim.Adam, IWAE(2))
        torch.manual_seed(1)
        losses = [svi.step(x), svi.step(x + 1)]
        found.append([torch.stack(losses), *(p.detach() for p in (*model.parameters(), *guide.parameters()))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("start", ["semi-amortised", "moved"])
def test_starts_from_other_guides(start: str) -> None:
    model, guide, x = pair(HamiltonianGuide)
    if start == "semi-amortised":
        base = SemiAmortizedGuide(guide.guide, model, steps=2)
        weights = log_weights(model, HamiltonianGuide(base, model).double(), x, num_particles=3)
    else:
        weights = log_weights(model, HamiltonianGuide(guide, model).double(), x, num_particles=3)
    assert weights.shape == (3, 6)
    assert weights.isfinite().all()


def test_annealing_needs_a_start_that_scores_any_draw() -> None:
    model, guide, x = pair(HamiltonianGuide)
    with pytest.raises(NotImplementedError, match=SCORES_ALONE):
        log_weights(model, AnnealedGuide(guide, model).double(), x)


def test_starts_from_a_flow_whose_scale_is_not_known() -> None:
    model, _, x = pair(HamiltonianGuide)
    flow = FlowGuide(MLP(4, hidden=5), Planar(2, 4)).double()
    weights = log_weights(model, HamiltonianGuide(flow, model).double(), x, num_particles=3)
    assert weights.isfinite().all()


# The distribution


def test_scores_its_last_draws_alone() -> None:
    normal = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
    moved = _MovedDraws(normal, lambda start, z: (2 * z, start.log_prob(z)), "OwnGuide")
    z = moved.rsample((4,))
    assert moved.log_prob(z).shape == (4, 3)
    for other in (z.clone(), torch.zeros(3, 2)):
        with pytest.raises(NotImplementedError, match=SCORES_ALONE):
            moved.log_prob(other)
    moved.rsample()
    with pytest.raises(NotImplementedError):
        moved.log_prob(z)
    wide = moved.expand((5, 3))
    assert wide.batch_shape == (5, 3)
    assert wide.sample((2,)).shape == (2, 5, 3, 2)


# State


@guides
def test_fit_saves_and_loads(make: Make, tmp_path: Path) -> None:
    model, guide, x = pair(make, steps=2)
    run = fit(model, guide, x, epochs=2, output=tmp_path / "run", progress=False)
    assert not any("model" in key for key in run.guide.state_dict())
    other = LinearGaussian(2, 4).double()
    empty = make(MeanFieldGuide(MLP(4, hidden=5), 2), other, steps=2).double()
    loaded = load_run(tmp_path / "run", model=other, guide=empty)
    results = []
    for program in (run, loaded):
        torch.manual_seed(1)
        results.append(log_weights(program.model, program.guide, x, num_particles=3))
    assert torch.equal(*results)


def test_the_model_is_no_part_of_the_guide() -> None:
    model, guide, x = pair(HamiltonianGuide)
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in model.parameters()}
    with pytest.raises(ValueError, match=r"^guide: expected a HamiltonianGuide of the model"):
        SVI(copy.deepcopy(model), guide, torch.optim.Adam, KL_ELBO()).step(x)


# Errors


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (HamiltonianGuide, "steps", 0),
        (HamiltonianGuide, "step_size", 0.0),
        (HamiltonianGuide, "step_size", "0.1"),
        (HamiltonianGuide, "tempering", 0.0),
        (HamiltonianGuide, "tempering", 1.0),
        (HamiltonianGuide, "tempering", "0.5"),
        (AnnealedGuide, "steps", 2.5),
        (AnnealedGuide, "step_size", -1.0),
        (AnnealedGuide, "persistence", 1.1),
        (AnnealedGuide, "persistence", None),
    ],
)
def test_wrong_arguments(make: Make, name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected a "):
        pair(make, **{name: value})


@pytest.mark.parametrize("make", [HamiltonianGuide, AnnealedGuide])
def test_wrong_programs(make: Make) -> None:
    model = LinearGaussian(2, 4)
    with pytest.raises(TypeError, match=r"^guide: expected a guide with a `posterior`, got MLP$"):
        make(MLP(4), model)
    with pytest.raises(TypeError, match=r"^model: expected a module or a function, got None$"):
        make(MeanFieldGuide(MLP(4), 2), None)
    assert make(LocalGuide(3, 2), IndexedModel(model))(torch.zeros(3, 4), torch.arange(3)).shape == (3, 2)
