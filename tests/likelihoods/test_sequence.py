"""Autoregressive likelihoods against enumeration, quadrature and the chain rule."""

import itertools
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from ppl_vae.likelihoods import AutoregressiveCategorical, AutoregressiveNormal
from ppl_vae.networks import MLP
from ppl_vae.networks.recurrent import RecurrentDecoder
from ppl_vae.networks.transformer import TransformerDecoder

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
DECODERS: dict[str, Callable[..., nn.Module]] = {
    "recurrent": lambda **kw: RecurrentDecoder(2, embedding=4, hidden=7, **kw),
    "transformer": lambda **kw: TransformerDecoder(2, width=8, heads=2, **kw),
}
decoders = pytest.mark.parametrize("name", DECODERS)


def tokens(name: str, vocabulary: int = 3, size: int = 3, **options: float) -> AutoregressiveCategorical:
    return AutoregressiveCategorical(DECODERS[name](vocabulary=vocabulary, **options), size).double()


def latents(*batch: int) -> Tensor:
    return 3 * torch.randn(*batch, 2, dtype=torch.float64)


@decoders
def test_probabilities_of_all_sequences_of_tokens_sum_to_one(name: str) -> None:
    likelihood, z = tokens(name), latents(4)
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    log_prob = likelihood(z).log_prob(every.unsqueeze(1).expand(27, 4, 3))
    torch.testing.assert_close(log_prob.logsumexp(0), torch.zeros(4).double(), **CLOSE)
    lengths = torch.tensor([3, 2, 1, 0])
    log_prob = likelihood(z, lengths).log_prob(every.unsqueeze(1).expand(27, 4, 3))
    padded = torch.tensor(3.0).double().log() * (3 - lengths)  # each prefix comes so often
    torch.testing.assert_close(log_prob.logsumexp(0), padded, **CLOSE)


@decoders
def test_density_of_reals_integrates_to_one(name: str) -> None:
    likelihood = AutoregressiveNormal(DECODERS[name](data_dim=1), 2, scale=0.7).double()
    grid = torch.linspace(-6, 6, 121, dtype=torch.float64)
    x = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2, 1)
    density = likelihood(torch.zeros(2).double()).log_prob(x).exp()
    torch.testing.assert_close(density.sum() * 0.1**2, torch.tensor(1.0).double(), atol=1e-6, rtol=0)


@decoders
@pytest.mark.parametrize("scale", [0.5, "learned", "network"])
def test_log_prob_of_reals_is_the_sum_of_the_steps(name: str, scale: object) -> None:
    outputs = 6 if scale == "network" else 3
    decoder = DECODERS[name](data_dim=3, out_features=outputs)
    likelihood = AutoregressiveNormal(decoder, 5, scale).double()
    z, x = latents(4), torch.randn(4, 5, 3).double()
    total, state = torch.zeros(4).double(), None
    for t in range(5):
        out, state = decoder.next(z, x[:, :t], state)
        sigma = {0.5: 0.5, "learned": 1.0, "network": out[:, 3:].exp()}[scale]
        total = total + dist.Normal(out[:, :3], sigma).log_prob(x[:, t]).sum(-1)
    torch.testing.assert_close(likelihood(z).log_prob(x), total, **CLOSE)


@decoders
def test_draws_of_tokens_have_the_probabilities_of_log_prob(name: str) -> None:
    # Seed 0; 20 000 draws, 9 outcomes within 4 standard errors.
    likelihood, z, draws = tokens(name, size=2), latents(1), 20_000
    x = likelihood(z).sample((draws,))
    assert x.shape == (draws, 1, 2)
    assert x.dtype == torch.float64
    every = torch.tensor(list(itertools.product(range(3), repeat=2)))
    p = likelihood(z).log_prob(every.unsqueeze(1)).exp().squeeze(1)
    assert p.max() - p.min() > 0.05
    found = (x == every.double()).all(-1).double().mean(0)
    assert ((found - p).abs() < 4 * (p * (1 - p) / draws).sqrt()).all()


@decoders
def test_draws_of_reals_have_the_moments_of_the_steps(name: str) -> None:
    # Given the first step, the second is normal with the decoder's mean: its standardised value is noise.
    decoder, draws = DECODERS[name](data_dim=2), 20_000
    likelihood, z = AutoregressiveNormal(decoder, 2, scale=0.5).double(), latents(1)
    x = likelihood(z).sample((draws,)).squeeze(1)
    noise = (x - decoder(z.expand(draws, 2), x)) / 0.5
    noise = noise.reshape(draws, 4)
    assert (noise.mean(0).abs() < 4 / draws**0.5).all()
    covariance = noise.mT @ noise / draws
    error = (covariance - torch.eye(4).double()).abs()
    assert (error < 4 * (1 + torch.eye(4)).sqrt() / draws**0.5).all()


@decoders
def test_draws_end_at_their_lengths(name: str) -> None:
    likelihood = AutoregressiveNormal(DECODERS[name](data_dim=2), 4).double()
    lengths = torch.tensor([4, 2, 0])
    x = likelihood(latents(5, 3), lengths).sample()
    assert x.shape == (5, 3, 4, 2)
    for i, length in enumerate(lengths):
        assert (x[:, i, :length] != 0).all()
        assert (x[:, i, length:] == 0).all()


@decoders
@pytest.mark.parametrize("kind", ["tokens", "reals"])
def test_padding_adds_nothing_and_lengths_are_as_cutting(name: str, kind: str) -> None:
    lengths = torch.tensor([5, 2, 3])
    z = latents(4, 3)
    if kind == "tokens":
        likelihood, x = tokens(name, size=5), torch.randint(3, (3, 5))
    else:
        likelihood = AutoregressiveNormal(DECODERS[name](data_dim=2), 5).double()
        x = torch.randn(3, 5, 2).double()
    log_prob = likelihood(z, lengths).log_prob(x)
    assert log_prob.shape == (4, 3)
    other = x.clone()
    for i, length in enumerate(lengths):
        other[i, length:] = -77
        alone = likelihood(z[:, i]).log_prob(x[i, :length])
        torch.testing.assert_close(log_prob[:, i], alone, **CLOSE)
    torch.testing.assert_close(likelihood(z, lengths).log_prob(other), log_prob, rtol=0, atol=0)
    shorter = likelihood(z[:, 1:], lengths[1:]).log_prob(x[1:, :3])
    torch.testing.assert_close(shorter, log_prob[:, 1:], **CLOSE)


@decoders
def test_word_dropout_changes_scores_in_training_but_no_draws(name: str) -> None:
    likelihood, z = tokens(name, word_dropout=0.9), latents(50)
    x = []
    for training in (True, False):
        torch.manual_seed(0)
        x.append(likelihood.train(training)(z).sample())
    assert torch.equal(*x)
    scores = likelihood.eval()(z).log_prob(x[0])
    assert torch.equal(likelihood(z).log_prob(x[0]), scores)
    assert not torch.equal(likelihood.train()(z).log_prob(x[0]), scores)


def test_expanding_and_tokens_of_any_dtype() -> None:
    likelihood, z = tokens("recurrent"), latents(3)
    distribution = likelihood(z, torch.tensor([3, 1, 2]))
    x = torch.randint(3, (3, 3))
    log_prob = distribution.log_prob(x)
    assert torch.equal(distribution.log_prob(x.double()), log_prob)
    wide = distribution.expand((4, 3))
    assert wide.batch_shape == (4, 3)
    assert wide.event_shape == distribution.event_shape == (3,)
    torch.testing.assert_close(wide.log_prob(x), log_prob.expand(4, 3), **CLOSE)
    assert wide.sample((2,)).shape == (2, 4, 3, 3)


def test_mean_says_that_there_is_none() -> None:
    with pytest.raises(NotImplementedError, match="no closed form: draw samples"):
        _ = tokens("recurrent")(latents(3)).mean


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 4), r"x: expected shape \[\*batch, T <= 3\], got \[3, 4\]"),
        (torch.full((3, 3), 3.0), "x: expected values in the support"),
        (torch.full((3, 3), 0.5), "x: expected values in the support"),
    ],
)
def test_data_that_do_not_fit(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens("recurrent")(latents(3)).log_prob(x)


def test_decoders_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="decoder: expected a RecurrentDecoder"):
        AutoregressiveCategorical(MLP(2, 5), 3)
    with pytest.raises(ValueError, match="decoder: expected one of tokens"):
        AutoregressiveCategorical(DECODERS["recurrent"](data_dim=2), 3)
    with pytest.raises(ValueError, match="decoder: expected one of reals"):
        AutoregressiveNormal(DECODERS["recurrent"](vocabulary=2), 3)
    with pytest.raises(ValueError, match="with 4 outputs for scale='network'"):
        AutoregressiveNormal(DECODERS["recurrent"](data_dim=2), 3, scale="network")
