"""Tests of augmentation: against moments of the linear-Gaussian model, classes, scikit-learn, and digits."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import function_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.util import get_rng_state
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ppl_vae import fit
from ppl_vae.data import Split, load_dataset, semi_supervised
from ppl_vae.evaluation import encode
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.tasks.augmentation import AugmentationScore, augment, augmentation_score

QUIET: dict[str, Any] = {"progress": False}


def linear() -> LinearGaussian:
    torch.manual_seed(0)
    return LinearGaussian(2, 5, scale=0.7).double()


def guide_of(model: LinearGaussian) -> Callable[..., None]:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), torch.no_grad():
            pyro.sample("z", model.posterior(x))

    return guide


@pytest.mark.parametrize(("scale", "draw"), [(1.0, False), (0.5, False), (2.0, True), (0.0, False)])
def test_new_data_have_the_mean_and_covariance_of_decoded_posterior_draws(scale: float, draw: bool) -> None:
    model = linear()
    torch.manual_seed(1)
    x = torch.randn(3, 5).double()
    result = augment(model, guide_of(model), x, copies=4000, scale=scale, draw=draw)
    new = result.x.reshape(4000, 3, 5)
    with torch.no_grad():
        posterior = model.posterior(x)
        mean = posterior.mean @ model.weight.mT + model.bias
        variance = scale**2 * model.weight @ posterior.covariance_matrix @ model.weight.mT
        variance = variance.diagonal(dim1=-2, dim2=-1) + draw * 0.7**2
    assert float((new.mean(0) - mean).abs().max()) <= 1e-9 + 4 * float((variance.max() / 4000).sqrt())
    # a variance of 4000 normal draws has the relative error sqrt(2 / 4000)
    torch.testing.assert_close(new.var(0), variance, rtol=4 * math.sqrt(2 / 4000), atol=1e-12)


@settings(max_examples=12)
@given(
    n=st.integers(1, 6),
    copies=st.integers(1, 3),
    method=st.sampled_from(["posterior", "interpolation"]),
    draw=st.booleans(),
)
def test_shapes_labels_and_sources(n: int, copies: int, method: Any, draw: bool) -> None:
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, (1, 2, 2), hidden=4)))
    guide = MeanFieldGuide(MLP((1, 2, 2), hidden=4), 2)
    x, y = torch.bernoulli(torch.full((n, 1, 2, 2), 0.5)), torch.arange(n) % 3
    result = augment(model, guide, x, y, copies=copies, method=method, draw=draw)
    assert result.x.shape == (copies * n, 1, 2, 2) and result.copies == copies
    assert result.source.tolist() == list(range(n)) * copies
    assert result.y is not None and torch.equal(result.y, y[result.source])
    assert torch.equal(result.original, x)
    assert bool(((result.x == 0) | (result.x == 1)).all()) == draw


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_interpolation_stays_between_latents_of_the_same_class(scale: float) -> None:
    model = linear()
    guide = guide_of(model)
    torch.manual_seed(2)
    y = torch.tensor([2, 0, 1, 0, 2, 2, 5])
    x = torch.randn(7, 5).double()
    result = augment(model, guide, x, y, copies=300, method="interpolation", scale=scale)
    z = encode(guide, x).z
    with torch.no_grad():
        found = (result.x.reshape(300, 7, 5) - model.bias) @ torch.linalg.pinv(model.weight).mT
    for i in range(7):
        others = [j for j in range(7) if y[j] == y[i] and j != i]
        if not others:
            torch.testing.assert_close(found[:, i], z[i].expand(300, 2))
            continue
        ways = z[others] - z[i]
        moved = found[:, i] - z[i]
        shares = (moved @ ways.mT) / ways.square().sum(1)  # [300, others]
        off = (moved[:, None] - shares[..., None] * ways).norm(dim=-1)
        nearest = off.argmin(1)
        assert float(off.amin(1).max()) < 1e-9  # each is on the way to one of them
        share = shares.gather(1, nearest[:, None])
        assert float(share.min()) > -1e-9 and float(share.max()) <= scale + 1e-9
        if scale:
            # uniform shares have the mean scale / 2, and each other datum is as likely
            assert abs(float(share.mean()) - scale / 2) < 4 * scale / math.sqrt(12 * 300)
            counts = nearest.bincount(minlength=len(others)).double()
            assert float((counts / 300 - 1 / len(others)).abs().max()) < 4 * math.sqrt(0.25 / 300)


def test_programs_that_take_labels_decode_with_them() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(10.0 * y[:, None] + z * x.new_ones(2), 0.1).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, :1] - 10.0 * y[:, None], 0.2).to_event(1))

    y = torch.tensor([0, 3, 3, 0])
    x = (10.0 * y[:, None] + torch.zeros(4, 2)).float()
    for method in ("posterior", "interpolation"):
        result = augment(model, guide, x, y, method=method, copies=3)  # type: ignore[arg-type]
        assert result.y is not None and float((result.x - 10.0 * result.y[:, None]).abs().max()) < 1.5


def test_hierarchies_are_augmented_by_draws_alone() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(x, 0.1).to_event(1))
            pyro.sample("z2", dist.Normal(z1 / 2, 0.7).to_event(1))

    x = torch.randn(4, 2)
    new = augment(model, guide, x, copies=2).x.reshape(2, 4, 2)
    assert 0 < float((new - x).abs().max()) < 0.6
    with pytest.raises(ValueError, match=r"one latent site 'z' to move in, got \['z1', 'z2'\]"):
        augment(model, guide, x, scale=0.5)


def test_plain_functions_run_and_nothing_of_the_caller_changes() -> None:
    model, guide, modules = function_pair()
    before = [[p.clone() for p in module.parameters()] for module in modules]
    x = torch.bernoulli(torch.full((6, 4), 0.5, dtype=torch.float64))
    state = get_rng_state()
    for arguments in ({"scale": 0.5}, {"scale": 1.0}, {"method": "interpolation", "y": torch.arange(6) % 2}):
        runs = [augment(model, guide, x, **arguments) for _ in range(2)]  # type: ignore[arg-type]
        assert torch.equal(runs[0].x, runs[1].x)
    assert torch.equal(state["torch"], get_rng_state()["torch"])
    assert not list(pyro.get_param_store().keys())
    for module, values in zip(modules, before, strict=True):
        assert module.training and all(map(torch.equal, module.parameters(), values))


def digits() -> Any:
    return load_dataset("digits", binarization="threshold")


def digits_pair() -> tuple[VAE, MeanFieldGuide]:
    torch.manual_seed(0)
    model = VAE(StandardNormal(4), Bernoulli(MLP(4, (1, 8, 8), hidden=32)))
    return model, MeanFieldGuide(MLP((1, 8, 8), hidden=32), 4)


def test_the_score_is_that_of_classifiers_with_and_without_new_data() -> None:
    data = digits()
    model, guide = digits_pair()
    fit(model, guide, data.train.x, epochs=5, batch_size=50, learning_rate=5e-3, **QUIET)
    result = augmentation_score(
        model, guide, data.train, data.test, labels=30, copies=2, repeats=3, seed=4, **QUIET
    )
    for repeat in range(3):
        chosen = semi_supervised(data.train, 30, seed=4 + repeat)
        rows = chosen.y >= 0
        x, y = chosen.x[rows], chosen.y[rows]
        new = augment(model, guide, x, y, copies=2, seed=4 + repeat)
        for found, (xs, ys) in (
            (result.without[repeat], (x, y)),
            (result.augmented[repeat], (torch.cat([x, new.x]), torch.cat([y, new.y]))),  # type: ignore[list-item]
        ):
            classifier = LogisticRegression(max_iter=2000).fit(xs.flatten(1).numpy(), ys.numpy())
            expected = classifier.score(data.test.x.flatten(1).numpy(), data.test.y.numpy())
            assert float(found) == pytest.approx(expected)
    assert result.num_test == 447 and float(result.without.mean()) > 0.4
    # the copies are worth no less than noise: a trained pair's data carry their labels
    mean, error = result.gain
    assert abs(mean) < 0.2 and error > 0


def test_bits_of_a_dynamic_split_are_drawn_once_for_both_classifiers() -> None:
    data = load_dataset("digits", binarization="dynamic")
    model, guide = digits_pair()
    assert data.train.y is not None
    few = Split(data.train.x[:20], None, dynamic=True)
    new = augment(model, guide, few, data.train.y[:20])
    assert new.original.unique().tolist() == [0.0, 1.0] and new.y is not None
    assert torch.equal(new.y, data.train.y[:20])

    class Seen:
        """Keeps what it is trained on."""

        values: ClassVar[list[set[float]]] = []

        def fit(self, x: Any, y: Any) -> "Seen":
            self.values.append(set(x[:20].flatten().tolist()))
            return self

        def score(self, x: Any, y: Any) -> float:
            return 0.5

    augmentation_score(
        model, guide, data.train, data.test, labels=20, copies=1, repeats=2, classifier=Seen, **QUIET
    )
    assert Seen.values == [{0.0, 1.0}] * 4


def test_the_gain_is_paired() -> None:
    without = torch.tensor([0.5, 0.6, 0.9], dtype=torch.float64)
    result = AugmentationScore(without, without + torch.tensor([0.1, 0.1, 0.13]).double(), 20, 5, 100)
    mean, error = result.gain
    assert mean == pytest.approx(0.11) and error == pytest.approx(0.01)
    summary = result.summary()
    assert summary["gain"] == {"mean": mean, "standard_error": error}
    assert summary["without"]["mean"] == pytest.approx(2 / 3)
    assert summary["without"]["standard_error"] == pytest.approx(float(without.std()) / math.sqrt(3))
    assert "0.1100 +- 0.0100" in str(result) and "20 labels, 5 copies, 3 repeats" in str(result)


X, Y = torch.zeros(4, 5).double(), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"copies": 0}, ValueError, "copies"),
        ({"method": "smote"}, ValueError, "method: unknown 'smote'"),
        ({"scale": -1.0}, ValueError, "scale: expected a finite number from 0"),
        (
            {"scale": 1.5, "method": "interpolation", "y": Y},
            ValueError,
            "scale: expected a share from 0 to 1",
        ),
        ({"method": "interpolation"}, ValueError, r"y: expected labels \[n\]"),
        ({"y": Y[:3]}, ValueError, "x: expected one label y per datum"),
        ({"x": Split(X, Y), "y": Y}, ValueError, "y: expected labels in the split or in `y`, got both"),
        ({"x": X / 0}, ValueError, "x: expected finite"),
        ({"x": X[:, :3]}, ValueError, "x: model and guide can't run"),
        ({"memory": 0.0}, ValueError, "memory"),
        ({"seed": 1.5}, TypeError, "seed"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = linear()
    with pytest.raises(error, match=message):
        augment(model, guide_of(model), **{"x": X, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"repeats": 1}, ValueError, "repeats: expected at least 2"),
        ({"train": Split(X)}, ValueError, "train: expected data with labels"),
        ({"test": Split(X)}, ValueError, "test: expected data with labels"),
        ({"labels": 5}, ValueError, "labels: expected at most 2"),
        ({"classifier": 3}, TypeError, "classifier: expected a function"),
    ],
)
def test_wrong_arguments_of_the_score(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = linear()
    data = {"train": Split(X, Y), "test": Split(X, Y), "labels": 2}
    with pytest.raises(error, match=message):
        augmentation_score(model, guide_of(model), **{**data, **arguments}, **QUIET)
