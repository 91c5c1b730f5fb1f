"""Tests of the autoregressive likelihood of images."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from ppl_vae import fit
from ppl_vae.distributions.autoregressive_pixels import AutoregressivePixels
from ppl_vae.evaluation import reconstruct, sample
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import KL_ELBO, SVI
from ppl_vae.likelihoods.autoregressive import Autoregressive
from ppl_vae.models import VAE
from ppl_vae.networks import MLP, ConvDecoder
from ppl_vae.priors import StandardNormal


def make(event: tuple[int, int, int] = (1, 2, 3), levels: int = 2, **options: Any) -> Autoregressive:
    decoder = MLP(2, (3, *event[1:]), hidden=4)
    options = {"hidden": 6, "kernel_size": 3} | options
    likelihood = Autoregressive(decoder, event[0], levels, **options).double()
    with torch.no_grad():  # away from uniform probabilities
        likelihood.network.last.weight.mul_(5)
    return likelihood


def every_image(event: tuple[int, int, int], levels: int) -> Tensor:
    images = list(itertools.product(range(levels), repeat=math.prod(event)))
    return torch.tensor(images).double().reshape(-1, *event) / (levels - 1)


def at(likelihood: Autoregressive, *z: float) -> AutoregressivePixels:
    return likelihood(torch.tensor(z).double())


@pytest.mark.parametrize(
    ("event", "levels"), [((1, 2, 3), 2), ((2, 2, 2), 2), ((1, 2, 2), 3), ((3, 1, 2), 3)]
)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_probabilities_of_all_images_sum_to_one(event: Any, levels: int, dtype: Any, close: float) -> None:
    likelihood, x = make(event, levels).to(dtype), every_image(event, levels).to(dtype)
    for size in (1.0, 1e3):
        log_prob = likelihood(size * torch.randn(2, dtype=dtype)).log_prob(x).detach()
        assert log_prob.shape == (levels ** math.prod(event),)
        assert float(log_prob.exp().sum()) == pytest.approx(1.0, abs=close)
        assert float(log_prob.exp().max()) < 1


def test_probabilities_depend_on_the_latent() -> None:
    x = every_image((1, 2, 3), 2)
    likelihood = make()
    assert (at(likelihood, 0.0, 0.0).log_prob(x) - at(likelihood, 2.0, -1.0).log_prob(x)).abs().max() > 0.1


@pytest.mark.parametrize(("event", "levels"), [((1, 2, 2), 2), ((2, 1, 2), 2), ((1, 1, 2), 3)])
def test_draws_have_the_probabilities(event: Any, levels: int) -> None:
    distribution, x = at(make(event, levels), 1.0, -1.0), every_image(event, levels)
    torch.manual_seed(0)
    drawn = distribution.sample((20_000,))
    assert distribution.support.check(drawn).all()
    powers = levels ** torch.arange(math.prod(event) - 1, -1, -1)
    which = (((levels - 1) * drawn).round().long().flatten(1) * powers).sum(-1)
    expected = 20_000 * distribution.log_prob(x).exp().detach()
    assert float(expected.min()) > 5  # for the chi-square approximation
    assert stats.chisquare(which.bincount(minlength=len(x)).numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("event", "levels"), [((1, 7, 8), 2), ((3, 5, 6), 3)])
def test_draws_are_made_with_the_conditional_means_of_one_pass(event: Any, levels: int) -> None:
    # The image is larger than the part of it that a value is computed from.
    likelihood = make(event, levels, layers=2)
    assert likelihood.network.reach < min(event[1:])
    distribution = likelihood(torch.randn(4, 2).double())
    x, mean = distribution._draw(torch.Size((3,)))
    outputs = distribution.network(x.flatten(0, 1), distribution._flat_features(torch.Size((3, 4))))
    expected = distribution._values(outputs).mean.unflatten(0, (3, 4))
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-12)


def test_mean_is_an_unbiased_estimate() -> None:
    distribution, x = at(make((2, 2, 2), mean_draws=4000), 1.0, -1.0), every_image((2, 2, 2), 2)
    exact = (distribution.log_prob(x).exp()[:, None, None, None] * x).sum(0)
    torch.manual_seed(0)
    # What is averaged lies in [0, 1], so that its standard deviation is at most 1/2.
    assert (distribution.mean - exact).abs().max() < 4 * 0.5 / math.sqrt(4000)


def test_particles_and_expansion_are_their_loop() -> None:
    likelihood = make()
    z, x = torch.randn(4, 3, 2).double(), every_image((1, 2, 3), 2)[5:8]
    distribution = likelihood(z)
    assert (distribution.batch_shape, distribution.event_shape) == ((4, 3), (1, 2, 3))
    found = distribution.log_prob(x)
    for k in range(4):
        for i in range(3):
            torch.testing.assert_close(found[k, i], likelihood(z[k, i]).log_prob(x[i]))
    expanded = likelihood(z[0]).expand((4, 3))
    torch.testing.assert_close(expanded.log_prob(x), found[0].expand(4, 3))
    assert expanded.sample((2,)).shape == (2, 4, 3, 1, 2, 3)
    assert expanded.mean.shape == (4, 3, 1, 2, 3)


@pytest.mark.parametrize(
    ("levels", "message"), [(2, r"Boolean\(\)"), (5, r"Levels\(k / 4 for whole k from 0 to 4\)")]
)
def test_grey_pixels_are_refused_with_one_line(levels: int, message: str) -> None:
    likelihood = Autoregressive(MLP(2, (3, 4, 4)), levels=levels)
    pair = VAE(StandardNormal(2), likelihood), MeanFieldGuide(MLP((1, 4, 4)), 2)
    with pytest.raises(ValueError, match=rf"^data: datum 0 is outside the support of site 'x', .*{message}"):
        fit(*pair, torch.full((5, 1, 4, 4), 0.3), epochs=1)


def test_reconstructions_and_samples_have_draws_and_means() -> None:
    likelihood = Autoregressive(ConvDecoder(2, (3, 4, 5), 8, (4,)), hidden=4)
    model, guide = VAE(StandardNormal(2), likelihood), MeanFieldGuide(MLP((1, 4, 5)), 2)
    drawn = sample(model, 6)
    assert set(drawn.x.unique().tolist()) == {0.0, 1.0}
    for mean in (drawn.mean, reconstruct(model, guide, drawn.x).mean):
        assert mean.shape == (6, 1, 4, 5)
        assert ((mean > 0) & (mean < 1)).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Autoregressive(nn.Linear(2, 3)), TypeError, "features: needs a decoder with an `out_shape`"),
        (
            lambda: Autoregressive(MLP(2, (3, 4, 4)), kernel_size=4),
            ValueError,
            "kernel_size: expected an odd number from 3, got 4",
        ),
        (
            lambda: Autoregressive(MLP(2, (3, 4, 4)), levels=1),
            ValueError,
            "levels: expected at least 2, got 1",
        ),
        (lambda: Autoregressive(MLP(2, (3, 4, 4)), layers=0), ValueError, "layers: expected a whole number"),
        (
            lambda: Autoregressive(MLP(2, (3, 4)))(torch.zeros(5, 2)),
            ValueError,
            "decoder: expected a feature map [features, H, W] as the output, got shape [3, 4]",
        ),
    ],
)
def test_refuses(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call()


def test_training_nears_the_entropy_of_a_chain_that_independent_pixels_can_not_follow() -> None:
    # Bits in the order of a 3 x 4 image; each is the one before it but for one time in twenty.
    flip, bits = 0.05, 12
    entropy = math.log(2) - (bits - 1) * (flip * math.log(flip) + (1 - flip) * math.log(1 - flip))
    torch.manual_seed(0)
    changes = torch.bernoulli(torch.full((1200, bits), flip))
    changes[:, 0] = torch.bernoulli(torch.full((1200,), 0.5))
    x = (changes.cumsum(1) % 2).reshape(-1, 1, 3, 4)
    decoder = MLP(1, (2, 3, 4), hidden=2)
    likelihood = Autoregressive(decoder, hidden=8, kernel_size=5, layers=2)
    model, guide = VAE(StandardNormal(1), likelihood), MeanFieldGuide(MLP((1, 3, 4), hidden=4), 1)
    svi = SVI(model, guide, lambda p: torch.optim.Adam(p, 1e-2), KL_ELBO())
    for step in range(120):
        svi.step(x[step % 10 * 100 :][:100])
    with torch.no_grad():
        elbo = -svi.objective.evaluate_loss(x[1000:]) / 200
    # Independent pixels have 12 log 2 = 8.3 nats, the entropy is 2.9; that of 200 data has
    # standard deviation sqrt(11 flip (1 - flip) / 200) log(19) = 0.15.
    assert float(elbo) > -entropy - 0.8
    assert float(elbo) < -entropy + 0.6
