"""Tests of posterior draws: against exact posteriors and quadrature, and of posteriors that are hard."""

import math
import sys
import warnings
from typing import Any

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Rows, Stream, function_pair
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ppl_vae.data import Split
from ppl_vae.evaluation._hmc import transition
from ppl_vae.evaluation.reference_posterior import ReferencePosterior, reference_posterior
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.likelihoods import Normal
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

SHORT: dict[str, Any] = {"num_samples": 20, "warmup": 10, "num_chains": 2, "leapfrog": 2, "progress": False}


def quietly(*args: Any, **kwargs: Any) -> ReferencePosterior:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that short chains have not converged
        return reference_posterior(*args, **{**SHORT, **kwargs})


def linear(n: int, latent: int = 2) -> tuple[LinearGaussian, Tensor]:
    model = LinearGaussian(latent, 3, scale=0.5).double()
    return model, model(None, size=n).detach()


def scores(result: ReferencePosterior, mean: Tensor, sd: Tensor) -> Tensor:
    """Return errors of means and deviations ``[2, n, d]`` in standard errors, from the draws' ESS."""
    z = result.draws["z"]
    data = az.convert_to_dataset({"z": z.numpy()})
    of_mean, of_sd = (torch.from_numpy(az.ess(data, method=m)["z"].to_numpy()) for m in ("mean", "sd"))
    error_of_mean = (result.samples("z").mean(0) - mean) / (sd / of_mean.sqrt())
    error_of_sd = (result.samples("z").std(0) / sd - 1) * (2 * of_sd).sqrt()
    return torch.stack([error_of_mean, error_of_sd])


def bent(x: Tensor) -> None:
    """One latent whose posterior is skewed."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.exp(), 0.7).to_event(1), obs=x)


def bimodal(x: Tensor) -> None:
    """One latent that is as likely to be near 3 as near -3, and never in between."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 3.0).to_event(1))
        pyro.sample("x", dist.Normal(z.square(), 0.5).to_event(1), obs=x)


# -- against the truth -------------------------------------------------------------------------------


def test_hmc_has_the_exact_means_deviations_and_correlations_of_linear_gaussian_posteriors() -> None:
    model, x = linear(8)
    result = quietly(model, x, num_samples=400, warmup=150, leapfrog=3, num_chains=4)
    with torch.no_grad():
        exact = model.posterior(x)
        assert float(scores(result, exact.mean, exact.stddev).abs().max()) < 4
        correlation = torch.stack([draws.T.corrcoef()[0, 1] for draws in result.samples("z").unbind(1)])
        covariance = exact.covariance_matrix
        true = covariance[:, 0, 1] / (exact.stddev[:, 0] * exact.stddev[:, 1])
    # Fisher's z of a correlation has standard error 1 / sqrt(draws); 200 is half of the smallest ESS
    assert (
        float(result.ess.min()) > 400
        and float((correlation.atanh() - true.atanh()).abs().max()) < 4 / 200**0.5
    )
    assert float(result.r_hat.max()) < 1.03 and not int(result.divergences.sum())
    assert 0.7 < float(result.acceptance.mean()) < 0.99


def test_nuts_has_the_exact_moments_of_a_linear_gaussian_posterior() -> None:
    model, x = linear(1)
    result = quietly(model, x, "nuts", num_samples=120, warmup=50)
    with torch.no_grad():
        exact = model.posterior(x)
        assert float(scores(result, exact.mean, exact.stddev).abs().max()) < 4
    assert float(result.ess.min()) > 30 and 0.6 < float(result.acceptance) < 1
    assert result.draws["z"].shape == (2, 120, 1, 2)


@pytest.mark.parametrize(("method", "n"), [("hmc", 3), ("nuts", 1)])
def test_both_samplers_have_the_moments_of_a_skewed_posterior_that_quadrature_has(
    method: str, n: int
) -> None:
    x = torch.tensor([[1.0], [3.0], [-0.5]]).double()[:n]
    grid = torch.linspace(-8, 5, 20001).double()[:, None]
    log_joint = -grid.square() / 2 - (x.T - grid.exp()).square() / (2 * 0.7**2)
    weights = log_joint.softmax(0)
    mean = (weights * grid).sum(0)[:, None]
    sd = ((weights * grid.square()).sum(0)[:, None] - mean.square()).sqrt()
    length: dict[str, Any] = {"num_samples": 400, "warmup": 120, "leapfrog": 4, "num_chains": 4}
    if method == "nuts":
        length = {"num_samples": 120, "warmup": 50}
    result = quietly(bent, x, method, **length)
    # draws of a skewed density: the error of the deviation is as of a normal within some tens of per cent
    assert float(scores(result, mean, sd).abs().max()) < 4
    assert float(result.ess.min()) > 25


def test_latents_of_restricted_support_are_drawn_where_they_live() -> None:
    def model(x: Tensor) -> None:  # conjugate: the rate's posterior is Gamma(2 + x, 1 + 1)
        with pyro.plate("data", len(x), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    x = torch.tensor([0.0, 4.0]).double()
    result = quietly(model, x, num_samples=500, warmup=120, leapfrog=4)
    rate = result.draws["rate"]
    assert rate.shape == (2, 500, 2) and bool((rate > 0).all())
    error = ((2 + x) / 4 / result.ess).sqrt()
    assert bool(((result.samples("rate").mean(0) - (2 + x) / 2).abs() < 4 * error).all())
    assert float(result.ess.min()) > 100


def test_a_hierarchy_and_labels_are_drawn_too() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            top = pyro.sample("z2", dist.Normal(y.to(x), 1.0))
            low = pyro.sample("z1", dist.Normal(top[..., None].expand(*top.shape, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(low, 1.0).to_event(1), obs=x)

    x, y = torch.zeros(2, 2).double(), torch.tensor([0, 6])
    result = quietly(model, (x, y), num_samples=400, warmup=100, leapfrog=4)
    assert {site: tuple(draws.shape) for site, draws in result.draws.items()} == {
        "z2": (2, 400, 2),
        "z1": (2, 400, 2, 2),
    }
    # of top: prior N(y, 1), two observations of variance 2 at 0: mean y / 2, variance 1 / 2
    error = (0.5 / result.ess).sqrt()
    assert bool(((result.samples("z2").mean(0) - y / 2).abs() < 4 * error).all())
    assert float(result.ess.min()) > 50


# -- diagnostics -------------------------------------------------------------------------------------


def test_r_hat_and_ess_are_the_worst_over_the_dimensions_as_arviz_has_them() -> None:
    model, x = linear(3)
    result = quietly(model, x, num_samples=60, num_chains=3)
    data = az.convert_to_dataset({"z": result.draws["z"].numpy()})
    assert result.r_hat.tolist() == pytest.approx(az.rhat(data)["z"].to_numpy().max(-1).tolist())
    assert result.ess.tolist() == pytest.approx(az.ess(data)["z"].to_numpy().min(-1).tolist())


def test_r_hat_flags_the_datum_whose_chains_sit_in_different_modes_and_the_warning_counts_it() -> None:
    x = torch.tensor([[9.0], [0.1]]).double()  # two modes at 3 and -3; one around 0

    def wide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(1), 3.0).to_event(1))

    with pytest.warns(UserWarning, match="1 of 2 data have not converged: 1 have an R-hat above 1.01"):
        result = reference_posterior(
            bimodal, x, guide=wide, num_chains=6, num_samples=500, warmup=150, leapfrog=4, progress=False
        )
    means = result.draws["z"][:, :, 0, 0].mean(1)
    assert float(means.min()) < -2.5 and float(means.max()) > 2.5  # chains did start on both sides
    assert float(result.r_hat[0]) > 1.5 and result.converged.tolist() == [False, True]
    assert "1 data have not converged" in str(result) and result.summary()["not_converged"] == 1


def test_chains_that_never_move_have_no_effective_draws() -> None:
    def rough(x: Tensor) -> None:  # of infinite gradients: each proposal is refused
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal((1e30 * z).sin() * 1e3, 1e-3).to_event(1), obs=x)

    result = quietly(rough, torch.zeros(1, 1).double())
    assert float(result.ess) < 10 and float(result.r_hat) > 1.01 and not bool(result.converged)
    assert int(result.divergences) > 0


# -- starts, orbits, seeds ---------------------------------------------------------------------------


def test_a_guide_gives_the_starts_so_that_chains_are_at_home_without_a_warm_up() -> None:
    model, x = linear(5)
    x = x + 100  # far from the prior
    with torch.no_grad():
        exact = model.posterior(x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), torch.no_grad():
            pyro.sample("z", dist.Normal(exact.mean[: len(x)], exact.stddev[: len(x)]).to_event(1))

    settings: dict[str, Any] = {"warmup": 1, "num_samples": 10, "leapfrog": 1}
    near, far = quietly(model, x, guide=guide, **settings), quietly(model, x, **settings)
    distance = [((r.samples("z") - exact.mean) / exact.stddev).abs().amax((0, 2)) for r in (near, far)]
    assert float(distance[0].max()) < 6 < float(distance[1].min())


def test_leapfrog_numbers_change_around_their_mean_so_that_no_orbit_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = []

    def counting(*args: Any) -> Any:
        numbers.append(args[3])
        return transition(*args)

    # by its name: the package's attribute of this name is the function
    monkeypatch.setattr(sys.modules[reference_posterior.__module__], "transition", counting)
    model, x = linear(2)
    quietly(model, x, num_samples=150, warmup=50, leapfrog=3)
    assert len(numbers) == 200 and set(numbers) == {1, 2, 3, 4, 5}
    assert abs(sum(numbers) / 200 - 3) < 4 * math.sqrt(2 / 200)  # uniform on five numbers: variance 2


@pytest.mark.parametrize("method", ["hmc", "nuts"])
def test_the_same_seed_gives_the_same_draws_and_another_seed_others(method: Any) -> None:
    model, x = linear(1)
    draws = [quietly(model, x, method, num_samples=6, warmup=4, seed=seed).draws["z"] for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1])  # chains differ, too


def test_a_nuts_run_of_a_datum_does_not_depend_on_the_data_after_it_and_batches_are_in_order() -> None:
    model, x = linear(3)
    alone, many = (quietly(model, x[:n], "nuts", num_samples=5, warmup=4) for n in (1, 2))
    assert torch.equal(alone.draws["z"], many.draws["z"][:, :, :1])
    far = torch.stack([x[0] - 40, x[1], x[2] + 40])
    parts = quietly(model, far, warmup=50, num_samples=50, leapfrog=3, batch_size=2)
    with torch.no_grad():
        exact = model.posterior(far)
    assert float(((parts.samples("z").mean(0) - exact.mean) / exact.stddev).abs().max()) < 1


# -- what it runs on, and what it leaves alone ---------------------------------------------------------


@pytest.mark.parametrize("method", ["hmc", "nuts"])
def test_parameters_gradients_modes_the_store_and_the_random_stream_stay_as_they_were(method: Any) -> None:
    model = VAE(StandardNormal(2), Normal(nn.Sequential(MLP(2, 3, hidden=4), nn.Dropout(0.5))))
    guide = MeanFieldGuide(MLP(3, hidden=4), 2)
    model.train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    pyro.param("mine", torch.ones(2))
    state = torch.get_rng_state()
    quietly(model, torch.randn(1, 3), method, guide=guide)
    torch.set_rng_state(state)
    quietly(model, torch.zeros(1, 3), method, guide=guide)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in [*model.parameters(), *guide.parameters()])
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    assert list(pyro.get_param_store()) == ["mine"]


def test_plain_functions_and_a_module_of_ones_own_are_sampled() -> None:
    model, guide, _ = function_pair()
    x = torch.bernoulli(torch.full((3, 4), 0.5)).double()
    result = quietly(model, x, guide=guide)
    assert result.draws["z"].shape == (2, 20, 3, 2) and bool(result.draws["z"].isfinite().all())

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(2, 4).double()

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    assert quietly(Own(), x).draws["z"].shape == (2, 20, 3, 2)


def test_data_come_as_tensors_splits_datasets_and_loaders() -> None:
    model, x = linear(5)
    expected = quietly(model, x)
    for data in (Split(x), (x,), Rows(x), DataLoader(Rows(x), 2), Stream(x, 3)):
        data = DataLoader(data, None) if isinstance(data, Stream) else data
        result = quietly(model, data)
        assert torch.equal(result.draws["z"], expected.draws["z"]) and torch.equal(result.data[0], x)


def test_the_result_says_what_it_is() -> None:
    model, x = linear(3)
    result = quietly(model, x)
    assert (result.num_data, result.num_chains, result.num_samples) == (3, 2, 20)
    z = result.draws["z"]
    assert torch.equal(result.samples("z"), torch.cat([z[0], z[1]]))
    for values in (result.r_hat, result.ess, result.acceptance, result.divergences, result.converged):
        assert values.shape == (3,)
    summary = result.summary()
    assert summary["r_hat_max"] == float(result.r_hat.max()) and summary["method"] == "hmc"
    for word in ("3 data", "HMC", "2 chains of 20 draws", "R-hat", f"{float(result.ess.min()):.0f}"):
        assert word in str(result)
    with pytest.raises(ValueError, match="site: expected one of"):
        result.samples("w")


# -- wrong inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "gibbs"}, ValueError, "method: unknown 'gibbs'"),
        ({"num_samples": 3}, ValueError, "num_samples: expected at least 4"),
        ({"num_chains": 1}, ValueError, "num_chains: expected at least 2"),
        ({"warmup": 0}, ValueError, "warmup"),
        ({"leapfrog": 0}, ValueError, "leapfrog"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"seed": -1}, ValueError, "seed"),
        ({"guide": 3}, TypeError, "guide: expected a module or a function"),
        ({"device": "cuda:99"}, ValueError, "device"),
        ({"data": torch.full((2, 3), math.nan)}, ValueError, "data: expected finite x"),
        ({"data": torch.zeros(2, 7)}, ValueError, "data"),
        ({"data": "digits"}, TypeError, "data"),
        ({"model": 3}, TypeError, "model: expected a module or a function"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, Any], error: type, message: str) -> None:
    model, x = LinearGaussian(2, 3), torch.zeros(2, 3)
    settings = {"model": model, "data": x, **settings}
    with pytest.raises(error, match=message):
        quietly(settings.pop("model"), settings.pop("data"), **settings)


def test_discrete_latents_and_other_guides_are_named() -> None:
    def discrete(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'k': expected a continuous latent site"):
        quietly(discrete, torch.zeros(3))
    model, x = linear(2)
    with pytest.raises(ValueError, match="site 'z': model and guide disagree on shapes"):
        quietly(model, x, guide=MeanFieldGuide(MLP(3), 4).double())


def test_a_datum_that_no_start_is_possible_for_is_named() -> None:
    def impossible(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z - (x - 1).log(), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"data: expected a finite log p\(x, z\) of datum 2"):
        quietly(impossible, torch.tensor([[2.0], [3.0], [0.0], [4.0]]), batch_size=2)
