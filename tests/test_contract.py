"""What every public prior, likelihood, guide and model keeps to; a class that is not listed fails."""

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Draws
from pyro import poutine
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.description import build, describe
from ppl_vae.flows import AffineCoupling, BlockNeuralAutoregressive, InverseAutoregressive, Sylvester
from ppl_vae.guides import (
    AnnealedGuide,
    FlowGuide,
    FullRankGuide,
    HamiltonianGuide,
    HypersphericalGuide,
    LocalGuide,
    LowRankGuide,
    MeanFieldGuide,
    MixtureGuide,
    SemiAmortizedGuide,
)
from ppl_vae.infer import log_weights
from ppl_vae.likelihoods import Bernoulli, ContinuousBernoulli, Normal
from ppl_vae.models import VAE, IndexedModel, LinearGaussian
from ppl_vae.networks import MLP, ConvDecoder, ConvEncoder
from ppl_vae.priors import StandardNormal, UniformSphere

LATENT = 2
IMAGE = (1, 4, 5)
PACKAGES = ("priors", "likelihoods", "guides", "models")
# Float64 rounds at 1e-16; the sums here have fewer than 200 terms of order 1 to 10.
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11}


@dataclass(frozen=True)
class Case:
    """One way to make a piece.

    Attributes:
        name: what the test's id shows.
        make: makes it, at random.
        event: event shape of the data.
        support: where the data lie: "bits", "unit" or "real".
        indexed: whether programs take the data's numbers beside them.
        noisy: whether a guide draws more than its site.
    """

    name: str
    make: Callable[[], nn.Module]
    event: tuple[int, ...] = IMAGE
    support: str = "bits"
    indexed: bool = False
    noisy: bool = False

    def batch(self, n: int) -> tuple[Tensor, ...]:
        """Return what programs are called with."""
        return (self.data(n), torch.arange(n)) if self.indexed else (self.data(n),)

    def data(self, *batch: int) -> Tensor:
        shape = (*batch, *self.event)
        if self.support == "real":
            return torch.randn(shape, dtype=torch.float64)
        x = torch.rand(shape, dtype=torch.float64)
        return x.round() if self.support == "bits" else x


def dense(out: Any = IMAGE) -> nn.Module:
    return MLP(LATENT, out, hidden=(6, 5))


def convolution(normalization: str | None = None) -> nn.Module:
    return ConvDecoder(LATENT, IMAGE, 6, (4, 3), normalization=normalization)


def own_model() -> nn.Module:
    """Return the model of a guide that computes with it; in float64, since the guide leaves it as it is."""
    return VAE(StandardNormal(LATENT), Bernoulli(dense())).double()


def mean_field() -> MeanFieldGuide:
    return MeanFieldGuide(MLP(IMAGE, hidden=(6, 5)), LATENT)


PRIORS = (
    Case("StandardNormal", lambda: StandardNormal(LATENT)),
    Case("UniformSphere", lambda: UniformSphere(LATENT)),
)
LIKELIHOODS = (
    Case("Bernoulli", lambda: Bernoulli(dense())),
    Case("Bernoulli-convolution", lambda: Bernoulli(convolution("layer"))),
    Case("ContinuousBernoulli", lambda: ContinuousBernoulli(dense()), support="unit"),
    Case("Normal-fixed", lambda: Normal(dense(), scale=0.5), support="real"),
    Case("Normal-learned", lambda: Normal(dense(3), scale="learned"), (3,), "real"),
    Case("Normal-network", lambda: Normal(dense((2, 4, 5)), scale="network"), support="real"),
)
GUIDES = (
    Case("MeanFieldGuide", lambda: MeanFieldGuide(MLP(IMAGE, hidden=(6, 5)), LATENT)),
    Case("FullRankGuide", lambda: FullRankGuide(MLP(IMAGE, hidden=(6, 5)), LATENT)),
    Case("LowRankGuide", lambda: LowRankGuide(MLP(IMAGE, hidden=(6, 5)), LATENT, rank=1)),
    Case("MixtureGuide", lambda: MixtureGuide(MLP(IMAGE, hidden=(6, 5)), LATENT, 3)),
    Case("MixtureGuide-network", lambda: MixtureGuide(MLP(IMAGE, hidden=6), LATENT, 3, weights="network")),
    Case("HypersphericalGuide", lambda: HypersphericalGuide(MLP(IMAGE, hidden=(6, 5)), LATENT)),
    Case(
        "FlowGuide-autoregressive",
        lambda: FlowGuide(MLP(IMAGE, hidden=(6, 5)), InverseAutoregressive(LATENT, 4, hidden=7)),
    ),
    Case(
        "FlowGuide-coupling-full-rank",
        lambda: FlowGuide(
            ConvEncoder(IMAGE, 6, (3, 4)), AffineCoupling(LATENT, 3, hidden=7), base="full-rank"
        ),
    ),
    Case(
        "FlowGuide-block",
        lambda: FlowGuide(MLP(IMAGE, hidden=(6, 5)), BlockNeuralAutoregressive(LATENT, 4, hidden=3)),
    ),
    Case("FlowGuide-sylvester", lambda: FlowGuide(MLP(IMAGE, hidden=(6, 5)), Sylvester(LATENT, 4))),
    Case("MeanFieldGuide-convolution", lambda: MeanFieldGuide(ConvEncoder(IMAGE, 6, (3, 4)), LATENT)),
    Case("LocalGuide", lambda: LocalGuide(6, LATENT), indexed=True),
    Case("LocalGuide-like", lambda: LocalGuide(6, LATENT, like=mean_field()), indexed=True),
    Case(
        "SemiAmortizedGuide",
        lambda: SemiAmortizedGuide(mean_field(), own_model(), steps=2),
        noisy=True,
    ),
    Case(
        "SemiAmortizedGuide-constant",
        lambda: SemiAmortizedGuide(mean_field(), own_model(), steps=2, differentiable=False),
        noisy=True,
    ),
    Case("HamiltonianGuide", lambda: HamiltonianGuide(mean_field(), own_model(), steps=2), noisy=True),
    Case(
        "HamiltonianGuide-tempered",
        lambda: HamiltonianGuide(mean_field(), own_model(), steps=2, tempering=0.5),
        noisy=True,
    ),
    Case("AnnealedGuide", lambda: AnnealedGuide(mean_field(), own_model(), steps=2), noisy=True),
)
MODELS = (
    *(
        Case(
            f"VAE-{case.name}",
            lambda make=case.make: VAE(StandardNormal(LATENT), make()),
            case.event,
            case.support,
        )
        for case in LIKELIHOODS
    ),
    Case("LinearGaussian", lambda: LinearGaussian(LATENT, 3), (3,), "real"),
    Case("IndexedModel", lambda: IndexedModel(LinearGaussian(LATENT, 3)), (3,), "real", indexed=True),
)
PIECES = (*PRIORS, *LIKELIHOODS, *GUIDES, *MODELS)

pieces = pytest.mark.parametrize("case", PIECES, ids=lambda case: case.name)
priors = pytest.mark.parametrize("case", PRIORS, ids=lambda case: case.name)
likelihoods = pytest.mark.parametrize("case", LIKELIHOODS, ids=lambda case: case.name)
guides = pytest.mark.parametrize("case", GUIDES, ids=lambda case: case.name)
models = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)


def double(case: Case) -> nn.Module:
    return case.make().double()


def other_half(case: Case, piece: nn.Module) -> nn.Module:
    """Return a guide for a model, a model for a guide."""
    if case in MODELS:
        guide = LocalGuide(6, LATENT) if case.indexed else MeanFieldGuide(MLP(case.event, hidden=5), LATENT)
        return guide.double()
    if case.noisy:
        return piece.model
    prior = UniformSphere if "Hyperspherical" in case.name else StandardNormal
    model = VAE(prior(LATENT), Bernoulli(dense())).double()
    return IndexedModel(model) if case.indexed else model


def pair_of(case: Case) -> tuple[nn.Module, nn.Module]:
    piece = double(case)
    pair = piece, other_half(case, piece)
    return pair if case in MODELS else pair[::-1]


@contextmanager
def draws(case: Case, noise: Tensor) -> Iterator[None]:
    """Let runs share their noise, where a guide can be told it; else the random stream's start."""
    with nullcontext() if case.noisy else Draws(z=noise):
        torch.manual_seed(1)
        yield


# The list


def test_every_public_class_is_listed() -> None:
    public = {
        getattr(module, name)
        for module in (importlib.import_module(f"ppl_vae.{package}") for package in PACKAGES)
        for name in module.__all__
    }
    listed = {type(case.make()) for case in PIECES}
    assert {cls.__name__ for cls in public - listed} == set()
    assert {cls.__name__ for cls in listed - public} == set()


@pytest.mark.parametrize(
    ("package", "cases"),
    list(zip(PACKAGES, (PRIORS, LIKELIHOODS, GUIDES, MODELS), strict=True)),
    ids=PACKAGES,
)
def test_every_class_is_listed_under_its_package(package: str, cases: tuple[Case, ...]) -> None:
    names = importlib.import_module(f"ppl_vae.{package}").__all__
    assert sorted({type(case.make()).__name__ for case in cases}) == sorted(names)


# Construction


@pieces
def test_stores_every_argument_and_is_rebuilt_from_its_description(case: Case) -> None:
    piece = case.make()
    parameters = inspect.signature(type(piece)).parameters
    assert all(hasattr(piece, name) for name in parameters)
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    description = describe(piece)
    assert description.keys() == {"class", *parameters}
    built = build(description, "piece")
    assert type(built) is type(piece)
    assert describe(built) == description
    shapes = [{name: (t.shape, t.dtype) for name, t in p.state_dict().items()} for p in (piece, built)]
    assert shapes[0] == shapes[1]


@pieces
def test_repr_shows_the_class_and_its_modules(case: Case) -> None:
    piece = case.make()
    text = repr(piece)
    assert text.startswith(f"{type(piece).__name__}(")
    assert all(f"({name})" in text for name, _ in piece.named_children())


@pieces
def test_is_a_registered_module_without_state_beside_it(case: Case) -> None:
    # What is not in the state_dict would be lost on saving.
    piece = case.make()
    tensors = {id(t) for t in (*piece.parameters(), *piece.buffers())}
    saved = {id(t) for t in piece.state_dict(keep_vars=True).values()}
    assert tensors == saved
    for module in piece.modules():
        stray = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
        assert stray == []


# State


@models
def test_state_dict_round_trip_of_a_model(case: Case) -> None:
    check_state_round_trip(case)


@guides
def test_state_dict_round_trip_of_a_guide(case: Case) -> None:
    check_state_round_trip(case)


def check_state_round_trip(case: Case) -> None:
    one, other = double(case), double(case)
    half, batch = other_half(case, one), case.batch(3)
    if case.noisy:
        other.model = half
    noise = torch.randn(2, 3, LATENT).double()

    def weights(piece: nn.Module) -> Tensor:
        pair = (piece, half) if case in MODELS else (half, piece)
        with draws(case, noise):
            return log_weights(*pair, *batch, num_particles=2)

    assert not torch.equal(weights(one), weights(other))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(weights(one), weights(other))


@likelihoods
def test_state_dict_round_trip_of_a_likelihood(case: Case) -> None:
    one, other = double(case), double(case)
    z, x = torch.randn(3, LATENT).double(), case.data(3)
    assert not torch.equal(one(z).log_prob(x), other(z).log_prob(x))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(one(z).log_prob(x), other(z).log_prob(x))


@pieces
def test_float64_throughout(case: Case) -> None:
    piece = double(case)
    assert all(t.dtype == torch.float64 for t in piece.state_dict().values() if t.is_floating_point())
    if case in PRIORS:
        assert piece().mean.dtype == piece().variance.dtype == piece().sample().dtype == torch.float64
    elif case in LIKELIHOODS:
        distribution = piece(torch.zeros(3, LATENT).double())
        assert distribution.sample().dtype == distribution.log_prob(case.data(3)).dtype == torch.float64
    else:
        assert log_weights(*pair_of(case), *case.batch(3)).dtype == torch.float64


# Gradients


@pieces
def test_gradients_reach_every_parameter(case: Case) -> None:
    piece = double(case)
    if case in PRIORS:
        prior = piece()
        prior.log_prob(prior.sample()).sum()
    elif case in LIKELIHOODS:
        piece(torch.randn(3, LATENT).double()).log_prob(case.data(3)).sum().backward()
    else:
        half = other_half(case, piece)
        pair = (piece, half) if case in MODELS else (half, piece)
        log_weights(*pair, *case.batch(3), num_particles=2).sum().backward()
    for name, parameter in piece.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


# Shapes


@priors
def test_prior_is_over_one_latent_vector(case: Case) -> None:
    prior = double(case)()
    assert prior.batch_shape == ()
    assert prior.event_shape == (LATENT,)
    z = prior.sample((4, 3))
    log_prob = prior.log_prob(z)
    assert log_prob.shape == (4, 3)
    for k in range(4):
        for i in range(3):
            torch.testing.assert_close(log_prob[k, i], prior.log_prob(z[k, i]), **CLOSE)


@likelihoods
@pytest.mark.parametrize("n", [1, 5, 6])
def test_trap_7_likelihood_of_particles_is_their_loop(case: Case, n: int) -> None:
    # 5 and 6 are widths of the decoders' layers: a layer that took the batch for its units would run on.
    likelihood = double(case)
    z, x = torch.randn(4, n, LATENT).double(), case.data(n)
    distribution = likelihood(z)
    assert distribution.batch_shape == (4, n)
    assert distribution.event_shape == case.event
    log_prob = distribution.log_prob(x)
    for k in range(4):
        torch.testing.assert_close(log_prob[k], likelihood(z[k]).log_prob(x), **CLOSE)
        for i in range(n):
            torch.testing.assert_close(log_prob[k, i], likelihood(z[k, i]).log_prob(x[i]), **CLOSE)
    assert distribution.sample().shape == (4, n, *case.event)
    assert distribution.mean.shape == (4, n, *case.event)


@guides
def test_guide_draws_for_each_particle_and_datum(case: Case) -> None:
    guide, batch = double(case), case.batch(3)
    assert guide(*batch).shape == (3, LATENT)
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(guide).get_trace(*batch)
    assert trace.nodes["z"]["value"].shape == (4, 3, LATENT)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (4, 3)


@models
def test_model_draws_data_from_the_prior(case: Case) -> None:
    model = double(case)
    for context, shape in ((pyro.plate("particles", 4, dim=-2), (4, 3)), (poutine.block(), (3,))):
        with context:
            trace = poutine.trace(model).get_trace(None, size=3)
        assert trace.nodes["z"]["value"].shape == (*shape, LATENT)
        assert trace.nodes["x"]["value"].shape == (*shape, *case.event)
        assert not trace.nodes["x"]["is_observed"]
        assert torch.equal(trace.nodes["_RETURN"]["value"], trace.nodes["x"]["value"])


@models
def test_trap_5_every_site_is_in_the_data_plate_alone(case: Case) -> None:
    check_plates(double(case), case.batch(3), {"z", "x"})


@guides
def test_trap_5_every_site_of_a_guide_is_in_the_data_plate_alone(case: Case) -> None:
    check_plates(double(case), case.batch(3), {"z"})


def check_plates(program: nn.Module, batch: tuple[Tensor, ...], sites: set[str]) -> None:
    trace = poutine.trace(program).get_trace(*batch)
    found = {name: trace.nodes[name] for name in (*trace.stochastic_nodes, *trace.observation_nodes)}
    found.pop("data", None)
    assert found.keys() == sites
    for site in found.values():
        assert [(f.name, f.dim, f.size, f.full_size) for f in site["cond_indep_stack"]] == [
            ("data", -1, 3, 3)
        ]


@pytest.mark.parametrize("case", [*GUIDES, *MODELS], ids=lambda case: case.name)
@pytest.mark.parametrize("n", [1, 5])
def test_batch_and_particles_are_their_loop(case: Case, n: int) -> None:
    if case.noisy:
        pytest.skip("its draws can't be told their noise: its own tests look at data apart")
    model, guide = pair_of(case)
    batch, noise = case.batch(n), torch.randn(4, n, LATENT).double()
    with Draws(z=noise):
        weights = log_weights(model, guide, *batch, num_particles=4)
    assert weights.shape == (4, n)
    for k in range(4):
        for i in range(n):
            with Draws(z=noise[k : k + 1, i : i + 1]):
                alone = log_weights(model, guide, *(tensor[i : i + 1] for tensor in batch))
            torch.testing.assert_close(weights[k : k + 1, i : i + 1], alone, **CLOSE)


@pytest.mark.parametrize("case", [*GUIDES, *MODELS], ids=lambda case: case.name)
def test_trap_1_a_second_instance_and_a_copy_share_no_name_in_pyros_store(case: Case) -> None:
    first = case.make().double()
    programs = [first, case.make().double(), copy.deepcopy(first)]
    names = []
    for program in programs:
        trace = poutine.trace(program).get_trace(*case.batch(2))
        names += [name for name, site in trace.nodes.items() if site["type"] == "param"]
    assert len(names) == len(set(names)) == 3 * len(list(first.parameters()))


@pytest.mark.parametrize("case", [*LIKELIHOODS, *GUIDES, *MODELS], ids=lambda case: case.name)
def test_traced_once_and_replayed_on_other_data(case: Case) -> None:
    # A value read in Python (`.item()`, `if tensor:`) would raise in the tracer or stay as it was.
    noise, z = torch.randn(2, 3, LATENT).double(), torch.randn(3, LATENT).double()
    piece = double(case)
    half = other_half(case, piece)

    def run(*batch: Tensor) -> Tensor:
        if case in LIKELIHOODS:
            return piece(z).log_prob(batch[0])
        with draws(case, noise):
            return log_weights(*((piece, half) if case in MODELS else (half, piece)), *batch, num_particles=2)

    with pyro.validation_enabled(False):
        graph = make_fx(run)(*case.batch(3))
        batch = case.batch(3)
        torch.manual_seed(1)  # which a graph does not do
        found = graph(*batch)
        torch.testing.assert_close(found, run(*batch), **CLOSE)


# Traps of the process


def test_trap_10_validation_is_on_after_everything() -> None:
    # A wrong scale and grey pixels raise, with the library imported and its pieces used.
    for case in (*GUIDES, *MODELS):
        log_weights(*pair_of(case), *case.batch(2))
    assert torch.distributions.Distribution._validate_args is True
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, -1.0)
    with pytest.raises(ValueError, match="support"):
        dist.Bernoulli(torch.tensor(0.5)).log_prob(torch.tensor(0.5))
