"""The parts of the ELBO: against mixtures by brute force and quadrature, closed forms, their identities."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Rows, function_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.util import get_rng_state
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ppl_vae import evaluate
from ppl_vae.data import Split
from ppl_vae.evaluation.elbo_decomposition import ElboDecomposition, elbo_decomposition
from ppl_vae.flows import InverseAutoregressive, MaskedAutoregressive, Planar
from ppl_vae.guides import FlowGuide, FullRankGuide, HierarchicalGuide, MeanFieldGuide
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import CVAE, VAE, HierarchicalVAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import ConditionalNormal, GaussianMixture, StandardNormal

QUIET: dict[str, Any] = {"progress": False}


def pair(guide: type = MeanFieldGuide, latent: int = 2) -> tuple[LinearGaussian, Any]:
    torch.manual_seed(0)
    made = guide(MLP(5, hidden=(8,)), latent).double()
    with torch.no_grad():
        made.head.weight *= 4  # posteriors that differ
    return LinearGaussian(latent, 5).double(), made


def rows(n: int) -> Tensor:
    torch.manual_seed(100)
    return 2 * torch.randn(n, 5, dtype=torch.float64)


class Fixed(nn.Module):
    """Posteriors that are what the data say: x is means and log standard deviations, ``[n, 2 * latent]``."""

    def forward(self, x: Tensor) -> None:
        loc, log_scale = x.chunk(2, -1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Standard(nn.Module):
    """A model of z ~ N(0, I) and x ~ N(0, I)."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.latent = latent

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)


def grid(means: Tensor, scales: Tensor) -> tuple[float, float, float]:
    """Return MI, KL(q(z) || N(0, I)) and TC of a mixture of two-dimensional normals by quadrature."""
    axis = torch.linspace(-9, 9, 901, dtype=torch.float64)
    area = (axis[1] - axis[0]).item() ** 2
    z = torch.cartesian_prod(axis, axis)
    by_dimension = dist.Normal(means, scales).log_prob(z.unsqueeze(1))  # [grid, n, 2]
    log_n = math.log(len(means))
    log_q = by_dimension.sum(-1).logsumexp(1) - log_n
    log_dims = by_dimension.logsumexp(1) - log_n
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    q = log_q.exp() * area
    assert float(q.sum()) == pytest.approx(1, abs=1e-9)
    entropy = 0.5 * math.log(2 * math.pi * math.e) * 2 + scales.log().sum(-1).mean()
    mutual_information = -(q * log_q).sum() - entropy
    return (
        float(mutual_information),
        float((q * (log_q - prior)).sum()),
        float((q * (log_q - log_dims.sum(-1))).sum()),
    )


# -- truth -------------------------------------------------------------------------------------------


def test_parts_agree_with_quadrature_of_the_mixture_of_all_data() -> None:
    torch.manual_seed(3)
    n = 6
    means, scales = 1.5 * torch.randn(n, 2, dtype=torch.float64), 0.3 + torch.rand(n, 2, dtype=torch.float64)
    means[:, 1] = 0.8 * means[:, 0] + 0.3 * means[:, 1]  # correlated over the data
    result = elbo_decomposition(
        Standard(2), Fixed(), torch.cat([means, scales.log()], -1), num_particles=4000, **QUIET
    )
    truth = grid(means, scales)
    found = (result.mutual_information, result.marginal_kl, result.total_correlation)
    assert truth[2] > 0.1  # a total correlation that is not trivial
    for estimate, value in zip(found, truth, strict=True):
        # 4 Monte Carlo standard errors, seed 0
        assert estimate.mean == pytest.approx(value, abs=4 * estimate.monte_carlo_error)
        assert 0 < estimate.monte_carlo_error < 0.02


@pytest.mark.parametrize("guide", [MeanFieldGuide, FullRankGuide])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_parts_are_those_of_a_loop_over_the_same_draws(guide: type, num_particles: int) -> None:
    model, q = pair(guide)
    x = rows(7)
    drawn: list[Tensor] = []

    class Keep(type(q)):  # type: ignore[misc]
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            z = super().forward(x, y)
            drawn.append(z.detach())
            return z

    q.__class__ = Keep
    result = elbo_decomposition(model, q, x, num_particles=num_particles, **QUIET)
    with torch.no_grad():
        posterior = q.posterior(x)
        fits = [z for z in drawn if z.shape == (num_particles, 7, 2)]
        # the same z as of the result, known by its E[log q(z | x)] - log p(z)
        kl = result.mutual_information.values + result.marginal_kl.values
        prior = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
        kls = [(posterior.log_prob(z) - prior.log_prob(z)).mean(0) for z in fits]
        (z,) = [z for z, own in zip(fits, kls, strict=True) if torch.allclose(own, kl, atol=1e-9)]
        sd = posterior.variance.sqrt()
        for i in range(7):
            expected: dict[str, float] = {"mi": 0.0, "tc": 0.0, "dims": 0.0, "upper": 0.0}
            for k in range(num_particles):
                densities = torch.stack([posterior.log_prob(z[k, i])[j] for j in range(7)]).exp()
                dims = [
                    dist.Normal(posterior.mean[:, d], sd[:, d]).log_prob(z[k, i, d]).exp().mean().log()
                    for d in range(2)
                ]
                own, log_q = densities[i].log(), densities.mean().log()
                others = torch.cat([densities[:i], densities[i + 1 :]]).mean().log()
                expected["mi"] += float(own - log_q) / num_particles
                expected["upper"] += float(own - others) / num_particles
                expected["tc"] += float(log_q - sum(dims)) / num_particles
                expected["dims"] += float(sum(dims) - prior.log_prob(z[k, i])) / num_particles
            assert float(result.mutual_information.values[i]) == pytest.approx(expected["mi"], abs=1e-9)
            assert float(result.mutual_information_upper.values[i]) == pytest.approx(
                expected["upper"], abs=1e-7
            )
            assert float(result.total_correlation.values[i]) == pytest.approx(expected["tc"], abs=1e-9)
            assert float(result.dimension_kl.values[i]) == pytest.approx(expected["dims"], abs=1e-9)


@settings(deadline=None, max_examples=6)
@given(
    n=st.integers(1, 12),
    num_particles=st.integers(1, 4),
    latent=st.integers(1, 3),
    memory=st.integers(5_000, 50_000),
)
def test_sums_hold_for_each_datum_whatever_the_passes(
    n: int, num_particles: int, latent: int, memory: int
) -> None:
    result = elbo_decomposition(
        *pair(latent=latent), rows(n), num_particles=num_particles, memory=memory, **QUIET
    )
    assert (result.num_data, result.num_particles, len(result.dimension_kls)) == (n, num_particles, latent)
    torch.testing.assert_close(
        result.elbo.values,
        result.reconstruction.values - result.mutual_information.values - result.marginal_kl.values,
    )
    torch.testing.assert_close(
        result.marginal_kl.values, result.total_correlation.values + result.dimension_kl.values
    )
    torch.testing.assert_close(
        result.dimension_kl.values, sum(e.values for e in result.dimension_kls), check_dtype=False
    )
    assert float(result.mutual_information.values.max()) <= math.log(n) + 1e-9
    if n == 1:
        assert result.mutual_information.mean == pytest.approx(0, abs=1e-12)
        assert math.isnan(result.mutual_information_upper.mean)


def test_the_memory_budget_changes_the_passes_and_nothing_that_is_told_apart_from_noise() -> None:
    model, guide = pair()
    found, runs = [], []
    for memory in (10**9, 20_000):
        sizes: list[int] = []
        handle = guide.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
        found.append(elbo_decomposition(model, guide, rows(9), num_particles=100, memory=memory, **QUIET))
        handle.remove()
        runs.append(sizes)
    assert 9 in runs[0] and len(runs[1]) > len(runs[0])  # smaller passes, more of them
    for name in ("elbo", "mutual_information", "total_correlation", "dimension_kl"):
        one, other = (getattr(result, name) for result in found)
        error = math.hypot(one.monte_carlo_error, other.monte_carlo_error)
        assert one.mean == pytest.approx(other.mean, abs=4 * error)


def test_a_guide_that_ignores_the_data_has_no_mutual_information_and_no_correlation() -> None:
    x = torch.tensor([[0.3, -1.0, 0.2, -0.5]], dtype=torch.float64).expand(8, 4).contiguous()
    result = elbo_decomposition(Standard(2), Fixed(), x, num_particles=3, **QUIET)
    for estimate in (result.mutual_information, result.total_correlation, result.mutual_information_upper):
        torch.testing.assert_close(estimate.values, torch.zeros(8, dtype=torch.float64), atol=1e-12, rtol=0)
    scale = x[0, 2:].exp()
    kl = 0.5 * (scale**2 + x[0, :2] ** 2 - 1) - x[0, 2:]
    many = elbo_decomposition(Standard(2), Fixed(), x, num_particles=4000, **QUIET)
    for d, estimate in enumerate(many.dimension_kls):
        assert estimate.mean == pytest.approx(float(kl[d]), abs=4 * estimate.monte_carlo_error)


def test_disjoint_posteriors_have_the_log_of_the_number_of_data() -> None:
    x = torch.zeros(16, 4, dtype=torch.float64)
    x[:, 0], x[:, 2:] = 1000.0 * torch.arange(16), -3
    result = elbo_decomposition(Standard(2), Fixed(), x, **QUIET)
    torch.testing.assert_close(
        result.mutual_information.values, torch.full((16,), math.log(16), dtype=torch.float64)
    )
    assert result.mutual_information_upper.mean > 1e6
    # the second dimension is the same for all data, the first tells them apart: independent of each other
    torch.testing.assert_close(
        result.total_correlation.values, torch.zeros(16, dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_a_grid_of_means_factorises_though_it_depends_on_the_data() -> None:
    means = torch.cartesian_prod(torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 1.0, 3.0])).double()
    x = torch.cat([means, torch.full((6, 2), -0.7, dtype=torch.float64)], -1)
    result = elbo_decomposition(Standard(2), Fixed(), x, num_particles=5, **QUIET)
    torch.testing.assert_close(
        result.total_correlation.values, torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert result.mutual_information.mean > 0.3


def test_both_bounds_enclose_the_mutual_information_of_the_linear_gaussian_model() -> None:
    torch.manual_seed(0)
    model = LinearGaussian(1, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.5]]))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", model.posterior(x))

    with torch.no_grad():
        x = model(None, size=1500)
    result = elbo_decomposition(model, guide, x, **QUIET)
    truth = 0.5 * math.log(1 + 1.25)  # of z and x: half the log of 1 + |w|^2 / sigma^2
    lower, upper = result.mutual_information, result.mutual_information_upper
    # over data sets: 4 standard errors, draws of data and of z together
    error = 4 * lower.standard_error
    assert truth - 0.05 - error < lower.mean < truth + error
    assert truth - error < upper.mean < truth + 0.05 + error
    assert lower.mean < upper.mean
    # q(z) is the prior but for the finite data
    assert abs(result.marginal_kl.mean) < 4 * result.marginal_kl.standard_error + 0.01


def test_the_elbo_and_its_kl_are_those_of_evaluate() -> None:
    model, guide = pair()
    x = rows(30)
    ours = elbo_decomposition(model, guide, x, num_particles=400, **QUIET)
    theirs = evaluate(model, guide, x, num_particles=400, seed=1, **QUIET)
    for one, other in ((ours.elbo, theirs.elbo), (ours.reconstruction, theirs.reconstruction)):
        error = math.hypot(one.monte_carlo_error, other.monte_carlo_error)
        assert one.mean == pytest.approx(other.mean, abs=4 * error)
        assert one.monte_carlo_error == pytest.approx(other.monte_carlo_error, rel=0.3)
    kl = ours.mutual_information.mean + ours.marginal_kl.mean
    error = math.hypot(ours.marginal_kl.monte_carlo_error * 2, theirs.kl["z"].monte_carlo_error)
    assert kl == pytest.approx(theirs.kl["z"].mean, abs=4 * error)


# -- programs ----------------------------------------------------------------------------------------


def test_a_hierarchy_is_one_latent_together_and_says_why_it_has_no_dimensions() -> None:
    torch.manual_seed(0)
    model = HierarchicalVAE(
        StandardNormal(1), [ConditionalNormal(MLP(1, hidden=(4,)), 2)], Normal(MLP(2, 5, hidden=(4,)))
    ).double()
    guide = HierarchicalGuide([MLP(5, hidden=(4,)), MLP(2, hidden=(4,))], (2, 1)).double()
    x = rows(6)
    result = elbo_decomposition(model, guide, x, num_particles=2, **QUIET)
    assert set(result.reasons) == {"total_correlation", "dimension_kl"}
    assert "z1" in result.reasons["dimension_kl"]
    assert math.isnan(result.total_correlation.mean) and math.isnan(result.dimension_kl.mean)
    assert result.dimension_kls == ()
    torch.testing.assert_close(
        result.elbo.values,
        result.reconstruction.values - result.mutual_information.values - result.marginal_kl.values,
    )
    assert 0 < result.mutual_information.mean <= math.log(6)
    # a guide whose first layer alone sees x: z2 given z1 adds nothing
    with torch.no_grad():
        guide.heads[1].weight.zero_()
        guide.heads[0].weight.zero_()
    none = elbo_decomposition(model, guide, x, num_particles=2, **QUIET)
    assert none.mutual_information.mean == pytest.approx(0, abs=1e-9)


def test_a_prior_that_does_not_factorise_leaves_the_total_correlation() -> None:
    torch.manual_seed(0)
    model = VAE(GaussianMixture(2, 3), Normal(MLP(2, 5))).double()
    result = elbo_decomposition(model, pair()[1], rows(6), **QUIET)
    assert list(result.reasons) == ["dimension_kl"] and "factorises" in result.reasons["dimension_kl"]
    assert math.isfinite(result.total_correlation.mean) and math.isnan(result.dimension_kl.mean)
    assert "dimension_kl: " in str(result)


def test_plain_functions_as_a_pair_and_nothing_of_the_caller_changes() -> None:
    model, guide, parts = function_pair()
    x = torch.randint(0, 2, (8, 4)).double()
    before = [p.clone() for part in parts for p in part.parameters()]
    state = get_rng_state()
    results = [elbo_decomposition(model, guide, x, num_particles=2, **QUIET) for _ in range(2)]
    assert results[0].summary() == results[1].summary()
    assert all(map(torch.equal, before, [p for part in parts for p in part.parameters()]))
    assert torch.equal(state["torch"], get_rng_state()["torch"])
    assert list(pyro.get_param_store().keys()) == []


def test_modules_are_run_in_evaluation_mode_and_come_back_in_theirs() -> None:
    torch.manual_seed(0)
    model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5, hidden=(8,), dropout=0.5), 2)
    guide.train()
    first = elbo_decomposition(model, guide, rows(5).float(), **QUIET)
    assert guide.training and guide.encoder.training
    guide.eval()
    assert (
        elbo_decomposition(model, guide, rows(5).float(), **QUIET).summary()["elbo"]["mean"]
        == first.elbo.mean
    )


@pytest.mark.parametrize("flow", [InverseAutoregressive, MaskedAutoregressive])
def test_a_flow_that_can_be_inverted_is_scored_and_its_dimensions_are_not(flow: type) -> None:
    torch.manual_seed(0)
    guide = FlowGuide(MLP(5), flow(2)).double()
    result = elbo_decomposition(Standard(2), guide, rows(5), num_particles=3, **QUIET)
    assert set(result.reasons) == {"total_correlation", "dimension_kl"}
    x = rows(1).expand(5, 5).contiguous()  # one posterior for all: draws have the density of their own
    none = elbo_decomposition(Standard(2), guide, x, num_particles=3, **QUIET)
    torch.testing.assert_close(
        none.mutual_information.values, torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_every_kind_of_data_gives_the_same_numbers() -> None:
    model, guide = pair()
    x = rows(8)
    expected = elbo_decomposition(model, guide, x, num_particles=2, **QUIET).summary()
    for data in (Split(x), Rows(x), DataLoader(Rows(x), batch_size=3)):
        assert elbo_decomposition(model, guide, data, num_particles=2, **QUIET).summary() == expected


def test_labels_go_to_both_programs_and_a_prior_without_them_is_accepted() -> None:
    torch.manual_seed(0)
    model = CVAE(StandardNormal(2), Normal(MLP(2, 5, context=3)))
    guide = MeanFieldGuide(MLP(5, context=3), 2)
    result = elbo_decomposition(model, guide, (rows(9).float(), torch.arange(9) % 3), **QUIET)
    assert result.num_data == 9 and math.isfinite(result.elbo.mean)


# -- what comes out ----------------------------------------------------------------------------------


def test_table_summary_and_text_say_the_same() -> None:
    result = elbo_decomposition(*pair(), rows(5), num_particles=2, **QUIET)
    assert isinstance(result, ElboDecomposition)
    summary, table = result.summary(), result.table
    assert (summary["num_data"], summary["num_particles"]) == (5, 2)
    for name in ("elbo", "mutual_information", "dimension_kl[1]"):
        assert summary[name] == table.loc[name].to_dict()
    assert f"{result.total_correlation.mean:.2f}" in str(result) and "log N = 1.61" in str(result)


def test_one_draw_per_datum_has_no_monte_carlo_error() -> None:
    result = elbo_decomposition(*pair(), rows(5), **QUIET)
    assert math.isnan(result.elbo.monte_carlo_error) and result.elbo.standard_error > 0


# -- wrong inputs ------------------------------------------------------------------------------------


def test_a_prior_given_labels_is_refused() -> None:
    torch.manual_seed(0)
    model = CVAE(ConditionalNormal(MLP(3), 2, num_classes=3), Normal(MLP(2, 5, context=3)))
    guide = MeanFieldGuide(MLP(5, context=3), 2)
    for y in (torch.arange(9) % 3, torch.arange(9) // 3):  # mixed and sorted
        with pytest.raises(ValueError, match="model: expected a prior that does not depend on the datum"):
            elbo_decomposition(model, guide, (rows(9).float(), y), **QUIET)


def test_auxiliary_masked_and_observed_sites_are_refused() -> None:
    def auxiliary(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("a", dist.Normal(x.new_zeros(1), 1.0).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    def masked(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.poutine.mask(mask=x[:, 0] > 0):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    def observing(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.factor("extra", x[:, 0])

    cases = {
        "guide: expected no auxiliary sites.*'a'": auxiliary,
        "site 'z': expected no mask": masked,
        "guide: expected no observed site.*'extra'": observing,
    }
    for message, guide in cases.items():
        with pytest.raises(ValueError, match=message):
            elbo_decomposition(Standard(2), guide, rows(4), **QUIET)


def test_a_guide_that_can_score_its_own_draws_alone_is_refused() -> None:
    torch.manual_seed(0)
    guide = FlowGuide(MLP(5), Planar(2)).double()
    with pytest.raises(ValueError, match="score"):
        elbo_decomposition(Standard(2), guide, rows(4), **QUIET)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_particles": 0}, ValueError, "num_particles: expected a whole number above 0"),
        ({"num_particles": 1.5}, TypeError, "num_particles: expected a whole number above 0"),
        ({"memory": 0}, ValueError, "memory: expected"),
        ({"seed": -1}, ValueError, "seed: expected"),
        ({"device": "nowhere"}, ValueError, "device: expected"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        elbo_decomposition(*pair(), rows(4), **QUIET, **arguments)


def test_wrong_data_are_named() -> None:
    with pytest.raises(ValueError, match="data: expected finite x"):
        elbo_decomposition(*pair(), torch.full((3, 5), math.nan), **QUIET)
    with pytest.raises(ValueError, match="expected shape"):
        elbo_decomposition(*pair(), torch.zeros(3, 4, dtype=torch.float64), **QUIET)
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, 5)))
    with pytest.raises(ValueError, match="outside the support"):
        elbo_decomposition(
            model, MeanFieldGuide(MLP(5), 2), DataLoader(Rows(torch.full((4, 5), 0.5))), **QUIET
        )
