"""Active units and the collapse report: against closed forms, in hierarchies, and with noise taken off."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Rows, Stream, function_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.util import get_rng_state
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ppl_vae import evaluate
from ppl_vae.data import Split
from ppl_vae.evaluation.active_units import active_units, collapse_report
from ppl_vae.flows import InverseAutoregressive
from ppl_vae.guides import FlowGuide, FullRankGuide, MeanFieldGuide
from ppl_vae.likelihoods import Normal
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import GaussianMixture, StandardNormal

QUIET: dict[str, Any] = {"progress": False}
FACTORS = torch.tensor([1.0, 0.2, 0.05, 0.0], dtype=torch.float64)  # of the data in the means


def rows(n: int = 200) -> Tensor:
    torch.manual_seed(100)
    return torch.randn(n, 4, dtype=torch.float64)


class Model(nn.Module):
    """z ~ N(0, I) and x ~ N(weights * z, I)."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = torch.tensor(weights or (1.0, 1.0, 1.0, 0.0), dtype=torch.float64)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.weights * z, 1.0).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    """Means that are the data times factors; the last dimension is the prior's."""
    with pyro.plate("data", len(x), dim=-1):
        scale = torch.where(FACTORS > 0, 0.5, 1.0)
        pyro.sample("z", dist.Normal(FACTORS * x, scale).to_event(1))


class WithoutMean(dist.Normal):
    """A normal that does not know its moments."""

    @property
    def mean(self) -> Tensor:
        raise NotImplementedError

    @property
    def variance(self) -> Tensor:
        raise NotImplementedError


def guide_without_mean(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        scale = torch.where(FACTORS > 0, 0.5, 1.0)
        z = pyro.sample("z", WithoutMean(FACTORS * x, scale.expand(x.shape)).to_event(1))
        assert z.shape[-1] == 4


# -- active units ------------------------------------------------------------------------------------


def test_variances_are_those_of_the_means_over_the_data() -> None:
    x = rows()
    result = active_units(Model(), guide, x, **QUIET)
    torch.testing.assert_close(result.variances["z"], (FACTORS * x).var(0))
    assert result.active["z"].tolist() == [True, True, False, False]
    assert (result.counts, result.num_data, result.num_particles) == ({"z": 2}, 200, 1)


def test_the_threshold_is_on_the_variance_and_exclusive() -> None:
    x = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], dtype=torch.float64)  # variance 2
    for threshold, count in ((1.99, 1), (2.0, 0), (0.0, 1)):
        assert active_units(Model(), guide, x, threshold=threshold, **QUIET).counts == {"z": count}


def test_without_known_means_the_noise_of_draws_is_taken_off() -> None:
    x = rows(400)
    exact = (FACTORS * x).var(0)
    result = active_units(Model(), guide_without_mean, x, num_particles=20, **QUIET)
    assert result.num_particles == 20
    # the means of 20 draws have a noise of 0.25 / 20 and 1 / 20, above the threshold; their variance over 400
    # data is known to about noise * sqrt(2 / 400), plus 2 sd of means times noise over sqrt(400)
    noise = torch.tensor([0.25, 0.25, 0.25, 1.0], dtype=torch.float64) / 20
    error = noise * math.sqrt(2 / 400) + 2 * (exact * noise / 400).sqrt()
    assert bool(((result.variances["z"] - exact).abs() < 4 * error).all())
    assert result.active["z"].tolist() == [True, True, False, False]


def test_a_flow_guide_has_no_mean_and_is_taken_by_draws() -> None:
    torch.manual_seed(0)
    model, flow_guide = LinearGaussian(4, 4), FlowGuide(MLP(4, hidden=(8,)), InverseAutoregressive(4))
    result = active_units(model, flow_guide, rows(20).float(), num_particles=5, **QUIET)
    assert result.num_particles == 5 and result.variances["z"].shape == (4,)


class Hierarchy(nn.Module):
    """The model of z2 and z1, given what is above each."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2.expand(*z2.shape[:-1], 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)


def upwards(x: Tensor) -> None:
    """z1 is x with much noise; the mean of z2 is the first of z1."""
    with pyro.plate("data", len(x), dim=-1):
        z1 = pyro.sample("z1", dist.Normal(x, 2.0).to_event(1))
        pyro.sample("z2", dist.Normal(0.5 * z1[..., :1], 0.1).to_event(1))


def test_upper_layers_take_means_over_draws_of_the_lower_ones() -> None:
    x = rows(300)[:, :2]
    exact = (0.5 * x[:, 0]).var()
    result = active_units(Hierarchy(), upwards, x, num_particles=50, **QUIET)
    torch.testing.assert_close(result.variances["z1"], x.var(0))  # its mean needs no draw
    noise = 1.0 / 50  # of the mean over 50 draws of 0.5 * z1, whose standard deviation is 1
    error = noise * math.sqrt(2 / 300) + 2 * math.sqrt(float(exact) * noise / 300)
    assert float(result.variances["z2"]) == pytest.approx(float(exact), abs=4 * error)


def test_one_particle_is_burdas_way_with_the_noise_of_the_layer_below() -> None:
    x = rows(300)[:, :2]
    result = active_units(Hierarchy(), upwards, x, num_particles=1, **QUIET)
    both = float((0.5 * x[:, 0]).var()) + 1.0  # of the means and of 0.5 * z1 about its own
    assert float(result.variances["z2"]) == pytest.approx(both, abs=4 * both * math.sqrt(2 / 300))


@settings(deadline=None, max_examples=10)
@given(n=st.integers(2, 30), memory=st.integers(1, 50_000), offset=st.sampled_from([0.0, 1e6]))
def test_passes_change_nothing(n: int, memory: int, offset: float) -> None:
    x = rows(n) + offset
    result = active_units(Model(), guide, x, memory=memory, **QUIET)
    torch.testing.assert_close(result.variances["z"], (FACTORS * x).var(0), rtol=1e-6, atol=1e-12)


def test_every_kind_of_data_gives_the_same_numbers() -> None:
    x = rows(10)
    expected = active_units(Model(), guide, x, **QUIET).variances["z"]
    for data in (Split(x), Rows(x), DataLoader(Rows(x), batch_size=3), DataLoader(Stream(x, 4), None)):
        found = active_units(Model(), guide, data, **QUIET)
        torch.testing.assert_close(found.variances["z"], expected)
        assert found.num_data == 10


def test_discrete_sites_are_left_out_and_events_flattened() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=x.new_zeros(3)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2, 2), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(z.flatten(-2) + y.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def both(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Categorical(logits=x[:, :3]))
            pyro.sample("z", dist.Normal(x.view(-1, 2, 2), 1.0).to_event(2))

    x = rows(20)
    result = active_units(model, both, x, **QUIET)
    assert list(result.variances) == ["z"]
    torch.testing.assert_close(result.variances["z"], x.var(0))
    report = collapse_report(model, both, x, num_particles=3, signal=True, **QUIET)
    assert list(report.table.index) == [("z", d) for d in range(4)]
    assert "factorises" in report.reasons["z"] and bool(report.table["kl"].isna().all())


def test_summary_and_text_say_the_counts() -> None:
    result = active_units(Model(), guide, rows(), **QUIET)
    assert result.summary()["active_z"] == {"active": 2, "dimensions": 4}
    assert "z             2 of 4" in str(result) and "above 0.01" in str(result)


# -- the collapse report -----------------------------------------------------------------------------


def test_the_report_has_the_closed_forms_of_each_dimension() -> None:
    x = rows(300)
    report = collapse_report(Model(), guide, x, num_particles=100, **QUIET)
    table = report.table
    torch.testing.assert_close(torch.tensor(table["variance_of_means"].to_numpy()), (FACTORS * x).var(0))
    scale = torch.where(FACTORS > 0, 0.5, 1.0).double()
    assert table["posterior_sd"].tolist() == pytest.approx(scale.tolist())
    kl = (0.5 * (scale**2 + (FACTORS * x).square() - 1) - scale.log()).mean(0)
    # log q - log p = (z^2 - e^2) / 2 + const with z = m + s e: standard deviation at most
    # (1 + s^2) / sqrt(2) + |m| s over 30,000 draws
    error = (1.25 / math.sqrt(2) + 0.5 * x.abs().max()) / math.sqrt(30_000)
    assert table["kl"].tolist() == pytest.approx(kl.tolist(), abs=4 * float(error))
    assert table["kl"].iloc[3] == 0.0  # the prior itself
    assert table["active"].tolist() == [True, True, False, False]
    assert bool(table["signal"].isna().all()) and report.reasons == {}


def test_the_kl_of_the_dimensions_sum_to_that_of_evaluate() -> None:
    torch.manual_seed(0)
    model, q = LinearGaussian(3, 4).double(), MeanFieldGuide(MLP(4, hidden=(8,)), 3).double()
    x = rows(50)
    report = collapse_report(model, q, x, num_particles=200, **QUIET)
    kl = evaluate(model, q, x, num_particles=200, seed=1, **QUIET).kl["z"]
    error = math.sqrt(2) * kl.monte_carlo_error
    assert report.summary()["z"]["kl"] == pytest.approx(kl.mean, abs=4 * error)


def test_the_signal_is_the_fall_of_the_reconstruction_and_zero_where_the_decoder_does_not_look() -> None:
    n = 3000
    torch.manual_seed(1)
    x = torch.randn(n, 4, dtype=torch.float64)
    weights = (2.0, 1.0, 0.0, 0.0)
    report = collapse_report(Model(*weights), guide, x, num_particles=2, signal=True, **QUIET)
    signal, error = report.table["signal"], report.table["signal_se"]
    # E over data, z and z' ~ N(0, 1): ((x - w z')^2 - (x - w z)^2) / 2
    for d, w in enumerate(weights):
        m, s = float(FACTORS[d]), 0.5 if FACTORS[d] > 0 else 1.0
        after = 1 + w**2
        before = (1 - w * m) ** 2 + (w * s) ** 2
        assert signal.iloc[d] == pytest.approx(0.5 * (after - before), abs=4 * error.iloc[d] + 1e-12)
    assert signal.iloc[0] > 1 and signal.tolist()[2:] == [0.0, 0.0]


def test_the_signal_of_an_upper_layer_is_in_the_layer_below() -> None:
    x = rows(400)[:, :2] * 3
    report = collapse_report(Hierarchy(), upwards, x, num_particles=5, signal=True, **QUIET)
    assert list(report.table.index) == [("z1", 0), ("z1", 1), ("z2", 0)]
    # log p(z1 | z2) of z2 = 0.5 z1[0] + noise against a draw of N(0, 1), with x = 3 e and z1 = x + 2 e':
    # z1[0] has variance 13 and z1[1] 13; E (z1[0] - z2)^2 = 3.25 + .01, E (z1[1] - z2)^2 = 13 + 3.25 + .01;
    # with the draw 14 each
    truth = 0.5 * (28 - 3.26 - 16.26)
    assert report.table["signal"].loc[("z2", 0)] == pytest.approx(
        truth, abs=5 * report.table["signal_se"].loc[("z2", 0)]
    )


def test_correlated_posteriors_have_the_kl_of_their_marginals() -> None:
    torch.manual_seed(0)
    model, q = LinearGaussian(2, 4).double(), FullRankGuide(MLP(4, hidden=(8,)), 2).double()
    x = rows(100)
    report = collapse_report(model, q, x, num_particles=100, **QUIET)
    with torch.no_grad():
        posterior = q.posterior(x)
    variance = posterior.variance
    kl = 0.5 * (variance + posterior.mean**2 - 1 - variance.log()).mean(0)
    assert report.table["kl"].tolist() == pytest.approx(kl.tolist(), abs=4 * 1.5 / math.sqrt(10_000))
    assert report.table["posterior_sd"].tolist() == pytest.approx(variance.sqrt().mean(0).tolist())


def test_a_prior_that_does_not_factorise_leaves_all_but_the_kl() -> None:
    torch.manual_seed(0)
    model = VAE(GaussianMixture(4, 2), Normal(MLP(4, 4))).double()
    report = collapse_report(model, guide, rows(20), num_particles=2, **QUIET)
    assert "factorises" in report.reasons["z"] and bool(report.table["kl"].isna().all())
    assert math.isnan(report.summary()["z"]["kl"])
    assert "kl of z: " in str(report) and "posterior_sd" in str(report)


def test_plain_functions_and_nothing_of_the_caller_changes() -> None:
    model, q, parts = function_pair()
    x = torch.randint(0, 2, (8, 4)).double()
    before = [p.clone() for part in parts for p in part.parameters()]
    state = get_rng_state()
    for run in (active_units, collapse_report):
        run(model, q, x, num_particles=3, **QUIET)
    assert all(map(torch.equal, before, [p for part in parts for p in part.parameters()]))
    assert torch.equal(state["torch"], get_rng_state()["torch"])
    assert list(pyro.get_param_store().keys()) == []


# -- wrong inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [active_units, collapse_report])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"threshold": -0.1}, ValueError, "threshold: expected"),
        ({"threshold": "low"}, TypeError, "threshold: expected"),
        ({"num_particles": 0}, ValueError, "num_particles: expected"),
        ({"memory": -1}, ValueError, "memory: expected"),
        ({"seed": 0.5}, TypeError, "seed: expected"),
        ({"data": torch.zeros(1, 4, dtype=torch.float64)}, ValueError, "data: expected at least 2 data"),
        ({"data": "mnist"}, TypeError, "data: expected"),
        ({"guide": guide_without_mean, "num_particles": 1}, ValueError, "num_particles: expected at least 2"),
    ],
)
def test_wrong_arguments_are_named(
    run: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"model": Model(), "guide": guide, "data": rows(5)} | arguments
    with pytest.raises(error, match=message):
        run(**given, **QUIET)


def test_programs_without_a_continuous_site_or_with_a_masked_one_are_refused() -> None:
    def discrete(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Categorical(logits=x.new_zeros(3)))

    def discrete_model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Categorical(logits=x.new_zeros(3)))
            pyro.sample("x", dist.Normal(x.new_zeros(4), 1.0).to_event(1), obs=x)

    def masked(x: Tensor) -> None:
        with pyro.poutine.mask(mask=x[:, 0] > 0):
            guide(x)

    with pytest.raises(ValueError, match=r"a latent site of floating-point values, got \['y'\]"):
        active_units(discrete_model, discrete, rows(5), **QUIET)
    with pytest.raises(ValueError, match="site 'z': expected no mask"):
        active_units(Model(), masked, rows(5), **QUIET)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="site"):
        active_units(VAE(StandardNormal(3), Normal(MLP(3, 4))).double(), guide, rows(5), **QUIET)
