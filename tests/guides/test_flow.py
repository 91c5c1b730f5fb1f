"""Tests of the flow guide, with each flow."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from densities import gradients_reach_every_parameter, integral, log_prob_by_jacobian, moments_agree
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from ppl_vae import fit, flows, load_run
from ppl_vae.flows import (
    AffineCoupling,
    BlockNeuralAutoregressive,
    Continuous,
    Householder,
    InverseAutoregressive,
    MaskedAutoregressive,
    NeuralAutoregressive,
    Planar,
    Radial,
    SplineAutoregressive,
    SplineCoupling,
    Sylvester,
)
from ppl_vae.flows.flow import Flow
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.guides.flow import FlowGuide
from ppl_vae.infer import IWAE, KL_ELBO, STL_ELBO, SVI, CompiledSVI, DReG, WakeSleep, log_weights, tracing
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

FLOWS: dict[str, Callable[[], Flow]] = {
    "AffineCoupling": lambda: AffineCoupling(2, 3, 2, hidden=6),
    "BlockNeuralAutoregressive": lambda: BlockNeuralAutoregressive(2, 3, 2, hidden=3),
    "Continuous": lambda: Continuous(2, 3, hidden=6, steps=4),
    "Householder": lambda: Householder(2, 3),
    "InverseAutoregressive": lambda: InverseAutoregressive(2, 3, 2, hidden=6),
    "MaskedAutoregressive": lambda: MaskedAutoregressive(2, 3, 2, hidden=6),
    "NeuralAutoregressive": lambda: NeuralAutoregressive(2, 3, 1, hidden=6, units=3),
    "Planar": lambda: Planar(2, 3),
    "Radial": lambda: Radial(2, 3),
    "SplineAutoregressive": lambda: SplineAutoregressive(2, 3, 2, hidden=6, bins=4),
    "SplineCoupling": lambda: SplineCoupling(2, 3, 2, hidden=6, bins=4),
    "Sylvester-orthogonal": lambda: Sylvester(2, 3, 2),
    "Sylvester-householder": lambda: Sylvester(2, 3, 2, kind="householder"),
}
ONE_WAY = {"Planar", "Radial", "Sylvester-orthogonal", "Sylvester-householder"}
INVERTIBLE = [name for name in FLOWS if name not in ONE_WAY]

every = pytest.mark.parametrize("name", FLOWS)


def guide_of(name: str, base: str = "mean-field", disturbance: float = 0.1) -> FlowGuide:
    guide = FlowGuide(MLP(4, hidden=3), FLOWS[name](), base=base).double()
    with torch.no_grad():
        for parameter in guide.flow.parameters():
            parameter.add_(disturbance * torch.randn_like(parameter))
    return guide


def model() -> VAE:
    return VAE(StandardNormal(2), Bernoulli(MLP(2, 4, hidden=3))).double()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def bits(n: int = 6) -> Tensor:
    return torch.bernoulli(torch.full((n, 4), 0.5, dtype=torch.float64))


def test_every_public_flow_is_here() -> None:
    assert {type(make()).__name__ for make in FLOWS.values()} == set(flows.__all__)


# Densities


@every
@pytest.mark.parametrize("base", ["mean-field", "full-rank"])
def test_density_of_draws_is_the_change_of_variables(name: str, base: str) -> None:
    guide, x = guide_of(name, base), normal(3, 4)
    posterior = guide.posterior(x)
    assert posterior.batch_shape == (3,)
    assert posterior.event_shape == (2,)
    z = posterior.rsample((2,))
    log_prob = posterior.log_prob(z)
    assert log_prob.shape == (2, 3)
    noise = posterior.transforms[0].inv(z).detach()
    context = guide.encode(x)[:, -3:].detach()
    for k in range(2):
        for i in range(3):
            alone = guide.posterior(x[i : i + 1]).base_dist

            def draw(noise: Tensor, i: int = i) -> Tensor:
                return guide.flow(context[i])(noise)

            expected = log_prob_by_jacobian(draw, alone, noise[k, i])
            tolerance = 1e-3 if name == "Continuous" else 1e-9  # four steps of its solver
            torch.testing.assert_close(log_prob[k, i : i + 1], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_density_integrates_to_one_and_is_that_of_the_draws(name: str) -> None:
    posterior = guide_of(name, "full-rank").posterior(normal(1, 4))
    points = 91 if "Neural" in name else 201  # bisection takes time, and has no kinks
    with torch.no_grad():
        assert (integral(posterior, 9.0, points) - 1).abs().max() < 1e-3
    assert moments_agree(posterior, half_width=9.0, points=points)


@every
@pytest.mark.parametrize("base", ["mean-field", "full-rank"])
def test_gradients_reach_all_parameters(name: str, base: str) -> None:
    assert gradients_reach_every_parameter(guide_of(name, base), normal(5, 4)) == []


def test_a_full_rank_base_is_correlated() -> None:
    guide = guide_of("Planar", "full-rank")
    nn.init.normal_(guide.head.bias)
    base = guide.posterior(normal(3, 4)).base_dist
    assert (base.covariance_matrix[:, 0, 1].abs() > 1e-2).all()


@pytest.mark.parametrize("c", [None, 0])
def test_a_flow_without_context_is_the_same_for_all_data(c: int | None) -> None:
    guide = FlowGuide(MLP(4, hidden=3), AffineCoupling(2, c)).double()
    assert guide.head.out_features == 4
    assert gradients_reach_every_parameter(guide, normal(5, 4)) == []


def test_particles_share_one_run_of_the_encoder() -> None:
    rows = []
    guide = guide_of("InverseAutoregressive")
    guide.encoder.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with pyro.plate("particles", 7, dim=-2):
        assert guide(normal(4, 4)).shape == (7, 4, 2)
    assert rows == [4]


# Estimators


@every
def test_log_weights_of_particles_score_the_draws_they_made(name: str) -> None:
    weights = log_weights(model(), guide_of(name), bits(), num_particles=3)
    assert weights.shape == (3, 6)
    assert weights.isfinite().all()


@pytest.fixture
def plain_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    yield
    torch._dynamo.reset()


def run(engine: type[SVI], name: str, elbo: Any) -> list[Any]:
    torch.manual_seed(0)
    decoder, guide, x = model(), guide_of(name), bits()
    svi = engine(decoder, guide, lambda p: torch.optim.Adam(p, lr=1e-2), elbo)
    torch.manual_seed(3)
    losses = [svi.step(x) for _ in range(4)]
    return [*losses, *decoder.state_dict().values(), *guide.state_dict().values()]


@every
@pytest.mark.usefixtures("plain_operators")
def test_compiled_steps_are_plain_ones(name: str) -> None:
    for one, two in zip(run(SVI, name, IWAE(2)), run(CompiledSVI, name, IWAE(2)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["InverseAutoregressive", "Planar"])
@pytest.mark.usefixtures("plain_operators")
def test_compiled_steps_of_pyros_elbo(name: str) -> None:
    for one, two in zip(run(SVI, name, Trace_ELBO()), run(CompiledSVI, name, Trace_ELBO()), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["InverseAutoregressive", "AffineCoupling"])
@pytest.mark.parametrize("estimator", [STL_ELBO, DReG])
@pytest.mark.usefixtures("plain_operators")
def test_compiled_steps_of_path_gradients(name: str, estimator: Any) -> None:
    found = run(SVI, name, estimator(2)), run(CompiledSVI, name, estimator(2))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@every
def test_kl_elbo_and_pyros_estimators_agree(name: str) -> None:
    pair, x = (model(), guide_of(name)), bits()
    losses = []
    for elbo in (KL_ELBO(), Trace_ELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(1)
        losses.append(SVI(*pair, torch.optim.SGD, elbo).evaluate_loss(x))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


@pytest.mark.parametrize("name", INVERTIBLE)
def test_path_gradients_hold_the_parameters_of_log_q_constant(name: str) -> None:
    decoder, guide, x = model(), guide_of(name), bits(3)
    torch.manual_seed(2)
    STL_ELBO(2).differentiable_loss(decoder, guide, x).backward()
    found = [p.grad for p in guide.parameters()]
    guide.zero_grad()
    constant = copy.deepcopy(guide).requires_grad_(False)
    torch.manual_seed(2)
    z = guide.posterior(x).rsample((2,))
    likelihood, prior = decoder.likelihood(z).log_prob(x), decoder.prior().log_prob(z)
    loss = (constant.posterior(x).log_prob(z) - likelihood - prior).sum() / 2
    loss.backward()
    for one, parameter in zip(found, guide.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-7, atol=1e-9)


def surrogates(estimator: str, decoder: VAE, guide: FlowGuide, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return an estimator's loss for four draws, and what has the loss's gradient, by hand."""
    posterior = guide.posterior(x)
    z = posterior.rsample((4,))
    constant, fixed = (copy.deepcopy(module).requires_grad_(False) for module in (guide, decoder))

    def joint(model: VAE, z: Tensor) -> Tensor:
        result: Tensor = model.likelihood(z).log_prob(x) + model.prior().log_prob(z)
        return result

    log_w = joint(decoder, z) - posterior.log_prob(z)
    shares = log_w.detach().softmax(0)
    bound = log_w.logsumexp(0) - math.log(len(z))
    if estimator in ("Trace_ELBO", "KL_ELBO", "IWAE"):
        value = gradient = bound if estimator == "IWAE" else log_w.mean(0)
    elif estimator == "WakeSleep":
        log_q = guide.posterior(x).log_prob(z.detach())
        value, gradient = bound, (shares * (joint(decoder, z.detach()) + log_q)).sum(0)
    else:
        path = joint(fixed, z) - constant.posterior(x).log_prob(z)
        if estimator == "STL_ELBO":
            value, gradient = log_w.mean(0), (path + joint(decoder, z.detach())).mean(0)
        else:
            value = bound
            gradient = (shares.square() * path + shares * joint(decoder, z.detach())).sum(0)
    return -value.sum(), -gradient.sum()


SCORED_AGAIN: dict[str, Any] = {"STL_ELBO": STL_ELBO, "DReG": DReG, "WakeSleep": WakeSleep}
SIX: dict[str, Any] = {
    "Trace_ELBO": lambda k: Trace_ELBO(k, max_plate_nesting=1, vectorize_particles=True),
    "IWAE": IWAE,
    "KL_ELBO": KL_ELBO,
    **SCORED_AGAIN,
}


@every
@pytest.mark.parametrize("estimator", SIX)
def test_each_estimator_gives_its_loss_and_gradient_or_says_which_do(name: str, estimator: str) -> None:
    decoder, guide, x = model(), guide_of(name), bits(3)
    elbo = SIX[estimator](4)
    if name in ONE_WAY and estimator in SCORED_AGAIN:
        message = rf"^{name.split('-')[0]}: expected the last value .* use Trace_ELBO, KL_ELBO, IWAE"
        with pytest.raises(ValueError, match=message):
            elbo.differentiable_loss(decoder, guide, x)
        return
    parameters = [*decoder.parameters(), *guide.parameters()]
    torch.manual_seed(2)
    loss = elbo.differentiable_loss(decoder, guide, x)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    torch.manual_seed(2)
    value, gradient = surrogates(estimator, decoder, guide, x)
    tolerance = 1e-3 if name == "Continuous" else 1e-9  # four steps of its solver, there and back
    torch.testing.assert_close(loss, value, rtol=tolerance, atol=tolerance)
    expected = torch.autograd.grad(gradient, parameters, allow_unused=True, materialize_grads=True)
    assert all(g.any() for g in expected)
    torch.testing.assert_close(found, expected, rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize("sticks", [IWAE(2, stick_the_landing=True), WakeSleep(2, dreg=True)])
def test_other_estimators_that_score_draws_again_say_so(sticks: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^Radial: expected the last value .*DReG, stick_the_landing and Wake"
    ):
        sticks.differentiable_loss(model(), guide_of("Radial"), bits())


# Arguments


def test_kl_to_the_prior_is_estimated() -> None:
    guide = guide_of("Planar")
    with pytest.raises(NotImplementedError):
        torch.distributions.kl_divergence(guide.posterior(normal(1, 4)), StandardNormal(2).double()())


def test_log_scale_is_clamped() -> None:
    guide = FlowGuide(MLP(4, hidden=3), Planar(2))
    nn.init.constant_(guide.head.bias, 100.0)
    scale = guide.posterior(torch.zeros(1, 4)).base_dist.stddev
    torch.testing.assert_close(scale, torch.full((1, 2), math.exp(7.0)))


def test_near_the_mean_field_guide_at_the_start() -> None:
    torch.manual_seed(0)
    guide = FlowGuide(MLP(4), Planar(2, 3))
    mean_field = MeanFieldGuide(guide.encoder, 2)
    with torch.no_grad():
        mean_field.head.weight.copy_(guide.head.weight[:4])
        mean_field.head.bias.copy_(guide.head.bias[:4])
    x, posterior = torch.randn(5, 4), guide.posterior(torch.randn(5, 4))
    posterior, other = guide.posterior(x), mean_field.posterior(x)
    z = posterior.rsample((200,))
    assert (posterior.log_prob(z) - other.log_prob(z)).abs().mean() < 0.2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FlowGuide(MLP(4), nn.Linear(2, 2)), TypeError, "^flow: expected a module .* got Linear$"),
        (lambda: FlowGuide(MLP(4), "planar"), TypeError, "^flow: expected a module .* got str$"),
        (
            lambda: FlowGuide(MLP(4), Planar(2), base="full"),
            ValueError,
            "^base: unknown 'full' .*'full-rank'",
        ),
        (lambda: FlowGuide(nn.Tanh(), Planar(2)), TypeError, "^features: expected the number of features"),
        (lambda: FlowGuide(MLP(4), Planar(2), features=0), ValueError, "^features: expected a whole number"),
    ],
)
def test_wrong_arguments(make: Callable[[], FlowGuide], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_encoder_with_another_number_of_features_than_told() -> None:
    x = torch.zeros(5, 4)
    message = r"^features: expected \[n, 7\] from Linear, as its `out_features` or .* got \[5, 3\]$"
    for guide in (
        FlowGuide(nn.Linear(4, 3), Planar(2), features=7),
        MeanFieldGuide(nn.Linear(4, 3), 2, features=7),
    ):
        for run in (guide.posterior, guide):
            with pytest.raises(ValueError, match=message):
                run(x)
    encoder = nn.Linear(4, 3)
    encoder.out_features = 2
    with pytest.raises(ValueError, match=r"^features: expected \[n, 2\] from Linear.* got \[5, 3\]$"):
        log_weights(VAE(StandardNormal(2), Bernoulli(MLP(2, 4))), FlowGuide(encoder, Planar(2)), x)


@pytest.mark.parametrize("name", flows.__all__)
def test_a_saved_run_is_loaded(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, 4)))
    guide = FlowGuide(MLP(4, hidden=3), getattr(flows, name)(2, 3))
    x = torch.rand(6, 4).round()
    fit(model, guide, x, epochs=1, progress=False, output=tmp_path / "run")
    loaded = load_run(tmp_path / "run").guide
    torch.manual_seed(1)
    z = guide.posterior(x).sample()
    torch.manual_seed(1)
    torch.testing.assert_close(loaded.posterior(x).sample(), z)
