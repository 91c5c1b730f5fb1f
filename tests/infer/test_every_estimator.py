"""What holds for every estimator of the library, on the library's pair and on plain functions."""

import copy
import inspect
import math
from typing import Any

import pyro
import pytest
import torch
from helpers import ESTIMATORS, PAIRS
from pyro.infer import ELBO
from torch import Tensor

from ppl_vae import fit, infer
from ppl_vae.infer import SVI, CompiledSVI, Estimator, Objective, log_weights, tracing
from ppl_vae.infer.scoring import Scores


def bits(n: int = 6) -> Tensor:
    return torch.bernoulli(torch.full((n, 4), 0.5, dtype=torch.float64))


def test_no_estimator_is_missing_here() -> None:
    public = {name: getattr(infer, name) for name in infer.__all__}
    found = {name for name, made in public.items() if inspect.isclass(made) and issubclass(made, ELBO)}
    assert found - {"Estimator"} == set(ESTIMATORS)  # that is their base


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradients_reach_every_parameter_under_both_engines(name: str, pair: str) -> None:
    model, guide, modules = PAIRS[pair]()
    x, elbo = bits(), ESTIMATORS[name]()
    objective = Objective(model, guide, elbo)
    pyro.set_rng_seed(1)
    loss = objective.loss_and_grads(x)
    gradients = [p.grad for module in modules for p in module.parameters()]
    assert math.isfinite(loss)
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
    # Pyro's engine, the same noise: the same loss
    pyro.set_rng_seed(1)
    stock = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), ESTIMATORS[name]())
    assert stock.step(x) == pytest.approx(float(loss), rel=1e-10)
    assert math.isfinite(stock.evaluate_loss(x))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_lowers_nothing_but_the_parameters(name: str) -> None:
    """Losses of a step and of an evaluation agree on the same noise, and an evaluation takes no gradient."""
    model, guide, modules = PAIRS["VAE"]()
    x, svi = bits(), SVI(model, guide, torch.optim.Adam, ESTIMATORS[name]())
    svi.setup(x)
    before = [p.clone() for module in modules for p in module.parameters()]
    pyro.set_rng_seed(1)
    evaluated = svi.evaluate_loss(x)
    assert all(
        (p == q).all() for p, q in zip(before, (p for m in modules for p in m.parameters()), strict=True)
    )
    pyro.set_rng_seed(1)
    assert float(svi.step(x)) == pytest.approx(float(evaluated), rel=1e-10)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_fit_records_the_true_elbo_and_describes_the_estimator(name: str) -> None:
    model, guide, _ = PAIRS["VAE"]()
    run = fit(
        model,
        guide,
        bits(20),
        validation=bits(10),
        elbo=ESTIMATORS[name](),
        epochs=2,
        batch_size=10,
        progress=False,
    )
    record = run.history[-1]
    assert record["train_elbo"] == pytest.approx(
        record["train_reconstruction"] - record["train_kl_z"], rel=1e-6
    )
    assert record["validation_elbo"] < 0
    assert run.config["elbo"]["class"].endswith(name)
    assert run.config["elbo"]["num_particles"] == ESTIMATORS[name]().num_particles


@pytest.mark.parametrize("name", ESTIMATORS)
def test_copies_are_apart(name: str) -> None:
    model, guide, _ = PAIRS["VAE"]()
    elbo = ESTIMATORS[name]()
    Objective(model, guide, elbo).loss_and_grads(bits())
    other = copy.deepcopy(elbo)
    if hasattr(elbo, "step"):
        assert float(other.step) == float(elbo.step) == 1
        Objective(model, guide, other).loss_and_grads(bits())
        assert float(elbo.step) == 1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_one_datum_is_enough(name: str) -> None:
    if name == "DIP_ELBO":
        pytest.skip("a covariance takes two")
    model, guide, _ = PAIRS["VAE"]()
    assert math.isfinite(Objective(model, guide, ESTIMATORS[name]()).loss_and_grads(bits(1)))


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"EnumELBO"}))
def test_torch_func_takes_the_same_gradient(name: str) -> None:
    model, guide, _ = PAIRS["VAE"]()
    x, objective = bits(), Objective(model, guide, ESTIMATORS[name]())
    objective.setup(x)
    parameters = {k: p.detach() for k, p in objective.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(objective, parameters, (x,))

    pyro.set_rng_seed(1)
    found = torch.func.grad(loss)(parameters)
    pyro.set_rng_seed(1)
    if hasattr(objective.estimator, "step"):
        objective.estimator.step.zero_()
    objective.loss_and_grads(x)
    for k, p in objective.named_parameters():
        torch.testing.assert_close(found[k], p.grad)


class Median(Estimator):
    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        return scores.log_weights(kl_weight).median(0).values


@pytest.mark.parametrize("engine", [SVI, CompiledSVI])
def test_an_estimator_of_ones_own_is_what_its_objective_says(
    engine: type[SVI], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    model, guide, _ = PAIRS["VAE"]()
    x, svi = bits(), engine(model, guide, torch.optim.Adam, Median(5))
    pyro.set_rng_seed(1)
    loss = svi.evaluate_loss(x)
    pyro.set_rng_seed(1)
    expected = log_weights(model, guide, x, num_particles=5).detach().median(0).values.sum()
    assert float(loss) == pytest.approx(-float(expected), rel=1e-10)
    for _ in range(20):
        svi.step(x)
    pyro.set_rng_seed(1)
    assert float(svi.evaluate_loss(x)) < float(loss)  # the same draws, other parameters


def test_an_objective_that_is_no_value_per_datum_is_named() -> None:
    class AllDraws(Estimator):
        def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
            return scores.log_weights(kl_weight)

    class Forgetful(Estimator):
        def objective(self, scores: Scores, kl_weight: Any) -> Any:
            scores.log_weights(kl_weight).mean(0)

    model, guide, _ = PAIRS["VAE"]()
    with pytest.raises(ValueError, match=r"Forgetful\.objective: expected .* \[6\], got NoneType"):
        Forgetful().loss(model, guide, bits())
    message = r"AllDraws\.objective: expected a value per datum, \[6\], got \[3, 6\]"
    with pytest.raises(ValueError, match=message):
        AllDraws(3).loss(model, guide, bits())
