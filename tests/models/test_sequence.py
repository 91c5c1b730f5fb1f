"""The variational autoencoder of sequences, with every guide that has an encoder."""

import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pytest
import torch
from helpers import Draws
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae import evaluate, fit
from ppl_vae.flows import AffineCoupling
from ppl_vae.guides import (
    AnnealedGuide,
    FlowGuide,
    FullRankGuide,
    HamiltonianGuide,
    LowRankGuide,
    MeanFieldGuide,
    MixtureGuide,
    SemiAmortizedGuide,
)
from ppl_vae.infer import KL_ELBO, STL_ELBO, SVI, CompiledSVI, DReG, log_weights, tracing
from ppl_vae.likelihoods import AutoregressiveCategorical, AutoregressiveNormal
from ppl_vae.models import VAE
from ppl_vae.models.sequence import SequenceVAE
from ppl_vae.networks import MLP
from ppl_vae.networks.recurrent import RecurrentDecoder, RecurrentEncoder
from ppl_vae.networks.transformer import TransformerDecoder, TransformerEncoder
from ppl_vae.priors import StandardNormal

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
VOCABULARY, SIZE = 4, 4
LENGTHS = torch.tensor([4, 1, 3])


@pytest.fixture(autouse=True)
def plain_operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "inductor" not in request.keywords:
        monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    yield
    torch._dynamo.reset()


def tokens_model(word_dropout: float = 0.0, cell: str = "gru") -> SequenceVAE:
    decoder = RecurrentDecoder(
        2, vocabulary=VOCABULARY, embedding=3, hidden=5, word_dropout=word_dropout, cell=cell
    )
    return SequenceVAE(StandardNormal(2), AutoregressiveCategorical(decoder, SIZE))


def encoder(**options: Any) -> RecurrentEncoder:
    return RecurrentEncoder(vocabulary=VOCABULARY, embedding=3, hidden=5, **options)


def recurrent() -> tuple[nn.Module, nn.Module]:
    return tokens_model().double(), MeanFieldGuide(encoder(), 2).double()


def transformer() -> tuple[nn.Module, nn.Module]:
    decoder = TransformerDecoder(2, data_dim=2, width=8, heads=2, layers=1)
    model = SequenceVAE(StandardNormal(2), AutoregressiveNormal(decoder, SIZE, "learned"))
    guide = MeanFieldGuide(TransformerEncoder(data_dim=2, width=8, heads=2, layers=1), 2)
    return model.double(), guide.double()


PAIRS = {"recurrent-tokens": recurrent, "transformer-reals": transformer}
pairs = pytest.mark.parametrize("name", PAIRS)


def data(name: str, n: int = 3) -> Tensor:
    if name.endswith("tokens"):
        return torch.randint(VOCABULARY, (n, SIZE)).double()
    return torch.randn(n, SIZE, 2, dtype=torch.float64)


GUIDES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "MeanFieldGuide": lambda model: MeanFieldGuide(encoder(), 2),
    "FullRankGuide": lambda model: FullRankGuide(encoder(), 2),
    "LowRankGuide": lambda model: LowRankGuide(encoder(), 2, 1),
    "MixtureGuide": lambda model: MixtureGuide(encoder(), 2, 3),
    "FlowGuide": lambda model: FlowGuide(encoder(), AffineCoupling(2, 3, hidden=4)),
    "SemiAmortizedGuide": lambda model: SemiAmortizedGuide(MeanFieldGuide(encoder(), 2), model, steps=2),
    "HamiltonianGuide": lambda model: HamiltonianGuide(MeanFieldGuide(encoder(), 2), model, steps=2),
    "AnnealedGuide": lambda model: AnnealedGuide(MeanFieldGuide(encoder(), 2), model, steps=2),
}


@pairs
def test_log_weights_are_those_of_sequences_that_are_cut_one_by_one(name: str) -> None:
    model, guide = PAIRS[name]()
    x, noise = data(name), torch.randn(5, 3, 2).double()
    with Draws(z=noise):
        weights = log_weights(model, guide, x, LENGTHS, num_particles=5)
    other = x.clone()
    for i, length in enumerate(LENGTHS):
        other[i, length:] = -77.0
        with Draws(z=noise[:, i : i + 1]):
            alone = log_weights(model, guide, x[i : i + 1, :length], num_particles=5)
        torch.testing.assert_close(weights[:, i : i + 1], alone, **CLOSE)
    with Draws(z=noise):
        found = log_weights(model, guide, other, LENGTHS, num_particles=5)
    torch.testing.assert_close(found, weights, rtol=0, atol=0)


def test_without_lengths_it_is_the_plain_vae() -> None:
    model, guide = recurrent()
    plain = VAE(model.prior, model.likelihood)
    x, noise = data("tokens"), torch.randn(5, 3, 2).double()
    with Draws(z=noise):
        found = log_weights(model, guide, x, num_particles=5)
        torch.testing.assert_close(found, log_weights(plain, guide, x, num_particles=5), **CLOSE)


@pairs
def test_draws_from_the_prior(name: str) -> None:
    model, _ = PAIRS[name]()
    shape = data(name).shape[1:]
    assert model(None, size=6).shape == (6, *shape)
    x = model(None, LENGTHS)
    assert x.shape == (3, *shape)
    assert (x[1, 1:] == 0).all()
    with pyro.plate("particles", 5, dim=-2):
        trace = poutine.trace(model).get_trace(None, LENGTHS, size=3)
    assert trace.nodes["z"]["value"].shape == (5, 3, 2)
    assert trace.nodes["x"]["value"].shape == (5, 3, *shape)


@pytest.mark.parametrize("name", GUIDES)
def test_every_guide_takes_an_encoder_of_sequences_and_their_lengths(name: str) -> None:
    model = tokens_model().double()
    guide, x = GUIDES[name](model).double(), data("tokens")
    weights = log_weights(model, guide, x, LENGTHS, num_particles=4)
    assert weights.shape == (4, 3)
    torch.manual_seed(1)
    weights = log_weights(model, guide, x, LENGTHS)
    torch.manual_seed(1)
    x[1, 1:] = (x[1, 1:] + 1) % VOCABULARY
    torch.testing.assert_close(log_weights(model, guide, x, LENGTHS), weights, **CLOSE)
    weights.sum().backward()
    missing = [key for key, p in guide.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize("elbo", [Trace_ELBO, KL_ELBO, STL_ELBO, lambda: DReG(2)])
@pairs
def test_compiled_steps_are_plain_steps(name: str, elbo: Callable[[], Any]) -> None:
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        model, guide = PAIRS[name]()
        svi = engine(model, guide, torch.optim.Adam, elbo())
        losses = [svi.step(data(name)[:, :2], LENGTHS.clamp(max=2).roll(i)) for i in range(3)]
        assert not getattr(svi, "plain", False)
        found.append([*losses, *model.state_dict().values(), *guide.state_dict().values()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_compiled_steps_draw_word_dropout_as_plain_steps_do() -> None:
    losses = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        model, guide = tokens_model(0.5).double(), MeanFieldGuide(encoder(), 2).double()
        svi = engine(model, guide, torch.optim.Adam, Trace_ELBO())
        losses.append(torch.stack([svi.step(data("tokens"), LENGTHS) for _ in range(4)]))
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)


@pytest.mark.inductor
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own, on its way to a compiler
def test_an_lstm_is_compiled_by_inductor() -> None:
    # Torch has an LSTM of its own for the CPU, which can't be compiled.
    losses = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        guide = MeanFieldGuide(MLP(2, hidden=4), 2)
        svi = engine(tokens_model(cell="lstm"), guide, torch.optim.Adam, Trace_ELBO())
        losses.append(torch.stack([svi.step(data("tokens")[:, :2].float()) for _ in range(3)]))
        assert not getattr(svi, "plain", False)
        assert getattr(svi, "_failure", None) is None
    torch.testing.assert_close(*losses)


def test_pyros_own_svi_trains_the_pair() -> None:
    model, guide = recurrent()
    x = data("tokens", 20)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    lengths = torch.full((20,), 3)
    losses = [svi.step(x, lengths) for _ in range(25)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_fit_learns_sequences_of_one_token_each() -> None:
    # Each sequence repeats one of four tokens: log 4 = 1.39 nats; apart, each of its tokens would cost that.
    x = torch.arange(120).remainder(VOCABULARY).float().unsqueeze(1).expand(120, SIZE).contiguous()
    lengths = torch.arange(120).remainder(3) + 2
    model, guide = tokens_model(), MeanFieldGuide(encoder(), 2)
    before = evaluate(model, guide, (x, lengths), num_particles=5).elbo.mean
    run = fit(model, guide, (x, lengths), epochs=20, batch_size=40, learning_rate=0.05, progress=False)
    after = evaluate(run.model, run.guide, (x, lengths), num_particles=5).elbo.mean
    assert before < -3.5
    assert after > -2.2


def grammar_log_prob(x: Tensor, topics: Tensor, moves: Tensor) -> Tensor:
    """Return the exact log p(x): a topic is drawn, then its Markov chain from a uniform first token."""
    steps = torch.log(moves)[:, x[:, :-1], x[:, 1:]].sum(-1)
    return (topics.log().unsqueeze(-1) + steps).logsumexp(0) - math.log(VOCABULARY)


@pytest.mark.parametrize("kind", ["recurrent", "transformer"])
def test_the_bound_comes_within_a_twentieth_of_the_entropy_of_a_grammar(kind: str) -> None:
    generator, length, n = torch.Generator().manual_seed(0), 6, 4000
    topics = torch.tensor([0.5, 0.3, 0.2]).double()
    moves = torch.rand(3, VOCABULARY, VOCABULARY, generator=generator).double().pow(4).add(0.01)
    moves = moves / moves.sum(-1, keepdim=True)
    every = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * length)
    log_p = grammar_log_prob(every, topics, moves)
    torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=torch.float64))
    entropy = -float((log_p.exp() * log_p).sum())
    assert entropy < 0.8 * length * math.log(VOCABULARY)  # there is something to learn

    train, test = every[torch.multinomial(log_p.exp(), 2 * n, True, generator=generator)].float().split(n)
    torch.manual_seed(1)
    if kind == "recurrent":
        decoder: nn.Module = RecurrentDecoder(2, vocabulary=VOCABULARY, embedding=8, hidden=32)
        network: nn.Module = RecurrentEncoder(vocabulary=VOCABULARY, embedding=8, hidden=16)
    else:
        decoder = TransformerDecoder(2, vocabulary=VOCABULARY, width=32, heads=2, layers=1)
        network = TransformerEncoder(vocabulary=VOCABULARY, width=16, heads=2, layers=1)
    model = SequenceVAE(StandardNormal(2), AutoregressiveCategorical(decoder, length))
    guide = MeanFieldGuide(network, 2)
    run = fit(
        model,
        guide,
        train,
        elbo=KL_ELBO(),
        epochs=8,
        batch_size=50,
        learning_rate=1e-2,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8),
        progress=False,
    )
    found = evaluate(run.model, run.guide, test, num_particles=5, progress=False)
    # the same test sequences under the grammar itself: no model can be better than that but by chance
    exact = grammar_log_prob(test.long(), topics, moves)
    excess = exact - found.elbo.values.double()
    error = float(excess.std()) / n**0.5
    assert float(excess.mean()) > -4 * error
    assert float(excess.mean()) + 4 * error < 0.05 * entropy


def test_arguments_that_do_not_fit() -> None:
    model, _ = recurrent()
    with pytest.raises(ValueError, match=r"lengths: expected one per sequence, \[3\], got \[2\]"):
        model(data("tokens"), LENGTHS[:2])
    with pytest.raises(ValueError, match="size: expected the number of data"):
        model()
    with pytest.raises(ValueError, match=r"x: expected shape \[\*batch, T <= 4\], got \[3, 5\]"):
        poutine.trace(model).get_trace(torch.zeros(3, 5).double()).compute_log_prob()
