"""Tests of arithmetic of latents: against closed forms of a linear pair, and digits."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Rows
from pyro.util import get_rng_state
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ppl_vae import fit
from ppl_vae.data import Split, load_dataset
from ppl_vae.distributions import HypersphericalUniform, VonMisesFisher
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import CVAE, VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.tasks.arithmetic import Edits, attribute_vectors, edit, edit_accuracy, latent_arithmetic

QUIET: dict[str, Any] = {"progress": False}


def pair() -> tuple[LinearGaussian, Callable[[Tensor], None], Callable[[Tensor], Tensor]]:
    """Return a linear pair, and the mean of the guide."""
    torch.manual_seed(0)
    model = LinearGaussian(2, 5).double()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), torch.no_grad():
            pyro.sample("z", model.posterior(x))

    return model, guide, lambda x: model.posterior(x).mean.detach()


def groups() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 5).double(), 1 + torch.randn(7, 5).double(), torch.randn(2, 5).double() - 2


def test_a_minus_b_plus_c_of_means_is_decoded() -> None:
    model, guide, mean = pair()
    a, b, c = groups()
    result = latent_arithmetic(model, guide, a, Split(b), DataLoader(Rows(c), 2))
    za, zb, zc = (mean(x).mean(0) for x in (a, b, c))
    expected = torch.stack([za, zb, zc, za - zb + zc])
    torch.testing.assert_close(result.z, expected)
    torch.testing.assert_close(result.x, (expected @ model.weight.mT + model.bias).detach())


def test_attribute_vectors_are_differences_of_class_means() -> None:
    model, guide, mean = pair()
    x = torch.cat(groups())
    y = torch.tensor([3, 0, 0, 3, 7, 0, 0, 7, 3, 0, 0, 0, 3])
    result = attribute_vectors(model, guide, (x, y))
    assert result.classes.tolist() == [0, 3, 7] and result.counts.tolist() == [7, 4, 2]
    for label, found in zip((0, 3, 7), result.means, strict=True):
        torch.testing.assert_close(found, mean(x[y == label]).mean(0))
    torch.testing.assert_close(result.between(7, 3), mean(x[y == 3]).mean(0) - mean(x[y == 7]).mean(0))
    same = attribute_vectors(model, guide, x, y)
    assert torch.equal(same.means, result.means)
    with pytest.raises(ValueError, match=r"target: expected one of the classes \[0, 3, 7\], got 5"):
        result.between(0, 5)


def test_edits_add_the_vector_in_each_strength() -> None:
    model, guide, mean = pair()
    x, _, _ = groups()
    vector = torch.tensor([0.5, -2.0]).double()
    result = edit(model, guide, x, vector, strengths=[0.0, 1.0, -2.5])
    z = mean(x)[:, None] + torch.tensor([0.0, 1.0, -2.5])[:, None] * vector
    torch.testing.assert_close(result.x, (z @ model.weight.mT + model.bias).detach())
    assert torch.equal(result.original, x) and result.strengths.tolist() == [0.0, 1.0, -2.5]


@pytest.mark.parametrize("kind", ["function", "predict"])
def test_the_share_of_the_wanted_class_is_that_of_the_classifier(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(9, 3, 1, 2)
    edits = Edits(x[:, 0], x, torch.tensor([0.0, 1.0, 2.0]))
    wanted = x.flatten(2).sum(-1) > 1

    class Classifier:
        def predict(self, x: Any) -> Any:
            assert x.shape == (27, 2)
            return (x.sum(1) > 1).astype(int)

    classifier: Any = Classifier() if kind == "predict" else lambda x: x.flatten(1).sum(1) > 1
    result = edit_accuracy(edits, 1, classifier)
    share = wanted.double().mean(0)
    torch.testing.assert_close(result.share, share)
    torch.testing.assert_close(result.standard_error, (share * (1 - share) / 8).sqrt())
    assert result.num_data == 9 and result.summary()["share"] == share.tolist()
    assert f"{float(share[0]):.3f}" in str(result) and "class 1" in str(result)


def test_nothing_of_the_caller_changes_and_networks_of_plain_functions_run() -> None:
    torch.manual_seed(0)
    decoder, encoder = nn.Linear(2, 4), nn.Linear(4, 2)

    def model(x: Tensor | None, size: int | None = None) -> None:
        pyro.module("net", decoder)
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", encoder)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(encoder(x), 0.1).to_event(1))

    x = torch.bernoulli(torch.full((6, 4), 0.5))
    state = get_rng_state()
    result = latent_arithmetic(model, guide, x[:2], x[2:4], x[4:])
    edited = edit(model, guide, x, torch.ones(2))
    assert torch.equal(state["torch"], get_rng_state()["torch"])
    assert not list(pyro.get_param_store().keys()) and decoder.training
    with torch.no_grad():
        z = encoder(x)
        torch.testing.assert_close(result.z[3], z[:2].mean(0) - z[2:4].mean(0) + z[4:].mean(0))
        torch.testing.assert_close(result.x, decoder(result.z).sigmoid())
        torch.testing.assert_close(edited.x[:, 0], decoder(z).sigmoid())


def test_on_a_sphere_directions_are_added() -> None:
    def model(x: Tensor | None, size: int | None = None) -> None:
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", HypersphericalUniform(3))
            pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample(
                "z", VonMisesFisher(nn.functional.normalize(x, dim=-1), x.new_full(x.shape[:1], 20.0))
            )

    torch.manual_seed(0)
    a, b, c = torch.randn(3, 4, 3)
    result = latent_arithmetic(model, guide, a, b, c)
    directions = [nn.functional.normalize(x, dim=-1).mean(0) for x in (a, b, c)]
    expected = nn.functional.normalize(directions[0] - directions[1] + directions[2], dim=-1)
    torch.testing.assert_close(result.z[3], expected, rtol=0, atol=1e-5)
    moved = edit(model, guide, a, torch.tensor([1.0, 2.0, 0.0]))
    torch.testing.assert_close(moved.x.norm(dim=-1), torch.ones(4, 4))


def test_zeros_of_digits_become_threes() -> None:
    data = load_dataset("digits", binarization="threshold")
    assert data.train.y is not None and data.test.y is not None
    torch.manual_seed(0)
    model = VAE(StandardNormal(6), Bernoulli(MLP(6, (1, 8, 8), hidden=64)))
    guide = MeanFieldGuide(MLP((1, 8, 8), hidden=64), 6)
    fit(model, guide, data.train.x, epochs=8, batch_size=50, learning_rate=5e-3, **QUIET)
    classifier = LogisticRegression(max_iter=2000)
    classifier.fit(data.train.x.flatten(1).numpy(), data.train.y.numpy())
    vector = attribute_vectors(model, guide, data.train).between(0, 3)
    edits = edit(model, guide, data.test.x[data.test.y == 0], vector, strengths=[0.0, 1.0, 1.5])
    result = edit_accuracy(edits, 3, classifier)
    gain = float(result.share[2] - result.share[0])
    assert gain > 4 * math.hypot(*result.standard_error[[0, 2]].tolist())
    assert gain > 0.7


def test_a_module_as_the_classifier_gives_logits_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 5)
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        expected = module.eval()(x).argmax(-1) == 2
    module.train()
    result = edit_accuracy(Edits(x[:, 0], x, torch.arange(3.0)), 2, module)
    assert torch.equal(result.share, expected.double().mean(0)) and 0 < float(result.share.mean()) < 1
    assert all(part.training for part in module.modules())


def test_a_model_that_needs_labels_to_draw_is_refused_in_one_line() -> None:
    torch.manual_seed(0)
    model = CVAE(StandardNormal(2), Bernoulli(MLP(2, 5, context=3)))
    guide = MeanFieldGuide(MLP(5, context=3), 2)
    with pytest.raises(ValueError, match=r"^y: expected the labels[^\n]*$"):
        edit(model, guide, (torch.zeros(4, 5), torch.arange(4) % 3), torch.zeros(2))


X = torch.zeros(4, 5).double()
V = torch.zeros(2).double()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vector": torch.zeros(3)}, ValueError, "vector: expected the latent's size 2, got 3"),
        ({"vector": torch.zeros(1, 2)}, ValueError, r"vector: expected a finite tensor \[latent\]"),
        ({"vector": V / 0}, ValueError, "vector: expected a finite tensor"),
        ({"vector": [0.0, 1.0]}, ValueError, "vector: expected a finite tensor"),
        ({"strengths": []}, ValueError, "strengths"),
        ({"strengths": [math.inf]}, ValueError, "strengths"),
        ({"data": X / 0}, ValueError, "data: expected finite"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_wrong_arguments_of_edit(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model, guide, _ = pair()
    with pytest.raises(error, match=message):
        edit(model, guide, **{"data": X, "vector": V, **arguments})


def test_wrong_arguments_of_the_others() -> None:
    model, guide, _ = pair()
    with pytest.raises(ValueError, match="b: expected finite"):
        latent_arithmetic(model, guide, X, X / 0, X)
    with pytest.raises(TypeError, match="c: expected a Split"):
        latent_arithmetic(model, guide, X, X, 3)
    with pytest.raises(TypeError, match="model: can't be called as"):
        latent_arithmetic(lambda x: model(x), guide, X, X, X)
    for y in (None, torch.zeros(3, dtype=torch.long), torch.zeros(4)):
        with pytest.raises(ValueError, match="y: expected a whole number for each of 4 data"):
            attribute_vectors(model, guide, X, y)
    edits = Edits(X, X[:, None], torch.ones(1))
    with pytest.raises(TypeError, match="classifier: expected one with `predict`"):
        edit_accuracy(edits, 1, 3)
    with pytest.raises(ValueError, match=r"classifier: expected labels of shape \[4\]"):
        edit_accuracy(edits, 1, lambda x: x)
