"""What every public prior, likelihood, guide and model keeps to; a class that is not listed fails."""

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
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
from ppl_vae.flows import (
    AffineCoupling,
    BlockNeuralAutoregressive,
    InverseAutoregressive,
    MaskedAutoregressive,
    Sylvester,
)
from ppl_vae.guides import (
    AnnealedGuide,
    DeepMarkovGuide,
    FlowGuide,
    FullRankGuide,
    GaussianMixtureGuide,
    HamiltonianGuide,
    HierarchicalGuide,
    HypersphericalGuide,
    LadderGuide,
    LocalGuide,
    LowRankGuide,
    MeanFieldGuide,
    MixtureGuide,
    SemiAmortizedGuide,
    SemiSupervisedGuide,
    VeryDeepGuide,
)
from ppl_vae.infer import log_weights
from ppl_vae.likelihoods import (
    Autoregressive,
    AutoregressiveCategorical,
    AutoregressiveNormal,
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    LowRankNormal,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
)
from ppl_vae.models import (
    CVAE,
    VAE,
    DeepMarkovModel,
    GaussianMixtureVAE,
    HierarchicalVAE,
    IndexedModel,
    LinearGaussian,
    SemiSupervisedVAE,
    SequenceVAE,
    VeryDeepVAE,
)
from ppl_vae.networks import (
    MLP,
    ConvDecoder,
    ConvEncoder,
    PixelHead,
    RecurrentDecoder,
    TransformerDecoder,
)
from ppl_vae.priors import (
    AutoregressivePrior,
    ConditionalNormal,
    FlowPrior,
    GaussianMixture,
    StandardNormal,
    UniformSphere,
    VampPrior,
)

LATENT = 2
CLASSES = 3
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
        support: where the data lie: "bits", "levels", "unit", "counts" or "real".
        indexed: whether programs take the data's numbers beside them.
        noisy: whether a guide draws more than its site.
        labels: labels that programs take: "given", "missing" (all of them) or none.
        mean: whether a likelihood's mean has a closed form.
        latents: the event shape of each latent site; of a class, which is one of ``CLASSES``, None.
        half: makes the other half of a pair, if it is none of the usual.
    """

    name: str
    make: Callable[[], nn.Module]
    event: tuple[int, ...] = IMAGE
    support: str = "bits"
    indexed: bool = False
    noisy: bool = False
    labels: str = ""
    mean: bool = True
    latents: Mapping[str, tuple[int, ...] | None] = field(default_factory=lambda: {"z": (LATENT,)})
    half: Callable[[nn.Module], nn.Module] | None = None

    def noise(self, *batch: int) -> dict[str, Tensor]:
        """Return what draws of the latent sites can be made of, ``[*batch, *event]`` each."""
        return {
            name: torch.randint(CLASSES, batch)
            if shape is None
            else torch.randn(*batch, *shape, dtype=torch.float64)
            for name, shape in self.latents.items()
        }

    def batch(self, n: int) -> tuple[Tensor, ...]:
        """Return what programs are called with."""
        if self.labels:
            y = torch.arange(n) % CLASSES if self.labels == "given" else torch.full((n,), -1)
            return self.data(n), y
        return (self.data(n), torch.arange(n)) if self.indexed else (self.data(n),)

    def prior(self, piece: nn.Module) -> Any:
        """Return a prior's distribution, of one datum for each label if it is conditioned on them."""
        return piece(torch.arange(CLASSES)) if self.labels else piece()

    def data(self, *batch: int) -> Tensor:
        shape = (*batch, *self.event)
        if self.support == "real":
            return torch.randn(shape, dtype=torch.float64)
        if self.support == "counts":
            return torch.poisson(torch.full(shape, 2.0, dtype=torch.float64))
        x = torch.rand(shape, dtype=torch.float64)
        if self.support == "levels":  # four
            return (3 * x).round() / 3
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


def labelled(out: Any = IMAGE) -> nn.Module:
    return MLP(LATENT, out, hidden=(6, 5), context=CLASSES)


def tokens() -> nn.Module:
    return AutoregressiveCategorical(RecurrentDecoder(LATENT, vocabulary=2, embedding=3, hidden=5), 4)


def label_guide() -> nn.Module:
    return SemiSupervisedGuide(MLP(IMAGE, hidden=5, context=CLASSES), MLP(IMAGE, CLASSES, 5), LATENT)


def label_model() -> nn.Module:
    return SemiSupervisedVAE(StandardNormal(LATENT), Bernoulli(labelled()), CLASSES)


def gaussian_mixture(weights: str = "learned", covariance: str = "diagonal") -> nn.Module:
    return GaussianMixtureVAE(CLASSES, LATENT, Bernoulli(dense()), weights=weights, covariance=covariance)


def hierarchy(skip: bool = False) -> nn.Module:
    """Return a model of layers z2 [3] and z1 [2]."""
    decoder = MLP(LATENT + 3 * skip, IMAGE, hidden=(6, 5))
    layer = ConditionalNormal(MLP(3, hidden=4), LATENT)
    return HierarchicalVAE(StandardNormal(3), (layer,), Bernoulli(decoder), skip=skip)


def bottom_up() -> nn.Module:
    return HierarchicalGuide((MLP(IMAGE, hidden=(6, 5)), MLP(LATENT, hidden=4)), (LATENT, 3))


def ladder(model: nn.Module) -> nn.Module:
    return LadderGuide((MLP(IMAGE, hidden=(6, 5)), MLP(5, hidden=4)), (LATENT, 3), model)


def very_deep() -> nn.Module:
    return VeryDeepVAE((2, 4), 3, 2, Bernoulli(PixelHead((3, 4, 4), 1)))


CLUSTERED = {"y": None, "z": (LATENT,)}
LAYERED = {"z1": (LATENT,), "z2": (3,)}
DEEP = {"z1": (2, 4, 4), "z2": (2, 2, 2)}
PRIORS = (
    Case("StandardNormal", lambda: StandardNormal(LATENT)),
    Case("UniformSphere", lambda: UniformSphere(LATENT)),
    Case("GaussianMixture", lambda: GaussianMixture(LATENT, 3)),
    Case("VampPrior", lambda: VampPrior(mean_field().double(), IMAGE, 3)),
    Case("FlowPrior", lambda: FlowPrior(MaskedAutoregressive(LATENT, hidden=5))),
    Case("AutoregressivePrior", lambda: AutoregressivePrior(LATENT, 5, components=2)),
    Case(
        "ConditionalNormal",
        lambda: ConditionalNormal(MLP(CLASSES, hidden=5), LATENT, num_classes=CLASSES),
        labels="given",
    ),
)
LIKELIHOODS = (
    Case("Bernoulli", lambda: Bernoulli(dense())),
    Case("Bernoulli-convolution", lambda: Bernoulli(convolution("layer"))),
    Case("ContinuousBernoulli", lambda: ContinuousBernoulli(dense()), support="unit"),
    Case("Normal-fixed", lambda: Normal(dense(), scale=0.5), support="real"),
    Case("Normal-learned", lambda: Normal(dense(3), scale="learned"), (3,), "real"),
    Case("Normal-network", lambda: Normal(dense((2, 4, 5)), scale="network"), support="real"),
    Case("Normal-elementwise", lambda: Normal(dense(3), scale="elementwise"), (3,), "real"),
    Case("Categorical", lambda: Categorical(dense((4, 4, 5)), levels=4), support="levels"),
    Case("DiscretizedLogistic", lambda: DiscretizedLogistic(dense((2, 4, 5)), levels=4), support="levels"),
    Case(
        "DiscretizedLogistic-mixture",
        lambda: DiscretizedLogistic(dense((9, 4, 5)), 3, 4),
        support="levels",
    ),
    Case("Poisson", lambda: Poisson(dense(3)), (3,), "counts"),
    Case("NegativeBinomial", lambda: NegativeBinomial(dense(3)), (3,), "counts"),
    Case(
        "NegativeBinomial-network",
        lambda: NegativeBinomial(dense(6), total_count="network"),
        (3,),
        "counts",
    ),
    Case("StudentT", lambda: StudentT(dense(), scale="learned"), support="real"),
    Case("StudentT-network", lambda: StudentT(dense(9), scale="network", df="network"), (3,), "real"),
    Case("LowRankNormal", lambda: LowRankNormal(dense((4, 4, 5)), rank=2), support="real"),
    Case("Autoregressive", lambda: Autoregressive(dense((2, 4, 5)), hidden=4, kernel_size=3)),
    Case(
        "Autoregressive-levels",
        lambda: Autoregressive(dense((2, 4, 5)), levels=4, hidden=4, kernel_size=3),
        support="levels",
    ),
    Case("AutoregressiveCategorical", tokens, (4,), mean=False),
    Case(
        "AutoregressiveNormal",
        lambda: AutoregressiveNormal(TransformerDecoder(LATENT, data_dim=3, width=4, heads=2, layers=1), 4),
        (4, 3),
        "real",
        mean=False,
    ),
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
    Case(
        "SemiSupervisedGuide",
        label_guide,
        labels="missing",
        latents=CLUSTERED,
        half=lambda guide: label_model(),
    ),
    Case(
        "GaussianMixtureGuide",
        lambda: GaussianMixtureGuide(MLP(IMAGE, hidden=(6, 5)), LATENT, CLASSES),
        latents=CLUSTERED,
        half=lambda guide: gaussian_mixture(),
    ),
    Case(
        "GaussianMixtureGuide-independent",
        lambda: GaussianMixtureGuide(MLP(IMAGE, hidden=5), LATENT, CLASSES, per_cluster=False),
        latents=CLUSTERED,
        half=lambda guide: gaussian_mixture(),
    ),
    Case("HierarchicalGuide", bottom_up, latents=LAYERED, half=lambda guide: hierarchy()),
    Case(
        "LadderGuide",
        lambda: ladder(hierarchy().double()),
        latents=LAYERED,
        half=lambda guide: guide.model,
    ),
    Case(
        "VeryDeepGuide",
        lambda: VeryDeepGuide((1, 4, 4), very_deep().double()),
        (1, 4, 4),
        latents=DEEP,
        half=lambda guide: guide.model,
    ),
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
    Case("SequenceVAE", lambda: SequenceVAE(StandardNormal(LATENT), tokens()), (4,)),
    Case(
        "CVAE",
        lambda: CVAE(
            ConditionalNormal(MLP(CLASSES, hidden=5), LATENT, num_classes=CLASSES), Bernoulli(labelled())
        ),
        labels="given",
        half=lambda model: MeanFieldGuide(MLP(IMAGE, hidden=5, context=CLASSES), LATENT),
    ),
    Case(
        "SemiSupervisedVAE",
        label_model,
        labels="missing",
        latents=CLUSTERED,
        half=lambda model: label_guide(),
    ),
    *(
        Case(
            f"GaussianMixtureVAE-{'-'.join(kind)}",
            lambda kind=kind: gaussian_mixture(*kind),
            latents=CLUSTERED,
            half=lambda model: GaussianMixtureGuide(MLP(IMAGE, hidden=5), LATENT, CLASSES),
        )
        for kind in (("learned",), ("equal",), ("stick-breaking",), ("learned", "full"))
    ),
    Case("HierarchicalVAE", hierarchy, latents=LAYERED, half=lambda model: bottom_up()),
    Case("HierarchicalVAE-skip", lambda: hierarchy(skip=True), latents=LAYERED, half=ladder),
    Case(
        "VeryDeepVAE",
        very_deep,
        (1, 4, 4),
        latents=DEEP,
        half=lambda model: VeryDeepGuide((1, 4, 4), model),
    ),
    Case("LinearGaussian", lambda: LinearGaussian(LATENT, 3), (3,), "real"),
    Case("IndexedModel", lambda: IndexedModel(LinearGaussian(LATENT, 3)), (3,), "real", indexed=True),
)
PIECES = (*PRIORS, *LIKELIHOODS, *GUIDES, *MODELS)
SEVERAL_SITES = {DeepMarkovModel, DeepMarkovGuide}  # with no site "z": tests of their own

pieces = pytest.mark.parametrize("case", PIECES, ids=lambda case: case.name)
priors = pytest.mark.parametrize("case", PRIORS, ids=lambda case: case.name)
likelihoods = pytest.mark.parametrize("case", LIKELIHOODS, ids=lambda case: case.name)
guides = pytest.mark.parametrize("case", GUIDES, ids=lambda case: case.name)
models = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)


def double(case: Case) -> nn.Module:
    return case.make().double()


def other_half(case: Case, piece: nn.Module) -> nn.Module:
    """Return a guide for a model, a model for a guide."""
    if case.half is not None:
        return case.half(piece).double()
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
def draws(case: Case, noise: dict[str, Tensor]) -> Iterator[None]:
    """Let runs share their noise, where a guide can be told it; else the random stream's start."""
    with nullcontext() if case.noisy else Draws(**noise):
        torch.manual_seed(1)
        yield


# The list


def test_every_public_class_is_listed() -> None:
    public = {
        getattr(module, name)
        for module in (importlib.import_module(f"ppl_vae.{package}") for package in PACKAGES)
        for name in module.__all__
    }
    listed = {type(case.make()) for case in PIECES} | SEVERAL_SITES
    assert {cls.__name__ for cls in public - listed} == set()
    assert {cls.__name__ for cls in listed - public} == set()


@pytest.mark.parametrize(
    ("package", "cases"),
    list(zip(PACKAGES, (PRIORS, LIKELIHOODS, GUIDES, MODELS), strict=True)),
    ids=PACKAGES,
)
def test_every_class_is_listed_under_its_package(package: str, cases: tuple[Case, ...]) -> None:
    names = {*importlib.import_module(f"ppl_vae.{package}").__all__} - {c.__name__ for c in SEVERAL_SITES}
    assert {type(case.make()).__name__ for case in cases} == names


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
    if case in GUIDES and hasattr(one, "model"):
        other.model = half
    noise = case.noise(2, 3)

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
        prior = case.prior(piece)
        assert prior.sample().dtype == prior.log_prob(prior.sample()).dtype == torch.float64
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
        prior = case.prior(piece)
        log_prob = prior.log_prob(prior.sample((3,))).sum()
        if log_prob.requires_grad:
            log_prob.backward()
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
    prior = case.prior(double(case))
    assert prior.batch_shape == ((CLASSES,) if case.labels else ())
    assert prior.event_shape == (LATENT,)
    prior = prior.expand([3])
    z = prior.sample((4,))
    log_prob = prior.log_prob(z)
    assert log_prob.shape == (4, 3)
    for k in range(4):
        for i in range(3):
            torch.testing.assert_close(log_prob[k, i], prior.log_prob(z[k, i])[i], **CLOSE)


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
    if case.mean:
        assert distribution.mean.shape == (4, n, *case.event)


@guides
def test_guide_draws_for_each_particle_and_datum(case: Case) -> None:
    guide, batch = double(case), case.batch(3)
    if case.latents.keys() == {"z"}:
        assert guide(*batch).shape == (3, LATENT)
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(guide).get_trace(*batch)
    trace.compute_log_prob()
    for name, shape in case.latents.items():
        assert trace.nodes[name]["value"].shape == (4, 3, *(shape or ()))
        assert trace.nodes[name]["log_prob"].shape == (4, 3)


@models
def test_model_draws_data_from_the_prior(case: Case) -> None:
    model = double(case)
    for context, shape in ((pyro.plate("particles", 4, dim=-2), (4, 3)), (poutine.block(), (3,))):
        with context:
            labels = case.batch(3)[1:] if case.labels else ()
            trace = poutine.trace(model).get_trace(None, *labels, size=3)
        for name, event in case.latents.items():
            assert trace.nodes[name]["value"].shape == (*shape, *(event or ()))
        assert trace.nodes["x"]["value"].shape == (*shape, *case.event)
        assert not trace.nodes["x"]["is_observed"]
        assert torch.equal(trace.nodes["_RETURN"]["value"], trace.nodes["x"]["value"])


@models
def test_trap_5_every_site_is_in_the_data_plate_alone(case: Case) -> None:
    of_labels = {"given": {"y"}, "missing": {"label"}}.get(case.labels, set())
    check_plates(double(case), case.batch(3), {*case.latents, "x"} | of_labels)


@guides
def test_trap_5_every_site_of_a_guide_is_in_the_data_plate_alone(case: Case) -> None:
    check_plates(double(case), case.batch(3), {*case.latents})


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
    batch, noise = case.batch(n), case.noise(4, n)
    with Draws(**noise):
        weights = log_weights(model, guide, *batch, num_particles=4)
    assert weights.shape == (4, n)
    for k in range(4):
        for i in range(n):
            with Draws(**{name: value[k : k + 1, i : i + 1] for name, value in noise.items()}):
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
    noise, z = case.noise(2, 3), torch.randn(3, LATENT).double()
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
