"""Tests of the guide that refines an amortised one's answers."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae.distributions import VonMisesFisher
from ppl_vae.evaluation import evaluate
from ppl_vae.guides import HypersphericalGuide, MeanFieldGuide, MixtureGuide
from ppl_vae.guides.amortized import AmortizedGuide
from ppl_vae.guides.local import LocalGuide
from ppl_vae.guides.model_based import log_joint
from ppl_vae.guides.semi_amortized import SemiAmortizedGuide
from ppl_vae.infer import IWAE, KL_ELBO, STL_ELBO, SVI, CompiledSVI, DReG, WakeSleep, log_weights, tracing
from ppl_vae.likelihoods import Normal
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.models.indexed import IndexedModel
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.training import fit, fit_many, load_run


def pair(**options: Any) -> tuple[LinearGaussian, SemiAmortizedGuide, Tensor]:
    torch.manual_seed(0)
    model = LinearGaussian(2, 4).double()
    guide = SemiAmortizedGuide(
        MeanFieldGuide(MLP(4, hidden=5), 2), model, **{"differentiable": True, **options}
    ).double()
    return model, guide, model(None, size=6).detach()


def exact_kl(model: LinearGaussian, posterior: Any, x: Tensor) -> Tensor:
    exact = model.posterior(x)
    normal = dist.MultivariateNormal(posterior.mean, posterior.variance.diag_embed())
    return torch.distributions.kl_divergence(normal, exact)


# The steps


def test_a_step_goes_up_the_elbo() -> None:
    # Adam's first step is the sign of the gradient, whose closed form is known.
    model, guide, x = pair(steps=1, step_size=0.1, num_particles=20_000)
    outputs = guide.guide.encode(x).detach().requires_grad_()
    moved = guide.refine(outputs, x) - outputs
    (expected,) = torch.autograd.grad(-exact_kl(model, guide.guide.family(outputs), x).sum(), outputs)
    assert expected.abs().min() > 0.02  # far from what the draws may change
    torch.testing.assert_close(moved, 0.1 * expected.sign())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_steps_do_not_depend_on_the_scale_of_the_elbo(scale: float) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 6, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), scale).to_event(1), obs=x[:, :1])

    _, guide, x = pair(steps=4, step_size=0.1)
    guide.model = model
    outputs = guide.guide.encode(x)
    change = (guide.refine(outputs, x) - outputs).abs()
    assert 0.01 < change.max() < 4 * 0.1


def test_steps_lower_the_kl_of_every_datum() -> None:
    model, guide, x = pair(steps=40, step_size=0.2, num_particles=50)
    before = exact_kl(model, guide.guide.posterior(x), x)
    after = exact_kl(model, guide.posterior(x), x)
    assert (after < before).all()
    assert after.sum() < 0.1 * before.sum()


def test_each_datum_is_refined_apart() -> None:
    _, guide, x = pair(steps=3)

    def means(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return guide.posterior(x).mean

    jacobian = torch.autograd.functional.jacobian(means, x)  # [n, latent, n, data]
    reached = jacobian.abs().sum((1, 3))
    assert (reached.diagonal() > 0).all()
    assert torch.equal(reached, reached.diagonal().diag())


def test_refines_without_gradients_too() -> None:
    results = []
    for grad in (True, False):
        _, guide, x = pair()
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            results.append(guide.posterior(x).mean)
        assert results[-1].requires_grad is grad
    torch.testing.assert_close(*results)


# Gradients


@pytest.mark.parametrize("through", [True, False])
def test_gradient_of_the_steps(through: bool) -> None:
    model, guide, x = pair(differentiable=through)
    guide.posterior(x).mean.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in guide.guide.encoder.parameters())
    assert (model.weight.grad is not None) is through


def test_detached_steps_add_a_constant() -> None:
    _, guide, x = pair(differentiable=False)
    jacobian = torch.autograd.functional.jacobian(lambda o: guide.refine(o, x), guide.guide.encode(x))
    torch.testing.assert_close(jacobian.reshape(24, 24), torch.eye(24).double())


def test_differentiable_steps_have_the_derivative_of_finite_differences() -> None:
    _, guide, x = pair(steps=2)
    outputs = guide.guide.encode(x[:1]).detach()

    def refine(outputs: Tensor) -> Tensor:
        torch.manual_seed(1)
        return guide.refine(outputs, x[:1])

    assert torch.autograd.gradcheck(refine, (outputs.requires_grad_(),))


@pytest.mark.parametrize("frozen", ["model", "guide"])
def test_a_frozen_half(frozen: str) -> None:
    model, guide, x = pair()
    half = {"model": model, "guide": guide}[frozen].requires_grad_(False).eval()
    SVI(model, guide, torch.optim.Adam, KL_ELBO()).step(x)
    other = guide if half is model else model
    assert all(p.grad is None for p in half.parameters())
    assert all(p.grad is not None for p in other.parameters())


class OfMixture(MeanFieldGuide):
    """A guide whose draws' second derivatives are wrong, below another distribution."""

    def family(self, outputs: Tensor) -> Any:
        mixture = MixtureGuide.family(MixtureGuide(MLP(4), 2, 1), outputs)
        flip = dist.transforms.AffineTransform(0.0, -1.0, event_dim=1)
        return dist.TransformedDistribution(mixture, [flip])


class OnSphere(HypersphericalGuide):
    """A guide on the sphere, with a family."""

    def family(self, outputs: Tensor) -> Any:
        return VonMisesFisher(nn.functional.normalize(outputs[..., :-1], dim=-1), outputs[..., -1].exp())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: MixtureGuide(MLP(4), 2, 3), "NormalMixture"),
        (lambda: OfMixture(MLP(4), 2), "NormalMixture"),
        (lambda: OnSphere(MLP(4), 2), "VonMisesFisher"),
    ],
)
def test_draws_without_second_derivatives_are_not_differentiated_twice(make: Any, name: str) -> None:
    model = LinearGaussian(2, 4)
    message = (
        rf"^guide: expected draws with second derivatives, since differentiable=True, got .* of {name}, "
    )
    with pytest.raises(ValueError, match=message):
        SemiAmortizedGuide(make(), model, differentiable=True)
    guide = SemiAmortizedGuide(make(), model)
    assert guide(torch.zeros(3, 4)).isfinite().all()
    guide.differentiable = True
    with pytest.raises(ValueError, match=message):
        guide(torch.zeros(3, 4))


def test_a_mixture_is_refined_by_constant_steps() -> None:
    model, _, x = pair()
    mixture = MixtureGuide(MLP(4, hidden=5), 2, 3, weights="network").double()
    refined = SemiAmortizedGuide(mixture, model, steps=20, step_size=0.2, num_particles=50)
    with torch.no_grad():
        one, two = (log_weights(model, g, x, num_particles=1000) for g in (mixture, refined))
    error = ((one.var(0) + two.var(0)) / 1000).sqrt()
    assert ((two.mean(0) - one.mean(0)) > 4 * error).all()


# The KL weight


@pytest.mark.parametrize("weight", [0.5, 4.0])
def test_steps_reach_the_best_posterior_of_the_weighted_elbo(weight: float) -> None:
    # That of a prior of precision w and a likelihood of precision 1, tempered by 1 / w.
    model, guide, x = pair(kl_weight=weight, differentiable=False, steps=300, step_size=0.2, num_particles=50)
    w = model.weight.detach()
    precision = w.T @ w / weight + torch.eye(2).double()
    mean = x @ w @ torch.linalg.inv(precision).T / weight
    refined = guide.posterior(x)
    torch.testing.assert_close(refined.mean, mean, rtol=0, atol=0.1)
    torch.testing.assert_close(
        refined.variance, precision.diagonal().reciprocal().expand(6, 2), rtol=0.1, atol=0
    )


# The program


@pytest.mark.parametrize(
    "elbo",
    [KL_ELBO(2), IWAE(3), STL_ELBO(2), DReG(3), Trace_ELBO(), Trace_ELBO(2, 1, vectorize_particles=True)],
)
def test_estimators(elbo: Any) -> None:
    model, guide, x = pair()
    elbo.loss_and_grads(model, guide, x)
    assert all(p.grad is not None and p.grad.any() for p in (*model.parameters(), *guide.parameters()))


def test_particles_share_one_refined_posterior() -> None:
    model, guide, x = pair()
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    assert {name for name in trace.stochastic_nodes if name not in ("data", "particles")} == {"z"}
    assert trace.nodes["z"]["value"].shape == (4, 6, 2)
    assert trace.nodes["z"]["fn"].base_dist.loc.unique(dim=0).shape[0] == 1
    assert log_weights(model, guide, x, num_particles=5).shape == (5, 6)


def test_weights_are_those_of_p_of_x() -> None:
    model, guide, x = pair(steps=20, num_particles=20)
    ratio = (log_weights(model, guide, x, num_particles=20_000) - model.log_prob(x)).exp().detach()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / 20_000**0.5).all()


@pytest.mark.parametrize("through", [True, False])
def test_compiled_steps_are_plain_steps(through: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    found = []
    for engine in (SVI, CompiledSVI):
        model, guide, x = pair(steps=2, differentiable=through)
        svi = engine(model, guide, torch.optim.Adam, IWAE(2))
        torch.manual_seed(1)
        losses = [svi.step(x), svi.step(x + 1)]
        found.append([torch.stack(losses), *(p.detach() for p in (*model.parameters(), *guide.parameters()))])
    torch.testing.assert_close(*found)


def test_log_joint_in_the_middle_of_a_run() -> None:
    model, _, x = pair()
    z = torch.randn(3, 6, 2).double()
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    expected = expected + dist.Normal(z @ model.weight.T + model.bias, 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(log_joint(model, z, (x,)), expected)
    with poutine.trace() as trace, pyro.plate("other", 3, dim=-2), pyro.plate("data", 6, dim=-1):
        torch.testing.assert_close(log_joint(model, z, (x,)), expected)
        assert pyro.sample("after", dist.Normal(0.0, 1.0)).shape == (3, 6)
    assert list(trace.trace.stochastic_nodes) == ["other", "data", "after"]


def test_log_joint_keeps_masks() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            with poutine.mask(mask=torch.tensor([True, False])):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    found = log_joint(model, torch.zeros(2, 1), (torch.zeros(2, 1),))
    one = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    torch.testing.assert_close(found, torch.stack([2 * one, one]))


# What it is for


def test_closes_half_of_the_amortisation_gap_in_ten_steps() -> None:
    # A decoder that bends, and an encoder that is no more than linear.
    torch.manual_seed(0)
    model = VAE(StandardNormal(2), Normal(MLP(2, 6, hidden=8), scale=0.3))
    nn.init.normal_(list(model.likelihood.decoder.parameters())[-2])
    x = model(None, size=200).detach()
    weak = MeanFieldGuide(nn.Linear(6, 4), 2)
    fit(model, weak, x, elbo=KL_ELBO(2), epochs=100, learning_rate=1e-2, progress=False)
    model.requires_grad_(False).eval()
    local = LocalGuide(200, 2)
    local.start_at(weak.encode(x))
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=150)
    data = x, torch.arange(200)
    fit(IndexedModel(model), local, data, elbo=KL_ELBO(8), batch_size=200, epochs=150, learning_rate=0.05,
        scheduler=schedule, progress=False)  # fmt: skip
    measure = partial(evaluate, num_particles=300, progress=False)
    amortised = measure(model, weak, x).elbo
    best = measure(IndexedModel(model), local, data).elbo
    refined = measure(model, SemiAmortizedGuide(weak, model, steps=10, num_particles=8), x).elbo
    gap = best.mean - amortised.mean
    error = (amortised.monte_carlo_error**2 + best.monte_carlo_error**2) ** 0.5
    assert gap > 20 * error
    assert 0.5 < (refined.mean - amortised.mean) / gap < 1


def test_members_of_fit_many_refine_with_their_own_model() -> None:
    # At a rate of almost 0, the epoch's ELBO is one draw per datum of the pair as it was made.
    def make() -> tuple[LinearGaussian, SemiAmortizedGuide]:
        model = LinearGaussian(2, 4)
        return model, SemiAmortizedGuide(MeanFieldGuide(MLP(4, hidden=5), 2), model, steps=8)

    n = 4000
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    runs = fit_many(make, x, seeds=(0, 1), epochs=1, learning_rate=1e-9, batch_size=n, progress=False)
    torch.manual_seed(0)
    for run in runs:
        assert isinstance(run.guide, SemiAmortizedGuide)
        assert run.guide.model is run.model
        with torch.no_grad():
            weights = log_weights(run.model, run.guide, x)
        error = weights.std().item() * (2 / n) ** 0.5  # of the difference of two estimates
        assert abs(weights.mean().item() - run.history[0]["train_elbo"]) < 4 * error


# State


def test_the_model_is_no_part_of_the_guide() -> None:
    model, guide, _ = pair()
    name = model._pyro_name
    assert {key.split(".")[0] for key in guide.state_dict()} == {"guide"}
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in model.parameters()}
    guide.eval()
    assert model.training
    assert model._pyro_name == name
    both = copy.deepcopy((model, guide))
    assert both[1].model is both[0]
    guide.model = both[0]
    assert guide.model is both[0]
    assert "model" not in dict(guide.named_children())


def test_fit_saves_and_loads(tmp_path: Path) -> None:
    model, guide, x = pair(steps=2)
    run = fit(model, guide, x, epochs=2, output=tmp_path / "run", progress=False)
    assert "model" not in {part for key in run.guide.state_dict() for part in key.split(".")}
    other = LinearGaussian(2, 4).double()
    empty = SemiAmortizedGuide(
        MeanFieldGuide(MLP(4, hidden=5), 2).double(), other, steps=2, differentiable=True
    )
    loaded = load_run(tmp_path / "run", model=other, guide=empty)
    results = []
    for program in (run, loaded):
        torch.manual_seed(1)
        results.append(log_weights(program.model, program.guide, x, num_particles=3))
    assert torch.equal(*results)


def test_a_loaded_guide_refines_with_the_loaded_model(tmp_path: Path) -> None:
    model, guide, x = pair(steps=2)
    run = fit(model, guide, x, epochs=2, output=tmp_path / "run", progress=False)
    loaded = load_run(tmp_path / "run")
    assert isinstance(loaded.guide, SemiAmortizedGuide)
    assert loaded.guide.model is loaded.model
    results = []
    for program in (run, loaded):
        torch.manual_seed(1)
        results.append(log_weights(program.model, program.guide, x, num_particles=3))
    assert torch.equal(*results)


def test_resumed_training_is_uninterrupted_training(tmp_path: Path) -> None:
    ends = []
    for folder, epochs in (("whole", (4,)), ("parts", (2, 4))):
        for end in epochs:
            model, guide, x = pair(steps=2)
            fit(model, guide, x, epochs=end, output=tmp_path / folder, resume=True, progress=False)
        ends.append([p.detach() for p in (*model.parameters(), *guide.parameters())])
    assert all(map(torch.equal, *ends))


# Errors


def test_another_model_than_the_guides() -> None:
    model, guide, x = pair()
    other = copy.deepcopy(model)
    message = (
        "^guide: expected a SemiAmortizedGuide of the model that it is run with, got one of another "
        "LinearGaussian; set its `model`$"
    )
    for run in (
        lambda: SVI(other, guide, torch.optim.Adam, KL_ELBO()).step(x),
        lambda: evaluate(other, guide, x, progress=False),
        lambda: fit(other, guide, x, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    guide.model = other
    assert log_weights(other, guide, x).shape == (1, 6)


class WithoutFamily(AmortizedGuide):
    """A guide of the user's that overrides `posterior` alone."""

    def __init__(self) -> None:
        super().__init__(MLP(4), 2, 4, None)


@pytest.mark.parametrize("guide", [LocalGuide(3, 2), WithoutFamily(), MLP(4)], ids=lambda g: type(g).__name__)
def test_guides_that_have_no_family(guide: nn.Module) -> None:
    message = f"^guide: expected an amortised guide whose `family` .*, got {type(guide).__name__}$"
    with pytest.raises(TypeError, match=message):
        SemiAmortizedGuide(guide, LinearGaussian(2, 4))


def test_model_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"^model: expected a module or a function, got 3$"):
        SemiAmortizedGuide(MeanFieldGuide(MLP(4), 2), 3)


class Discrete(MeanFieldGuide):
    """A guide whose draws have no gradient."""

    def family(self, outputs: Tensor) -> Any:
        return dist.Bernoulli(logits=outputs[:, :2]).to_event(1)


def test_posterior_that_is_not_reparameterised() -> None:
    guide = SemiAmortizedGuide(Discrete(MLP(4), 2), LinearGaussian(2, 4))
    with pytest.raises(ValueError, match=r"^guide: expected a reparameterised .*, got Independent$"):
        guide.posterior(torch.zeros(3, 4))


def two_sites(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        w = pyro.sample("w", dist.Normal(z, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)


def no_z(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", dist.Normal(x.new_zeros(2), 1.0).to_event(1), obs=x)


def no_data(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (two_sites, r"one latent site 'z', found \['w'\]"),
        (no_z, "one latent site 'z', found none"),
        (no_data, r"an observed site \(`obs=x`\), found none"),
    ],
)
def test_models_that_it_can_not_score(model: Any, message: str) -> None:
    guide = SemiAmortizedGuide(MeanFieldGuide(MLP(2), 2), model)
    with pytest.raises(ValueError, match=f"^model: expected {message}$"):
        guide.posterior(torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("step_size", 0.0),
        ("num_particles", 0),
        ("step_size", "0.1"),
        ("kl_weight", "1"),
    ],
)
def test_wrong_arguments(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected a "):
        pair(**{name: value})


def test_negative_kl_weight() -> None:
    with pytest.raises(ValueError, match=r"^kl_weight: expected a finite number from 0, got -1\.0$"):
        pair(kl_weight=-1.0)


def test_wake_sleep_refuses_gradients_through_the_model() -> None:
    model, guide, x = pair(steps=2, differentiable=True)
    with pytest.raises(ValueError, match=r"^guide: .*SemiAmortizedGuide, .* differentiable=False"):
        WakeSleep(3).loss_and_grads(model, guide, x)
    model, guide, x = pair(steps=2, differentiable=False)
    assert WakeSleep(3).loss_and_grads(model, guide, x).isfinite()
