"""Tests of the semi-supervised model, its guide and its data, against sums over the classes."""

import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from helpers import Draws
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae import evaluate, fit, load_run
from ppl_vae.data import Split, batches, check_data, load_dataset, semi_supervised
from ppl_vae.guides.semi_supervised import SemiSupervisedGuide
from ppl_vae.infer import (
    IWAE,
    SVI,
    VIMCO,
    CompiledSVI,
    EnumELBO,
    ScoreFunctionELBO,
    WakeSleep,
    log_weights,
    tracing,
)
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models.semi_supervised import SemiSupervisedVAE
from ppl_vae.networks import MLP, ConvDecoder, ConvEncoder
from ppl_vae.priors import StandardNormal

CLASSES, LATENT, PIXELS = 3, 2, 5
WEIGHTS = (0.5, 0.25, 1.25)
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
Pair = tuple[SemiSupervisedVAE, SemiSupervisedGuide]


@pytest.fixture(autouse=True)
def plain_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    yield
    torch._dynamo.reset()


def pair(alpha: float = 0.0, weights: tuple[float, ...] | None = WEIGHTS, latent: int = LATENT) -> Pair:
    torch.manual_seed(0)
    classifier = MLP(PIXELS, CLASSES, 4)
    likelihood = Bernoulli(MLP(latent, PIXELS, 6, context=CLASSES))
    model = SemiSupervisedVAE(
        StandardNormal(latent), likelihood, CLASSES, weights, classifier=classifier, alpha=alpha
    )
    guide = SemiSupervisedGuide(MLP(PIXELS, None, 6, context=CLASSES), classifier, latent)
    return model.double(), guide.double()


def data(labels: list[int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(len(labels), PIXELS).round().double(), torch.tensor(labels)


def by_class(model: SemiSupervisedVAE, guide: SemiSupervisedGuide, x: Tensor, noise: Tensor) -> Tensor:
    """Return log p(x, y, z) - log q(z | x, y) of each class y, ``[classes, *particles, n]``."""
    found = []
    for c in range(CLASSES):
        y = torch.full((len(x),), c)
        q = guide.family(guide.head(guide.encoder(x, y)))
        z = q.base_dist.loc + q.base_dist.scale * noise
        p_y = math.log(WEIGHTS[c] / sum(WEIGHTS))
        p_z = -0.5 * z.square().sum(-1) - math.log(2 * math.pi) * z.shape[-1] / 2
        logits = model.likelihood.decoder(z, y.expand(z.shape[:-1]))
        p_x = -torch.nn.functional.softplus((1 - 2 * x) * logits).sum(-1)
        found.append(p_y + p_z + p_x - q.log_prob(z))
    return torch.stack(found)


def bounds(
    model: SemiSupervisedVAE, guide: SemiSupervisedGuide, x: Tensor, y: Tensor, noise: Tensor
) -> Tensor:
    """Return the bound of each datum by a sum over classes or, with a label, of that class alone."""
    joint = by_class(model, guide, x, noise)
    log_q = guide.classifier(x).log_softmax(-1).T  # [classes, n]
    log_q = log_q.view(CLASSES, *[1] * (joint.dim() - 2), len(x))
    unlabelled = (log_q.exp() * (joint - log_q)).sum(0)
    rows = [unlabelled[..., i] if c < 0 else joint[c, ..., i] for i, c in enumerate(y.tolist())]
    return torch.stack(rows, -1)


def gradients(loss: Tensor, *modules: nn.Module) -> Tensor:
    parameters = [p for module in modules for p in module.parameters()]
    found = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
    return torch.cat([g.flatten() for g in found])


# The bound


@settings(deadline=None, max_examples=8, derandomize=True)
@given(labels=st.lists(st.integers(-1, CLASSES - 1), min_size=1, max_size=5), k=st.sampled_from([1, 3]))
def test_summing_out_is_the_sum_over_classes_for_any_mixture_of_labels(labels: list[int], k: int) -> None:
    model, guide = pair()
    x, y = data(labels)
    noise = torch.randn(*([k] if k > 1 else []), len(x), LATENT).double()
    expected = bounds(model, guide, x, y, noise)
    expected = (expected.mean(0) if k > 1 else expected).sum()
    with Draws(z=noise):
        loss = EnumELBO(k).differentiable_loss(model, guide, x, y)
    torch.testing.assert_close(-loss, expected, **CLOSE)
    found = gradients(-loss, model, guide)
    torch.testing.assert_close(found, gradients(expected, model, guide), **CLOSE)


def test_a_labelled_bound_contains_the_probability_of_the_label() -> None:
    x, y = data([0, 1, 2, 2, -1])
    noise = torch.randn(4, LATENT).double()
    losses = []
    for weights in (WEIGHTS, None):
        model, guide = pair(weights=weights)
        with Draws(z=noise):
            losses.append(EnumELBO().differentiable_loss(model, guide, x[:4], y[:4]))
    log_p = [math.log(w / sum(WEIGHTS)) for w in WEIGHTS]
    expected = log_p[0] + log_p[1] + 2 * log_p[2] + 4 * math.log(3)
    assert (losses[1] - losses[0]).item() == pytest.approx(expected, abs=1e-10)


def test_no_labels_at_all_are_as_missing_ones() -> None:
    model, guide = pair()
    x, y = data([-1, -1, -1])
    noise = torch.randn(3, LATENT).double()
    with Draws(z=noise):
        one = EnumELBO().differentiable_loss(model, guide, x, y)
        two = EnumELBO().differentiable_loss(model, guide, x)
    torch.testing.assert_close(one, two, **CLOSE)


def test_weights_are_those_of_the_drawn_class_or_of_the_label() -> None:
    model, guide = pair()
    x, y = data([-1, 2, -1, 0])
    noise, drawn = torch.randn(4, 4, LATENT).double(), torch.tensor([1, 2, 0, 0])
    with Draws(z=noise, y=drawn):
        found = log_weights(model, guide, x, y, num_particles=4)
    joint = by_class(model, guide, x, noise)
    log_q = guide.classifier(x).log_softmax(-1)
    for i, c in enumerate(drawn.tolist()):
        expected = joint[c, :, i] - (log_q[i, c] if y[i] < 0 else 0.0)
        torch.testing.assert_close(found[:, i], expected, **CLOSE)


def test_a_known_label_is_never_drawn_otherwise_and_its_divergence_is_zero() -> None:
    model, guide = pair()
    x, y = data([-1, 2, 1, 0])
    with pyro.plate("particles", 500, dim=-2):
        trace = poutine.trace(guide).get_trace(x, y)
        prior = poutine.trace(model).get_trace(None, y)
    for t in (trace, prior):
        assert (t.nodes["y"]["value"][:, 1:] == y[1:]).all()
        assert t.nodes["y"]["value"][:, 0].unique().tolist() == [0, 1, 2]
    result = evaluate(model, guide, (x, y), num_particles=5, progress=False)
    assert torch.equal(result.kl["y"].values[1:], torch.zeros(3).double())
    assert result.kl["y"].values[0] != 0


def test_mean_weight_is_the_evidence_of_data_with_and_without_labels() -> None:
    model, guide = pair(latent=1)
    x, y = data([-1, 2, 1, -1])
    points, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(60))
    per_class = []
    for c, weight in enumerate(WEIGHTS):
        logits = model.likelihood.decoder(points.view(-1, 1, 1), torch.full((60, 1), c))
        p_x = -torch.nn.functional.softplus((1 - 2 * x) * logits).sum(-1)
        log_node = (weights / weights.sum()).log().unsqueeze(-1)
        per_class.append((p_x + log_node).logsumexp(0) + math.log(weight / sum(WEIGHTS)))
    joint = torch.stack(per_class)
    exact = torch.stack([joint[:, 0].logsumexp(0), joint[2, 1], joint[1, 2], joint[:, 3].logsumexp(0)])
    torch.manual_seed(2)
    with torch.no_grad():
        ratio = (log_weights(model, guide, x, y, num_particles=4000) - exact).exp()
    error = ratio.std(0) / math.sqrt(4000)
    assert (error < 0.05).all()
    assert ((ratio.mean(0) - 1).abs() < 4 * error).all()


# The classification loss


@pytest.mark.parametrize(
    "elbo",
    [EnumELBO(), EnumELBO(2), ScoreFunctionELBO(2), VIMCO(3), WakeSleep(3)],
    ids=["EnumELBO", "EnumELBO-2", "ScoreFunctionELBO", "VIMCO", "WakeSleep"],
)
def test_classification_loss_is_in_the_classifiers_gradient_alone(elbo: Any) -> None:
    x, y = data([-1, 2, 1, -1, 0])
    values, found = [], []
    for alpha in (0.0, 1.7):
        model, guide = pair(alpha)
        torch.manual_seed(3)
        loss = elbo.differentiable_loss(model, guide, x, y)
        values.append(loss.detach())
        modules = guide.classifier, model.likelihood, guide.encoder, guide.head
        found.append(gradients(loss, *modules))
    torch.testing.assert_close(values[0], values[1], **CLOSE)
    log_q = guide.classifier(x).log_softmax(-1)[[1, 2, 4], [2, 1, 0]].sum()
    expected = -1.7 * gradients(log_q, *modules)
    torch.testing.assert_close(found[1] - found[0], expected, **CLOSE)
    assert expected.abs().max() > 0.1


def test_classification_loss_leaves_weights_and_evaluation_alone() -> None:
    x, y = data([-1, 2, 1, -1, 0])
    noise = torch.randn(3, 5, LATENT).double()
    found = []
    for alpha in (0.0, 5.0):
        model, guide = pair(alpha)
        torch.manual_seed(4)
        with Draws(z=noise):
            found.append(log_weights(model, guide, x, y, num_particles=3))
    assert torch.equal(*found)


def test_classifier_of_the_guide_and_the_model_is_trained_once_and_saved(tmp_path: Path) -> None:
    model, guide = (program.float() for program in pair(alpha=2.0))
    x, y = data([-1, 2, 1, -1, 0])
    split = (x.float(), y)
    before = guide.predict_proba(split[0]).detach()
    run = fit(model, guide, split, elbo=EnumELBO(), epochs=3, progress=False, output=tmp_path / "run")
    assert not torch.allclose(guide.predict_proba(split[0]), before)
    assert model.classifier is guide.classifier
    loaded = load_run(tmp_path / "run", classes=[SemiSupervisedVAE, SemiSupervisedGuide])
    assert torch.equal(loaded.guide.predict_proba(split[0]), guide.predict_proba(split[0]))
    options: dict[str, Any] = {"num_particles": 3, "progress": False}
    one, two = (evaluate(r.model, r.guide, split, **options) for r in (run, loaded))
    assert torch.equal(one.elbo.values, two.elbo.values)


# Engines


@pytest.mark.parametrize("elbo", [lambda: VIMCO(3), lambda: ScoreFunctionELBO(2)], ids=["VIMCO", "score"])
def test_compiled_steps_are_plain_steps(elbo: Any) -> None:
    x, y = data([-1, 2, 1, -1, 0])
    found = []
    for engine in (SVI, CompiledSVI):
        model, guide = pair(alpha=1.5)
        svi = engine(model, guide, torch.optim.Adam, elbo())
        torch.manual_seed(3)
        losses = [svi.step(x, y.roll(i)) for i in range(5)]  # which data have labels changes
        found.append([*losses, *model.parameters(), *guide.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


def test_weights_are_traced_for_any_mixture_of_labels() -> None:
    model, guide = pair()
    x, y = data([-1, 2, 1, -1, 0])
    noise = torch.randn(2, 5, LATENT).double()

    def run(x: Tensor, y: Tensor, drawn: Tensor) -> Tensor:
        with Draws(z=noise, y=drawn):
            return log_weights(model, guide, x, y, num_particles=2)

    with pyro.validation_enabled(False):
        graph = make_fx(run)(x, y, y.clamp(min=0))
        other = torch.tensor([0, -1, -1, 1, -1])
        drawn = torch.tensor([0, 2, 1, 1, 2])
        torch.testing.assert_close(graph(x, other, drawn), run(x, other, drawn), **CLOSE)


def test_convolutions_take_the_labels_too() -> None:
    event = (1, 5, 4)
    likelihood = Bernoulli(ConvDecoder(LATENT, event, 6, (3,), context=CLASSES))
    model = SemiSupervisedVAE(StandardNormal(LATENT), likelihood, CLASSES)
    encoder = ConvEncoder(event, 6, (3,), context=CLASSES)
    guide = SemiSupervisedGuide(encoder, MLP(event, CLASSES, 5), LATENT)
    x, y = model(None, size=4), torch.tensor([0, -1, 2, -1])
    assert EnumELBO(2).differentiable_loss(model, guide, x, y).isfinite()
    assert log_weights(model, guide, x, y, num_particles=3).shape == (3, 4)


def test_an_estimator_for_reparameterised_draws_refuses_the_guide() -> None:
    model, guide = pair()
    with pytest.raises(ValueError, match="EnumELBO"):
        IWAE(3).differentiable_loss(model, guide, *data([0, -1]))


# Arguments


def test_misfit_labels_are_refused() -> None:
    model, guide = pair()
    x, y = data([-1, 2, 1, -1])
    for labels, error, message in (
        (
            y.float(),
            TypeError,
            "y: expected whole numbers as labels, -1 where there is none, got torch.float32",
        ),
        (y[:3], ValueError, "y: expected one label per datum, [4], got [3]"),
        (y.unsqueeze(-1), ValueError, "y: expected one label per datum, [4], got [4, 1]"),
    ):
        for program in (model, guide):
            with pytest.raises(error, match="^" + re.escape(message)):
                program(x, labels)
    with pytest.raises(ValueError, match=r"^size: expected the number of data that are given, 4, got 3"):
        model(None, y, size=3)


@pytest.mark.parametrize("bad", [CLASSES, -2])
def test_a_label_out_of_range_anywhere_in_the_data_is_found_before_any_work(bad: int) -> None:
    model, guide = (program.float() for program in pair())
    x, y = data([-1, 2, 1, -1] * 15)
    y[47] = bad
    message = (
        f"^data: datum 47 is outside the support of site 'label', .*: its values reach from {bad} to {bad}"
    )
    with pytest.raises(ValueError, match=message):
        fit(model, guide, (x.float(), y), elbo=EnumELBO(), epochs=1, batch_size=10, progress=False)


def test_bad_constructor_arguments_are_refused() -> None:
    likelihood = Bernoulli(MLP(LATENT, PIXELS, 6, context=CLASSES))
    for arguments, options, message in (
        ((0,), {}, "num_classes: expected a whole number above 0, got 0"),
        ((3, (0.5, 0.5)), {}, "label_prior: expected a weight for each of 3 classes, got 2"),
        ((2, (0.5, 0.0)), {}, "label_prior[1]: expected a finite number above 0, got 0.0"),
        ((3,), {"alpha": 1.0}, "classifier: expected the guide's for alpha=1.0, got None"),
        ((3,), {"alpha": -1.0}, "alpha: expected a finite number from 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            SemiSupervisedVAE(StandardNormal(LATENT), likelihood, *arguments, **options)


def test_posterior_without_a_label_is_that_of_the_most_probable_one() -> None:
    _, guide = pair()
    x, y = data([-1, 2, 1, -1])
    best = guide.predict_proba(x).argmax(-1)
    torch.testing.assert_close(guide.posterior(x).mean, guide.posterior(x, best).mean)
    filled = torch.tensor([best[0], 2, 1, best[3]])
    torch.testing.assert_close(guide.posterior(x, y).mean, guide.posterior(x, filled).mean)
    assert torch.equal(guide.predict_proba(x).sum(-1).round(decimals=12), torch.ones(4).double())


# Data


def test_labels_are_kept_in_balance_and_the_rest_are_missing() -> None:
    digits = load_dataset("digits").train
    part = semi_supervised(digits, labels=43, seed=1)
    known = part.y >= 0
    counts = part.y[known].bincount()
    assert counts.sum() == 43
    assert sorted(counts.tolist()) == [4] * 7 + [5] * 3
    assert torch.equal(part.y[known], digits.y[known])
    assert (part.y[~known] == -1).all()
    assert torch.equal(part.x, digits.x)
    assert torch.equal(semi_supervised(digits, labels=43, seed=1).y, part.y)
    assert not torch.equal(semi_supervised(digits, labels=43, seed=2).y, part.y)
    assert part.source == {**digits.source, "labels": "43, seed 1"}
    check_data(part, "data")


def test_data_with_a_label_can_be_repeated() -> None:
    digits = load_dataset("digits", binarization="dynamic").train
    once, thrice = semi_supervised(digits, labels=20), semi_supervised(digits, labels=20, repeat=3)
    assert len(thrice) == len(digits) + 40
    assert thrice.dynamic
    rows = once.y >= 0
    assert torch.equal(thrice.x[: len(digits)], once.x)
    assert torch.equal(thrice.y[len(digits) :], once.y[rows].repeat(2))
    assert torch.equal(thrice.x[len(digits) :], once.x[rows].repeat(2, 1, 1, 1))


def test_missing_labels_stay_missing_and_too_few_are_refused() -> None:
    x, y = torch.rand(6, 2), torch.tensor([0, 0, 0, 1, -1, -1])
    part = semi_supervised(Split(x, y), labels=2)
    assert (part.y >= 0).sum() == 2
    assert part.y[4:].tolist() == [-1, -1]
    for split, labels, message in (
        (Split(x, y), 4, r"labels: expected at most 1 of class 1, got 2"),
        (Split(x), 2, r"split: expected data with labels, got y=None"),
        (Split(x, torch.full((6,), -1)), 2, r"split: expected data with labels, got -1 for all"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            semi_supervised(split, labels=labels)


def test_data_may_be_conditioned_on_tensors_of_any_shape() -> None:
    x, y = torch.rand(5, 2), torch.rand(5, 3, 4)
    check_data(Split(x, y), "data")
    found = list(batches(Split(x, y), 2, device="cpu", shuffle=False))
    assert [b.shape for _, b in found] == [(2, 3, 4), (2, 3, 4), (1, 3, 4)]
    with pytest.raises(ValueError, match=r"^data: expected one row of y per datum, 5, got 4$"):
        check_data(Split(x, y[:4]), "data")
    with pytest.raises(ValueError, match=r"^data: expected finite y"):
        check_data(Split(x, y / 0), "data")


# Training


def test_few_labels_and_the_classification_loss_classify_digits() -> None:
    digits = load_dataset("digits", binarization="threshold")
    train = semi_supervised(digits.train, labels=100)
    torch.manual_seed(0)
    classifier = MLP(digits.x_shape, 10, 64, activation="relu")
    likelihood = Bernoulli(MLP(8, digits.x_shape, 64, context=10, activation="relu"))
    model = SemiSupervisedVAE(StandardNormal(8), likelihood, 10, classifier=classifier, alpha=20.0)
    guide = SemiSupervisedGuide(MLP(digits.x_shape, None, 64, context=10, activation="relu"), classifier, 8)

    def accuracy() -> float:
        hits = guide.predict_proba(digits.test.x).argmax(-1) == digits.test.y
        return float(hits.double().mean())

    assert accuracy() < 0.3
    run = fit(model, guide, train, elbo=EnumELBO(), epochs=8, learning_rate=5e-3, progress=False)
    assert accuracy() > 0.6  # of 447 images: a standard error of 0.02
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"] - 8


def test_a_loaded_model_refers_to_the_loaded_classifier_and_another_is_refused(tmp_path: Path) -> None:
    (model, guide), (x, y) = pair(alpha=2.0), data([0, -1, 2, 1])
    fit(model, guide, (x, y), epochs=1, output=tmp_path / "run", elbo=EnumELBO(), progress=False)
    loaded = load_run(tmp_path / "run")
    assert loaded.model.classifier is loaded.guide.classifier
    assert not any(name.startswith("classifier") for name in model.state_dict())
    model.classifier = copy.deepcopy(guide.classifier)
    with pytest.raises(ValueError, match=r"^model: expected the guide's classifier in the SemiSupervisedVAE"):
        fit(model, guide, (x, y), epochs=1, elbo=EnumELBO(), progress=False)


@pytest.mark.parametrize("label", [3, -2])
def test_labels_out_of_range_are_refused_while_values_are_validated(label: int) -> None:
    (model, guide), (x, y) = pair(), data([0, -1, 2, 1])
    with pytest.raises(ValueError, match=r"label|y:"):
        EnumELBO().differentiable_loss(model, guide, x, torch.full_like(y, label))
