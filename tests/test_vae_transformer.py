"""Tests of the scikit-learn transformer: scikit-learn's own checks, exact likelihoods, and its uses."""

import math
import pickle
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.util import get_rng_state
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

from ppl_vae.infer import log_weights
from ppl_vae.models import LinearGaussian
from ppl_vae.sklearn import VAETransformer


def quick(**settings: Any) -> VAETransformer:
    return VAETransformer(**{"hidden": (4,), "epochs": 1, "num_particles": 2, "random_state": 0, **settings})


def iris() -> np.ndarray:
    return load_iris().data


def linear_data(n: int, *, seed: int) -> tuple[LinearGaussian, np.ndarray]:
    torch.manual_seed(0)
    model = LinearGaussian(2, 6, scale=0.5).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        return model, model(None, size=n).numpy()


# -- scikit-learn's own checks -------------------------------------------------------------------------


@parametrize_with_checks([quick()])
def test_check_of_scikit_learn_for_its_estimators(estimator: VAETransformer, check: Any) -> None:
    check(estimator)


def test_no_check_of_scikit_learn_is_expected_to_fail_or_left_out() -> None:
    results = check_estimator(quick(), on_skip=None)
    assert len(results) > 40
    skipped = {r["check_name"] for r in results if r["status"] != "passed"}
    assert skipped <= {"check_array_api_input"}  # for which SCIPY_ARRAY_API must be set
    assert {"check_transformer_general", "check_transformer_preserve_dtypes", "check_estimators_pickle"} <= {
        r["check_name"] for r in results
    }


# -- truth ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear_vae() -> VAETransformer:
    _, x = linear_data(1000, seed=1)
    return VAETransformer(
        2, hidden=(), standardize=False, epochs=150, learning_rate=1e-2, num_particles=1000, random_state=0
    ).fit(x)


def test_linear_vae_reaches_the_exact_log_likelihood_of_linear_gaussian_data(
    linear_vae: VAETransformer,
) -> None:
    model, test = linear_data(1000, seed=2)
    with torch.no_grad():
        exact = model.log_prob(torch.from_numpy(test)).numpy()
    found = linear_vae.score_samples(test)
    # 2 * 6 + 6 + 1 fitted numbers from 1000 data lose 19 / 2000 = 0.01 nats on others; the rest is training.
    assert -0.04 < (found - exact).mean() < 0.01
    assert np.corrcoef(found, exact)[0, 1] > 0.99
    assert linear_vae.score(test) == found.mean()


def test_linear_vae_has_the_log_likelihoods_of_maximum_likelihood_pca(linear_vae: VAETransformer) -> None:
    _, x = linear_data(1000, seed=1)
    pca = PCA(2).fit(x)
    found = linear_vae.score_samples(x)
    assert found.mean() == pytest.approx(pca.score(x), abs=0.03)
    assert found.mean() < pca.score(x) + 0.005  # the highest there is
    assert np.abs(found - pca.score_samples(x)).max() < 0.5


def test_latents_reconstruct_as_well_as_those_of_pca(linear_vae: VAETransformer) -> None:
    _, x = linear_data(1000, seed=1)
    _, test = linear_data(1000, seed=2)
    pca = PCA(2).fit(x)
    best = np.square(test - pca.inverse_transform(pca.transform(test))).mean()
    error = np.square(test - linear_vae.inverse_transform(linear_vae.transform(test))).mean()
    assert 0.98 * best < error < 1.1 * best  # posterior means are shrunk towards 0, projections are not


def test_networks_with_hidden_layers_on_standardised_data_come_near_too() -> None:
    model, x = linear_data(1000, seed=1)
    _, test = linear_data(500, seed=2)
    units = np.array([1e-3, 1.0, 50.0, 1.0, 1.0, 7.0])
    vae = VAETransformer(2, hidden=32, epochs=40, learning_rate=3e-3, random_state=0).fit(x * units + 5)
    with torch.no_grad():
        exact = model.log_prob(torch.from_numpy(test)).numpy() - np.log(units).sum()
    assert -0.3 < vae.score(test * units + 5) - exact.mean() < 0.02


def test_score_samples_is_the_log_mean_of_importance_weights() -> None:
    x = iris()
    vae = quick(epochs=5, num_particles=20_000, standardize=False).fit(x)
    rows = torch.from_numpy(x[:3])
    with torch.no_grad():
        weights = log_weights(vae.model_, vae.guide_, rows, num_particles=20_000)
    expected = weights.logsumexp(0) - math.log(20_000)
    relative = (weights - expected).exp().std(0) / math.sqrt(20_000)  # of each of the two
    difference = torch.from_numpy(vae.score_samples(x[:3])) - expected
    assert (difference.abs() < 4 * math.sqrt(2) * relative).all()
    assert (relative < 0.05).all()


def test_score_samples_of_one_draw_is_the_elbo_in_the_mean() -> None:
    x = np.repeat(iris()[:1], 2, 0) + np.array([[0.0], [0.1]])
    vae = quick(epochs=3, standardize=False).fit(iris())
    scores = []
    for seed in range(400):
        vae._noise_seed = seed
        scores.append(vae.set_params(num_particles=1).score_samples(x))
    with torch.no_grad():
        elbos = log_weights(vae.model_, vae.guide_, torch.from_numpy(x), num_particles=4000).numpy()
    found = np.array(scores)
    error = np.sqrt(found.var(0) / 400 + elbos.var(0) / 4000)
    assert (np.abs(found.mean(0) - elbos.mean(0)) < 4 * error).all()


def test_standardisation_leaves_a_density_of_the_data_as_they_came() -> None:
    x = iris()
    units = np.array([10.0, 1.0, 0.1, 3.0])
    one, other = quick(epochs=3).fit(x), quick(epochs=3).fit(x * units - 4)
    np.testing.assert_allclose(
        other.score_samples(x * units - 4), one.score_samples(x) - np.log(units).sum(), rtol=1e-6
    )
    z = one.transform(x)
    np.testing.assert_allclose(other.transform(x * units - 4), z, atol=1e-8)
    np.testing.assert_allclose(other.inverse_transform(z), one.inverse_transform(z) * units - 4, rtol=1e-6)


def test_a_constant_feature_is_only_centred() -> None:
    x = np.column_stack([iris(), np.full(150, 0.1 + 0.2)])
    vae = quick().fit(x)
    assert vae.scale_[-1] == 1
    assert np.isfinite(vae.score_samples(x)).all()
    assert (vae.scale_[:-1] == x[:, :-1].std(0)).all()


def test_bernoulli_vae_scores_bits_and_gives_probabilities() -> None:
    x = (load_digits().data[:500] > 7).astype(np.float32)
    vae = VAETransformer(
        5, hidden=32, likelihood="bernoulli", epochs=30, learning_rate=3e-3, random_state=0
    ).fit(x)
    p = x.mean(0).clip(1e-3, 1 - 1e-3)
    independent = (x * np.log(p) + (1 - x) * np.log(1 - p)).sum(1)
    assert vae.score(x) > independent.mean() + 3
    means = vae.inverse_transform(vae.transform(x))
    assert means.min() > 0 and means.max() < 1
    assert np.abs(means - x).mean() < 0.8 * np.abs(p - x).mean()


# -- how it is used ------------------------------------------------------------------------------------


def test_same_random_state_gives_the_same_and_another_gives_another() -> None:
    x = iris()
    one, same, other = (quick(random_state=seed).fit(x) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.transform(x), same.transform(x))
    np.testing.assert_array_equal(one.score_samples(x), same.score_samples(x))
    assert np.abs(one.transform(x) - other.transform(x)).max() > 1e-3
    state = np.random.RandomState(0)
    first, second = (quick(random_state=state).fit(x).transform(x) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def test_streams_and_parameter_store_of_the_caller_are_left_alone() -> None:
    x = iris()
    before = get_rng_state()
    vae = quick().fit(x)
    vae.inverse_transform(vae.transform(x))
    vae.score_samples(x)
    after = get_rng_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["random"] == after["random"]
    np.testing.assert_array_equal(before["numpy"][1], after["numpy"][1])
    assert not list(pyro.get_param_store().keys())


def test_a_row_has_the_same_score_in_any_company() -> None:
    x = np.tile(iris(), (40, 1))
    vae = quick(num_particles=3).fit(x)
    scores = vae.score_samples(x)
    np.testing.assert_allclose(scores, np.tile(scores[:150], 40), rtol=1e-9)
    np.testing.assert_allclose(vae.score_samples(x[[7]]), scores[[7]], rtol=1e-9)
    np.testing.assert_allclose(vae.transform(x), np.tile(vae.transform(iris()), (40, 1)), atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_have_the_type_of_the_data(dtype: Any) -> None:
    x = iris().astype(dtype)
    vae = quick().fit(x)
    z = vae.transform(x)
    assert z.dtype == vae.inverse_transform(z).dtype == vae.score_samples(x).dtype == dtype
    assert {p.dtype for p in vae.guide_.parameters()} == {torch.from_numpy(x).dtype}


def test_pickle_and_clone_keep_what_they_promise() -> None:
    x = iris()
    vae = quick().fit(x)
    copy = pickle.loads(pickle.dumps(vae))
    np.testing.assert_array_equal(copy.transform(x), vae.transform(x))
    np.testing.assert_array_equal(copy.score_samples(x), vae.score_samples(x))
    fresh = clone(vae)
    assert fresh.get_params() == vae.get_params()
    with pytest.raises(NotFittedError):
        fresh.transform(x)


def test_names_of_features_in_pandas_output() -> None:
    frame = load_iris(as_frame=True).data
    vae = quick(latent_dim=3).set_output(transform="pandas").fit(frame)
    z = vae.transform(frame)
    assert list(z.columns) == ["vaetransformer0", "vaetransformer1", "vaetransformer2"]
    assert list(vae.get_feature_names_out()) == list(z.columns)
    assert (z.index == frame.index).all()
    assert list(vae.feature_names_in_) == list(frame.columns)
    assert vae.inverse_transform(z).shape == frame.shape


def test_pipeline_with_a_classifier_beats_chance() -> None:
    x, y = load_iris(return_X_y=True)
    pipeline = make_pipeline(
        VAETransformer(2, hidden=16, epochs=40, learning_rate=1e-2, random_state=0), LogisticRegression()
    )
    assert pipeline.fit(x, y).score(x, y) > 0.85


def test_grid_search_chooses_by_the_log_likelihood() -> None:
    _, x = linear_data(300, seed=1)
    search = GridSearchCV(
        quick(hidden=(), standardize=False, learning_rate=1e-2, num_particles=20),
        {"epochs": [1, 30]},
        cv=2,
    ).fit(x)
    assert search.best_params_ == {"epochs": 30}
    scores = search.cv_results_["mean_test_score"]
    assert search.best_score_ == scores[1] > scores[0]
    assert search.transform(x).shape == (300, 2)


def test_history_has_a_record_per_epoch_that_rises() -> None:
    vae = quick(epochs=10, learning_rate=1e-2).fit(iris())
    assert [record["epoch"] for record in vae.history_] == list(range(1, 11))
    assert vae.history_[-1]["train_elbo"] > vae.history_[0]["train_elbo"]


def test_progress_is_shown_only_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    quick().fit(iris())
    assert capsys.readouterr().err == ""
    quick(verbose=True).fit(iris())
    assert capsys.readouterr().err != ""


# -- wrong input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"latent_dim": 0}, ValueError, "latent_dim: expected a whole number above 0, got 0"),
        ({"latent_dim": 1.5}, TypeError, "latent_dim"),
        ({"hidden": (4, 0)}, ValueError, r"hidden\[1\]: expected"),
        ({"hidden": None}, TypeError, "hidden: expected"),
        ({"likelihood": "gaussian"}, ValueError, "likelihood: unknown 'gaussian'.*'normal', 'bernoulli'"),
        ({"likelihood": "bernoulli"}, ValueError, "X: expected values 0 and 1 .* got values from 0.1 to 7.9"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"batch_size": -1}, ValueError, "batch_size"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate"),
        ({"num_particles": 0}, ValueError, "num_particles"),
        ({"device": "abacus"}, ValueError, "device"),
        ({"random_state": "x"}, ValueError, "cannot be used to seed"),
    ],
)
def test_wrong_settings_are_named_by_fit_which_then_leaves_it_unfitted(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    vae = quick(**settings)
    with pytest.raises(error, match=message):
        vae.fit(iris())
    with pytest.raises(NotFittedError):
        vae.transform(iris())


def test_wrong_latents_are_refused() -> None:
    with pytest.raises(NotFittedError):
        quick().inverse_transform(np.zeros((3, 2)))
    vae = quick().fit(iris())
    with pytest.raises(ValueError, match=r"X: expected latents \[n, 2\], got shape \[3, 4\]"):
        vae.inverse_transform(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="NaN"):
        vae.inverse_transform(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="num_particles"):
        vae.set_params(num_particles=0).score_samples(iris())
