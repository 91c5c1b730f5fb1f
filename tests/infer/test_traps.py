"""Traps of Pyro that concern estimators, each with a test that fails if we fall into it.

Where the others are tested:

- 1, parameters that silently don't train: test_svi, test_objective, test_running, test_log_weights.
- 2, the engine as the seam: test_svi, test_objective.
- 3, a KL weight on one side: test_scoring ("KL weight", "Scale of a whole program").
- 4, a plate's scale inside the logarithm: test_scoring ("Subsampling plates"), test_log_weights.
- 5, model and guide that disagree on plates: test_scoring (estimators), test_running, test_svi.
- 6, closed forms that fall back without a word: test_elbo; here, those that are wrong.
- 7, particles as leading dimensions: test_log_weights, test_running.
- 8, one guess of the plates for all pairs: test_objective for Pyro's estimators; here, for ours.
- 9, values frozen by tracing: test_objective and test_schedules; here, a traced loss.
- 10, validation switched off: test_objective.
- 11, parameters made by the first run: test_svi, test_objective.
- 13, flows that can't score: test_scoring ("Guides that are run twice").
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Draws, function_pair, vae_pair
from pyro import poutine
from pyro.infer import ELBO, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import ppl_vae
import ppl_vae.evaluation
import ppl_vae.infer
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import (
    DIP_ELBO,
    IWAE,
    KL_ELBO,
    STL_ELBO,
    TVO,
    VIMCO,
    BetaTC_ELBO,
    DReG,
    EnumELBO,
    LinearWarmup,
    RelaxedELBO,
    ScoreFunctionELBO,
    WakeSleep,
    log_weights,
)
from ppl_vae.infer.estimator import Estimator
from ppl_vae.models import LinearGaussian
from ppl_vae.networks import MLP

Program = Callable[..., Any]
CLOSE: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}


def name_of(value: Any) -> str:
    return type(value).__name__


def gaussian_pair(latent: int = 2, data: int = 3) -> tuple[LinearGaussian, MeanFieldGuide, Tensor]:
    """Return a pair in float64 and data of its model."""
    model = LinearGaussian(latent, data).double()
    guide = MeanFieldGuide(MLP(data, hidden=4), latent).double()
    return model, guide, model(None, size=5).detach()


# Trap 6: a closed form of the KL for a guide that draws its sites in another order than the model.


def normal(loc: Any, scale: float = 1.0) -> Any:
    return dist.Normal(loc, scale).to_event(1)


def ladder_model(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z2 = pyro.sample("z2", normal(x.new_zeros(1)))
        z1 = pyro.sample("z1", normal(z2))
        pyro.sample("x", normal(z1), obs=x)


def ladder_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z1 = pyro.sample("z1", normal(0.6 * x, 0.7))
        pyro.sample("z2", normal(0.5 * z1, 0.6))


def test_trap_6_closed_form_of_a_ladder_is_refused_where_pyro_takes_it() -> None:
    x = torch.randn(10, 1, dtype=torch.float64)
    draws = 2000
    noise = {name: torch.randn(draws, 10, 1, dtype=torch.float64) for name in ("z1", "z2")}
    settings: Any = {"num_particles": draws, "vectorize_particles": True, "max_plate_nesting": 1}
    with pyro.validation_enabled(False), Draws(**noise):
        sampled = KL_ELBO(draws, analytic_kl=False).loss(ladder_model, ladder_guide, x)
        right = Trace_ELBO(**settings).loss(ladder_model, ladder_guide, x)
        wrong = TraceMeanField_ELBO(**settings).loss(ladder_model, ladder_guide, x)
        weights = log_weights(ladder_model, ladder_guide, x, num_particles=draws)
        # its check is part of validation; ours isn't
        with pytest.raises(
            ValueError, match=r"^site 'z1': the closed form of its KL is wrong here: .*\['z2'\]"
        ):
            KL_ELBO(draws).loss(ladder_model, ladder_guide, x)
    assert float(sampled) == pytest.approx(right, rel=1e-11)
    error = float(weights.sum(1).std()) / math.sqrt(draws)
    assert abs(wrong - right) > 10 * error


# Trap 8: the number of plates is guessed once per estimator, by one more run, and kept for the next pair.


@pytest.mark.parametrize(
    "estimator",
    [KL_ELBO(3), STL_ELBO(3), IWAE(3), DReG(3), TVO(3), VIMCO(3), WakeSleep(3), DIP_ELBO(), BetaTC_ELBO(99)],
    ids=name_of,
)
def test_trap_8_one_estimator_serves_several_pairs(estimator: Estimator) -> None:
    pairs = [vae_pair()[:2], gaussian_pair(data=4)[:2], function_pair()[:2]]
    x = torch.randint(2, (5, 4)).double()

    def losses(*order: int) -> dict[int, float]:
        found = {}
        for i in order:
            torch.manual_seed(i)
            found[i] = float(estimator.loss(*pairs[i], x))
        return found

    assert losses(0, 1, 2) == losses(2, 1, 0)
    assert estimator.max_plate_nesting == 1


def test_trap_8_estimators_make_no_run_but_their_own() -> None:
    model, guide, x = gaussian_pair()
    calls = []

    def counting(*batch: Tensor) -> Any:
        calls.append(1)
        return guide(*batch)

    KL_ELBO(4).loss(model, counting, x)
    assert len(calls) == 1


def test_trap_8_no_estimator_is_a_default_argument() -> None:
    # it would be shared by all callers, with what it has noted of the first one's pair
    checked = 0
    for module in (ppl_vae, ppl_vae.infer, ppl_vae.evaluation):
        for name in module.__all__:
            if callable(call := getattr(module, name)):
                for parameter in inspect.signature(call).parameters.values():
                    assert not isinstance(parameter.default, ELBO), f"{name}({parameter})"
                    checked += 1
    assert checked > 50


# Trap 9: a number that changes during training is frozen when the loss is traced.


@pytest.mark.parametrize(
    "make",
    [
        lambda schedule: KL_ELBO(2, kl_weight=schedule),
        lambda schedule: KL_ELBO(2, capacity=schedule),
        lambda schedule: STL_ELBO(2, kl_weight=schedule),
        lambda schedule: IWAE(3, kl_weight=schedule),
        lambda schedule: VIMCO(3, kl_weight=schedule),
    ],
    ids=["KL", "capacity", "STL", "IWAE", "VIMCO"],
)
def test_trap_9_traced_loss_follows_its_schedule(make: Callable[[Any], Estimator]) -> None:
    estimator = make(LinearWarmup(10, 0.25, 4.0))
    model, guide, x = gaussian_pair()

    def loss_at(step: Tensor, x: Tensor) -> Tensor:
        estimator.step = step
        return estimator.loss(model, guide, x)

    with pyro.validation_enabled(False):  # looks at values
        traced = make_fx(loss_at)(torch.tensor(0), x)
        found = []
        for step in map(torch.tensor, (0, 5, 99)):
            torch.manual_seed(step)
            expected = loss_at(step, x)
            torch.manual_seed(step)
            found.append(traced(step, x))
            torch.testing.assert_close(found[-1], expected, **CLOSE)
    assert len({float(loss.detach()) for loss in found}) == 3


def test_trap_9_traced_gradient_of_a_guide_that_is_run_twice() -> None:
    # that its parameters are constants in the second run is part of the trace
    x = torch.randn(4, 1, dtype=torch.float64)

    def gradient(parameters: Tensor, x: Tensor) -> Tensor:
        parameters = parameters.detach().requires_grad_()

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", normal(parameters[0] * x, 0.5))

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("x", normal(pyro.sample("z", normal(x.new_zeros(1)))), obs=x)

        return torch.autograd.grad(STL_ELBO(2).differentiable_loss(model, guide, x), parameters)[0]

    at, other = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.9], dtype=torch.float64)
    with pyro.validation_enabled(False):
        traced = make_fx(gradient)(at, x)
        for parameters in (at, other):
            torch.manual_seed(1)
            expected = gradient(parameters, x)
            torch.manual_seed(1)
            torch.testing.assert_close(traced(parameters, x), expected, **CLOSE)


# Trap 14: discrete latents.


LOGITS = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64)
LOCS = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)


def discrete_model(x: Tensor) -> Tensor:
    with pyro.plate("data", len(x), dim=-1):
        y = pyro.sample("y", dist.OneHotCategorical(logits=LOGITS))
        pyro.sample("x", dist.Normal(y @ LOCS, 1.0), obs=x)
    return y


def discrete_guide(logits: Tensor) -> Program:
    """Return a guide with logits of its own for each datum."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.OneHotCategorical(logits=logits))

    return guide


def replicas(n: int) -> tuple[Tensor, Tensor]:
    """Return one datum n times and as many logits, so that a run gives n estimates of one gradient."""
    logits = torch.tensor([0.2, 0.4, -0.5], dtype=torch.float64).repeat(n, 1).requires_grad_()
    return torch.full((n,), 0.7, dtype=torch.float64), logits


def gradients(estimator: Any, x: Tensor, logits: Tensor) -> Tensor:
    """Return the gradient of the loss for each datum, ``[n, 3]``."""
    logits.grad = None
    estimator.differentiable_loss(discrete_model, discrete_guide(logits), x).backward()
    assert logits.grad is not None
    return logits.grad


def exact_elbo(logits: Tensor, x: Tensor) -> Tensor:
    """Return the sum over the values of y, ``[n]``."""
    q, p = logits.log_softmax(-1), LOGITS.log_softmax(-1)
    return (q.exp() * (dist.Normal(LOCS, 1.0).log_prob(x.unsqueeze(-1)) + p - q)).sum(-1)


def test_trap_14_enumeration_is_exact_without_marks_on_the_programs() -> None:
    x, logits = replicas(3)
    expected = exact_elbo(logits, x).sum()
    (gradient,) = torch.autograd.grad(-expected, logits)
    torch.testing.assert_close(gradients(EnumELBO(), x, logits), gradient, **CLOSE)
    for k in (1, 4):
        loss = EnumELBO(k).loss(discrete_model, discrete_guide(logits), x)
        assert float(loss) == pytest.approx(-float(expected.detach()), rel=1e-12)
    trace = poutine.trace(discrete_guide(logits)).get_trace(x)
    assert "enumerate" not in trace.nodes["y"]["infer"]


@pytest.mark.parametrize("estimator", [ScoreFunctionELBO(4), RelaxedELBO(4)], ids=name_of)
def test_trap_14_loss_of_discrete_draws_has_the_exact_mean(estimator: Estimator) -> None:
    x, logits = replicas(4000)
    torch.manual_seed(0)
    loss = float(estimator.loss(discrete_model, discrete_guide(logits), x)) / len(x)
    assert estimator.terms is not None
    error = float(estimator.terms.log_weights().std()) / math.sqrt(4 * len(x))
    assert abs(loss + float(exact_elbo(logits, x)[0].detach())) < 4 * error


def test_trap_14_baselines_take_the_noise_out_of_the_score_function() -> None:
    x, logits = replicas(4000)
    (exact,) = torch.autograd.grad(-exact_elbo(logits, x).sum(), logits)
    plain = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    spread = {}
    for estimator in (plain, ScoreFunctionELBO(4)):
        torch.manual_seed(0)
        found = gradients(estimator, x, logits)
        error = found.std(0) / math.sqrt(len(x))
        assert ((found.mean(0) - exact[0]).abs() < 4 * error).all()
        spread[name_of(estimator)] = found.var(0).sum()
    # of 4000 values each: the ratio of variances is known to about 5 %
    assert spread["ScoreFunctionELBO"] < 0.5 * spread["Trace_ELBO"]


def test_trap_14_relaxed_guide_of_a_discrete_model() -> None:
    x, logits = replicas(6)

    def relaxed_guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.RelaxedOneHotCategorical(x.new_tensor(0.5), logits=logits))

    with pytest.raises(ValueError, match="to be within the support"):
        Trace_ELBO().loss(discrete_model, relaxed_guide, x)
    seen = []

    def model(x: Tensor) -> None:
        seen.append(discrete_model(x))

    estimator = RelaxedELBO(temperature=0.5)
    estimator.loss_and_grads(model, discrete_guide(logits), x)
    assert ((seen[0] == 0) | (seen[0] == 1)).all() and (seen[0].sum(-1) == 1).all()
    assert logits.grad is not None and (logits.grad != 0).all()


def test_trap_14_sleep_calls_the_guide_as_everything_else_does() -> None:
    model, guide, x = gaussian_pair()
    theirs = ReweightedWakeSleep(
        num_particles=2, insomnia=0.5, vectorize_particles=True, max_plate_nesting=1, model_has_params=False
    )
    with pytest.raises(TypeError, match="observations"):
        theirs.loss(model, guide, x)
    WakeSleep(2, sleep=0.5).loss_and_grads(model, guide, x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


# Trap 15: evaluation that misleads.


def test_trap_15_importance_weights_are_not_those_of_the_whole_batch() -> None:
    # the weight of a batch is the product of its data's: its bound is looser, the more the larger the batch
    model, guide, x = gaussian_pair()
    noise = torch.randn(8, 5, 2, dtype=torch.float64)
    theirs = ReweightedWakeSleep(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    with Draws(z=noise):
        bound = -IWAE(8).loss(model, guide, x)
        value = -WakeSleep(8).loss(model, guide, x)
        weights = log_weights(model, guide, x, num_particles=8)
        of_batch = weights.sum(1).logsumexp(0) - math.log(8)
        wake_theta = float(theirs.loss(model, guide, x)[0])
    alone = []
    for i in range(5):
        with Draws(z=noise[:, i : i + 1]):
            alone.append(-IWAE(8).loss(model, guide, x[i : i + 1]))
    torch.testing.assert_close(bound, torch.stack(alone).sum(), **CLOSE)
    assert value.isfinite()
    assert -wake_theta == pytest.approx(float(of_batch.detach()), rel=1e-9)
    assert float(of_batch.detach()) < float(bound) - 0.1


def test_trap_15_one_loss_is_one_noisy_estimate_and_terms_say_how_noisy() -> None:
    model, guide, x = gaussian_pair()
    runs, draws = 300, 16
    estimator = IWAE(1)  # of one draw: the ELBO
    losses = []
    for seed in range(runs):
        torch.manual_seed(seed)
        losses.append(estimator.loss(model, guide, x))
    many = KL_ELBO(draws * runs, analytic_kl=False)
    torch.manual_seed(0)
    mean = many.loss(model, guide, x)
    assert many.terms is not None
    spread = many.terms.log_weights().std(0).square().sum().sqrt()
    found = torch.stack(losses)
    # a standard deviation of 300 values that are not far from normal is known to about 1 / sqrt(600)
    assert abs(float(found.std() / spread) - 1) < 0.25
    assert abs(float(found.mean() - mean)) < 4 * float(spread) / math.sqrt(runs)
    torch.manual_seed(0)
    assert float(many.loss(model, guide, x)) == float(mean)
