"""What can be combined: priors, likelihoods, models, guides and estimators, all pairs of them.

``RULES`` says which two choices do not go together, and why. All others do: a set of combinations in which
every such pair occurs is trained, and the pairs that are ruled out raise. The README's table is made of it.
"""

import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn

from ppl_vae.flows import AffineCoupling, MaskedAutoregressive, Planar
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
from ppl_vae.infer import (
    CIWAE,
    CUBO,
    DIP_ELBO,
    IWAE,
    KL_ELBO,
    MIWAE,
    PIWAE,
    STL_ELBO,
    TVO,
    VIMCO,
    BetaTC_ELBO,
    DReG,
    EnumELBO,
    Objective,
    RelaxedELBO,
    Renyi,
    ScoreFunctionELBO,
    WakeSleep,
    log_weights,
)
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
from ppl_vae.networks import MLP, GatedTransition, RecurrentDecoder, RecurrentEncoder
from ppl_vae.priors import (
    AutoregressivePrior,
    ConditionalNormal,
    FlowPrior,
    GaussianMixture,
    StandardNormal,
    UniformSphere,
    VampPrior,
)
from ppl_vae.training import fit

N, LATENT, CLASSES, SIDE, STEPS = 24, 2, 3, 4, 4
MARGIN = 0.3  # nats per datum
IMAGE = (1, SIDE, SIDE)
OWN_PRIOR, OWN_LIKELIHOOD = "the model's prior", "the model's likelihood"  # which is no argument of it

Combination = tuple[str, ...]  # a choice of each axis, in their order

# The table

AXES: dict[str, tuple[str, ...]] = {
    "model": (
        *("VAE", "CVAE", "SemiSupervisedVAE", "GaussianMixtureVAE", "HierarchicalVAE", "VeryDeepVAE"),
        *("SequenceVAE", "DeepMarkovModel", "LinearGaussian", "IndexedModel"),
    ),
    "prior": (
        *("StandardNormal", "UniformSphere", "GaussianMixture", "VampPrior", "FlowPrior"),
        *("AutoregressivePrior", "ConditionalNormal", OWN_PRIOR),
    ),
    "likelihood": (
        *("Bernoulli", "ContinuousBernoulli", "Normal", "LowRankNormal", "StudentT", "Categorical"),
        *("DiscretizedLogistic", "Poisson", "NegativeBinomial", "Autoregressive"),
        *("AutoregressiveCategorical", "AutoregressiveNormal", OWN_LIKELIHOOD),
    ),
    "guide": (
        *("MeanFieldGuide", "FullRankGuide", "LowRankGuide", "MixtureGuide", "HypersphericalGuide"),
        *("FlowGuide", "FlowGuide of Planar", "LocalGuide", "SemiAmortizedGuide", "HamiltonianGuide"),
        *("AnnealedGuide", "SemiSupervisedGuide", "GaussianMixtureGuide", "HierarchicalGuide"),
        *("LadderGuide", "VeryDeepGuide", "DeepMarkovGuide"),
    ),
    "estimator": (
        *("Trace_ELBO", "KL_ELBO", "STL_ELBO", "IWAE", "DReG", "Renyi", "CIWAE", "MIWAE", "PIWAE", "CUBO"),
        *("TVO", "WakeSleep", "VIMCO", "ScoreFunctionELBO", "EnumELBO", "RelaxedELBO", "BetaTC_ELBO"),
        "DIP_ELBO",
    ),
}
NAMES = tuple(AXES)


@dataclass(frozen=True)
class Rule:
    """Choices of two axes that do not go together.

    Attributes:
        one: some choices of an axis.
        other: some choices of another axis.
        reason: why they do not.
        error: what the error says, a regular expression; None if there is nothing to be built, or no error.
    """

    one: tuple[str, ...]
    other: tuple[str, ...]
    reason: str
    error: str | None = None

    def forbids(self, a: str, b: str) -> bool:
        return (a in self.one and b in self.other) or (b in self.one and a in self.other)


def but(axis: str, *names: str) -> tuple[str, ...]:
    """Return the choices of an axis other than these."""
    return tuple(name for name in AXES[axis] if name not in names)


GUIDES_OF = {
    "SemiSupervisedVAE": ("SemiSupervisedGuide",),
    "GaussianMixtureVAE": ("GaussianMixtureGuide",),
    "HierarchicalVAE": ("HierarchicalGuide", "LadderGuide"),
    "VeryDeepVAE": ("VeryDeepGuide",),
    "DeepMarkovModel": ("DeepMarkovGuide",),
    "IndexedModel": ("LocalGuide",),
}
OF_ONE_SITE = tuple(
    name for name in AXES["guide"] if name not in itertools.chain.from_iterable(GUIDES_OF.values())
)
OF_X = ("AutoregressiveCategorical", "AutoregressiveNormal")  # of sequences
OWN_PRIORS = ("GaussianMixtureVAE", "VeryDeepVAE", "LinearGaussian")
OWN = "the prior is the model's own", "the likelihood is the model's own"
SITES = "the latent sites are others"
# the sites differ, or before they are compared the guide takes no labels, lengths or vectors
OTHER = (
    "latent sites|one latent site|HierarchicalVAE|VeryDeepVAE|index: |"
    "positional arguments|context: expected|every_step|x: expected shape|disagree on shapes|inside plate"
)
DISCRETE = "the class is drawn, which has no reparameterised gradient"
SPHERE = "one is on the sphere, the other in all of space"
SCORES = "it scores values that it did not draw"
RULES: tuple[Rule, ...] = (
    # which model has which sites
    *(Rule((model,), but("guide", *guides), SITES, OTHER) for model, guides in GUIDES_OF.items()),
    Rule(("VAE", "CVAE", "SequenceVAE", "LinearGaussian"), but("guide", *OF_ONE_SITE), SITES, OTHER),
    # which model has which arguments
    Rule(OWN_PRIORS, but("prior", OWN_PRIOR), OWN[0]),
    Rule(but("model", *OWN_PRIORS), (OWN_PRIOR,), "the prior is an argument"),
    Rule(("LinearGaussian",), but("likelihood", OWN_LIKELIHOOD), OWN[1]),
    Rule(but("model", "LinearGaussian"), (OWN_LIKELIHOOD,), "the likelihood is an argument"),
    Rule(
        but("model", "CVAE", "SemiSupervisedVAE", *OWN_PRIORS),
        ("ConditionalNormal",),
        "the model has nothing to condition it on",
        "context: expected labels",
    ),
    # data
    Rule(
        ("SequenceVAE",),
        but("likelihood", *OF_X, OWN_LIKELIHOOD),
        "it takes no lengths",
        "context: expected none",
    ),
    Rule(("CVAE", "SemiSupervisedVAE"), OF_X, "it takes the labels for lengths", "likelihood: expected one"),
    Rule(("VeryDeepVAE",), OF_X, "the guide takes images", "conv2d|channels"),
    Rule(("DeepMarkovModel",), ("Autoregressive",), "steps are vectors, not images", "feature map"),
    Rule(("DeepMarkovModel",), ("AutoregressiveNormal",), "steps are vectors", r"x: expected shape .*T, 4"),
    Rule(
        ("VampPrior",),
        ("AutoregressiveCategorical",),
        "pseudo-inputs can't learn tokens",
        "guide: expected an encoder of reals",
    ),
    # priors
    Rule(("HypersphericalGuide",), but("prior", "UniformSphere", "VampPrior"), SPHERE, "on the sphere"),
    Rule(
        ("UniformSphere",),
        but("guide", "HypersphericalGuide"),
        SPHERE,
        "on the sphere|within the support .Sphere",
    ),
    Rule(
        ("VampPrior",),
        ("CVAE", "SemiSupervisedVAE", "HierarchicalVAE", "DeepMarkovModel", "IndexedModel"),
        "the guide has no posterior of x alone",
        "labels|posterior|index",
    ),
    Rule(("VampPrior",), ("FlowGuide of Planar",), SCORES, "Planar"),
    # estimators
    Rule(
        ("SemiSupervisedVAE", "GaussianMixtureVAE"),
        but("estimator", "Trace_ELBO", "TVO", "WakeSleep", "VIMCO", "ScoreFunctionELBO", "EnumELBO"),
        DISCRETE,
        "reparameterised|OneHotCategorical",
    ),
    Rule(("FlowGuide of Planar",), ("STL_ELBO", "DReG", "WakeSleep"), SCORES, "Planar"),
    Rule(("HamiltonianGuide", "AnnealedGuide"), ("STL_ELBO", "DReG"), SCORES, "can score a value"),
    Rule(
        ("HamiltonianGuide", "AnnealedGuide", "LadderGuide", "VeryDeepGuide"),
        ("WakeSleep",),
        "training the guide alone would train the model, which it is made of",
        "leave the model alone",
    ),
    Rule(
        (
            *("MixtureGuide", "HypersphericalGuide", "FlowGuide", "FlowGuide of Planar"),
            *("HamiltonianGuide", "AnnealedGuide"),
        ),
        ("BetaTC_ELBO", "DIP_ELBO"),
        "it needs the marginals of q(z given x)",
        "known marginals",
    ),
    Rule(("VeryDeepVAE",), ("BetaTC_ELBO", "DIP_ELBO"), "it takes latent vectors, not images", "known marg"),
    Rule(("DeepMarkovModel",), ("BetaTC_ELBO", "DIP_ELBO"), "latents after the end are masked", "known marg"),
)


# What a combination is made of

OUTPUTS: Mapping[str, int] = {
    "LowRankNormal": 3,
    "Categorical": 4,
    "DiscretizedLogistic": 2,
    "Autoregressive": 2,
}
MAKE_LIKELIHOOD: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "Bernoulli": Bernoulli,
    "ContinuousBernoulli": ContinuousBernoulli,
    "Normal": lambda decoder: Normal(decoder, scale="learned"),
    "LowRankNormal": lambda decoder: LowRankNormal(decoder, rank=1),
    "StudentT": lambda decoder: StudentT(decoder, scale="learned"),
    "Categorical": lambda decoder: Categorical(decoder, levels=4),
    "DiscretizedLogistic": lambda decoder: DiscretizedLogistic(decoder, levels=4),
    "Poisson": Poisson,
    "NegativeBinomial": NegativeBinomial,
    "Autoregressive": lambda decoder: Autoregressive(decoder, hidden=4, layers=1, kernel_size=3),
    "AutoregressiveCategorical": lambda decoder: AutoregressiveCategorical(decoder, STEPS),
    "AutoregressiveNormal": lambda decoder: AutoregressiveNormal(decoder, STEPS),
}
MAKE_PRIOR: Mapping[str, Callable[..., nn.Module]] = {
    "StandardNormal": StandardNormal,
    "UniformSphere": UniformSphere,
    "GaussianMixture": lambda latent: GaussianMixture(latent, 3),
    "FlowPrior": lambda latent: FlowPrior(MaskedAutoregressive(latent, depth=1, hidden=6)),
    "AutoregressivePrior": lambda latent: AutoregressivePrior(latent, hidden=6, components=2),
    "ConditionalNormal": lambda latent: ConditionalNormal(
        MLP(CLASSES, hidden=6), latent, num_classes=CLASSES
    ),
}
MAKE_GUIDE: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "MeanFieldGuide": lambda encoder: MeanFieldGuide(encoder, LATENT),
    "FullRankGuide": lambda encoder: FullRankGuide(encoder, LATENT),
    "LowRankGuide": lambda encoder: LowRankGuide(encoder, LATENT, rank=1),
    "MixtureGuide": lambda encoder: MixtureGuide(encoder, LATENT, 2),
    "HypersphericalGuide": lambda encoder: HypersphericalGuide(encoder, LATENT),
    "FlowGuide": lambda encoder: FlowGuide(encoder, AffineCoupling(LATENT, 3, depth=2, hidden=6)),
    "FlowGuide of Planar": lambda encoder: FlowGuide(encoder, Planar(LATENT, 3, depth=2)),
    "LocalGuide": lambda encoder: LocalGuide(N, LATENT),
    "SemiSupervisedGuide": lambda encoder: SemiSupervisedGuide(encoder, MLP(IMAGE, CLASSES, 6), LATENT),
    "GaussianMixtureGuide": lambda encoder: GaussianMixtureGuide(encoder, LATENT, CLASSES),
    "HierarchicalGuide": lambda encoder: HierarchicalGuide(
        (encoder, MLP(LATENT, hidden=6)), (LATENT, LATENT)
    ),
    "DeepMarkovGuide": lambda encoder: DeepMarkovGuide(encoder, LATENT),
}
MAKE_MODEL_BASED: Mapping[str, Callable[[Any, Any], nn.Module]] = {  # of a mean-field guide and the model
    "SemiAmortizedGuide": lambda inner, model: SemiAmortizedGuide(inner, model, steps=2, num_particles=2),
    "HamiltonianGuide": lambda inner, model: HamiltonianGuide(inner, model, steps=2),
    "AnnealedGuide": lambda inner, model: AnnealedGuide(inner, model, steps=2),
    "LadderGuide": lambda inner, model: LadderGuide(
        (inner.encoder, MLP(inner.encoder.out_features, hidden=6)), (LATENT, LATENT), model
    ),
    "VeryDeepGuide": lambda inner, model: VeryDeepGuide(IMAGE, model),
}
MAKE_MODEL: Mapping[str, Callable[[Any, Any], nn.Module]] = {
    "VAE": VAE,
    "CVAE": CVAE,
    "SemiSupervisedVAE": lambda prior, likelihood: SemiSupervisedVAE(prior, likelihood, CLASSES),
    "GaussianMixtureVAE": lambda prior, likelihood: GaussianMixtureVAE(CLASSES, LATENT, likelihood),
    "HierarchicalVAE": lambda prior, likelihood: HierarchicalVAE(
        prior, [ConditionalNormal(MLP(LATENT, hidden=6), LATENT)], likelihood
    ),
    "VeryDeepVAE": lambda prior, likelihood: VeryDeepVAE((2, SIDE), 3, 1, likelihood),
    "SequenceVAE": SequenceVAE,
    "DeepMarkovModel": lambda prior, likelihood: DeepMarkovModel(
        prior, GatedTransition(LATENT, hidden=6), likelihood, STEPS
    ),
    "LinearGaussian": lambda prior, likelihood: LinearGaussian(LATENT, 5),
    "IndexedModel": lambda prior, likelihood: IndexedModel(VAE(prior, likelihood)),
}
MAKE_ESTIMATOR: Mapping[str, Callable[[], ELBO]] = {
    "Trace_ELBO": Trace_ELBO,
    "KL_ELBO": KL_ELBO,
    "STL_ELBO": STL_ELBO,
    "IWAE": lambda: IWAE(3),
    "DReG": lambda: DReG(3),
    "Renyi": lambda: Renyi(3),
    "CIWAE": lambda: CIWAE(3),
    "MIWAE": lambda: MIWAE(4, num_groups=2),
    "PIWAE": lambda: PIWAE(4, num_groups=2),
    "CUBO": lambda: CUBO(3),
    "TVO": lambda: TVO(4),
    "WakeSleep": lambda: WakeSleep(3),
    "VIMCO": lambda: VIMCO(3),
    "ScoreFunctionELBO": lambda: ScoreFunctionELBO(3),
    "EnumELBO": EnumELBO,
    "RelaxedELBO": RelaxedELBO,
}


def shape_of(model: str, likelihood: str) -> tuple[int, ...]:
    """Return the event shape of x, or of one step's."""
    if likelihood.startswith("Autoregressive") and likelihood != "Autoregressive":
        return (STEPS,) if likelihood == "AutoregressiveCategorical" else (STEPS, 3)
    return {"LinearGaussian": (5,), "DeepMarkovModel": (4,)}.get(model, IMAGE)


def data(model: str, likelihood: str) -> Tensor:
    """Return data of a pattern that a few steps learn: every other value is large."""
    shape = shape_of(model, likelihood)
    shape = (N, STEPS, *shape) if model == "DeepMarkovModel" else (N, *shape)
    pattern = (torch.arange(shape[-1]) % 2).expand(shape)
    p = 0.1 + 0.8 * pattern
    if likelihood in ("Bernoulli", "Autoregressive", "AutoregressiveCategorical"):
        return torch.bernoulli(p)
    if likelihood == "ContinuousBernoulli":
        return (p + 0.1 * (torch.rand(shape) - 0.5)).clamp(0.0, 1.0)
    if likelihood in ("Categorical", "DiscretizedLogistic"):
        return torch.bernoulli(p.expand(3, *shape)).mean(0)
    if likelihood in ("Poisson", "NegativeBinomial"):
        return torch.poisson(10 * p)
    return 4 * p + 0.3 * torch.randn(shape)


def batch_of(model: str, likelihood: str) -> tuple[Tensor, ...]:
    x = data(model, likelihood)
    if model == "CVAE":
        return x, torch.arange(N) % CLASSES
    if model == "SemiSupervisedVAE":
        return x, torch.arange(N) % (CLASSES + 1) - 1  # -1: no label
    if model in ("SequenceVAE", "DeepMarkovModel"):
        return x, STEPS - torch.arange(N) % 2
    return (x, torch.arange(N)) if model == "IndexedModel" else (x,)


def build(combination: Combination) -> tuple[nn.Module, nn.Module, ELBO, tuple[Tensor, ...]]:
    """Return model, guide, estimator and a batch for them."""
    torch.manual_seed(0)
    model_name, prior_name, likelihood_name, guide_name, estimator_name = combination
    shape = shape_of(model_name, likelihood_name)
    context = CLASSES if model_name in ("CVAE", "SemiSupervisedVAE") else None
    encoder: nn.Module
    decoder: nn.Module
    if len(shape) == 3 or model_name == "LinearGaussian":
        encoder = MLP(shape, hidden=8, context=context)
    elif model_name == "DeepMarkovModel":
        encoder = RecurrentEncoder(data_dim=4, hidden=6, direction="backward", every_step=True)
    elif len(shape) == 1:
        encoder = RecurrentEncoder(vocabulary=2, embedding=3, hidden=6)
    else:
        encoder = RecurrentEncoder(data_dim=3, hidden=6)
    if likelihood_name == "AutoregressiveCategorical":
        decoder = RecurrentDecoder(LATENT, vocabulary=2, embedding=3, hidden=6)
    elif likelihood_name == "AutoregressiveNormal":
        decoder = RecurrentDecoder(LATENT, data_dim=3, embedding=3, hidden=6)
    else:
        out = (OUTPUTS.get(likelihood_name, 1) * shape[0], *shape[1:])
        state = 3 * SIDE * SIDE if model_name == "VeryDeepVAE" else LATENT
        decoder = MLP(state, out, hidden=8, context=context)
    likelihood = None if likelihood_name == OWN_LIKELIHOOD else MAKE_LIKELIHOOD[likelihood_name](decoder)
    based = guide_name in MAKE_MODEL_BASED
    guide: Any = MeanFieldGuide(encoder, LATENT) if based else MAKE_GUIDE[guide_name](encoder)
    prior: nn.Module | None = None
    if prior_name == "VampPrior":
        bounds = None if likelihood_name in ("Normal", "LowRankNormal", "StudentT") else (0.0, 1.0)
        prior = VampPrior(guide, shape, 3, bounds=bounds)  # or what the guide starts from
    elif prior_name != OWN_PRIOR:
        prior = MAKE_PRIOR[prior_name](LATENT)
    model = MAKE_MODEL[model_name](prior, likelihood)
    if based:
        guide = MAKE_MODEL_BASED[guide_name](guide, model)
    site = {"HierarchicalVAE": "z1", "VeryDeepVAE": "z1", "DeepMarkovModel": "z_1"}.get(model_name, "z")
    if estimator_name == "BetaTC_ELBO":
        elbo: ELBO = BetaTC_ELBO(N, site=site)
    elif estimator_name == "DIP_ELBO":
        elbo = DIP_ELBO(0.01, site=site)
    elif estimator_name == "KL_ELBO" and guide_name == "HierarchicalGuide":
        elbo = KL_ELBO(analytic_kl=False)  # closed forms need the model's order of layers
    else:
        elbo = MAKE_ESTIMATOR[estimator_name]()
    return model, guide, elbo, batch_of(model_name, likelihood_name)


# Pairwise covering


def reason_against(a: str, b: str) -> str | None:
    """Return why two choices do not go together, None if no rule says so."""
    return next((rule.reason for rule in RULES if rule.forbids(a, b)), None)


@cache
def fits(a: str, b: str) -> bool:
    return reason_against(a, b) is None


def completed(
    chosen: dict[int, str], uncovered: set[tuple[str, str]], but_for: tuple[str, str] | None = None
) -> dict[int, str] | None:
    """Return a combination with the chosen ones that no rule is against, of many uncovered pairs.

    Args:
        chosen: choices by their axes' numbers.
        uncovered: pairs of which as many as possible are to be in it.
        but_for: a pair that may be in it, whatever the rules say.
    """

    def allowed(a: str, b: str) -> bool:
        return fits(a, b) or (but_for is not None and {a, b} == {*but_for})

    if not all(allowed(a, b) for a, b in itertools.combinations(chosen.values(), 2)):
        return None
    axis = next((i for i in range(len(NAMES)) if i not in chosen), None)
    if axis is None:
        return chosen
    choices = [c for c in AXES[NAMES[axis]] if all(allowed(c, other) for other in chosen.values())]
    new = {c: sum((o, c) in uncovered or (c, o) in uncovered for o in chosen.values()) for c in choices}
    for choice in sorted(choices, key=lambda c: -new[c]):
        found = completed({**chosen, axis: choice}, uncovered, but_for)
        if found is not None:
            return found
    return None


def pairs_of(chosen: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    for i, j in itertools.combinations(range(len(NAMES)), 2):
        yield chosen[i], chosen[j]


def all_pairs() -> dict[tuple[str, str], dict[int, str]]:
    """Return every two choices of different axes, with the numbers of their axes."""
    return {
        (a, b): {i: a, j: b}
        for i, j in itertools.combinations(range(len(NAMES)), 2)
        for a in AXES[NAMES[i]]
        for b in AXES[NAMES[j]]
    }


@cache
def covering() -> list[Combination]:
    """Return combinations in which every two choices occur that go together."""
    pairs, found = all_pairs(), []
    uncovered = set(pairs)
    for pair, chosen in pairs.items():
        if pair in uncovered:
            uncovered.discard(pair)
            combination = completed(chosen, uncovered)
            if combination is not None:
                uncovered -= set(pairs_of(combination))
                found.append(tuple(combination[i] for i in range(len(NAMES))))
    return found


# The tests


def test_every_public_class_is_on_an_axis() -> None:
    for axis in ("model", "prior", "likelihood", "guide"):
        public = set(importlib.import_module(f"ppl_vae.{axis}s").__all__)
        listed = {name.partition(" of ")[0] for name in AXES[axis]} - {OWN_PRIOR, OWN_LIKELIHOOD}
        assert listed == public
    infer = importlib.import_module("ppl_vae.infer")
    public = {name for name in infer.__all__ if isinstance(getattr(infer, name), type)}
    assert {*AXES["estimator"]} - {"Trace_ELBO"} == {
        name for name in public - {"Estimator"} if issubclass(getattr(infer, name), ELBO)
    }


def test_every_choice_is_in_a_combination_and_every_pair_is_covered_or_ruled_out() -> None:
    covered = set(itertools.chain.from_iterable(pairs_of(dict(enumerate(c))) for c in covering()))
    for pair, chosen in all_pairs().items():
        assert (pair in covered) == (completed(chosen, set()) is not None)
    assert {*itertools.chain.from_iterable(covering())} == {*itertools.chain.from_iterable(AXES.values())}


@pytest.mark.parametrize("combination", covering(), ids="-".join)
def test_combination_trains(combination: Combination) -> None:
    model, guide, elbo, batch = build(combination)
    objective = Objective(model, guide, elbo)
    objective.setup(*batch)

    def bound() -> float:
        torch.manual_seed(1)
        with torch.no_grad():
            return float(log_weights(model, guide, *batch, num_particles=4).mean())

    before, trained = bound(), [model, guide]
    if isinstance(elbo, CUBO):  # its guide descends an upper bound, of which few draws know little
        trained = [model]
    parameters = dict.fromkeys(p for program in trained for p in program.parameters())
    optimizer = torch.optim.Adam(list(parameters), lr=0.05)
    for _ in range(6):
        optimizer.zero_grad()
        loss = objective(*batch)
        loss.backward()
        assert loss.isfinite()
        optimizer.step()
    after = bound()
    assert math.isfinite(after)
    if not (isinstance(elbo, CUBO) and hasattr(guide, "model")):  # such a guide moves with the model
        assert after > before + MARGIN


def raise_of(chosen: Mapping[int, str]) -> None:
    """Run a combination that raises."""
    model, guide, elbo, batch = build(tuple(chosen[i] for i in range(len(NAMES))))
    objective = Objective(model, guide, elbo)
    objective.setup(*batch)
    objective(*batch)


# pairs that no rule allows, in combinations that no other rule forbids
RULED_OUT = [
    pytest.param(chosen, rule.error, id="-".join(pair))
    for pair, start in all_pairs().items()
    for rule in RULES
    if rule.error is not None and rule.forbids(*pair)
    if (chosen := completed(start, set(), but_for=pair)) is not None
]


@pytest.mark.parametrize(("chosen", "error"), RULED_OUT)
def test_what_does_not_go_together_raises(chosen: dict[int, str], error: str) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError, RuntimeError), match=error):
        raise_of(chosen)


def test_every_rule_that_names_an_error_is_tried() -> None:
    tried = {error for _, error in (param.values for param in RULED_OUT)}
    assert tried == {rule.error for rule in RULES if rule.error is not None}


@pytest.mark.parametrize(
    ("likelihood", "x"),
    [
        ("Bernoulli", 0.5),
        ("Categorical", 0.5),
        ("ContinuousBernoulli", 1.5),
        ("Poisson", 0.5),
        ("Poisson", -1.0),
    ],
)
def test_data_outside_the_support_raise(likelihood: str, x: float) -> None:
    model, guide, _, (batch,) = build(("VAE", "StandardNormal", likelihood, "MeanFieldGuide", "Trace_ELBO"))
    with pytest.raises(ValueError, match="outside the support of site 'x'"):
        fit(model, guide, torch.full_like(batch, x), epochs=1, progress=False)


def test_enum_elbo_without_discrete_sites_is_the_elbo() -> None:
    losses = []
    for estimator in ("EnumELBO", "Trace_ELBO"):
        model, guide, elbo, batch = build(("VAE", "StandardNormal", "Bernoulli", "MeanFieldGuide", estimator))
        torch.manual_seed(0)
        losses.append(Objective(model, guide, elbo)(*batch))
    torch.testing.assert_close(*losses)


# The README's table

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- combinations: made by tests/test_combinations.py -->", "<!-- end of combinations -->"


def listed(axis: str, names: tuple[str, ...]) -> str:
    """Return choices of an axis as text."""
    own = {OWN_PRIOR, OWN_LIKELIHOOD}
    if set(names) <= own:
        return "its own"
    everything, all_of_them = [name for name in AXES[axis] if name not in own], "all"
    if axis == "guide" and len(names) > 6 and set(names) <= set(OF_ONE_SITE):
        everything, all_of_them = list(OF_ONE_SITE), "of one site"
    missing = [name for name in everything if name not in names]
    if len(missing) >= len(everything) / 2:
        return quoted(name for name in everything if name in names)
    return f"{all_of_them} but {quoted(missing)}" if missing else all_of_them


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names).replace(" of ", "` of `")


def axis_of(names: tuple[str, ...]) -> str:
    return next(axis for axis, choices in AXES.items() if names[0] in choices)


def readme_table() -> str:
    """Return what the README says: what each model goes with, and what else does not go together."""
    lines = [
        "| model | priors | likelihoods | guides | estimators |",
        "|---|---|---|---|---|",
    ]
    for model in AXES["model"]:
        cells = [f"`{model}`"]
        for i, axis in enumerate(NAMES[1:], 1):
            names = [name for name in AXES[axis] if completed({0: model, i: name}, set()) is not None]
            cells.append(listed(axis, tuple(names)))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Guides of one site: {quoted(OF_ONE_SITE)}.",
        "",
        "| this | does not go with | because |",
        "|---|---|---|",
    ]
    for rule in RULES:
        if (
            rule.reason != SITES
            and not {OWN_PRIOR, OWN_LIKELIHOOD} & {*rule.one, *rule.other}
            and rule.reason not in OWN
        ):
            one, other = (listed(axis_of(names), names) for names in (rule.one, rule.other))
            lines.append(f"| {one} | {other} | {rule.reason} |")
    return "\n".join(lines)


def test_the_readmes_table_is_the_one_that_is_tested() -> None:
    found = README.read_text().partition(BEGIN)[2].partition(END)[0]
    assert found.strip() == readme_table(), "run `python tests/test_combinations.py`, which writes it"


if __name__ == "__main__":
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{readme_table()}\n{END}{rest.partition(END)[2]}")
