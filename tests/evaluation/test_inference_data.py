"""Tests of the way to ArviZ: names, values against the programs and closed forms, ArviZ's own tools."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from helpers import Stream, function_pair, vae_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.util import get_rng_state
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ppl_vae
from ppl_vae import evaluate
from ppl_vae.data import Split
from ppl_vae.evaluation import inference_data
from ppl_vae.evaluation.inference_data import assemble, for_loo, import_arviz, to_inference_data
from ppl_vae.guides import (
    GaussianMixtureGuide,
    HierarchicalGuide,
    LocalGuide,
    MeanFieldGuide,
    SemiSupervisedGuide,
)
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import CVAE, VAE, GaussianMixtureVAE, HierarchicalVAE, LinearGaussian, SemiSupervisedVAE
from ppl_vae.models.indexed import IndexedModel
from ppl_vae.networks import MLP
from ppl_vae.priors import ConditionalNormal, StandardNormal

az = import_arviz()
matplotlib.use("Agg")
QUIET: dict[str, Any] = {"progress": False}


def linear_model(weight: Tensor | None = None, scale: float = 0.5, seed: int = 0) -> LinearGaussian:
    torch.manual_seed(seed)
    latent_dim = 2 if weight is None else weight.shape[1]
    model = LinearGaussian(latent_dim, 5, scale=scale).double()
    with torch.no_grad():
        model.bias.copy_(torch.arange(5.0))
        if weight is not None:
            model.weight.copy_(weight)
    return model


def linear_data(model: LinearGaussian, n: int = 6) -> Tensor:
    torch.manual_seed(1)
    return model(None, size=n).detach()


def wide_posterior(model: LinearGaussian, spread: float = 1.2) -> Callable[[Tensor], None]:
    """Return the guide that is the exact posterior, widened: weights are bounded, k-hat is small."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), torch.no_grad():
            exact = model.posterior(x)
            covariance = spread**2 * exact.covariance_matrix
            pyro.sample("z", dist.MultivariateNormal(exact.mean, covariance))

    return guide


def image_pair() -> tuple[VAE, MeanFieldGuide]:
    torch.manual_seed(0)
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, (1, 6, 4), hidden=8)))
    return model, MeanFieldGuide(MLP((1, 6, 4), hidden=8), 2)


def image_data(n: int = 5) -> Tensor:
    return torch.bernoulli(torch.full((n, 1, 6, 4), 0.4), generator=torch.Generator().manual_seed(2))


def draws_of(found: Any, name: str, group: str = "posterior") -> Tensor:
    return torch.as_tensor(found[group][name].values)


def replayed(model: Any, guide: Any, latents: dict[str, Tensor], *batch: Tensor) -> dict[str, Tensor]:
    """Return log p and log q of each site at given latents ``[draws, n, ...]``, by plain Pyro."""
    count = len(next(iter(latents.values())))
    result = {}
    for kind, program in (("p", model), ("q", guide)):
        given = poutine.condition(pyro.plate("k", count, dim=-2)(program), data=latents)
        with torch.no_grad(), pyro.get_param_store().scope():
            trace = poutine.trace(given).get_trace(*batch)
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not poutine.util.site_is_subsample(site):
                result[f"{kind}({name})"] = site["log_prob"]
    return result


# -- shapes, names and labels ------------------------------------------------------------------------


@settings(max_examples=8)
@given(n=st.integers(1, 4), num_draws=st.integers(2, 9), some=st.integers(0, 12), prior=st.integers(0, 3))
def test_every_group_has_its_dims_and_sizes(n: int, num_draws: int, some: int, prior: int) -> None:
    found = to_inference_data(
        *image_pair(),
        image_data(n),
        num_draws=num_draws,
        predictive_draws=some,
        prior_draws=prior,
        **QUIET,
    )
    lead, image = {"chain": 1, "draw": num_draws, "datum": n}, {"channel": 1, "height": 6, "width": 4}
    expected = {
        ("posterior", "z"): lead | {"z_dim_0": 2},
        ("log_likelihood", "x"): lead,
        ("log_likelihood", "marginal"): lead,
        ("sample_stats", "lp"): lead,
        ("sample_stats", "log_weight"): lead,
        ("sample_stats", "marginal"): {"datum": n},
        ("sample_stats", "k_hat"): {"datum": n},
        ("observed_data", "x"): {"datum": n} | image,
    }
    if some:
        expected["posterior_predictive", "x"] = lead | {"draw": min(some, num_draws)} | image
    if prior:
        expected["prior", "z"] = lead | {"draw": prior, "z_dim_0": 2}
        expected["prior_predictive", "x"] = lead | {"draw": prior} | image
    got = {(g, name): dict(v.sizes) for g in found.groups() for name, v in found[g].data_vars.items()}
    assert got == expected
    for key, sizes in got.items():  # the order of dims, and numbers as labels
        assert list(sizes) == list(expected[key])
        for dim in sizes:
            if (dim, key[0]) != ("draw", "posterior_predictive"):
                assert found[key[0]][key[1]].coords[dim].values.tolist() == list(range(sizes[dim]))


def test_predictive_draws_are_spread_evenly_and_labelled_as_the_posterior_draws_they_come_from() -> None:
    model = linear_model(scale=0.001)
    x, guide = linear_data(model), wide_posterior(linear_model())
    found = to_inference_data(model, guide, x, num_draws=10, predictive_draws=4, **QUIET)
    assert found.posterior_predictive.coords["draw"].values.tolist() == [0, 2, 5, 7]
    z = torch.as_tensor(found.posterior["z"].sel(draw=found.posterior_predictive["draw"]).values)
    with torch.no_grad():
        mean = z @ model.weight.T + model.bias
    torch.testing.assert_close(
        draws_of(found, "x", "posterior_predictive"), mean, rtol=0, atol=0.006
    )  # 6 scales


def test_dims_and_coords_can_be_named() -> None:
    model = linear_model()
    found = to_inference_data(
        model,
        wide_posterior(model),
        linear_data(model, 3),
        num_draws=5,
        dims={"x": ["gene"], "z": "factor"},
        coords={"datum": ["a", "b", "c"], "gene": torch.arange(5) * 10, "factor": ["u", "v"]},
        **QUIET,
    )
    assert found.posterior["z"].dims == ("chain", "draw", "datum", "factor")
    assert found.prior_predictive["x"].dims == ("chain", "draw", "datum", "gene")
    assert found.observed_data["x"].sel(datum="b", gene=30).item() == linear_data(model, 3)[1, 3]
    z = found.posterior["z"].sel(datum="c", factor="v").values
    np.testing.assert_array_equal(z[0], found.posterior["z"].values[0, :, 2, 1])


def test_attributes_tell_the_library_its_version_whose_draws_and_units() -> None:
    model = linear_model()
    x = linear_data(model)
    found = to_inference_data(model, wide_posterior(model), x, num_draws=5, **QUIET)
    for group in found.groups():
        assert found[group].attrs["inference_library"] == "ppl-vae"
        assert found[group].attrs["inference_library_version"] == ppl_vae.__version__
    assert found.posterior.attrs["draws_of"] == "guide"
    given = {"z": torch.zeros(2, 3, len(x), 2)}
    assert (
        to_inference_data(model, wide_posterior(model), x, reference=given, **QUIET).posterior.attrs[
            "draws_of"
        ]
        == "reference"
    )
    units = {name: v.attrs.get("units") for name, v in found.sample_stats.data_vars.items()}
    assert units == {"lp": "nats", "log_weight": "nats", "marginal": "nats", "k_hat": None}
    assert all(v.attrs["units"] == "nats" for v in found.log_likelihood.data_vars.values())


# -- values: those of the programs -------------------------------------------------------------------


@pytest.mark.parametrize("make", [vae_pair, function_pair], ids=["modules", "functions"])
@pytest.mark.parametrize("pass_memory", [1, 2**29], ids=["many passes", "one pass"])
def test_numbers_at_the_stored_draws_are_those_of_the_programs(
    make: Any, pass_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of draws in the wrong place, or beside the wrong datum, they would not be."""
    monkeypatch.setattr(inference_data, "PASS_MEMORY", pass_memory)
    model, guide, _ = make()
    x = torch.bernoulli(torch.full((5, 4), 0.5, dtype=torch.float64))
    found = to_inference_data(model, guide, x, num_draws=7, prior_draws=0, **QUIET)
    logs = replayed(model, guide, {"z": draws_of(found, "z")[0]}, x)
    np.testing.assert_array_equal(found.observed_data["x"].values, x.numpy())
    for group, name, expected in (
        ("log_likelihood", "x", logs["p(x)"]),
        ("sample_stats", "lp", logs["p(x)"] + logs["p(z)"]),
        ("sample_stats", "log_weight", logs["p(x)"] + logs["p(z)"] - logs["q(z)"]),
    ):
        torch.testing.assert_close(draws_of(found, name, group)[0], expected, rtol=1e-10, atol=1e-10)
    expected = draws_of(found, "log_weight", "sample_stats")[0].logsumexp(0) - math.log(7)
    torch.testing.assert_close(draws_of(found, "marginal", "sample_stats"), expected)


def test_the_linear_gaussian_model_s_numbers_are_its_densities() -> None:
    model = linear_model()
    x = linear_data(model)
    found = to_inference_data(model, wide_posterior(model), x, num_draws=20, **QUIET)
    z = draws_of(found, "z")[0]
    with torch.no_grad():
        residual = x - (z @ model.weight.T + model.bias)
        log_likelihood = (-0.5 * (residual / 0.5) ** 2 - math.log(0.5 * math.sqrt(2 * math.pi))).sum(-1)
        log_prior = -0.5 * z.square().sum(-1) - math.log(2 * math.pi)
        # scale 0.5 comes from its float32 logarithm
        torch.testing.assert_close(
            draws_of(found, "x", "log_likelihood")[0], log_likelihood, rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            draws_of(found, "lp", "sample_stats")[0], log_likelihood + log_prior, rtol=1e-6, atol=1e-6
        )


def test_posterior_predictions_have_the_mean_and_variance_of_the_exact_posterior_s() -> None:
    model = linear_model()
    x = linear_data(model)
    count = 4000
    found = to_inference_data(
        model,
        wide_posterior(model, 1.0),
        x,
        num_draws=count,
        predictive_draws=count,
        prior_draws=0,
        **QUIET,
    )
    drawn = draws_of(found, "x", "posterior_predictive")[0]
    with torch.no_grad():
        exact = model.posterior(x)
        mean = exact.mean @ model.weight.T + model.bias
        covariance = model.weight @ exact.covariance_matrix @ model.weight.T
        variance = covariance.diagonal(dim1=-2, dim2=-1) + 0.25
    # normal draws: the standard errors of mean and variance
    assert bool(((drawn.mean(0) - mean).abs() < 4 * (variance / count).sqrt()).all())
    assert bool(((drawn.var(0) - variance).abs() < 4 * variance * math.sqrt(2 / (count - 1))).all())
    # each belongs to its own draw of z: what the likelihood adds is noise of scale 0.5
    with torch.no_grad():
        noise = drawn - (draws_of(found, "z")[0] @ model.weight.T + model.bias)
    assert float((noise.std() - 0.5).abs()) < 4 * 0.5 / math.sqrt(2 * noise.numel())


def test_the_prior_s_draws_have_its_moments_for_every_datum() -> None:
    model = linear_model()
    count = 4000
    found = to_inference_data(
        model, wide_posterior(model), linear_data(model, 3), num_draws=5, prior_draws=count, **QUIET
    )
    z, x = draws_of(found, "z", "prior")[0], draws_of(found, "x", "prior_predictive")[0]
    with torch.no_grad():
        covariance = model.weight @ model.weight.T + 0.25 * torch.eye(5)
        variance = covariance.diagonal()
    assert float(z.mean(0).abs().max()) < 4 / math.sqrt(count)
    assert bool(((x.mean(0) - torch.arange(5.0)).abs() < 4 * (variance / count).sqrt()).all())
    assert bool(((x.var(0) - variance).abs() < 4 * variance * math.sqrt(2 / (count - 1))).all())
    with torch.no_grad():  # z and x are drawn together
        noise = x - (z @ model.weight.T + model.bias)
    assert float((noise.std() - 0.5).abs()) < 4 * 0.5 / math.sqrt(2 * noise.numel())


def test_the_same_seed_gives_the_same_result_and_another_one_another() -> None:
    model = linear_model()
    x = linear_data(model)
    first, again, other = (
        to_inference_data(model, wide_posterior(model), x, num_draws=6, seed=seed, **QUIET)
        for seed in (3, 3, 4)
    )
    for group in first.groups():
        xarray.testing.assert_identical(first[group], again[group])
    for group, name in (
        ("posterior", "z"),
        ("posterior_predictive", "x"),
        ("prior", "z"),
        ("prior_predictive", "x"),
    ):
        assert not np.isclose(first[group][name].values, other[group][name].values).any()


# -- leave-one-out and comparison --------------------------------------------------------------------


def test_loo_of_the_marginal_is_the_estimate_of_log_p_x_with_the_guide_s_k_hat() -> None:
    model = linear_model()
    x = linear_data(model, 8)
    count = 2000
    found = to_inference_data(model, wide_posterior(model), x, num_draws=count, **QUIET)
    loo = az.loo(found, var_name="marginal", pointwise=True)
    marginal = found.sample_stats["marginal"].values
    np.testing.assert_allclose(loo.loo_i.values, marginal, rtol=1e-9)
    np.testing.assert_allclose(loo.pareto_k.values, found.sample_stats["k_hat"].values, atol=1e-6)
    assert not loo.warning and 0 < loo.p_loo < len(x)
    fewer = az.loo(found, var_name="marginal", pointwise=True, reff=0.3)  # has a longer tail
    np.testing.assert_allclose(fewer.loo_i.values, loo.loo_i.values, rtol=1e-9)
    np.testing.assert_allclose(fewer.pareto_k.values, loo.pareto_k.values, atol=1e-6)
    with torch.no_grad():
        exact = model.log_prob(x)
    weights = draws_of(found, "log_weight", "sample_stats")[0].softmax(0) * count
    error = weights.std(0) / math.sqrt(count)  # the delta method
    assert bool(((torch.as_tensor(marginal) - exact).abs() < 4 * error).all())


def test_loo_of_the_marginal_warns_of_a_guide_that_is_too_narrow() -> None:
    model = linear_model()
    found = to_inference_data(model, wide_posterior(model, 0.3), linear_data(model), num_draws=500, **QUIET)
    with pytest.warns(UserWarning, match="Estimated shape parameter of Pareto"):
        loo = az.loo(found, var_name="marginal", pointwise=True)
    assert float(found.sample_stats["k_hat"].max()) > 0.7
    np.testing.assert_allclose(loo.loo_i.values, found.sample_stats["marginal"].values, rtol=1e-9)


def test_the_marginal_is_what_evaluate_calls_log_likelihood() -> None:
    """Both are means over draws of their own: they differ by Monte Carlo error."""
    model, guide = image_pair()
    x = image_data(20)
    found = to_inference_data(model, guide, x, num_draws=400, **QUIET)
    expected = evaluate(model, guide, x, num_particles=400, **QUIET).log_likelihood
    got = float(found.sample_stats["marginal"].mean())
    assert abs(got - expected.mean) < 4 * math.sqrt(2) * expected.monte_carlo_error


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")  # ArviZ 0.23 beside pandas 3.1
def test_compare_ranks_models_by_their_exact_log_p_x_and_reconstruction_would_not() -> None:
    torch.manual_seed(5)
    weight = torch.randn(5, 4, dtype=torch.float64)
    models = {
        "larger": linear_model(weight, scale=0.25),
        "noisier": linear_model(weight[:, :2], scale=1.5),
        "smaller": linear_model(weight[:, :1]),
        "true": linear_model(weight[:, :2]),
    }
    x = linear_data(models["true"], 40)
    found = {
        name: to_inference_data(model, wide_posterior(model), x, num_draws=1000, prior_draws=0, **QUIET)
        for name, model in models.items()
    }
    with torch.no_grad():
        exact = {name: model.log_prob(x) for name, model in models.items()}
    order = sorted(exact, key=lambda name: -float(exact[name].sum()))
    assert order[0] == "true"
    table = az.compare(found, var_name="marginal")
    assert list(table.index) == order and not table["warning"].any()
    for name in order:
        weights = draws_of(found[name], "log_weight", "sample_stats")[0].softmax(0) * 1000
        error = float((weights.var(0) / 1000).sum().sqrt())
        assert abs(table.loc[name, "elpd_loo"] - float(exact[name].sum())) < 4 * error
        difference = exact["true"] - exact[name]
        assert table.loc[name, "dse"] == pytest.approx(
            math.sqrt(40) * float(difference.std(correction=0)), rel=0.1, abs=1e-9
        )
    reconstruction = {name: float(one.log_likelihood["x"].mean()) for name, one in found.items()}
    assert max(reconstruction, key=lambda name: reconstruction[name]) == "larger"
    conditional = az.loo(found["true"], var_name="x", pointwise=True)
    assert conditional.warning and float(conditional.pareto_k.max()) > 0.7


def test_loo_without_a_name_asks_which_question_is_meant() -> None:
    model = linear_model()
    found = to_inference_data(model, wide_posterior(model), linear_data(model), num_draws=50, **QUIET)
    with pytest.raises(TypeError, match=r"\['x', 'marginal'\], var_name cannot be None"):
        az.loo(found)


def test_weights_that_are_all_equal_are_no_cause_for_a_warning() -> None:
    """The exact posterior is the best of guides; ArviZ would call the shape of equal weights infinite."""
    log_weights = torch.tensor([-3.0, -700.0], dtype=torch.float64).expand(100, 2)
    marginal, k_hat, values = for_loo(log_weights)
    torch.testing.assert_close(marginal, log_weights[0])
    assert bool((k_hat == -math.inf).all())
    loo = az.loo(as_data(values), pointwise=True, reff=1.0)
    np.testing.assert_allclose(loo.loo_i.values, marginal.numpy(), atol=1e-9)
    assert not loo.warning


def test_weights_of_zero_count_as_zero_and_impossible_data_stay_impossible() -> None:
    torch.manual_seed(0)
    log_weights = torch.randn(200, 3, dtype=torch.float64)
    log_weights[::2, 1] = -math.inf
    log_weights[:, 2] = -math.inf
    marginal, k_hat, values = for_loo(log_weights)
    expected = torch.cat([log_weights[:, :1].exp().mean(0), log_weights[::2, 1:2].exp().mean(0) * 0])
    expected[1] = log_weights[1::2, 1].exp().sum() / 200
    torch.testing.assert_close(marginal[:2], expected.log())
    loo = az.loo(as_data(values[:, :2]), pointwise=True, reff=1.0)
    np.testing.assert_allclose(loo.loo_i.values, marginal[:2].numpy(), rtol=1e-9)
    assert marginal[2] == -math.inf and k_hat[2] == math.inf and bool((values[:, 2] == -math.inf).all())


def as_data(values: Tensor) -> Any:
    dims = ("chain", "draw", "datum")
    return az.InferenceData(log_likelihood=xarray.Dataset({"marginal": (dims, values[None].numpy())}))


# -- draws by other means ----------------------------------------------------------------------------


class Reference:
    def __init__(self, draws: dict[str, Tensor]) -> None:
        self.draws = draws


@pytest.mark.parametrize("kind", ["dictionary", "object", "arrays"])
def test_a_reference_s_draws_are_the_posterior_and_the_marginal_stays_the_guide_s(kind: str) -> None:
    model = linear_model()
    x = linear_data(model)
    with torch.no_grad():
        draws = {"z": model.posterior(x).sample((4, 60))}
    given: Any = Reference(draws) if kind == "object" else draws
    if kind == "arrays":
        given = {"z": draws["z"].float().numpy()}  # is taken as the model's own type
    guide = wide_posterior(model)
    found = to_inference_data(model, guide, x, reference=given, predictive_draws=15, **QUIET)
    atol = 1e-6 if kind == "arrays" else 0.0
    torch.testing.assert_close(draws_of(found, "z"), draws["z"], rtol=0, atol=atol)
    assert dict(found.posterior_predictive["x"].sizes) == {"chain": 4, "draw": 15, "datum": 6, "x_dim_0": 5}
    logs = replayed(model, guide, {"z": draws_of(found, "z").flatten(0, 1)}, x)
    torch.testing.assert_close(draws_of(found, "x", "log_likelihood").flatten(0, 1), logs["p(x)"])
    torch.testing.assert_close(
        draws_of(found, "lp", "sample_stats").flatten(0, 1), logs["p(x)"] + logs["p(z)"]
    )
    of_guide = to_inference_data(model, guide, x, num_draws=240, **QUIET)
    for name in ("marginal", "k_hat"):
        xarray.testing.assert_equal(found.sample_stats[name], of_guide.sample_stats[name])
    assert "log_weight" not in found.sample_stats
    summary = az.summary(found, round_to="none")
    assert len(summary) == 12
    # independent draws of 4 chains of 60: the mean of r-hat over 12 is near 1
    assert 0.99 < summary["r_hat"].mean() < 1.03
    exact = model.posterior(x)
    error = (exact.variance / 240).sqrt().detach()
    means = torch.tensor(summary["mean"].to_numpy()).reshape(6, 2)
    assert bool(((means - exact.mean.detach()).abs() < 4 * error).all())


def test_loo_of_the_marginal_beside_a_reference_of_antithetic_chains_is_still_the_guide_s() -> None:
    model = linear_model()
    x = linear_data(model)
    with torch.no_grad():
        posterior = model.posterior(x)
        draws = posterior.sample((4, 60))
    draws = torch.stack([draws, 2 * posterior.mean.detach() - draws], 2).flatten(1, 2)
    found = to_inference_data(model, wide_posterior(model), x, reference={"z": draws}, **QUIET)
    assert float(az.ess(found, method="mean")["z"].mean()) > 2 * 480  # so that a default `reff` is above 1
    loo = az.loo(found, var_name="marginal", pointwise=True, reff=1)
    np.testing.assert_allclose(loo.loo_i.values, found.sample_stats["marginal"].values, rtol=1e-9)
    np.testing.assert_allclose(loo.pareto_k.values, found.sample_stats["k_hat"].values, atol=1e-6)


# -- other programs ----------------------------------------------------------------------------------


def test_a_hierarchy_has_a_variable_for_each_layer_and_replays() -> None:
    torch.manual_seed(0)
    model = HierarchicalVAE(
        StandardNormal(2), [ConditionalNormal(MLP(2, hidden=4), 3)], Normal(MLP(3, 5, hidden=4))
    ).double()
    guide = HierarchicalGuide([MLP(5, hidden=4), MLP(3, hidden=4)], (3, 2)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    found = to_inference_data(model, guide, x, num_draws=6, prior_draws=3, **QUIET)
    assert {name: v.shape for name, v in found.posterior.data_vars.items()} == {
        "z1": (1, 6, 4, 3),
        "z2": (1, 6, 4, 2),
    }
    assert found.posterior["z1"].dims[-1] == "z1_dim_0" and set(found.prior.data_vars) == {"z1", "z2"}
    latents = {name: draws_of(found, name)[0] for name in ("z1", "z2")}
    logs = replayed(model, guide, latents, x)
    expected = logs["p(x)"] + logs["p(z1)"] + logs["p(z2)"] - logs["q(z1)"] - logs["q(z2)"]
    torch.testing.assert_close(draws_of(found, "log_weight", "sample_stats")[0], expected)
    given = {name: value[None] for name, value in latents.items()}
    of_reference = to_inference_data(model, guide, x, reference=given, **QUIET)
    torch.testing.assert_close(
        draws_of(of_reference, "lp", "sample_stats"), draws_of(found, "lp", "sample_stats")
    )


def semi_supervised_pair() -> tuple[SemiSupervisedVAE, SemiSupervisedGuide]:
    torch.manual_seed(0)
    model = SemiSupervisedVAE(StandardNormal(2), Bernoulli(MLP(2, 8, hidden=4, context=3)), 3)
    return model, SemiSupervisedGuide(MLP(8, hidden=4, context=3), MLP(8, 3, hidden=4), 2)


def test_labels_are_constant_data_and_drawn_where_they_are_missing() -> None:
    model, guide = semi_supervised_pair()
    x, y = torch.bernoulli(torch.full((4, 8), 0.5)), torch.tensor([2, -1, 0, -1])
    found = to_inference_data(model, guide, (x, y), num_draws=40, prior_draws=50, **QUIET)
    assert found.constant_data["y"].values.tolist() == [2, -1, 0, -1]
    drawn = found.posterior["y"]
    assert drawn.dims == ("chain", "draw", "datum") and drawn.dtype == np.int64
    assert (drawn.isel(datum=[0, 2]).values == [2, 0]).all()
    assert len(np.unique(drawn.isel(datum=1).values)) > 1
    assert set(found.log_likelihood.data_vars) == {"x", "label", "marginal"}
    np.testing.assert_allclose(
        found.log_likelihood["label"].values[0, 0], [-math.log(3), 0, -math.log(3), 0], rtol=1e-6
    )
    assert set(found.posterior_predictive.data_vars) == {"x"}  # `label` only observes
    latents = {name: draws_of(found, name)[0] for name in ("y", "z")}
    logs = replayed(model, guide, latents, x, y)
    expected = sum(v if k.startswith("p") else -v for k, v in logs.items())
    torch.testing.assert_close(
        draws_of(found, "log_weight", "sample_stats")[0], expected.double(), rtol=1e-5, atol=1e-5
    )
    prior = np.bincount(found.prior["y"].values.ravel(), minlength=3) / 200
    assert np.abs(prior - 1 / 3).max() < 4 * math.sqrt(2 / 9 / 200)


def test_a_conditional_model_draws_its_prior_for_the_labels_that_are_given() -> None:
    torch.manual_seed(0)

    class Context(nn.Module):
        """Gives the label for every datum as the mean of x."""

        context = 10

        def forward(self, z: Tensor, y: Tensor) -> dist.TorchDistribution:
            mean = y.to(z.dtype).unsqueeze(-1).expand(*z.shape[:-1], 5)
            return dist.Normal(mean, 0.01).to_event(1)

    model = CVAE(StandardNormal(2), Context())
    y = torch.tensor([7, 1, 4])
    found = to_inference_data(
        model,
        MeanFieldGuide(MLP(5, context=10), 2),
        (torch.randn(3, 5), y),
        num_draws=6,
        prior_draws=4,
        **QUIET,
    )
    expected = np.broadcast_to([[7.0], [1.0], [4.0]], (1, 4, 3, 5))
    np.testing.assert_allclose(found.prior_predictive["x"].values, expected, atol=0.06)  # 6 scales
    np.testing.assert_allclose(found.posterior_predictive["x"].values[:, :4], expected, atol=0.06)
    assert set(found.log_likelihood.data_vars) == {"x", "marginal"}  # y is given, not observed
    assert set(found.observed_data.data_vars) == {"x"}


def test_discrete_latents_keep_their_type() -> None:
    torch.manual_seed(0)
    model = GaussianMixtureVAE(3, 2, Normal(MLP(2, 5, hidden=4)))
    guide = GaussianMixtureGuide(MLP(5, hidden=4), 2, components=3)
    found = to_inference_data(model, guide, torch.randn(4, 5), num_draws=6, **QUIET)
    assert found.posterior["y"].dtype == np.int64 and found.posterior["y"].shape == (1, 6, 4)
    assert found.prior["y"].shape == (1, 100, 4) and found.posterior["z"].shape == (1, 6, 4, 2)


def test_a_guide_of_one_row_per_datum_gets_the_data_s_numbers() -> None:
    model, guide = linear_model(), LocalGuide(10, 2).double()
    with torch.no_grad():
        guide.rows.weight[:, :2] = torch.arange(10.0)[:, None]
        guide.rows.weight[:, 2:] = -7.0
    x, index = linear_data(model, 3), torch.tensor([8, 2, 5])
    found = to_inference_data(IndexedModel(model), guide, (x, index), num_draws=5, **QUIET)
    expected = np.broadcast_to([[8.0], [2.0], [5.0]], (1, 5, 3, 2))
    np.testing.assert_allclose(found.posterior["z"].values, expected, atol=6 * math.exp(-7))


def test_a_function_without_draws_of_the_prior_works_without_them() -> None:
    model, guide, _ = function_pair()
    x = torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"model: model\(None, size=2\) failed .* prior_draws=0"):
        to_inference_data(model, guide, x, num_draws=5, **QUIET)
    found = to_inference_data(model, guide, x, num_draws=5, prior_draws=0, predictive_draws=0, **QUIET)
    assert set(found.groups()) == {"posterior", "log_likelihood", "sample_stats", "observed_data"}


def test_what_is_computed_or_added_as_a_factor_is_no_data() -> None:
    guide = vae_pair()[1]
    decoder = nn.Linear(2, 4).double()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = pyro.deterministic("logits", decoder(z), event_dim=1)
            pyro.factor("penalty", -z.square().sum(-1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    x = torch.ones(3, 4, dtype=torch.float64)
    found = to_inference_data(model, guide, x, num_draws=5, prior_draws=0, **QUIET)
    assert set(found.log_likelihood.data_vars) == {"x", "marginal"}
    assert set(found.posterior_predictive.data_vars) == set(found.observed_data.data_vars) == {"x"}
    z = draws_of(found, "z")
    weight = draws_of(found, "x", "log_likelihood") - 1.5 * z.square().sum(-1) - math.log(2 * math.pi)
    torch.testing.assert_close(draws_of(found, "lp", "sample_stats"), weight)  # the factor counts


# -- data --------------------------------------------------------------------------------------------


def test_a_dynamic_split_stores_the_bits_that_the_model_saw() -> None:
    model, guide = image_pair()
    split = Split(torch.full((6, 1, 6, 4), 0.5), torch.arange(6), dynamic=True)
    found = to_inference_data(model, guide, split, num_draws=5, **QUIET)
    x = draws_of(found, "x", "observed_data")
    assert sorted(x.unique().tolist()) == [0.0, 1.0]
    logs = replayed(model, guide, {"z": draws_of(found, "z")[0]}, x)
    torch.testing.assert_close(
        draws_of(found, "x", "log_likelihood")[0], logs["p(x)"].double(), rtol=1e-5, atol=0
    )
    assert found.constant_data["y"].values.tolist() == [0, 1, 2, 3, 4, 5]  # the model takes no labels


@pytest.mark.parametrize("kind", ["dataset", "loader", "stream"])
def test_data_may_come_in_batches(kind: str) -> None:
    model = linear_model()
    x = linear_data(model, 7)
    data: Any = TensorDataset(x)
    if kind == "loader":
        data = DataLoader(data, batch_size=3)
    if kind == "stream":
        data = Stream(x, 3)
    whole = to_inference_data(model, wide_posterior(model), x, num_draws=5, **QUIET)
    found = to_inference_data(model, wide_posterior(model), data, num_draws=5, **QUIET)
    np.testing.assert_array_equal(found.observed_data["x"].values, x.numpy())
    xarray.testing.assert_equal(found.log_likelihood, whole.log_likelihood)


def test_nothing_of_the_caller_s_changes() -> None:
    model = VAE(StandardNormal(2), Normal(nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.5), nn.LayerNorm(5))))
    guide = MeanFieldGuide(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), 2, features=4)
    model.likelihood.eval()
    before = [{k: v.clone() for k, v in program.state_dict().items()} for program in (model, guide)]
    modes = [m.training for program in (model, guide) for m in program.modules()]
    pyro.param("other", torch.ones(1))
    random = get_rng_state()
    to_inference_data(model, guide, torch.randn(4, 5).detach(), num_draws=5, prior_draws=2, **QUIET)
    torch.randn(4, 5)
    for program, state in zip((model, guide), before, strict=True):
        for name, value in program.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=0)
        assert all(p.grad is None for p in program.parameters())
    assert modes == [m.training for program in (model, guide) for m in program.modules()]
    assert list(pyro.get_param_store().keys()) == ["other"]
    after = get_rng_state()
    pyro.util.set_rng_state(random)
    torch.randn(4, 5)
    torch.randn(4, 5)
    expected = get_rng_state()
    assert torch.equal(after["torch"], expected["torch"]) and after["random"] == expected["random"]


# -- files and ArviZ's tools -------------------------------------------------------------------------


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    model, guide = semi_supervised_pair()
    data = torch.bernoulli(torch.full((4, 8), 0.5)), torch.tensor([2, -1, 0, -1])
    found = to_inference_data(model, guide, data, num_draws=6, coords={"datum": list("abcd")}, **QUIET)
    back = az.from_netcdf(found.to_netcdf(str(tmp_path / "pair.nc")))
    assert set(back.groups()) == set(found.groups()) and len(found.groups()) == 8
    for group in found.groups():
        xarray.testing.assert_equal(back[group], found[group])
        assert back[group].attrs == found[group].attrs
    assert back.log_likelihood["x"].attrs["units"] == "nats"


def test_newer_versions_of_arviz_get_a_tree_of_the_same_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = linear_model()
    arguments: Any = (model, wide_posterior(model), linear_data(model))
    found = to_inference_data(*arguments, num_draws=6, **QUIET)
    monkeypatch.setattr(az, "__version__", "1.2.0")
    tree: Any = to_inference_data(*arguments, num_draws=6, **QUIET)
    assert isinstance(tree, xarray.DataTree) and set(tree.children) == set(found.groups())
    for group in found.groups():
        xarray.testing.assert_identical(tree[group].to_dataset(), found[group])
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as back:
        xarray.testing.assert_identical(back["posterior"].to_dataset(), found.posterior)
    assert isinstance(assemble({"posterior": found.posterior}, tree=False), az.InferenceData)


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # ArviZ 0.23, matplotlib 3.11
@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_arviz_summarises_and_draws_it(kind: str) -> None:
    import matplotlib.pyplot as plt

    if kind == "images":
        found = to_inference_data(*image_pair(), image_data(), num_draws=100, **QUIET)
    else:
        model = linear_model()
        found = to_inference_data(model, wide_posterior(model), linear_data(model), num_draws=100, **QUIET)
    n = found.posterior.sizes["datum"]
    summary = az.summary(found, kind="stats", round_to="none")
    assert len(summary) == 2 * n
    np.testing.assert_allclose(summary["mean"], found.posterior["z"].values[0].mean(0).ravel())
    try:
        for group in ("posterior", "prior"):
            ax = az.plot_ppc(found, group=group, num_pp_samples=20, random_seed=0)
            assert len(ax.get_lines()) + len(ax.collections) + len(ax.patches) >= 3
        axes = az.plot_pair(found, var_names=["z"], coords={"datum": [0]})
        assert axes.get_xlabel() == "z\n0, 0" and axes.get_ylabel() == "z\n0, 1"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto")
            loo = az.loo(found, var_name="marginal", pointwise=True)
        drawn = az.plot_khat(loo).collections[0].get_offsets()
        np.testing.assert_allclose(drawn[:, 1], found.sample_stats["k_hat"].values, atol=1e-6)
    finally:
        plt.close("all")


# -- wrong inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_draws": 0}, "num_draws: expected a whole number above 0"),
        ({"num_draws": 1}, "num_draws: expected at least 2"),
        ({"num_draws": 2.0}, "num_draws: expected a whole number"),
        ({"predictive_draws": -1}, "predictive_draws: expected a whole number from 0, got -1"),
        ({"prior_draws": True}, "prior_draws: expected a whole number from 0, got True"),
        ({"seed": -1}, "seed: expected"),
        ({"memory": 0}, "memory: expected"),
        ({"device": "nowhere"}, "device: expected"),
        ({"dims": [("x", ["gene"])]}, "dims: expected a dictionary, got list"),
        ({"dims": {"X": ["gene"]}}, r"dims: unknown site 'X' \(did you mean 'x'\?\)"),
        ({"dims": {"x": ["a", "b"]}}, r"dims: expected 1 names for the event \(5,\) of site 'x'"),
        ({"dims": {"x": ["datum"]}}, "dims: expected different names for site 'x', none of"),
        ({"dims": {"x": ["one"], "z": ["one"]}}, "dims: expected one size of dim 'one', got 2 and"),
        ({"coords": ["a"]}, "coords: expected a dictionary, got list"),
        ({"coords": {"data": [1, 2]}}, r"coords: unknown dim 'data' \(did you mean 'datum'\?\)"),
        ({"coords": {"draw": [1, 2]}}, "coords: unknown dim 'draw'"),
        ({"coords": {"datum": [1, 2]}}, "coords: expected 6 labels for dim 'datum'"),
        ({"reference": torch.zeros(2, 3, 6, 2)}, "reference: expected draws {site"),
        ({"reference": {}}, r"reference: expected draws of the model's latent sites \['z'\], got \[\]"),
        ({"reference": {"z": torch.zeros(2, 3, 5, 2)}}, r"reference: expected draws \[chains, draws, 6, 2\]"),
        ({"reference": {"z": torch.zeros(3, 6, 2)}}, r"reference: expected draws \[chains, draws, 6, 2\]"),
        ({"reference": {"z": torch.zeros(1, 1, 6, 2)}}, "reference: expected at least 2 draws"),
        ({"reference": {"z": torch.full((1, 3, 6, 2), math.nan)}}, "reference: expected finite draws"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    model = linear_model()
    with pytest.raises((TypeError, ValueError), match=message):
        to_inference_data(model, wide_posterior(model), linear_data(model), **QUIET | arguments)


def test_a_result_above_the_limit_of_memory_is_refused_with_what_takes_it() -> None:
    model = linear_model()
    x = linear_data(model, 100)
    message = (
        r"memory: expected room for the result, 8.4 MiB of 100 data, got 4 MiB "
        r"\(log-likelihoods and weights, num_draws or the reference: 3.05 MiB; "
        r"prior and prior_predictive, prior_draws: 2.67 MiB; "
        r"posterior, num_draws or the reference: 1.53 MiB; posterior_predictive"
    )
    limited: dict[str, Any] = {"prior_draws": 500, "predictive_draws": 300, "memory": 4 * 2**20, **QUIET}
    with pytest.raises(ValueError, match=message):
        to_inference_data(model, wide_posterior(model), x, **limited)
    limited |= {"num_draws": 300, "prior_draws": 100, "predictive_draws": 10}
    found = to_inference_data(model, wide_posterior(model), x, **limited)
    assert sum(found[group].nbytes for group in found.groups()) < 4 * 2**20
    with pytest.raises(ValueError, match="memory: expected room for the data"):
        to_inference_data(model, wide_posterior(model), x, memory=1000, **QUIET)


def test_data_and_pairs_that_do_not_fit_are_refused() -> None:
    model, guide = image_pair()
    with pytest.raises(ValueError, match="data: datum 0 is outside the support of site 'x'"):
        to_inference_data(model, guide, torch.full((3, 1, 6, 4), 0.5), **QUIET)
    bad = DataLoader(TensorDataset(torch.cat([image_data(2), torch.full((2, 1, 6, 4), 0.5)])), batch_size=2)
    with pytest.raises(ValueError, match=r"data, batch 2: datum 0 is outside the support"):
        to_inference_data(model, guide, bad, **QUIET)
    with pytest.raises(ValueError, match="z"):
        to_inference_data(model, MeanFieldGuide(MLP((1, 6, 4)), 3), image_data(), **QUIET)
    with pytest.raises(TypeError, match="data: expected a Split"):
        to_inference_data(model, guide, "digits", **QUIET)


def test_weights_that_are_no_numbers_are_refused_with_their_datum() -> None:
    class Broken(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return (z[..., :1] * 0 / 0).expand(*z.shape[:-1], 5)

    def model(x: Tensor | None, size: int | None = None) -> None:
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = torch.zeros(5) if x is None else torch.where(x > 3, Broken()(z), x * 0)
            pyro.sample("x", dist.Normal(mean, 1.0, validate_args=False).to_event(1), obs=x)

    x = torch.zeros(4, 5)
    x[3, 2] = 9.0
    with pytest.raises(ValueError, match="got others for 1 data, first for datum 3"):
        to_inference_data(model, MeanFieldGuide(MLP(5), 2), x, num_draws=5, **QUIET)


def test_a_likelihood_that_can_t_be_drawn_from_says_how_to_go_on() -> None:
    class NoDraws(dist.Normal):
        def sample(self, sample_shape: Any = ()) -> Tensor:
            raise NotImplementedError

        def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
            return NoDraws(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", NoDraws(z.sum(-1), torch.ones(())), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    quiet: dict[str, Any] = {"num_draws": 5, "prior_draws": 0, **QUIET}
    with pytest.raises(ValueError, match=r"none of the sites \['x'\] can be drawn from; predictive_draws=0"):
        to_inference_data(model, guide, torch.zeros(3), **quiet)
    found = to_inference_data(model, guide, torch.zeros(3), predictive_draws=0, **quiet)
    assert found.observed_data["x"].dims == ("datum",)
