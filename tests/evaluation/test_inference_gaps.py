"""Inference gaps: against their closed forms, for guides of all kinds, and what they leave alone."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Stream
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.util import get_rng_state
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ppl_vae.data import Split
from ppl_vae.evaluation import Estimate
from ppl_vae.evaluation.inference_gaps import (
    InferenceGaps,
    _Search,
    chosen_weights,
    find_heads,
    inference_gaps,
)
from ppl_vae.flows import Planar
from ppl_vae.guides import (
    FlowGuide,
    FullRankGuide,
    GaussianMixtureGuide,
    HierarchicalGuide,
    LadderGuide,
    LocalGuide,
    MeanFieldGuide,
    MixtureGuide,
    SemiAmortizedGuide,
)
from ppl_vae.infer import log_weights, tracing
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE, GaussianMixtureVAE, HierarchicalVAE, LinearGaussian
from ppl_vae.models.indexed import IndexedModel
from ppl_vae.networks import MLP
from ppl_vae.priors import ConditionalNormal, StandardNormal, VampPrior

QUIET: dict[str, Any] = {"progress": False}
SHORT: dict[str, Any] = {"progress": False, "num_particles": 20, "steps": 10, "step_particles": 2}
# What a search leaves that ends where 50 steps gain less than 0.01 nats, at each of four falling rates.
LEFT = 5e-3


def linear_model(latent: int = 2) -> LinearGaussian:
    torch.manual_seed(0)
    model = LinearGaussian(latent, 5, scale=0.7).double()
    with torch.no_grad():
        model.weight[:, 1] += 0.7 * model.weight[:, 0]  # so that the posterior is correlated
    return model


def linear_data(model: LinearGaussian, n: int = 30) -> Tensor:
    torch.manual_seed(1)
    return model(None, size=n).detach()


def precision_of(model: LinearGaussian) -> Tensor:
    with torch.no_grad():
        eye = torch.eye(model.latent_dim, dtype=torch.float64)
        return model.weight.mT @ model.weight / (2 * model.log_scale).exp() + eye


def optimal_outputs(model: LinearGaussian, x: Tensor) -> Tensor:
    """Return means and log scales of the best mean-field guide of each datum, ``[n, 2 * latent]``."""
    with torch.no_grad():
        log_scale = -0.5 * precision_of(model).diagonal().log()
        return torch.cat([model.posterior(x).mean, log_scale.expand(len(x), -1)], 1)


def mean_field_gap(model: LinearGaussian) -> float:
    """Return KL(q* || p(z | x)) of the best mean-field guide: its precisions are the posterior's diagonal."""
    precision = precision_of(model)
    return 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))


def exact_gap(model: LinearGaussian, x: Tensor, outputs: Tensor) -> Tensor:
    """Return KL(q || p(z | x)) of mean-field guides, ``[n]``."""
    with torch.no_grad():
        loc, log_scale = outputs.chunk(2, -1)
        q = dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(log_scale.exp()))
        return torch.distributions.kl_divergence(q, model.posterior(x))


def linear_guide(model: LinearGaussian, shift: tuple[float, ...] = (0.0,) * 4) -> MeanFieldGuide:
    """Return the best amortised mean-field guide, but for a shift of means and log scales."""
    guide = MeanFieldGuide(nn.Flatten(), model.latent_dim, features=5).double()
    set_head(guide.head, model, shift)
    return guide


def set_head(head: nn.Linear, model: LinearGaussian, shift: tuple[float, ...] = (0.0,) * 4) -> None:
    zero = torch.zeros(1, 5, dtype=torch.float64)
    with torch.no_grad():
        head.bias[:4] = optimal_outputs(model, zero)[0] + torch.tensor(shift)
        columns = optimal_outputs(model, torch.eye(5, dtype=torch.float64)) - optimal_outputs(model, zero)
        head.weight[:4] = columns.mT
        head.bias[4:], head.weight[4:] = 0.0, 0.0  # of a full-rank guide


def estimates(result: InferenceGaps) -> dict[str, Estimate]:
    return {name: value for name, value in vars(result).items() if isinstance(value, Estimate)}


SHIFT = (0.5, -0.4, 0.5, -0.3)


# -- against closed forms ------------------------------------------------------------------------------


def test_mean_field_gaps_are_their_closed_forms() -> None:
    model = linear_model()
    x = linear_data(model)
    start = optimal_outputs(model, x) + torch.tensor(SHIFT)
    result = inference_gaps(model, linear_guide(model, SHIFT), x, num_particles=4000, **QUIET)
    family, total = mean_field_gap(model), exact_gap(model, x, start)
    assert family > 0.03 and float(total.mean()) > family + 0.5  # there is something to find
    gap = result.approximation_gap
    assert abs(gap.mean - family) < 4 * gap.monte_carlo_error + LEFT < 0.2 * family
    gap = result.amortization_gap
    assert abs(gap.mean - (float(total.mean()) - family)) < 4 * gap.monte_carlo_error + LEFT < 0.05
    gap = result.inference_gap
    assert abs(gap.mean - float(total.mean())) < 4 * gap.monte_carlo_error < 0.1
    with torch.no_grad():
        log_p = float(model.log_prob(x).mean())
    assert abs(result.log_likelihood.mean - log_p) < 4 * result.log_likelihood.monte_carlo_error < 0.05
    assert result.converged and result.steps < 2000
    # rows: the optimum's curvature is 1 in a mean over its scale and 2 in a log scale, so that an ELBO
    # within LEFT of the optimum is a row within its square root
    found = result.outputs["head"]
    assert found.shape == (30, 4)
    assert float((found - optimal_outputs(model, x)).abs().mean()) < math.sqrt(LEFT)


def test_each_datum_has_its_own_amortisation_gap() -> None:
    """A guide with one mean for all data: the gaps differ between data by nats."""
    model = linear_model()
    x = linear_data(model)
    guide = linear_guide(model)
    nn.init.zeros_(guide.head.weight)
    result = inference_gaps(model, guide, x, num_particles=4000, **QUIET)
    start = optimal_outputs(model, torch.zeros(1, 5, dtype=torch.float64)).expand(30, -1)
    exact = exact_gap(model, x, start) - mean_field_gap(model)
    assert float(exact.max()) > 3 and float(exact.min()) < 0.5
    # the error of one datum is about sqrt(n) that of the mean; the largest of 30 is below 5 of them
    error = result.amortization_gap.monte_carlo_error * math.sqrt(30)
    assert float((result.amortization_gap.values - exact).abs().max()) < 5 * 2 * error < 1.5


def test_the_exact_family_has_no_approximation_gap() -> None:
    model = linear_model()
    x = linear_data(model)
    guide = FullRankGuide(nn.Flatten(), 2, features=5).double()
    set_head(guide.head, model, SHIFT)
    result = inference_gaps(model, guide, x, num_particles=500, **QUIET)
    assert abs(result.approximation_gap.mean) < 4 * result.approximation_gap.monte_carlo_error + LEFT < 0.01
    assert result.amortization_gap.mean > 0.5
    with torch.no_grad():
        exact = model.log_prob(x)
    torch.testing.assert_close(result.optimal_elbo.values, exact, rtol=0, atol=4 * LEFT)
    torch.testing.assert_close(result.log_likelihood.values, exact, rtol=0, atol=4 * LEFT)


def test_a_guide_at_the_optimum_has_no_amortisation_gap() -> None:
    model = linear_model()
    result = inference_gaps(model, linear_guide(model), linear_data(model), num_particles=500, **QUIET)
    gap = result.amortization_gap
    assert abs(gap.mean) < 4 * gap.monte_carlo_error + LEFT < 0.02
    assert gap.monte_carlo_error < 0.1 * result.optimal_elbo.monte_carlo_error  # both have the same draws


@pytest.mark.parametrize("rate", [30.0, 1e-9])
def test_steps_that_find_nothing_better_leave_the_start(rate: float) -> None:
    model = linear_model()
    x = linear_data(model)
    result = inference_gaps(
        model, linear_guide(model), x, steps=60, learning_rate=rate, num_particles=100, **QUIET
    )
    assert abs(result.amortization_gap.mean) < 1e-6
    torch.testing.assert_close(result.outputs["head"], optimal_outputs(model, x), rtol=0, atol=1e-6)


def test_monte_carlo_errors_are_the_spread_over_seeds() -> None:
    """Of 30 seeds, at given rows: the spread is within 3 / sqrt(2 * 29) = 39 % of what is stated."""
    model = linear_model()
    x, guide = linear_data(model, 10), linear_guide(model, (0.3, -0.3, 0.3, 0.3))
    results = [
        inference_gaps(model, guide, x, num_particles=100, steps=1, learning_rate=0.01, seed=seed, **QUIET)
        for seed in range(30)
    ]
    for name in ("log_likelihood", "amortized_elbo", "inference_gap"):
        found = [estimates(result)[name] for result in results]
        spread = float(np.std([estimate.mean for estimate in found], ddof=1))
        stated = float(np.mean([estimate.monte_carlo_error for estimate in found]))
        assert 0.61 < spread / stated < 1.39, name


@settings(deadline=None, max_examples=6)
@given(
    n=st.integers(1, 5),
    num_particles=st.integers(2, 9),
    step_particles=st.integers(1, 4),
    copies=st.sampled_from(["shared", "separate"]),
    memory=st.sampled_from([5_000, 20_000, 10**9]),
)
def test_gaps_add_up_for_each_datum_whatever_the_passes(
    n: int, num_particles: int, step_particles: int, copies: Any, memory: int
) -> None:
    model = linear_model()
    x = linear_data(model, n)
    result = inference_gaps(
        model,
        linear_guide(model, SHIFT),
        x,
        num_particles=num_particles,
        step_particles=step_particles,
        steps=2,
        copies=copies,
        memory=memory,
        **QUIET,
    )
    count = step_particles if copies == "separate" else 1
    assert result.num_particles == math.ceil(num_particles / count) * count
    assert result.outputs["head"].shape == ((n, count, 4) if copies == "separate" else (n, 4))
    for estimate in estimates(result).values():
        assert estimate.values.shape == (n,) and estimate.values.dtype == torch.float64
        assert estimate.num_particles == result.num_particles
    total = result.approximation_gap.values + result.amortization_gap.values
    torch.testing.assert_close(total, result.inference_gap.values)
    torch.testing.assert_close(
        result.log_likelihood.values - result.amortized_elbo.values, result.inference_gap.values
    )


def test_small_passes_find_the_same_gaps_in_the_order_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear_model()
    x, guide = linear_data(model, 6), linear_guide(model)
    nn.init.zeros_(guide.head.weight)
    blocks: list[int] = []
    optimum = _Search.optimum

    def counting(self: Any, batch: tuple[Tensor, ...], *args: Any) -> list[Tensor]:
        blocks.append(len(batch[0]))
        return optimum(self, batch, *args)

    monkeypatch.setattr(_Search, "optimum", counting)
    result = inference_gaps(model, guide, x, num_particles=1000, memory=150_000, steps=120, **QUIET)
    assert len(blocks) > 1 and sum(blocks) == 6
    exact = exact_gap(model, x, optimal_outputs(model, 0 * x)) - mean_field_gap(model)
    error = result.amortization_gap.monte_carlo_error * math.sqrt(6)
    assert float(exact.max() - exact.min()) > 10 * error
    assert float((result.amortization_gap.values - exact).abs().max()) < 5 * 2 * error


# -- log p(x) ------------------------------------------------------------------------------------------


def test_given_values_take_the_place_of_importance_sampling() -> None:
    model = linear_model()
    x, guide = linear_data(model), linear_guide(model, SHIFT)
    with torch.no_grad():
        exact = model.log_prob(x)
    plain = inference_gaps(model, guide, x, log_likelihood=exact, **SHORT)
    assert torch.equal(plain.log_likelihood.values, exact) and plain.log_likelihood.monte_carlo_error == 0
    assert plain.inference_gap.monte_carlo_error == pytest.approx(plain.amortized_elbo.monte_carlo_error)
    noisy = inference_gaps(model, guide, x, log_likelihood=Estimate(exact, 3, 0.5), **SHORT)
    assert noisy.log_likelihood.monte_carlo_error == 0.5
    expected = math.hypot(0.5, plain.approximation_gap.monte_carlo_error)
    assert noisy.approximation_gap.monte_carlo_error == pytest.approx(expected)
    assert noisy.amortization_gap.monte_carlo_error == plain.amortization_gap.monte_carlo_error


def test_the_choice_of_the_proposal_adds_no_bias() -> None:
    """Weights with mean 1: two log-normal proposals, which a choice by the same draws would put above 1.

    The mean of 4000 estimates is within 4 standard errors of 1; the larger of two of 20 draws is not.
    """
    torch.manual_seed(0)
    a, b = (0.7 * torch.randn(20, 4000, dtype=torch.float64) - 0.245 for _ in range(2))
    found = (chosen_weights(a, b).logsumexp(0) - math.log(20)).exp()
    error = float(found.std()) / math.sqrt(4000)
    assert abs(float(found.mean()) - 1) < 4 * error
    naive = (torch.maximum(a.logsumexp(0), b.logsumexp(0)) - math.log(20)).exp()
    assert float(naive.mean()) - 1 > 10 * error


def test_the_better_proposal_is_chosen_for_each_datum() -> None:
    """Datum 0: one has no spread. Datum 1: one misses half of the mass, without spread."""
    torch.manual_seed(0)
    noise = torch.randn(2000, dtype=torch.float64)
    exact, wide = torch.zeros_like(noise), 1.5 * noise - 1.125
    narrow, good = exact - math.log(2), 0.1 * noise - 0.005
    chosen = chosen_weights(torch.stack([wide, good], 1), torch.stack([exact, narrow], 1))
    assert torch.equal(chosen, torch.stack([exact, good], 1))
    chosen = chosen_weights(torch.stack([exact, narrow], 1), torch.stack([wide, good], 1))
    assert torch.equal(chosen, torch.stack([exact, good], 1))


# -- separate copies -----------------------------------------------------------------------------------


def test_separate_copies_come_close_to_the_shared_optimum_from_below() -> None:
    model = linear_model()
    x, guide = linear_data(model), linear_guide(model, SHIFT)
    result = inference_gaps(model, guide, x, copies="separate", step_particles=8, num_particles=4000, **QUIET)
    with torch.no_grad():
        optimum = float(model.log_prob(x).mean()) - mean_field_gap(model)
    error = result.optimal_elbo.monte_carlo_error
    assert optimum - 0.05 < result.optimal_elbo.mean < optimum + 4 * error < optimum + 0.01
    rows = result.outputs["head"]
    assert rows.shape == (30, 8, 4) and float(rows.std(1).min()) > 0  # each copy went its own way
    # copies of a datum are near its optimum, not near that of its neighbour
    distance = (rows.mean(1).unsqueeze(1) - optimal_outputs(model, x)).norm(dim=-1)
    assert torch.equal(distance.argmin(1), torch.arange(30))


# -- guides --------------------------------------------------------------------------------------------


class OwnGuide(nn.Module):
    """A guide whose head has another name."""

    def __init__(self, model: LinearGaussian) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4).double()
        set_head(self.fc, model, SHIFT)

    def forward(self, x: Tensor) -> None:
        pyro.module("own", self)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.fc(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class TwoHeads(nn.Module):
    """A guide with a head for means and one for log scales, as a bound method of a larger module."""

    def __init__(self, model: LinearGaussian) -> None:
        super().__init__()
        whole = OwnGuide(model).fc
        self.heads_of = nn.ModuleDict({name: nn.Linear(5, 2).double() for name in ("loc", "scale")})
        with torch.no_grad():
            for rows, part in zip(((0, 2), (2, 4)), self.heads_of.values(), strict=True):
                part.weight.copy_(whole.weight[slice(*rows)])
                part.bias.copy_(whole.bias[slice(*rows)])

    def guide(self, x: Tensor) -> None:
        pyro.module("two", self)
        with pyro.plate("data", len(x), dim=-1):
            loc, scale = self.heads_of["loc"](x), self.heads_of["scale"](x).exp()
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def test_hand_written_guides_give_what_the_librarys_do() -> None:
    """The same numbers: the draws of a seed don't depend on how a guide is written."""
    model = linear_model()
    x = linear_data(model, 8)
    options: dict[str, Any] = {"num_particles": 50, "steps": 30, "learning_rate": 0.1, **QUIET}
    expected = inference_gaps(model, linear_guide(model, SHIFT), x, **options)
    assert expected.amortization_gap.mean > 0.2
    own, two = OwnGuide(model), TwoHeads(model)

    def function(x: Tensor) -> None:
        pyro.module("encoder", own.fc)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = own.fc(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def generative(x: Tensor) -> None:
        pyro.module("model", model)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = z @ model.weight.mT + model.bias
            pyro.sample("x", dist.Normal(loc, model.log_scale.exp()).to_event(1), obs=x)

    cases: list[tuple[Any, Any, Any]] = [
        (model, own, "fc"),
        (model, own, own.fc),
        (model, two.guide, ["heads_of.loc", "heads_of.scale"]),
        (model, function, own.fc),
        (generative, function, [own.fc]),
    ]
    for program, guide, head in cases:
        result = inference_gaps(program, guide, x, head=head, **options)
        for name, estimate in estimates(result).items():
            torch.testing.assert_close(
                estimate.values, estimates(expected)[name].values, rtol=1e-6, atol=1e-6
            )
        joined = torch.cat(list(result.outputs.values()), -1)
        torch.testing.assert_close(joined, expected.outputs["head"], rtol=1e-6, atol=1e-6)


def hierarchical_model() -> HierarchicalVAE:
    torch.manual_seed(0)
    return HierarchicalVAE(
        StandardNormal(2), [ConditionalNormal(MLP(2, hidden=4), 3)], Bernoulli(MLP(3, 5, hidden=4))
    )


FAMILIES: dict[str, Callable[[LinearGaussian], nn.Module]] = {
    "flow": lambda model: FlowGuide(MLP(5, hidden=8), Planar(2, 3, depth=2)),
    "full-rank flow": lambda model: FlowGuide(MLP(5, hidden=8), Planar(2), base="full-rank"),
    "mixture": lambda model: MixtureGuide(MLP(5, hidden=8), 2, 3),
    "mixture with weights": lambda model: MixtureGuide(MLP(5, hidden=8), 2, 2, weights="network"),
    "semi-amortised": lambda model: SemiAmortizedGuide(MeanFieldGuide(MLP(5, hidden=8), 2), model, steps=2),
}


@pytest.mark.parametrize("copies", ["shared", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_guides_of_other_families_come_near_the_evidence(family: str, copies: Any) -> None:
    """All of them hold nearly the exact posterior, 0.1 nats from the best mean-field one or less."""
    model = linear_model()
    x = linear_data(model, 6)
    torch.manual_seed(2)
    guide = FAMILIES[family](model).double()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    options: dict[str, Any] = {"num_particles": 400, "step_particles": 4, "steps": 100, "learning_rate": 0.1}
    result = inference_gaps(model, guide, x, copies=copies, **options, **QUIET)
    with torch.no_grad():
        exact = float(model.log_prob(x).mean())
    error = result.optimal_elbo.monte_carlo_error
    assert exact - 0.5 < result.optimal_elbo.mean < exact + 4 * error + 1e-9
    assert result.amortization_gap.mean > 1 or family == "semi-amortised"
    assert result.amortization_gap.mean > -4 * result.amortization_gap.monte_carlo_error
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


def test_all_heads_of_a_ladder_are_free() -> None:
    model = hierarchical_model()
    guide = LadderGuide([MLP(5, hidden=4), MLP(4, hidden=4)], (3, 2), model)
    x = (torch.rand(6, 5) > 0.5).float()
    result = inference_gaps(model, guide, x, num_particles=400, steps=200, **QUIET)
    assert {name: tuple(rows.shape) for name, rows in result.outputs.items()} == {
        "heads.0": (6, 6),
        "heads.1": (6, 4),
    }
    assert result.amortization_gap.mean > 4 * result.amortization_gap.monte_carlo_error > 0
    assert result.approximation_gap.mean > -4 * result.approximation_gap.monte_carlo_error


@pytest.mark.parametrize("components", [4, 6])
def test_a_prior_of_the_guides_own_posteriors_is_left_as_it_is(components: int) -> None:
    torch.manual_seed(0)
    guide = MeanFieldGuide(MLP(5, hidden=4), 2).double()
    x = torch.randn(6, 5, dtype=torch.float64)

    def gaps(of_prior: MeanFieldGuide) -> InferenceGaps:
        torch.manual_seed(1)
        model = VAE(VampPrior(of_prior, 5, components, bounds=None), Normal(MLP(2, 5, hidden=4)))
        return inference_gaps(model.double(), guide, x, **SHORT)

    expected = estimates(gaps(copy.deepcopy(guide)))
    for name, found in estimates(gaps(guide)).items():
        torch.testing.assert_close(found.values, expected[name].values, rtol=0, atol=1e-9)


def test_a_local_guide_has_no_amortisation_gap() -> None:
    model = linear_model()
    x = linear_data(model, 6)
    guide = LocalGuide(6, 2).double()
    guide.start_at(optimal_outputs(model, x))
    result = inference_gaps(IndexedModel(model), guide, (x, torch.arange(6)), num_particles=20_000, **QUIET)
    assert torch.equal(result.amortization_gap.values, torch.zeros(6, dtype=torch.float64))
    gap = result.approximation_gap
    assert abs(gap.mean - mean_field_gap(model)) < 4 * gap.monte_carlo_error < 0.3 * mean_field_gap(model)
    assert result.outputs == {} and result.steps == 0


def test_labels_go_to_both_programs_and_copies_keep_theirs() -> None:
    """The model's x is near 10 y; rows that had another datum's label would have an ELBO of -100s."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + 10 * y.unsqueeze(-1), 1.0).to_event(1), obs=x)

    encoder = nn.Linear(2, 2)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = encoder(torch.cat([x, y.unsqueeze(-1)], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    nn.init.zeros_(encoder.weight)
    y = torch.tensor([0, 3, 1, 2, 0])
    x = 10.0 * y.unsqueeze(-1) + torch.tensor([[0.5], [-0.5], [0.0], [1.0], [-1.0]])
    exact = dist.Normal(10.0 * y, math.sqrt(2)).log_prob(x.squeeze(-1)).double()
    options: dict[str, Any] = {
        "num_particles": 200,
        "steps": 100,
        "step_particles": 6,
        **QUIET,
    }
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    for copies, data in (("shared", loader), ("separate", (x, y))):
        result = inference_gaps(model, guide, data, head=encoder, copies=copies, learning_rate=0.1, **options)
        torch.testing.assert_close(result.optimal_elbo.values, exact, rtol=0, atol=0.1)
        torch.testing.assert_close(result.log_likelihood.values, exact, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "wrap",
    [Split, TensorDataset, lambda x: DataLoader(TensorDataset(x), batch_size=4), lambda x: Stream(x, 4)],
    ids=["split", "dataset", "loader", "stream"],
)
def test_all_forms_of_data_in_order(wrap: Callable) -> None:
    model = linear_model()
    x = linear_data(model, 10)
    result = inference_gaps(
        model, linear_guide(model), wrap(x), **(SHORT | {"learning_rate": 1e-9, "num_particles": 300})
    )
    torch.testing.assert_close(result.outputs["head"], optimal_outputs(model, x), rtol=0, atol=1e-6)
    with torch.no_grad():
        log_p = model.log_prob(x)
    torch.testing.assert_close(result.log_likelihood.values, log_p, rtol=0, atol=0.5)
    given_too = inference_gaps(model, linear_guide(model), wrap(x), log_likelihood=log_p, **SHORT)
    assert torch.equal(given_too.log_likelihood.values, log_p)


def test_a_traced_step_takes_the_plain_ones_path(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def compile_graph(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(tracing, "compile_graph", compile_graph)  # without TorchInductor
    model = linear_model()
    x, guide = linear_data(model, 5), linear_guide(model, SHIFT)
    options: dict[str, Any] = {"num_particles": 20, "steps": 20, "step_particles": 2, **QUIET}
    plain = inference_gaps(model, guide, x, **options)
    compiled = inference_gaps(model, guide, x, compile=True, **options)
    torch.testing.assert_close(compiled.outputs["head"], plain.outputs["head"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(compiled.optimal_elbo.values, plain.optimal_elbo.values)
    assert len(graphs) == 1


def test_what_cannot_be_compiled_is_taken_plainly() -> None:
    model, own = linear_model(), OwnGuide(linear_model())

    def guide(x: Tensor) -> None:
        outputs = own.fc(x)
        assert float(outputs.detach().sum()) < 1e9
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = outputs.chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    x = linear_data(model, 5)
    plain = inference_gaps(model, guide, x, head=own.fc, **SHORT)
    with pytest.warns(UserWarning, match="can't compile a step: .*read in Python") as caught:
        result = inference_gaps(model, guide, x, head=own.fc, compile=True, **SHORT)
    assert torch.equal(result.outputs["fc" if "fc" in result.outputs else "Linear"], plain.outputs["Linear"])
    assert len(caught) == 1 and caught[0].filename == __file__


# -- what it shows -------------------------------------------------------------------------------------


def test_summary_table_and_text() -> None:
    model = linear_model()
    x, guide = linear_data(model, 7), linear_guide(model, SHIFT)
    result = inference_gaps(model, guide, x, **SHORT)
    summary, table = result.summary(), result.table
    assert summary["num_data"] == 7 and summary["num_particles"] == 20 and summary["copies"] == "shared"
    assert summary["steps"] == 10 and summary["converged"] is False
    assert list(table.columns) == list(estimates(result)) and list(table.index) == list(range(7))
    for name, estimate in estimates(result).items():
        assert summary[name] == {
            "mean": estimate.mean,
            "standard_error": estimate.standard_error,
            "monte_carlo_error": estimate.monte_carlo_error,
        }
        assert all(type(value) is float for value in summary[name].values())
        assert table[name].tolist() == estimate.values.tolist()
        assert f"{estimate.mean:.3f} +- {estimate.standard_error:.3f}" in str(result)
    for text in ("nats per datum", "7 data", "20 draws", "approximation gap", "still rising after 10 steps"):
        assert text in str(result)
    done = inference_gaps(model, guide, x, **(SHORT | {"steps": 1000, "tolerance": 1e9}))
    assert done.converged and "still rising" not in str(done)
    assert done.steps == 250  # a window that gains on nothing, then one for each rate


def test_a_progress_bar_shows_steps_and_elbo(capsys: pytest.CaptureFixture[str]) -> None:
    model = linear_model()
    options = SHORT | {"progress": True}
    result = inference_gaps(model, linear_guide(model), linear_data(model, 5), **options)
    err = capsys.readouterr().err
    assert "10/10" in err and "elbo=" in err and result.steps == 10


# -- what it leaves alone ------------------------------------------------------------------------------


def random_states() -> tuple:
    states = get_rng_state()
    name, keys, *rest = states["numpy"]
    return states["torch"].tolist(), states["random"], (name, keys.tolist(), *rest)


def hooks(*programs: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for p in programs for m in p.modules()]


class Failing(nn.Module):
    """A decoder that fails after some calls."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls
        self.net = nn.Linear(2, 5)

    def forward(self, z: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyError("broken")
        return self.net(z)


@pytest.mark.parametrize("calls", [0, 1, 4, 6, 9, 14, 10_000])
def test_nothing_of_the_callers_changes_also_after_an_exception(calls: int) -> None:
    torch.manual_seed(0)
    decoder = Failing(calls)
    guide = MeanFieldGuide(MLP(5, hidden=8, normalization="batch", dropout=0.5), 2)
    guide.encoder.layers[0].eval()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    x, store = torch.randn(7, 5), list(pyro.get_param_store())
    modules = (guide, decoder)
    modes = [module.training for program in modules for module in program.modules()]
    before = {name: value.clone() for program in modules for name, value in program.state_dict().items()}
    states, counts = random_states(), hooks(*modules)
    if calls < 10_000:
        with pytest.raises(KeyError, match="broken"):
            inference_gaps(model, guide, x, **SHORT)
    else:
        inference_gaps(model, guide, x, **SHORT)
        assert decoder.left < 10_000 - 14
    assert random_states() == states and hooks(*modules) == counts
    assert [module.training for program in modules for module in program.modules()] == modes
    now = {name: value for program in modules for name, value in program.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in now.items())
    assert all(p.grad is None and p.requires_grad for m in modules for p in m.parameters())
    assert list(pyro.get_param_store()) == store
    assert torch.is_grad_enabled()


def test_normalisation_and_dropout_are_in_evaluation_mode() -> None:
    model = linear_model()
    torch.manual_seed(3)
    guide = MeanFieldGuide(MLP(5, hidden=8, normalization="batch", dropout=0.9), 2).double()
    x = linear_data(model, 6)
    training = inference_gaps(model, guide, x, **SHORT)
    guide.eval()
    evaluation = inference_gaps(model, guide, x, **SHORT)
    with torch.no_grad():
        start = guide.encode(x)
    assert torch.equal(training.amortized_elbo.values, evaluation.amortized_elbo.values)
    assert torch.equal(training.outputs["head"], evaluation.outputs["head"])
    assert float((training.outputs["head"] - start).abs().max()) < 10 * 0.03 + 1e-6  # ten steps of Adam
    again = inference_gaps(model, guide, x, **SHORT)
    other = inference_gaps(model, guide, x, seed=1, **SHORT)
    assert torch.equal(again.optimal_elbo.values, evaluation.optimal_elbo.values)
    assert not torch.equal(other.optimal_elbo.values, evaluation.optimal_elbo.values)


def test_the_amortised_elbo_is_that_of_the_guide_as_it_is() -> None:
    model = linear_model()
    x, guide = linear_data(model, 5), linear_guide(model, SHIFT)
    result = inference_gaps(model, guide, x, num_particles=3000, steps=1, **QUIET)
    with torch.no_grad():
        weights = log_weights(model, guide, x, num_particles=3000)
    error = float(weights.std(0).square().sum().sqrt()) / 5 / math.sqrt(3000)
    difference = abs(result.amortized_elbo.mean - float(weights.mean()))
    assert difference < 4 * math.hypot(error, result.amortized_elbo.monte_carlo_error) < 0.2


# -- what it refuses -----------------------------------------------------------------------------------


class Odd(OwnGuide):
    """A guide with one thing wrong about its head."""

    def __init__(self, model: LinearGaussian, wrong: str) -> None:
        super().__init__(model)
        self.wrong = wrong
        self.tail = nn.Identity()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            outputs = self.fc(x)
            if self.wrong == "tuple":
                outputs = torch.cat(self.tail(outputs.chunk(2, -1)), -1)
            elif self.wrong == "twice":
                outputs = self.tail(self.tail(outputs))
            elif self.wrong == "one row":
                outputs = outputs + self.tail(outputs.mean(0))
            elif self.wrong == "noise":
                outputs = self.tail(outputs + torch.randn_like(outputs))
            elif self.wrong == "off the way":
                self.tail(outputs)
            elif self.wrong == "detached":
                outputs = self.tail(outputs).detach()
            elif self.wrong == "constrained":
                outputs = self.tail(outputs.exp()).log()
            loc, log_scale = outputs.chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


MODEL = linear_model()
X = linear_data(MODEL, 10)
BITS = (torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) > 0.5).float()
NAN = X.clone()
NAN[3, 2] = math.nan


def plain_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))


def odd(wrong: str) -> Callable:
    return lambda: (MODEL, Odd(MODEL, wrong))


def hierarchical_pair() -> tuple[nn.Module, nn.Module]:
    return hierarchical_model(), HierarchicalGuide([MLP(5, hidden=4), MLP(3, hidden=4)], (3, 2))


def mixture_pair() -> tuple[nn.Module, nn.Module]:
    model = GaussianMixtureVAE(3, 2, Bernoulli(MLP(2, 5, hidden=4)))
    return model, GaussianMixtureGuide(MLP(5, hidden=4), 2, 3)


REFUSED: dict[str, tuple[type[Exception], str, Callable, dict[str, Any]]] = {
    "K 1": (ValueError, "^num_particles: expected at least 2, got 1", odd(""), {"num_particles": 1}),
    "K text": (TypeError, "^num_particles: .*got '9'", odd(""), {"num_particles": "9"}),
    "steps 0": (ValueError, "^steps: .*got 0", odd(""), {"steps": 0}),
    "rate": (ValueError, "^learning_rate: .*got -1", odd(""), {"learning_rate": -1}),
    "draws": (TypeError, "^step_particles: .*got 1.5", odd(""), {"step_particles": 1.5}),
    "tolerance": (ValueError, "^tolerance: .*got nan", odd(""), {"tolerance": math.nan}),
    "copies": (ValueError, "^copies: unknown 'seperate' .*'separate'", odd(""), {"copies": "seperate"}),
    "compile": (TypeError, "^compile: .*got 'yes'", odd(""), {"compile": "yes"}),
    "memory": (ValueError, "^memory: .*got 0", odd(""), {"memory": 0}),
    "seed": (ValueError, "^seed: .*got -1", odd(""), {"seed": -1}),
    "device": (ValueError, "^device: .*got 'gpu'", odd(""), {"device": "gpu"}),
    "nan": (ValueError, "^data: .*finite.*row 3", odd(""), {"data": NAN}),
    "log p shape": (
        ValueError,
        r"^log_likelihood: .*\[10\], got \[9\]",
        odd(""),
        {"log_likelihood": torch.zeros(9)},
    ),
    "log p of a loader": (
        ValueError,
        "^log_likelihood: expected a value for each of 10 data, got 11",
        odd(""),
        {"log_likelihood": torch.zeros(11), "data": DataLoader(TensorDataset(X), 5)},
    ),
    "too few log p of a loader": (
        ValueError,
        "^log_likelihood: expected a value for each of 10 data or more, got 7",
        odd(""),
        {"log_likelihood": torch.zeros(7), "data": DataLoader(TensorDataset(X), 5)},
    ),
    "log p nan": (
        ValueError,
        "^log_likelihood: .*got nan for datum 3",
        odd(""),
        {"log_likelihood": NAN[:, 2]},
    ),
    "log p number": (TypeError, "^log_likelihood: .*got float", odd(""), {"log_likelihood": -90.0}),
    "no head": (ValueError, r"^head: .*Odd has no `head`.*'fc'.*got None", odd(""), {"head": None}),
    "head's name": (ValueError, r"^head: .*'fc'.*got 'fd'.*did you mean 'fc'", odd(""), {"head": "fd"}),
    "head of another": (
        ValueError,
        "^head: .*of the Odd, got another Linear",
        odd(""),
        {"head": nn.Linear(5, 4)},
    ),
    "head a number": (TypeError, "^head: .*got 3", odd(""), {"head": 3}),
    "no heads": (TypeError, r"^head: .*got \[\]", odd(""), {"head": []}),
    "a number among heads": (TypeError, "^head: .*got 3", odd(""), {"head": ["fc", 3]}),
    "a head twice": (
        ValueError,
        "^head: .*different modules, got 'fc' twice",
        odd(""),
        {"head": ["fc", "fc"]},
    ),
    "function": (
        ValueError,
        "^head: .*plain function; give the nn.Module that it calls",
        lambda: (MODEL, plain_guide),
        {"head": None},
    ),
    "function and name": (
        TypeError,
        "^head: expected the module itself.*got 'fc'",
        lambda: (MODEL, plain_guide),
        {},
    ),
    "function and another's module": (
        ValueError,
        "^head: .*'Linear', which it calls 0 times",
        lambda: (MODEL, plain_guide),
        {"head": nn.Linear(5, 4)},
    ),
    "never called": (ValueError, "^head: .*'tail', which it calls 0 times", odd(""), {"head": "tail"}),
    "called twice": (ValueError, "^head: .*'tail', which it calls 2 times", odd("twice"), {"head": "tail"}),
    "tuple": (TypeError, "^head: .*'tail', which puts out tuple", odd("tuple"), {"head": "tail"}),
    "one row": (ValueError, r"^head: .*'tail', which puts out \[4\]", odd("one row"), {"head": "tail"}),
    "noise": (ValueError, "^head: .*'tail', whose output depends on what", odd("noise"), {"head": "tail"}),
    "off the way": (ValueError, "^head: .*reaches q.*'tail'", odd("off the way"), {"head": "tail"}),
    "detached": (ValueError, "^head: .*reaches q.*'tail'", odd("detached"), {"head": "tail"}),
    "constrained": (
        ValueError,
        "^head: the ELBO of datum . is not finite after .*free of constraints",
        odd("constrained"),
        {"head": "tail", "learning_rate": 5.0, "steps": 60},
    ),
    "hierarchical": (
        ValueError,
        "^head: .*'heads.1', whose output depends on what the guide draws",
        hierarchical_pair,
        {"head": None, "data": BITS},
    ),
    "clusters": (
        ValueError,
        "^guide: expected reparameterised sites.*site 'y' of Categorical",
        mixture_pair,
        {"head": None, "data": BITS},
    ),
    "other model": (
        ValueError,
        "^guide: lacks the model's latent sites",
        lambda: (MODEL, HierarchicalGuide([MLP(5).double()], (2,)).double()),
        {"head": None},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named_in_one_line(name: str) -> None:
    kind, message, pair, arguments = REFUSED[name]
    model, guide = pair()
    with pytest.raises(kind, match=message) as caught:
        inference_gaps(model, guide, **({"data": X, "head": "fc"} | SHORT | arguments))
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    if isinstance(guide, nn.Module):
        assert not any(hooks(guide))


def test_heads_of_the_librarys_guides_are_known() -> None:
    guide = MeanFieldGuide(MLP(5), 2)
    assert find_heads(guide, None) == {"head": guide.head}
    moved = SemiAmortizedGuide(guide, MODEL)
    assert find_heads(moved, None) == {"guide.head": guide.head}
    assert find_heads(LocalGuide(3, 2), None) == {}
    assert find_heads(moved, "guide.head") == find_heads(moved, guide.head) == find_heads(moved, None)
