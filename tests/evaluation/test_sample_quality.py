"""Tests of sample quality: against loops, closed forms and torchmetrics; and of the classifier."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.util import get_rng_state
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ppl_vae.data import Split, load_dataset
from ppl_vae.evaluation.classifier import Classifier, train_classifier
from ppl_vae.evaluation.sample_quality import SampleQuality, frechet_distance, sample_quality
from ppl_vae.networks import MLP

QUIET: dict[str, Any] = {"progress": False}
MEASURES = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")


def normal(n: int, features: int = 3, *, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, features, generator=generator, dtype=torch.float64) + shift


def lattice(n: int, features: int, *, seed: int) -> Tensor:
    """Return whole numbers: many equal distances and equal data."""
    return torch.randint(0, 4, (n, features), generator=torch.Generator().manual_seed(seed)).double()


def quality(real: Any, generated: Any, **settings: Any) -> SampleQuality:
    return sample_quality(real, generated, nn.Flatten(), **QUIET, **settings)


def values(result: SampleQuality) -> list[float]:
    return [getattr(result, name) for name in MEASURES]


def loops(real: Tensor, generated: Tensor, k: int) -> dict[str, Any]:
    """Return the four measures' parts by the papers' definitions, a pair at a time."""

    def squared(x: Tensor, y: Tensor) -> float:
        return sum((p - q) ** 2 for p, q in zip(x.tolist(), y.tolist(), strict=True))

    def radius(i: int, data: Tensor) -> float:
        return sorted(squared(data[i], data[j]) for j in range(len(data)) if j != i)[k - 1]

    slack = 1e-9
    real_radii = [radius(i, real) for i in range(len(real))]
    generated_radii = [radius(j, generated) for j in range(len(generated))]
    in_ball = [[squared(x, y) <= r + slack for y in generated] for x, r in zip(real, real_radii, strict=True)]
    in_other = [
        [squared(x, y) <= r + slack for y, r in zip(generated, generated_radii, strict=True)] for x in real
    ]
    return {
        "in_real": [any(row[j] for row in in_ball) for j in range(len(generated))],
        "in_generated": [any(row) for row in in_other],
        "real_neighbors": [sum(row[j] for row in in_ball) for j in range(len(generated))],
        "covered": [any(row) for row in in_ball],
    }


# -- against loops -------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    n=st.integers(5, 24),
    m=st.integers(5, 24),
    features=st.integers(1, 4),
    k=st.integers(1, 4),
    memory=st.sampled_from([1, 2000, 2**28]),
    make=st.sampled_from([normal, lattice]),
    seed=st.integers(0, 1000),
)
def test_precision_recall_density_and_coverage_are_those_of_loops(
    n: int, m: int, features: int, k: int, memory: int, make: Callable[..., Tensor], seed: int
) -> None:
    real, generated = make(n, features, seed=seed), make(m, features, seed=seed + 1)
    result = quality(real, generated, k=k, memory=memory)
    expected = loops(real, generated, k)
    for name, values in expected.items():
        assert getattr(result, name).tolist() == values, name
    assert result.precision == pytest.approx(np.mean(expected["in_real"]))
    assert result.recall == pytest.approx(np.mean(expected["in_generated"]))
    assert result.density == pytest.approx(np.mean(expected["real_neighbors"]) / k)
    assert result.coverage == pytest.approx(np.mean(expected["covered"]))


@settings(max_examples=10)
@given(n=st.integers(3, 12), m=st.integers(3, 12), features=st.integers(1, 4), seed=st.integers(0, 1000))
def test_kernel_distance_and_its_error_are_those_of_loops(n: int, m: int, features: int, seed: int) -> None:
    x, y = (a.numpy() for a in (normal(n, features, seed=seed), normal(m, features, seed=seed + 1, shift=1)))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / features + 1) ** 3)

    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(kernel(a, b) for a in x for b in y) / (n * m)
    found = quality(torch.tensor(x), torch.tensor(y), k=1, memory=300)
    assert found.kernel_distance == pytest.approx(xx + yy - 2 * xy, rel=1e-9, abs=1e-9)
    of_x = [
        sum(kernel(x[i], x[j]) for j in range(n) if j != i) / (n - 1) - sum(kernel(x[i], b) for b in y) / m
        for i in range(n)
    ]
    of_y = [
        sum(kernel(y[i], y[j]) for j in range(m) if j != i) / (m - 1) - sum(kernel(y[i], a) for a in x) / n
        for i in range(m)
    ]
    error = math.sqrt(4 * np.var(of_x, ddof=1) / n + 4 * np.var(of_y, ddof=1) / m)
    assert found.standard_errors["kernel_distance"] == pytest.approx(error, rel=1e-9)


def test_standard_errors_are_those_of_measuring_again_without_each_group() -> None:
    n, m, k = 30, 47, 2
    real, generated = normal(n, seed=1), normal(m, seed=2, shift=0.5)
    result = quality(real, generated, k=k, seed=5)
    torch.manual_seed(int(np.random.SeedSequence((5, 2)).generate_state(1)[0]))
    groups = [torch.randperm(size) % 10 for size in (n, m)]
    variance = np.zeros(len(MEASURES))
    for fewer in (
        [(real[groups[0] != g], generated) for g in range(10)],
        [(real, generated[groups[1] != g]) for g in range(10)],
    ):
        found = np.array([values(quality(*pair, k=k)) for pair in fewer])
        variance += 9 * found.var(0)
    for name, expected in zip(MEASURES, np.sqrt(variance), strict=True):
        if name != "kernel_distance":
            assert result.standard_errors[name] == pytest.approx(expected, rel=1e-6), name


# -- known values --------------------------------------------------------------------------------------


def test_a_set_against_itself() -> None:
    x = normal(60, 5, seed=0, scale=10, shift=100)
    result = quality(x, x.clone(), k=3)
    assert result.frechet_distance == pytest.approx(0, abs=1e-8)
    assert (result.precision, result.recall, result.coverage) == (1, 1, 1)
    assert result.density == pytest.approx(4 / 3)  # a datum is in its own ball too
    assert result.kernel_distance < 0  # without the own pairs within a set, with them across


def test_sets_far_from_each_other() -> None:
    x = normal(60, 4, seed=0)
    result = quality(x, normal(40, 4, seed=1, shift=1000))
    assert (result.precision, result.recall, result.density, result.coverage) == (0, 0, 0, 0)
    assert result.frechet_distance == pytest.approx(4 * 1000**2, rel=1e-2)
    assert result.kernel_distance > 1e15


def test_copies_of_one_datum_are_precise_but_cover_nothing_else() -> None:
    x = normal(100, 4, seed=0)
    result = quality(x, x[:1].expand(50, -1))
    assert result.precision == 1
    assert result.recall == 0.01
    assert result.coverage < 0.2


def test_frechet_distance_of_normals_is_the_closed_form() -> None:
    n, d = 20_000, 4
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(2, d, d, generator=generator, dtype=torch.float64)
    means = torch.randn(2, d, generator=generator, dtype=torch.float64)
    a, b = (normal(n, d, seed=i) @ roots[i].mT + means[i] for i in range(2))
    covariances = [(root @ root.mT).numpy() for root in roots]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    exact = float((means[0] - means[1]).square().sum()) + np.trace(sum(covariances) - 2 * root)
    errors = [
        quality(a[i : i + 1000], b[i : i + 1000], k=1).standard_errors["frechet_distance"]
        for i in (0, 1000, 2000)
    ]
    error = float(np.mean(errors)) / math.sqrt(n / 1000)
    assert error < 0.05 * exact
    assert abs(frechet_distance(a, b) - exact) < 4 * error


@pytest.mark.parametrize(("n", "m", "features"), [(50, 30, 3), (200, 40, 10), (30, 200, 1)])
def test_frechet_distance_is_that_of_torchmetrics(n: int, m: int, features: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Same(nn.Flatten):
        num_features = features

    a, b = normal(n, features, seed=1), normal(m, features, seed=2, scale=2, shift=1)
    metric = FrechetInceptionDistance(Same(), normalize=True).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert quality(a, b).frechet_distance == pytest.approx(float(metric.compute()), rel=1e-6)


def test_kernel_distance_of_sets_of_one_size_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = normal(50, 6, seed=1), normal(50, 6, seed=2, scale=2, shift=1)
    assert quality(a, b).kernel_distance == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_frechet_distance_of_fewer_data_than_features_is_not_rounding() -> None:
    x = normal(20, 100, seed=0, scale=1e3)
    shift = normal(1, 100, seed=1)
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-6)
    # sets in dimensions of their own: no overlap at all
    a, b = x.clone(), x.clone()
    a[:, 50:], b[:, :50] = 0, 0
    exact = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    assert frechet_distance(a, b) == pytest.approx(float(exact), rel=1e-12)


def test_sets_of_one_distribution_have_the_expected_density_coverage_and_kernel_distance() -> None:
    n, m, k, repeats = 40, 60, 3, 80
    results = [quality(normal(n, seed=i), normal(m, seed=10_000 + i), k=k) for i in range(repeats)]

    def check(found: list[float], expected: float) -> None:
        error = np.std(found, ddof=1) / math.sqrt(repeats)
        assert abs(np.mean(found) - expected) < 4 * error

    check([r.density for r in results], 1.0)
    check([r.kernel_distance for r in results], 0.0)
    none_of_k = math.comb(n - 1, k) / math.comb(n - 1 + m, k)  # the k nearest of all are real
    check([r.coverage for r in results], 1 - none_of_k)
    assert results[0].expected_coverage == pytest.approx(1 - none_of_k)


def test_standard_errors_tell_the_spread_over_new_sets_and_err_on_the_large_side() -> None:
    repeats = 40
    results = [
        quality(normal(200, seed=i), normal(100, seed=10_000 + i, scale=0.6, shift=0.2), seed=i)
        for i in range(repeats)
    ]
    spread = np.array([values(r) for r in results]).std(0, ddof=1)
    errors = np.array([[r.standard_errors[name] for name in MEASURES] for r in results])
    ratio = dict(zip(MEASURES, spread / np.sqrt(np.square(errors).mean(0)), strict=True))
    # the spread itself is known to 1 / sqrt(2 * 39) = 11 %; three of these
    for name, found in ratio.items():
        assert found < 1 + 3 * 0.11, name
        assert found > (0.25 if name == "precision" else 0.45), name  # precision is 0.999 here


# -- features and data ---------------------------------------------------------------------------------


def test_all_forms_of_features_and_of_data_give_the_same() -> None:
    torch.manual_seed(0)
    classifier = Classifier(MLP((1, 4, 4), hidden=(8,), dropout=0.5), 3)
    real, generated = torch.rand(30, 1, 4, 4), torch.rand(20, 1, 4, 4)
    before = {name: t.clone() for name, t in classifier.state_dict().items()}
    expected = sample_quality(real, generated, classifier, **QUIET)
    assert classifier.training and classifier.encoder.training
    assert all(torch.equal(t, before[name]) for name, t in classifier.state_dict().items())
    assert expected.num_features == 8
    loader = DataLoader(TensorDataset(generated), 7)
    for other in (
        sample_quality(real, generated, classifier.features, **QUIET),
        sample_quality(real, generated, lambda x: classifier.features(x), **QUIET),
        sample_quality(Split(real), (generated, torch.zeros(20).long()), classifier, **QUIET, batch_size=3),
        sample_quality(real.numpy(), loader, classifier, **QUIET),
    ):
        assert values(other) == pytest.approx(values(expected), rel=1e-4, abs=1e-9)
    logits = sample_quality(real, generated, nn.Sequential(classifier), **QUIET)
    assert logits.num_features == 3


def test_default_features_are_those_of_a_classifier_trained_on_the_real_data() -> None:
    digits = load_dataset("digits")
    part = Split(digits.train.x[:200], digits.train.y[:200])
    expected = sample_quality(
        part, digits.test.x[:50], train_classifier(part, **QUIET, seed=3), **QUIET, seed=3
    )
    found = sample_quality(part, digits.test.x[:50], **QUIET, seed=3)
    assert values(found) == values(expected)
    assert found.num_features == 128


def test_noise_on_images_makes_all_measures_of_quality_worse() -> None:
    digits = load_dataset("digits")
    classifier = train_classifier(digits.train, epochs=5, learning_rate=3e-3, **QUIET)
    real, x = digits.validation.x, digits.test.x
    noise = 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    good, bad = (sample_quality(real, y, classifier, **QUIET) for y in (x, (x + noise).clamp(0, 1)))
    for name in ("precision", "density", "coverage"):
        assert getattr(bad, name) < 0.8 * getattr(good, name), name
    for name in ("frechet_distance", "kernel_distance"):
        assert getattr(bad, name) > 2 * getattr(good, name), name
    one_class = sample_quality(real, x[digits.test.y == 1], classifier, **QUIET)
    assert one_class.recall < 0.5 * good.recall
    assert one_class.coverage < 0.5 * good.coverage
    assert one_class.precision > 0.8 * good.precision


def test_draws_of_bits_follow_the_seed_and_leave_the_streams_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    real = Split(torch.rand(30, 5, generator=generator), dynamic=True)
    generated = torch.rand(20, 5, generator=generator).round()
    before = get_rng_state()
    one, same, other = (quality(real, generated, seed=seed) for seed in (1, 1, 2))
    after = get_rng_state()
    assert values(one) == values(same) != values(other)
    assert one.standard_errors == same.standard_errors
    assert torch.equal(before["torch"], after["torch"])
    assert before["random"] == after["random"]
    np.testing.assert_array_equal(before["numpy"][1], after["numpy"][1])


def test_summary_and_table_hold_the_measures_with_their_errors(capsys: pytest.CaptureFixture[str]) -> None:
    result = quality(normal(40, seed=0), normal(30, seed=1))
    summary = result.summary()
    assert {name: summary.pop(name) for name in MEASURES} == {
        name: {"value": getattr(result, name), "standard_error": result.standard_errors[name]}
        for name in MEASURES
    }
    assert summary == {"num_real": 40, "num_generated": 30, "num_features": 3, "k": 5}
    assert all(math.isfinite(error) and error > 0 for error in result.standard_errors.values())
    lines = str(result).splitlines()
    assert lines[0] == "value and standard error; 30 generated and 40 real data, 3 features, k=5"
    assert [line[:20].strip() for line in lines[1:]] == [name.replace("_", " ") for name in MEASURES]
    assert f"({result.expected_coverage:.4g} if" in lines[-1]
    assert capsys.readouterr().err == ""
    sample_quality(normal(40, seed=0), normal(30, seed=1), nn.Flatten())
    assert "distances" in capsys.readouterr().err


def test_errors_of_sets_too_small_for_a_jackknife_are_nan_and_values_stay() -> None:
    result = quality(normal(6, seed=0), normal(30, seed=1), k=5)
    assert all(math.isfinite(value) for value in values(result))
    unknown = {name for name, error in result.standard_errors.items() if math.isnan(error)}
    assert unknown == {"precision", "recall", "density", "coverage"}
    smallest = quality(normal(2, seed=0), normal(30, seed=1), k=1)
    assert math.isnan(smallest.standard_errors["frechet_distance"])
    assert math.isfinite(smallest.frechet_distance)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected a whole number above 0"),
        ({"k": 1.5}, TypeError, "k: expected"),
        ({"k": 8}, ValueError, "generated: expected more than k=8 data, got 8"),
        ({"k": 10}, ValueError, "real: expected more than k=10 data, got 10"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"memory": -1}, ValueError, "memory"),
        ({"seed": -1}, ValueError, "seed"),
        ({"device": "abacus"}, ValueError, "device"),
        ({"features": 3}, TypeError, "features: expected a module or a function of data, got int"),
        ({"features": None}, ValueError, "features: .* since real has no labels"),
        (
            {"features": nn.Linear(3, 2)},
            ValueError,
            r"features: can't run on data of real of shape \[10, 4\]",
        ),
        ({"features": lambda x: x.sum()}, ValueError, r"features: expected them to be \[10, features\], got"),
        ({"features": lambda x: None}, ValueError, "got NoneType"),
        ({"features": lambda x: x.log()}, ValueError, "features: expected finite features of real"),
        (
            {"features": lambda x: x[:, : len(x) - 6]},
            ValueError,
            "generated: expected 4 features as of real, got 2",
        ),
        (
            {"generated": torch.ones(8, 3)},
            ValueError,
            r"generated: expected data of the shape .*\[4\], got \[3\]",
        ),
        ({"generated": torch.full((8, 4), math.nan)}, ValueError, "generated: expected finite x"),
        ({"real": [1, 2]}, TypeError, "real: expected"),
        (
            {"generated": DataLoader(torch.ones(3, 4), 2)},
            ValueError,
            "generated: expected more than k=5 data",
        ),
        ({"generated": DataLoader(torch.ones(0, 4), 2)}, ValueError, "generated: .* got none from it"),
    ],
)
def test_wrong_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"real": -torch.ones(10, 4), "generated": torch.ones(8, 4), "features": nn.Flatten()}
    with pytest.raises(error, match=message):
        sample_quality(**{**arguments, **change}, **QUIET)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(1, 3), torch.ones(4, 3), "a: expected features"),
        (torch.ones(4, 3), torch.ones(4), "b: expected features"),
        (torch.ones(4, 3), torch.ones(4, 2), "b: expected 3 features as of a, got 2"),
        (torch.ones(4, 3), torch.ones(4, 3) / 0, "b: expected finite features"),
        ([1.0, 2.0], torch.ones(4, 3), "a: expected features .*, got list"),
    ],
)
def test_wrong_features_of_a_frechet_distance_are_named(a: Any, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


# -- the classifier ------------------------------------------------------------------------------------


def test_classifier_of_images_learns_digits() -> None:
    digits = load_dataset("digits")
    classifier = train_classifier(digits.train, epochs=5, learning_rate=3e-3, **QUIET)
    assert classifier.accuracy(digits.validation) > 0.92
    assert classifier.features(digits.test.x[:3]).shape == (3, 128)


def test_classifier_of_vectors_tells_classes_of_any_scale_apart() -> None:
    y = torch.arange(300) % 3
    x = normal(300, 4, seed=0, scale=1e4) + 1e5 * y.unsqueeze(1)
    classifier = train_classifier((x, y), epochs=20, **QUIET)
    assert classifier.accuracy((x, y)) > 0.98
    assert classifier.head.weight.dtype == torch.float64
    right = (classifier(x).argmax(-1) == y).double().mean()
    assert classifier.accuracy((x, y), batch_size=7) == pytest.approx(float(right))
    assert not classifier.training


def test_classifier_follows_its_seed_and_leaves_the_streams_alone() -> None:
    x, y = normal(50, 4, seed=0), torch.arange(50) % 2
    before = get_rng_state()
    one, same, other = (train_classifier((x, y), seed=seed, **QUIET) for seed in (1, 1, 2))
    after = get_rng_state()
    with torch.no_grad():
        assert torch.equal(one(x), same(x))
        assert not torch.allclose(one(x), other(x))
    assert torch.equal(before["torch"], after["torch"])
    assert all(p.grad is None for p in one.parameters())


def test_accuracy_on_bits_drawn_at_random_repeats_and_leaves_the_stream_alone() -> None:
    torch.manual_seed(0)
    classifier = Classifier(nn.Identity(), 2, features=6)
    data = Split(torch.full((500, 6), 0.5), torch.arange(500) % 2, dynamic=True)
    before = torch.get_rng_state()
    assert classifier.accuracy(data) == classifier.accuracy(data)
    assert torch.equal(before, torch.get_rng_state())


def test_classifier_leaves_out_data_without_a_label() -> None:
    x, y = normal(60, 4, seed=0), torch.arange(60) % 3 - 1
    found = train_classifier((x, y), **QUIET)
    expected = train_classifier((x[y >= 0], y[y >= 0]), **QUIET)
    with torch.no_grad():
        assert torch.equal(found(x), expected(x))
    assert found.num_classes == 2
    assert found.accuracy((x, y)) == found.accuracy((x[y >= 0], y[y >= 0]))


def test_classifier_trains_an_encoder_of_yours() -> None:
    torch.manual_seed(0)
    encoder = MLP(4, hidden=(7,))
    before = [p.detach().clone() for p in encoder.parameters()]
    y = torch.arange(40) % 2
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) + 3 * y.unsqueeze(1)
    classifier = train_classifier((x, y), encoder=encoder, epochs=30, learning_rate=1e-2, **QUIET)
    assert classifier.encoder is encoder
    assert all(not torch.equal(p, q) for p, q in zip(encoder.parameters(), before, strict=True))
    assert classifier.features(x).shape == (40, 7)
    assert classifier.accuracy((x, y)) > 0.9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train": torch.ones(9, 4)}, ValueError, "train: expected data with labels, got none"),
        ({"train": (torch.ones(9, 4), torch.zeros(9).long())}, ValueError, "two classes or more, got 0 only"),
        ({"train": (torch.ones(9, 4), torch.full((9,), -1))}, ValueError, "got -1 for all"),
        (
            {"train": (torch.ones(9, 4), torch.full((9,), -2))},
            ValueError,
            "expected labels from 0, .* got -2",
        ),
        ({"train": (torch.ones(9, 4), torch.ones(9, 2))}, ValueError, r"got y of shape \[9, 2\]"),
        ({"train": (torch.ones(9, 4), torch.ones(8).long())}, ValueError, "train: expected one label y"),
        ({"train": DataLoader(torch.ones(9, 4))}, TypeError, "train: expected data in memory"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate"),
        ({"learning_rate": 1e300}, FloatingPointError, "cross-entropy became .* try a lower one"),
        ({"seed": -1}, ValueError, "seed"),
        ({"device": "abacus"}, ValueError, "device"),
        ({"encoder": lambda x: x}, TypeError, "encoder: expected a module, got function"),
        (
            {"encoder": nn.Flatten()},
            TypeError,
            "features: expected the number of features that Flatten gives",
        ),
    ],
)
def test_wrong_input_of_the_classifier_is_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"train": (normal(9, 4, seed=0), torch.arange(9) % 3)}
    with pytest.raises(error, match=message):
        train_classifier(**{**arguments, **change}, **QUIET)
