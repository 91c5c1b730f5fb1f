"""The sweep of KL weights: against single runs of training, and for programs that vmap can't run."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae import evaluate
from ppl_vae.data import Split
from ppl_vae.evaluation.rate_distortion import rate_distortion
from ppl_vae.guides import HierarchicalGuide, MeanFieldGuide
from ppl_vae.infer import IWAE, KL_ELBO
from ppl_vae.likelihoods import Normal
from ppl_vae.models import HierarchicalVAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import ConditionalNormal, StandardNormal
from ppl_vae.training import fit_many

QUIET: dict[str, Any] = {"progress": False}
SHORT: dict[str, Any] = {"epochs": 3, "batch_size": 50, "learning_rate": 1e-2, "num_particles": 10, **QUIET}


def make() -> tuple[LinearGaussian, MeanFieldGuide]:
    return LinearGaussian(2, 5), MeanFieldGuide(MLP(5, hidden=(8,)), 2)


def rows(n: int = 100, seed: int = 100) -> Tensor:
    torch.manual_seed(0)
    model = LinearGaussian(2, 5, scale=0.5)  # the same for training and test data
    torch.manual_seed(seed)
    return model(None, size=n).detach()


class Branching(MeanFieldGuide):
    """A guide that ``torch.func.vmap`` can't run: it looks at a value."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.head.bias.sum() > 1e9:
            x = x * 2
        return super().forward(x, y)


def make_branching() -> tuple[LinearGaussian, Branching]:
    return LinearGaussian(2, 5), Branching(MLP(5, hidden=(8,)), 2)


def make_functions() -> tuple[Any, Any]:
    decoder, encoder = nn.Linear(2, 5), nn.Linear(5, 4)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def test_the_points_are_those_of_fit_many_and_evaluate() -> None:
    x, test = rows(), rows(40, 7)
    result = rate_distortion(make, x, test, kl_weights=(0.5, 4.0), seed=3, **SHORT)
    assert result.together and list(result.table.index) == [0.5, 4.0]
    training = {name: SHORT[name] for name in ("epochs", "batch_size", "learning_rate", "progress")}
    runs = fit_many(make, x, seeds=(3,), kl_weights=(0.5, 4.0), elbo=KL_ELBO(), **training)
    for run, (weight, row) in zip(runs, result.table.iterrows(), strict=True):
        truth = evaluate(run.model, run.guide, test, num_particles=10, seed=3, **QUIET)
        assert row["elbo"] == pytest.approx(truth.elbo.mean, rel=1e-6)
        assert row["rate"] == pytest.approx(truth.kl["z"].mean, rel=1e-6)
        assert row["rate_se"] == pytest.approx(truth.kl["z"].standard_error, rel=1e-6)
        assert row["distortion"] == pytest.approx(-truth.reconstruction.mean, rel=1e-6)
        assert row["distortion_se"] == pytest.approx(truth.reconstruction.standard_error, rel=1e-6)
        assert row["elbo"] == pytest.approx(-row["rate"] - row["distortion"], rel=1e-6)
        assert run.config["kl_weight"] == weight
    assert [run.config["kl_weight"] for run in result.runs] == [0.5, 4.0]


def test_a_larger_weight_gives_a_smaller_rate_and_a_larger_distortion() -> None:
    settings = SHORT | {"epochs": 15, "learning_rate": 2e-2}
    result = rate_distortion(make, rows(300), rows(200, 7), kl_weights=(8.0, 0.1, 1.0), **settings)
    table = result.table.loc[[0.1, 1.0, 8.0]]
    # the gaps are far above the errors over test data
    for name, sign in (("rate", -1), ("distortion", 1)):
        values, errors = sign * table[name].to_numpy(), table[f"{name}_se"].to_numpy()
        assert bool((values[1:] - values[:-1] > 4 * errors[1:]).all())
    assert table["elbo"].idxmax() == 1.0


@pytest.mark.parametrize("maker", [make_branching, make_functions])
def test_programs_that_cannot_be_trained_together_are_trained_one_by_one(maker: Any) -> None:
    result = rate_distortion(
        maker, rows(), rows(40, 7), kl_weights=(0.1, 10.0), **SHORT | {"epochs": 10, "learning_rate": 3e-2}
    )
    assert not result.together and len(result.runs) == 2
    rate, error = result.table["rate"], result.table["rate_se"]
    assert rate[0.1] - rate[10.0] > 4 * math.hypot(error[0.1], error[10.0])
    again = rate_distortion(
        maker, rows(), rows(40, 7), kl_weights=(10.0,), **SHORT | {"epochs": 10, "learning_rate": 3e-2}
    )
    assert again.table.loc[10.0].tolist() == result.table.loc[10.0].tolist()  # whatever the others


def test_the_rate_of_a_hierarchy_is_the_kl_of_all_layers_and_the_estimator_is_left_alone() -> None:
    def hierarchy() -> tuple[HierarchicalVAE, HierarchicalGuide]:
        layers = [ConditionalNormal(MLP(1, hidden=(4,)), 2)]
        model = HierarchicalVAE(StandardNormal(1), layers, Normal(MLP(2, 5, hidden=(4,))))
        return model, HierarchicalGuide([MLP(5, hidden=(4,)), MLP(2, hidden=(4,))], (2, 1))

    elbo = KL_ELBO(analytic_kl=False)
    result = rate_distortion(hierarchy, rows(), rows(40, 7), kl_weights=(2.0,), elbo=elbo, **SHORT)
    kl = result.evaluations[0].kl
    assert set(kl) == {"z1", "z2"}
    assert result.table["rate"].iloc[0] == pytest.approx(sum(e.mean for e in kl.values()))
    assert elbo.kl_weight == 1.0


def test_text_and_summary_have_a_row_per_weight() -> None:
    result = rate_distortion(make, Split(rows()), Split(rows(40, 7)), kl_weights=(1.0, 2.0), **SHORT)
    summary = result.summary()
    assert [row["kl_weight"] for row in summary["weights"]] == [1.0, 2.0]
    assert summary["weights"][1]["rate"] == result.table["rate"].iloc[1]
    assert (summary["num_data"], summary["num_particles"]) == (40, 10)
    assert f"{result.table['rate'].iloc[1]:.2f} +- " in str(result) and "40 test data" in str(result)


def test_the_random_stream_and_the_parameter_store_are_left_alone() -> None:
    state = torch.get_rng_state()
    x, test = torch.zeros(20, 5), torch.ones(10, 5)
    rate_distortion(make, x, test, kl_weights=(1.0,), **SHORT)
    assert torch.equal(state, torch.get_rng_state())
    assert list(pyro.get_param_store().keys()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kl_weights": ()}, TypeError, "kl_weights: expected a sequence of numbers from 0"),
        ({"kl_weights": 1.0}, TypeError, "kl_weights: expected a sequence"),
        ({"kl_weights": (1.0, -1.0)}, ValueError, r"kl_weights\[1\]: expected"),
        ({"kl_weights": (1.0, 1)}, ValueError, "kl_weights: expected each weight once"),
        ({"elbo": IWAE}, TypeError, "elbo: expected an estimator with a `kl_weight`, .* got IWAE"),
        ({"elbo": Trace_ELBO()}, TypeError, "elbo: expected an estimator .* got Trace_ELBO"),
        ({"make": 3}, TypeError, "make: expected a function"),
        ({"make": lambda: None}, TypeError, "make: expected a function that returns a pair"),
        ({"num_particles": 0}, ValueError, "num_particles: expected"),
        ({"epochs": 0}, ValueError, "epochs: expected"),
        ({"seed": -1}, ValueError, "seed: expected"),
        ({"test": torch.zeros(3, 4)}, ValueError, "expected shape"),
        ({"train": torch.full((3, 5), math.nan)}, ValueError, "data: expected finite x"),
    ],
)
def test_wrong_arguments_are_named_before_any_training(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"make": make, "train": rows(20), "test": rows(10)} | SHORT | arguments
    with pytest.raises(error, match=message):
        rate_distortion(**given)
