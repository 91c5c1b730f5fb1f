"""Tests of anomaly detection: against exact densities, all pairs, scikit-learn, and digits."""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import function_pair
from hypothesis import given
from hypothesis import strategies as st
from pyro.util import get_rng_state
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from ppl_vae import evaluate, fit
from ppl_vae.data import Split, load_dataset
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.tasks import anomaly
from ppl_vae.tasks.anomaly import (
    SCORES,
    anomaly_scores,
    auroc_standard_error,
    average_precision_standard_error,
    detect_anomalies,
    weighted_average_precision,
)

QUIET: dict[str, Any] = {"progress": False}


def linear() -> LinearGaussian:
    torch.manual_seed(0)
    return LinearGaussian(2, 5).double()


def guide_of(model: LinearGaussian, spread: float = 1.0) -> Any:
    """Return the exact posterior, widened, as a plain function."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), torch.no_grad():
            exact = model.posterior(x)
            pyro.sample("z", dist.MultivariateNormal(exact.mean, spread**2 * exact.covariance_matrix))

    return guide


def linear_data(model: LinearGaussian, n: int = 80, m: int = 60) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(None, size=n), 1.7 * model(None, size=m)


def test_scores_are_the_parts_of_evaluate_with_anomalous_data_high() -> None:
    model = linear()
    guide, (x, _) = guide_of(model, 1.3), linear_data(model)
    result = evaluate(model, guide, x, num_particles=20, seed=3, **QUIET)
    expected = {
        "elbo": -result.elbo.values,
        "log_likelihood": -result.log_likelihood.values,
        "reconstruction": -result.reconstruction.values,
        "kl": result.kl["z"].values,
    }
    for score in SCORES:
        values = anomaly_scores(model, guide, x, score=score, num_particles=20, seed=3, **QUIET)
        torch.testing.assert_close(values, expected[score], rtol=0, atol=0)


def test_with_the_exact_posterior_log_p_has_the_exact_score_and_area() -> None:
    model = linear()
    normal, anomalous = linear_data(model)
    result = detect_anomalies(model, guide_of(model), normal, anomalous, num_particles=2, **QUIET)
    with torch.no_grad():
        exact = -model.log_prob(normal), -model.log_prob(anomalous)
    torch.testing.assert_close(result.normal["log_likelihood"], exact[0])
    torch.testing.assert_close(result.anomalous["log_likelihood"], exact[1])
    torch.testing.assert_close(result.normal["elbo"], exact[0])  # no gap at the exact posterior
    pairs = (exact[1][:, None] > exact[0]).double()
    assert result.table.loc["log_likelihood", "auroc"] == pytest.approx(float(pairs.mean()), abs=1e-12)
    assert float(pairs.mean()) > 0.6  # anomalous data are told apart


def test_with_a_wide_guide_the_area_is_exact_but_for_pairs_closer_than_the_error() -> None:
    model = linear()
    normal, anomalous = linear_data(model)
    result = detect_anomalies(model, guide_of(model, 1.4), normal, anomalous, num_particles=2000, **QUIET)
    with torch.no_grad():
        exact = -model.log_prob(normal), -model.log_prob(anomalous)
    errors = torch.cat(
        [result.normal["log_likelihood"] - exact[0], result.anomalous["log_likelihood"] - exact[1]]
    )
    # weights of N(0, 1) under N(0, 1.4^2) have E[w^2] = (1.4^2 / sqrt(2 * 1.4^2 - 1))^2 in two dimensions
    variance = 1.4**4 / (2 * 1.4**2 - 1) - 1
    worst = float(errors.abs().max())
    assert worst < 5 * (variance / 2000) ** 0.5  # of 140 data
    between = exact[1][:, None] - exact[0]
    near = float((between.abs() <= 2 * worst).double().mean())
    area = float((between > 0).double().mean())
    assert abs(result.table.loc["log_likelihood", "auroc"] - area) <= near + 1e-12


def test_the_elbo_score_is_above_that_of_log_p() -> None:
    model = linear()
    normal, anomalous = linear_data(model)
    result = detect_anomalies(model, guide_of(model, 1.4), normal, anomalous, num_particles=500, **QUIET)
    for found, x in ((result.normal, normal), (result.anomalous, anomalous)):
        assert bool((found["elbo"] >= found["log_likelihood"]).all())
        with torch.no_grad():
            gap = found["elbo"] + model.log_prob(x)
        # KL of N(m, 1.4^2 S) from N(m, S), two dimensions; its estimate has variance (1.4^2 - 1)^2 / K
        expected = 1.4**2 - 1 - 2 * np.log(1.4)
        error = (1.4**2 - 1) / (500 * len(x)) ** 0.5
        assert abs(float(gap.mean()) - expected) < 4 * error


@given(
    normal=st.lists(st.integers(0, 6), min_size=2, max_size=12),
    anomalous=st.lists(st.integers(0, 6), min_size=2, max_size=12),
)
def test_the_standard_error_of_the_area_is_that_of_placements_in_pairs(
    normal: list[int], anomalous: list[int]
) -> None:
    n, a = np.array(normal, float), np.array(anomalous, float)
    wins = (a[:, None] > n) + 0.5 * (a[:, None] == n)
    expected = np.sqrt(wins.mean(1).var(ddof=1) / len(a) + wins.mean(0).var(ddof=1) / len(n))
    labels = np.repeat([0, 1], [len(n), len(a)])
    assert auroc_standard_error(labels, np.concatenate([n, a])) == pytest.approx(expected, abs=1e-12)


def test_standard_errors_are_the_spread_over_new_data() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], [80, 40])
    areas, precisions, errors = [], [], []
    for i in range(400):
        scores = np.concatenate([generator.normal(size=80), 1 + generator.normal(size=40)])
        areas.append(roc_auc_score(labels, scores))
        precisions.append(average_precision_score(labels, scores))
        if i < 40:
            errors.append(
                (
                    auroc_standard_error(labels, scores),
                    average_precision_standard_error(labels, scores, 100, i),
                )
            )
    area_error, precision_error = np.mean(errors, 0)
    # a standard deviation of 400 is known to 1 / sqrt(800) = 3.5 %, and the bootstrap is off by a few
    assert area_error == pytest.approx(np.std(areas), rel=0.15)
    assert precision_error == pytest.approx(np.std(precisions), rel=0.2)


@given(
    data=st.lists(
        st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=2, max_size=15
    ).filter(lambda rows: any(y and w for _, y, w in rows))
)
def test_the_average_precision_of_weighted_data_is_scikit_learns(data: list[tuple[int, bool, int]]) -> None:
    scores, labels, weights = (np.array(column, float) for column in zip(*data, strict=True))
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    found = weighted_average_precision(labels[order], weights[order], ends)
    assert found == pytest.approx(average_precision_score(labels, scores, sample_weight=weights))


def test_the_table_is_scikit_learns_and_the_text_and_summary_say_it() -> None:
    model = linear()
    normal, anomalous = linear_data(model)
    result = detect_anomalies(model, guide_of(model, 1.2), normal, anomalous, num_particles=5, **QUIET)
    labels = np.repeat([0, 1], [80, 60])
    assert result.share_anomalous == 60 / 140
    assert list(result.table.index) == list(SCORES)
    summary = result.summary()
    for score in SCORES:
        values = torch.cat([result.normal[score], result.anomalous[score]]).numpy()
        row = result.table.loc[score]
        assert row["auroc"] == roc_auc_score(labels, values)
        assert row["average_precision"] == average_precision_score(labels, values)
        assert summary[score] == dict(row) and all(type(v) is float for v in summary[score].values())
        assert f"{row['auroc']:.4f} +- {row['auroc_se']:.4f}" in str(result)
    assert (summary["num_normal"], summary["num_anomalous"], summary["num_particles"]) == (80, 60, 5)


def test_plain_functions_run_and_nothing_of_the_caller_changes() -> None:
    model, guide, modules = function_pair()
    before = [[p.clone() for p in module.parameters()] for module in modules]
    x = torch.bernoulli(torch.full((12, 4), 0.5, dtype=torch.float64))
    state = get_rng_state()
    first = detect_anomalies(model, guide, x[:8], x[8:], num_particles=5, **QUIET)
    again = detect_anomalies(model, guide, x[:8], x[8:], num_particles=5, **QUIET)
    assert torch.equal(state["torch"], get_rng_state()["torch"])
    assert not list(pyro.get_param_store().keys())
    for module, values in zip(modules, before, strict=True):
        assert module.training and all(map(torch.equal, module.parameters(), values))
    assert all(torch.equal(first.normal[s], again.normal[s]) for s in SCORES)


def digits_pair(hidden: int = 64) -> tuple[VAE, MeanFieldGuide]:
    torch.manual_seed(0)
    model = VAE(StandardNormal(4), Bernoulli(MLP(4, (1, 8, 8), hidden=hidden)))
    return model, MeanFieldGuide(MLP((1, 8, 8), hidden=hidden), 4)


def test_digits_turned_upside_down_and_noise_are_found_among_digits() -> None:
    data = load_dataset("digits", binarization="threshold")
    model, guide = digits_pair()
    fit(model, guide, data.train.x, epochs=15, batch_size=50, learning_rate=3e-3, **QUIET)
    noise = torch.bernoulli(torch.full((100, 1, 8, 8), float(data.test.x.mean())))
    result = detect_anomalies(model, guide, data.test, noise, num_particles=20, bootstrap=50, **QUIET)
    for score in ("elbo", "log_likelihood", "reconstruction"):
        row = result.table.loc[score]
        assert row["auroc"] - 4 * row["auroc_se"] > 0.9
        assert row["average_precision"] - 4 * row["average_precision_se"] > result.share_anomalous
    turned = detect_anomalies(model, guide, data.test, data.test.x.flip(-1), num_particles=20, **QUIET)
    row = turned.table.loc["elbo"]
    assert row["auroc"] - 4 * row["auroc_se"] > 0.5  # mirrored digits are nearer


def test_mnist_digits_of_another_kind_are_found(mnist_root: Any) -> None:
    data = load_dataset("mnist", root=mnist_root, binarization="static")
    assert data.train.y is not None and data.test.y is not None
    ones = data.train.x[data.train.y == 1][:500]
    torch.manual_seed(0)
    model = VAE(StandardNormal(4), Bernoulli(MLP(4, (1, 28, 28), hidden=32)))
    guide = MeanFieldGuide(MLP((1, 28, 28), hidden=32), 4)
    fit(model, guide, ones, epochs=8, batch_size=50, learning_rate=3e-3, **QUIET)
    normal, anomalous = (data.test.x[data.test.y == label][:200] for label in (1, 8))
    result = detect_anomalies(model, guide, normal, anomalous, num_particles=10, bootstrap=50, **QUIET)
    row = result.table.loc["elbo"]
    assert row["auroc"] - 4 * row["auroc_se"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"score": "log_likelyhood"}, ValueError, "score: unknown .*did you mean 'log_likelihood'"),
        ({"num_particles": 0}, ValueError, "num_particles: expected a whole number"),
        ({"seed": -1}, ValueError, "seed"),
        ({"data": torch.tensor([[float("nan")] * 5])}, ValueError, "data: expected finite"),
    ],
)
def test_wrong_arguments_of_scores(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = linear()
    arguments = {"data": torch.zeros(3, 5).double(), **arguments}
    with pytest.raises(error, match=message):
        anomaly_scores(model, guide_of(model), **arguments, **QUIET)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"normal": torch.zeros(3, 5, dtype=torch.long)}, TypeError, "^normal: expected floating-point"),
        ({"anomalous": torch.zeros(3, 5) / 0}, ValueError, "^anomalous: expected finite"),
        ({"anomalous": torch.zeros(0, 5)}, ValueError, "^anomalous: expected x of shape"),
        ({"bootstrap": 0}, ValueError, "bootstrap: expected a whole number"),
        ({"bootstrap": 2.5}, TypeError, "bootstrap: expected a whole number"),
    ],
)
def test_wrong_arguments_of_detection(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = linear()
    data = {"normal": torch.zeros(3, 5).double(), "anomalous": torch.zeros(3, 5).double()}
    with pytest.raises(error, match=message):
        detect_anomalies(model, guide_of(model), **{**data, **arguments}, **QUIET)


def test_anomalous_data_are_looked_at_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear()
    x = torch.zeros(3, 5).double()
    monkeypatch.setattr(anomaly, "evaluate", lambda *_, **__: pytest.fail("the normal data were evaluated"))
    for wrong, message in ((x[:, :4], "^anomalous: "), (x / 0, "^anomalous: expected finite")):
        with pytest.raises(ValueError, match=message):
            detect_anomalies(model, guide_of(model), x, wrong, **QUIET)


def test_a_split_is_taken_as_data() -> None:
    model = linear()
    x, _ = linear_data(model, 5, 1)
    assert anomaly_scores(model, guide_of(model), Split(x), **QUIET).shape == (5,)
