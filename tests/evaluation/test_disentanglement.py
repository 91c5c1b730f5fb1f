"""Scores of disentanglement: known values, sums by hand, scikit-learn, and what a guide's codes give."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from helpers import Rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.util import get_rng_state
from sklearn.metrics import mutual_info_score, roc_auc_score
from sklearn.svm import LinearSVC
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ppl_vae.data import Split
from ppl_vae.evaluation.disentanglement_metrics import (
    Score,
    beta_vae_score,
    dci,
    disentanglement,
    explicitness,
    factor_vae_score,
    modularity,
    mutual_information_gap,
    sap_score,
)
from ppl_vae.evaluation.disentanglement_metrics._table import (
    JointCounts,
    bins_of,
    check_table,
    information,
    train_and_test,
)
from ppl_vae.evaluation.disentanglement_metrics.fixed_factor import Groups
from ppl_vae.evaluation.disentanglement_metrics.modularity import area_under_curve
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.networks import MLP

FEW: dict[str, Any] = {"num_train": 1000, "num_test": 1000}
QUIET: dict[str, Any] = {"progress": False, "estimator": "lasso", "bootstrap": 3, "num_points": 200}

# each by name, with settings that make it quick and the identity score 1
SCORES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "MIG": lambda z, y: float(mutual_information_gap(z, y, bootstrap=0)),
    "SAP": lambda z, y: float(sap_score(z, y, continuous=True, bootstrap=0)),
    "DCI disentanglement": lambda z, y: float(dci(z, y, estimator="lasso").disentanglement),
    "DCI completeness": lambda z, y: float(dci(z, y, estimator="lasso").completeness),
    "DCI informativeness": lambda z, y: float(dci(z, y, estimator="lasso").informativeness),
    "beta-VAE": lambda z, y: float(beta_vae_score(z, y, **FEW)),
    "FactorVAE": lambda z, y: float(factor_vae_score(z, y, **FEW)),
    "modularity": lambda z, y: float(modularity(z, y, bootstrap=0)),
}


def combinations(*sizes: int, repeats: int = 1) -> Tensor:
    """Return all combinations of factors, ``[n, factors]``: they are uniform and independent."""
    return torch.cartesian_prod(*map(torch.arange, sizes)).repeat(repeats, 1)


def noise(n: int, latent: int, seed: int = 0) -> Tensor:
    return torch.randn(n, latent, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


# -- known values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORES)
def test_the_identity_code_scores_one(name: str) -> None:
    y = combinations(3, 4, 5, repeats=4)
    assert SCORES[name](y.double(), y) == pytest.approx(1.0, abs=2e-3)  # the lasso shrinks by a thousandth


@pytest.mark.parametrize("name", ["MIG", "SAP", "DCI disentanglement", "modularity"])
def test_a_noise_code_of_many_data_scores_near_zero_or_lower_than_one(name: str) -> None:
    y = combinations(3, 4, 5, repeats=100)
    score = SCORES[name](noise(len(y), 5), y)
    # a mutual information of noise is some (20 - 1)(5 - 1) / 2n = 0.006 nats, and a squared correlation 1 / n
    assert score < {"MIG": 0.01, "SAP": 0.01}.get(name, 0.75)


def test_trees_of_noise_spread_importance_evenly_and_predict_by_chance() -> None:
    y = combinations(2, 2, repeats=150)
    result = dci(noise(len(y), 4), y, estimator="random_forest")
    assert result.disentanglement.value < 0.05 and result.completeness.value < 0.05
    # chance is one half; 4 standard errors of 400 hits, which are a coin's
    assert abs(result.informativeness.value - 0.5) < 4 * 0.5 / math.sqrt(400)
    assert result.informativeness_train > 0.95


@pytest.mark.parametrize("estimator", ["gradient_boosting", "random_forest"])
def test_trees_find_the_factor_of_each_code(estimator: Any) -> None:
    y = combinations(3, 2, 3, repeats=10)
    result = dci(y.double() + 0.01 * noise(len(y), 3), y, estimator=estimator)
    assert result.disentanglement.value > 0.95 and result.completeness.value > 0.95
    assert result.informativeness.value == result.informativeness_train == 1.0
    assert result.importance.shape == (3, 3) and torch.equal(result.importance.argmax(0), torch.arange(3))
    mixed = dci((y.double() - 1) @ torch.linalg.qr(noise(3, 3)).Q, y, estimator=estimator)
    assert mixed.disentanglement.value < 0.6


@pytest.mark.parametrize("score", [beta_vae_score, factor_vae_score])
def test_a_noise_code_tells_the_fixed_factor_by_chance(score: Callable[..., Score]) -> None:
    y = combinations(4, 4, 4, repeats=200)
    result = score(noise(len(y), 5), y, num_train=2000, num_test=2000)
    # 4 standard errors of 2000 guesses among three, and as much for groups that differ by chance
    assert abs(result.value - 1 / 3) < 8 * math.sqrt(2 / 9 / 2000)
    assert result.standard_error == pytest.approx(math.sqrt(result.value * (1 - result.value) / 2000))


def test_one_code_that_varies_alike_halves_the_votes_of_a_factor() -> None:
    every = combinations(5, 5, 5, repeats=4)
    y, z = every[:, :2], every[:, [0, 2]].double()
    # with factor 0 fixed, code 0 is constant; with factor 1 fixed, each code is the least half of the time
    result = factor_vae_score(z, y, num_train=4000, num_test=4000)
    assert abs(result.value - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000) + 0.005  # ties of some in a hundred
    # a linear classifier also sees how near zero the other code is
    assert beta_vae_score(z, y, **FEW).value == 1.0


def test_collapsed_codes_have_no_vote() -> None:
    y = combinations(4, 5, repeats=3)
    z = torch.cat([torch.full((len(y), 1), 0.1, dtype=torch.float64), 1e-3 * noise(len(y), 1), y.double()], 1)
    assert float(factor_vae_score(z[:, [0, 2, 3]], y, **FEW)) == 1.0
    assert float(factor_vae_score(z, y, least_std=0.05, **FEW)) == 1.0
    none = factor_vae_score(z[:, :2], y, least_std=0.05, **FEW)
    assert none.value == 0.0 and math.isnan(none.standard_error)


def test_a_code_without_information_has_no_modularity() -> None:
    y = combinations(4, 5)
    z = torch.cat([y.double(), torch.full((len(y), 2), 3.3, dtype=torch.float64)], 1)
    assert float(modularity(z, y)) == pytest.approx(0.5)


def test_modularity_of_a_code_that_knows_two_factors_alike_is_zero() -> None:
    y = combinations(2, 2)
    z = (y @ torch.tensor([[1, 2], [2, 1]])).double()  # each code tells all four combinations
    assert float(modularity(z, y)) == pytest.approx(0.0, abs=1e-12)
    one_of_three = combinations(2, 2, 2)
    z = torch.stack([y3 := one_of_three.double() @ torch.tensor([1.0, 2.0, 0.0]).double(), -y3], 1)
    assert float(modularity(z, one_of_three)) == pytest.approx(1 - 1 / 2)


@pytest.mark.parametrize("name", [name for name in SCORES if name != "DCI informativeness"])
def test_a_rotated_code_scores_lower(name: str) -> None:
    y = combinations(5, 5, repeats=8)
    z = (y.double() - 2) @ rotation(math.pi / 4)
    assert SCORES[name](z, y) < 0.7


def test_a_rotation_takes_nothing_from_informativeness_and_explicitness() -> None:
    y = combinations(2, 2, repeats=30)
    z = (y.double() - 0.5) @ rotation(math.pi / 5)
    assert float(dci(z, y, estimator="lasso").informativeness) > 0.99
    assert float(explicitness(z, y, bootstrap=0)) == 1.0


def test_a_duplicated_code_has_no_gap_but_is_disentangled() -> None:
    y = combinations(3, 4, repeats=20)
    z = torch.cat([y, y], 1).double()
    assert float(mutual_information_gap(z, y)) == pytest.approx(0.0, abs=1e-12)
    assert float(sap_score(z, y, continuous=True)) == pytest.approx(0.0, abs=1e-12)
    assert float(sap_score(z, y)) == pytest.approx(0.0, abs=1e-12)
    result = dci(z, y, estimator="random_forest")
    assert result.disentanglement.value > 0.95
    assert result.completeness.value < 0.7


@pytest.mark.parametrize("name", [*SCORES, "SAP of classes", "explicitness"])
def test_order_and_sign_of_codes_do_not_matter(name: str) -> None:
    y = combinations(3, 4, repeats=25)
    z = torch.cat([y.double() @ rotation(0.3), noise(len(y), 1)], 1) + 0.3 * noise(len(y), 3, seed=1)
    score = SCORES | {
        "SAP of classes": lambda z, y: float(sap_score(z, y, bootstrap=0)),
        "explicitness": lambda z, y: float(explicitness(z, y, bootstrap=0)),
    }
    moved = z[:, [2, 0, 1]] * torch.tensor([-1.0, 1.0, -1.0])
    # solvers stop within their tolerance; a point or two may change sides
    assert score[name](moved, y) == pytest.approx(score[name](z, y), abs=5e-3)


@pytest.mark.parametrize("name", SCORES)
def test_order_of_factors_and_of_data_does_not_matter_to_what_needs_no_draw(name: str) -> None:
    y = combinations(3, 4, repeats=25)
    z = y.double() @ rotation(0.3) + 0.3 * noise(len(y), 2)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    drawn = name not in ("MIG", "SAP", "modularity")
    moved = SCORES[name](z[order], y[order].flip(1))
    assert moved == pytest.approx(SCORES[name](z, y), abs=0.08 if drawn else 1e-9)


# -- mutual information ------------------------------------------------------------------------------


def test_a_gap_by_hand() -> None:
    # code 0 agrees with the factor in 6 of 8 data, code 1 in 4 of 8: nothing
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])[:, None]
    z = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0, 1, 1]]).T.double()
    information_of_code = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(mutual_information_gap(z, y)) == pytest.approx(information_of_code / math.log(2))
    mutual, entropy = information(JointCounts(check_table(z, y), 20)())
    torch.testing.assert_close(mutual, torch.tensor([[information_of_code], [0.0]], dtype=torch.float64))
    assert float(entropy) == pytest.approx(math.log(2))


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(2, 60),
    latent=st.integers(2, 4),
    factors=st.integers(1, 3),
    bins=st.integers(1, 25),
    levels=st.integers(2, 30),
    seed=st.integers(0, 99),
)
def test_mutual_informations_are_those_of_scikit_learn_with_bins_of_numpy(
    n: int, latent: int, factors: int, bins: int, levels: int, seed: int
) -> None:
    generator = np.random.RandomState(seed)
    z = generator.randint(0, levels, (n, latent)) / generator.choice([1.0, 3.0, 7.0])  # values on edges, too
    y = generator.randint(-5, 5, (n, factors))
    y[:2] = [[0], [1]]
    edges = [np.histogram(column, bins)[1][:-1] for column in z.T]
    binned = np.stack([np.digitize(column, edge) for column, edge in zip(z.T, edges, strict=True)], 1)
    found = bins_of(torch.from_numpy(z), bins)
    constant = z.min(0) == z.max(0)  # in one bin, whichever
    assert np.array_equal(found.numpy()[:, ~constant] + 1, binned[:, ~constant])
    mutual, entropy = information(JointCounts(check_table(z, y), bins)())
    expected = [[mutual_info_score(y[:, f], binned[:, c]) for f in range(factors)] for c in range(latent)]
    np.testing.assert_allclose(mutual.numpy(), np.clip(expected, 0, None), atol=1e-10)
    np.testing.assert_allclose(entropy.numpy(), [mutual_info_score(c, c) for c in y.T], atol=1e-10)
    ordered = np.sort(expected, 0)
    mig = np.mean((ordered[-1] - ordered[-2]) / entropy.numpy())
    assert float(mutual_information_gap(z, y, bins=bins, bootstrap=0)) == pytest.approx(mig, abs=1e-9)


def test_weights_of_data_count_them_so_often() -> None:
    y = combinations(3, 4, repeats=3)
    z = noise(len(y), 2)
    weights = torch.arange(len(y)) % 3
    weights[z.argmin(0)] = weights[z.argmax(0)] = 1  # the bins stay
    rows = torch.arange(len(y)).repeat_interleave(weights)
    counts = JointCounts(check_table(z, y), 5)(weights)
    torch.testing.assert_close(counts, JointCounts(check_table(z[rows], y[rows]), 5)())


@pytest.mark.parametrize(
    ("score", "spread"),
    [
        # few bins: biases of (bins - 1)(values - 1) / 2n, which resampling doubles, are below the information
        (lambda z, y, **of: mutual_information_gap(z, y, bins=5, **of), 0.4),
        (lambda z, y, **of: modularity(z, y, bins=5, **of), 0.4),
        (lambda z, y, **of: sap_score(z, y, continuous=True, **of), 0.4),
    ],
    ids=["MIG", "modularity", "SAP"],
)
def test_the_standard_error_is_the_spread_over_new_data(score: Callable[..., Score], spread: float) -> None:
    def data(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(4, (1500, 2), generator=generator)
        return y.double() @ rotation(0.5) + noise(1500, 2, seed), y

    values = torch.tensor([float(score(*data(seed), bootstrap=0)) for seed in range(1, 81)])
    error = score(*data(0), bootstrap=100).standard_error
    # 80 values and 100 resamples know a standard deviation to 8 and 7 percent: 0.4 is some 4 of these
    assert abs(error / float(values.std()) - 1) < spread


# -- SAP ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(n=st.integers(5, 40), latent=st.integers(2, 4), factors=st.integers(1, 3), seed=st.integers(0, 99))
def test_sap_of_continuous_factors_is_the_gap_of_squared_correlations(
    n: int, latent: int, factors: int, seed: int
) -> None:
    generator = np.random.RandomState(seed)
    z, y = generator.randn(n, latent), generator.randint(0, 9, (n, factors))
    y[:2] = [[0], [3]]
    squares = np.corrcoef(z.T, y.T)[:latent, latent:] ** 2
    ordered = np.sort(squares, 0)
    expected = np.mean(ordered[-1] - ordered[-2])
    assert float(sap_score(z, y, continuous=True, bootstrap=0)) == pytest.approx(expected, abs=1e-10)
    constant = np.concatenate([z[:, :1], np.full((n, 1), 0.1)], 1)
    assert float(sap_score(constant, y, continuous=True, bootstrap=0)) == pytest.approx(squares[0].mean())


def test_sap_of_classes_is_the_gap_of_accuracies_of_linear_machines() -> None:
    y = combinations(2, 3, repeats=30)
    z = torch.cat([y.double(), noise(len(y), 1)], 1) + 0.4 * noise(len(y), 3, seed=1)
    train, test = train_and_test(check_table(z, y), 4)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(180)) and len(test) == 60
    accuracies = np.zeros((3, 2))
    for c in range(3):
        for f in range(2):
            # the dual solver of disentanglement_lib, made to converge
            machine = LinearSVC(C=0.01, class_weight="balanced", dual=True, max_iter=100_000, random_state=0)
            machine.fit(z[train, c : c + 1].numpy(), y[train, f].numpy())
            accuracies[c, f] = machine.score(z[test, c : c + 1].numpy(), y[test, f].numpy())
    ordered = np.sort(accuracies, 0)
    result = sap_score(z, y, seed=4)
    assert result.value == pytest.approx(np.mean(ordered[-1] - ordered[-2]), abs=0.02)  # one datum of 60
    assert result.value > 0.2 and 0.01 < result.standard_error < 0.1
    assert result.settings == {"continuous": False, "bootstrap": 100, "seed": 4}


def test_sap_takes_each_factor_as_it_is_told() -> None:
    y = combinations(2, 5, repeats=20)
    z = y.double() + 0.1 * noise(len(y), 2)
    parts = [float(sap_score(z, y[:, [f]], continuous=f == 1, bootstrap=0)) for f in range(2)]
    both = sap_score(z, y, continuous=[False, True])
    assert both.value == pytest.approx(sum(parts) / 2, abs=1e-9)
    assert parts[0] == pytest.approx(0.5, abs=0.2)  # the other code is right half of the time


# -- DCI, explicitness and fixed factors -------------------------------------------------------------


def test_dci_is_the_entropy_of_importances_as_in_disentanglement_lib() -> None:
    y = combinations(3, 4, 3, repeats=10)
    z = y.double() @ noise(3, 5) + 0.1 * noise(len(y), 5, seed=1)
    result = dci(z, y, estimator="lasso")
    r = result.importance.numpy()
    assert r.shape == (5, 3) and (r >= 0).all()
    per_code = 1 - scipy.stats.entropy(r.T + 1e-11, base=3)
    assert float(result.disentanglement) == pytest.approx((per_code * r.sum(1) / r.sum()).sum())
    per_factor = 1 - scipy.stats.entropy(r + 1e-11, base=5)
    assert float(result.completeness) == pytest.approx((per_factor * r.sum(0) / r.sum()).sum())
    assert 0.1 < float(result.disentanglement) < 0.9


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 30), levels=st.integers(1, 8), seed=st.integers(0, 99))
def test_weighted_areas_under_the_curve_are_those_of_scikit_learn(n: int, levels: int, seed: int) -> None:
    generator = np.random.RandomState(seed)
    scores, positive = generator.randint(0, levels, n) / 7.0, generator.rand(n) < 0.5
    positive[:2] = [True, False]
    weights = generator.randint(0, 3, (3, n)).astype(float)
    weights[:2, :2] = 1.0
    weights[2] = ~positive  # none is positive
    found = area_under_curve(*map(torch.from_numpy, (scores, positive, weights)))
    for row in range(2):
        assert float(found[row]) == pytest.approx(roc_auc_score(positive, scores, sample_weight=weights[row]))
    assert math.isnan(found[2])


def test_explicitness_is_one_half_by_chance_and_one_of_told_values() -> None:
    y = combinations(2, 3, repeats=200)
    result = explicitness(noise(len(y), 3), y)
    # an area's standard error by chance is sqrt((1 / p + 1 / q) / 12 n) < 0.031 for n = 400, p = 1 / 3
    assert abs(result.value - 0.5) < 4 * 0.031
    assert 0.005 < result.standard_error < 0.031
    one_hot = torch.nn.functional.one_hot(y[:, 1]).double()
    assert float(explicitness(torch.cat([y[:, :1].double(), one_hot], 1), y)) == 1.0


@settings(deadline=None, max_examples=20)
@given(
    sizes=st.lists(st.integers(2, 4), min_size=2, max_size=3),
    repeats=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_pairs_agree_on_the_fixed_factor_and_are_of_two_data(
    sizes: list[int], repeats: int, seed: int
) -> None:
    y = combinations(*sizes, repeats=repeats)
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    groups = Groups(check_table(noise(len(y), 2), y))
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.randint(len(sizes), (50,), generator=generator)
    first = torch.randint(len(y), (50, 40), generator=generator)
    second = groups.another(first, fixed, generator)
    of_fixed = fixed[:, None].expand_as(first)
    assert torch.equal(y[first, of_fixed], y[second, of_fixed])
    assert not (first == second).any()
    alike = groups.alike(first[:, 0], fixed, 40, generator)
    assert torch.equal(y[alike, of_fixed], y[first[:, :1], fixed[:, None]].expand_as(alike))


def test_partners_are_drawn_evenly() -> None:
    y = combinations(2, 5)
    groups, generator = Groups(check_table(noise(10, 2), y)), torch.Generator().manual_seed(0)
    fixed, first = torch.zeros(1, dtype=torch.int64), torch.full((1, 8000), 2)
    partners = groups.another(first, fixed, generator).flatten().bincount(minlength=10)
    # four others of the same value: 2000 each, 4 standard errors
    assert partners[2] == 0 and not partners[5:].any()
    assert ((partners[[0, 1, 3, 4]] - 2000).abs() < 4 * math.sqrt(8000 * 3 / 16)).all()
    alike = groups.alike(first[0, :1], fixed, 8000, generator).flatten().bincount(minlength=10)
    assert not alike[5:].any()
    assert ((alike[:5] - 1600).abs() < 4 * math.sqrt(8000 * 4 / 25)).all()


@pytest.mark.parametrize("score", [beta_vae_score, factor_vae_score])
def test_passes_that_fit_memory_give_as_many_points(
    score: Callable[..., Score], monkeypatch: pytest.MonkeyPatch
) -> None:
    y = combinations(4, 5, repeats=3)
    whole = score(y.double(), y, num_train=300, num_test=70)
    monkeypatch.setattr("ppl_vae.evaluation.disentanglement_metrics.fixed_factor._PASS", 1000)
    parts = score(y.double(), y, num_train=300, num_test=70)
    assert parts.value == whole.value == 1.0
    assert parts.settings == {"batch_size": 64, "num_train": 300, "num_test": 70, "seed": 0} | (
        {"least_std": 0.0} if score is factor_vae_score else {}
    )


# -- all of them, of a guide -------------------------------------------------------------------------


class Program(nn.Module):
    """A guide whose mean is x rotated, in training mode with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Linear(2, 2, bias=False)
        self.turn.weight.data.copy_(rotation(0.3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.dropout(self.turn(x)), 0.5).to_event(1))


def function_guide() -> Callable[..., None]:
    turn = Program().turn

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        assert y is None  # codes are not to be told the factors
        pyro.module("turn", turn)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(turn(x), 0.5).to_event(1))

    return guide


def factor_data() -> tuple[Tensor, Tensor]:
    y = combinations(3, 4, repeats=8)
    return y.float() + 0.05 * noise(len(y), 2).float(), y


@pytest.mark.parametrize("make", [Program, function_guide])
def test_codes_of_a_guide_are_its_means_however_data_come(make: Callable[[], Callable[..., Any]]) -> None:
    x, y = factor_data()
    with torch.no_grad():
        expected = disentanglement(Program().turn(x), y, **QUIET).summary()
    guide = make()
    pyro.get_param_store().clear()
    state = {key: str(value) for key, value in get_rng_state().items()}
    loader = DataLoader(TensorDataset(x, y), batch_size=20)
    for data in ((x, y), Split(x, y.float()), Split(x, y), TensorDataset(x, y), loader):
        found = disentanglement(guide, data, batch_size=17, **QUIET).summary()
        assert found.keys() == expected.keys()
        for name, score in expected.items():
            if isinstance(score, dict):
                assert found[name]["value"] == pytest.approx(score["value"], abs=2e-3), name
            else:
                assert found[name] == score
    assert {key: str(value) for key, value in get_rng_state().items()} == state
    assert not list(pyro.get_param_store().keys())
    if isinstance(guide, Program):
        assert guide.training and guide.dropout.training


def test_all_scores_are_those_of_their_functions() -> None:
    x, y = factor_data()
    result = disentanglement(
        x,
        y,
        names=["size", "colour"],
        continuous=[True, False],
        estimator="random_forest",
        seed=3,
        progress=False,
    )
    assert list(result.scores) == [
        *("MIG", "SAP", "DCI disentanglement", "DCI completeness", "DCI informativeness"),
        *("beta-VAE", "FactorVAE", "modularity", "explicitness"),
    ]
    parts = dci(x, y, estimator="random_forest", seed=3)
    for name, score in {
        "MIG": mutual_information_gap(x, y, seed=3),
        "SAP": sap_score(x, y, continuous=[True, False], seed=3),
        "DCI disentanglement": parts.disentanglement,
        "DCI completeness": parts.completeness,
        "DCI informativeness": parts.informativeness,
        "beta-VAE": beta_vae_score(x, y, seed=3),
        "FactorVAE": factor_vae_score(x, y, seed=3),
        "modularity": modularity(x, y, seed=3),
        "explicitness": explicitness(x, y, seed=3),
    }.items():
        found = result.scores[name]
        assert found.value == score.value and found.settings == score.settings, name
        assert found.standard_error == score.standard_error or math.isnan(score.standard_error)
        assert 0 <= found.value <= 1
    assert torch.equal(result.importance, parts.importance)
    torch.testing.assert_close(result.entropy, torch.tensor([3.0, 4.0], dtype=torch.float64).log())
    assert result.mutual_information.shape == (2, 2) and result.num_data == 96
    table = result.table
    assert list(table.index) == list(result.scores) and list(table.columns) == [
        "score",
        "standard_error",
        "settings",
    ]
    assert table.loc["MIG", "score"] == result.scores["MIG"].value
    assert table.loc["MIG", "settings"] == "bins=20, bootstrap=100, seed=3"
    summary = result.summary()
    assert summary["factors"] == ["size", "colour"] and summary["num_data"] == 96
    assert summary["DCI completeness"]["standard_error"] is None
    lines = str(result).splitlines()
    assert lines[0] == "2 codes against size, colour; 96 data" and len(lines) == 10
    assert lines[1].startswith(f"MIG                  {result.scores['MIG'].value:.3f} +- ")


def test_a_random_part_of_many_data_is_taken_by_the_seed() -> None:
    x, y = factor_data()
    whole = disentanglement(x, y, **QUIET)
    part, again, other = (disentanglement(x, y, num_data=60, **(QUIET | {"seed": s})) for s in (0, 0, 1))
    assert (
        part.num_data == 60 and whole.num_data == 96 == disentanglement(x, y, num_data=None, **QUIET).num_data
    )
    assert part.summary() == again.summary() != other.summary()
    guide = Program()
    of_guide = disentanglement(guide, (x, y), num_data=60, **QUIET)
    with torch.no_grad():
        of_codes = disentanglement(guide.turn(x), y, num_data=60, **QUIET)
    torch.testing.assert_close(of_guide.mutual_information, of_codes.mutual_information)


def test_a_guide_of_the_library_runs_on_images_that_are_drawn_anew() -> None:
    y = combinations(2, 3, repeats=10)
    x = torch.rand(len(y), 6)
    result = disentanglement(MeanFieldGuide(MLP(6), 3), Split(x, y.float(), dynamic=True), **QUIET)
    again = disentanglement(MeanFieldGuide(MLP(6), 3), Split(x, y.float(), dynamic=True), **QUIET)
    assert result.mutual_information.shape == again.mutual_information.shape == (3, 2)


def needs_labels(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x + y, 1.0).to_event(1))


def of_images(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x[..., None].expand(-1, -1, 2), 1.0).to_event(2))


Y = combinations(2, 3, repeats=4)
X = noise(24, 2).float()


@pytest.mark.parametrize(
    ("codes", "data", "of", "match"),
    [
        (X[:, :1], Y, {}, "codes: expected two latent dimensions or more"),
        (X[:, 0], Y, {}, r"codes: expected a tensor \[n, latent\], got shape \[24\]"),
        (X.where(X != X[5, 1], math.nan), Y, {}, "codes: expected finite values, .* first in row 5"),
        (X[:20], Y, {}, "factors: expected one row for each of 20 codes, got 24"),
        (X, Y[:, 0], {}, r"factors: expected a tensor \[n, factors\] of whole numbers, got shape \[24\]"),
        (X, Y + 0.5, {}, "factors: expected whole numbers, got torch.float32 with others"),
        (X, Y[:, :1], {}, "factors: expected 2 or more, to compare, got 1"),
        (X, Y * torch.tensor([1, 0]), {}, "factors: expected factors that vary, got one value in column 1"),
        (X, torch.cat([Y[:23], torch.tensor([[0, 9]])]), {}, "value 9 of column 1 in one datum only"),
        (X, Y, {"bins": 0}, "bins: expected a whole number above 0"),
        (X, Y, {"bootstrap": 1}, "bootstrap: expected 0 or at least 2"),
        (X, Y, {"estimator": "tree"}, "estimator: unknown 'tree'"),
        (X, Y, {"continuous": [True]}, "continuous: expected a bool, or one for each of 2 factors"),
        (X, Y, {"names": ["a"]}, "names: expected a name for each of 2 factors"),
        (X, Y, {"names": "ab"}, "names: expected a name for each of 2 factors"),
        (X, Y, {"seed": -1}, "seed: expected a whole number from 0"),
        (X, Y, {"num_points": 1}, "num_points: expected at least 2, got 1"),
        (X, Y, {"num_data": 0}, "num_data: expected a whole number above 0"),
        (X, Y, {"num_data": 4}, "factors: expected"),
        (3, Y, {}, "codes: expected a guide or a tensor"),
        (Program(), X, {}, "data: expected factors as y, got x alone"),
        (Program(), Rows(X), {}, "data: expected factors as y, got x alone"),
        (Program(), DataLoader(Rows(X), 5), {}, "data: expected factors as y, got x alone"),
        (Program(), (X, Y[:20]), {}, "data: expected a row of factors for each of 24 data, got 20"),
        (Program(), (X, Y[:, 0]), {}, r"data: y: expected a tensor \[n, factors\]"),
        (Program(), (X[:, :1], Y), {}, r"data: .*can't run on a batch of shape \[24, 1\]"),
        (Program(), (X * math.inf, Y), {}, "data: expected finite x"),
        (Program(), (X, Y), {"device": "abacus"}, "device: expected 'cpu'"),
        (needs_labels, (X, Y), {}, "codes: expected a guide of x alone"),
        (of_images, (X, Y), {}, r"codes: expected a guide with a vector z, \[n, latent\], got \[24, 2, 2\]"),
    ],
)
def test_wrong_input_is_named(codes: Any, data: Any, of: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        disentanglement(codes, data, **(QUIET | of))


def test_what_can_not_be_scored_is_said_before_the_guide_runs() -> None:
    def never(x: Tensor) -> None:
        raise AssertionError

    with pytest.raises(ValueError, match="factors that vary"):
        disentanglement(never, (X, Y * 0), **QUIET)
    with pytest.raises(ValueError, match="names"):
        disentanglement(never, (X, Y), names=["a"], **QUIET)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: dci(X, Y, estimator="boosting"), "estimator: unknown 'boosting'"),  # type: ignore[arg-type]
        (lambda: factor_vae_score(X, Y, batch_size=1), "batch_size: expected at least 2"),
        (lambda: factor_vae_score(X, Y, least_std=-1.0), "least_std"),
        (lambda: beta_vae_score(X, Y, num_train=1), "num_train: expected points of two factors"),
        (lambda: beta_vae_score(X, Y, num_test=0), "num_test: expected a whole number above 0"),
        (lambda: modularity(X, Y[:, :1]), "factors: expected 2 or more"),
        (lambda: explicitness(X[:2], Y[[0, 5]]), "codes: expected more data"),
    ],
)
def test_wrong_settings_of_one_score_are_named(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
