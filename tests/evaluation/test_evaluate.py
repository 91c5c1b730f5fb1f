"""Tests of evaluation: against the exact evidence, against itself in parts, and against its memory budget."""

import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Rows, Stream
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.util import get_rng_state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from ppl_vae import evaluate
from ppl_vae.data import Split
from ppl_vae.evaluation import Estimate, Evaluation
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import log_weights
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

QUIET: dict[str, Any] = {"progress": False}
MIB = 2**20


def linear_pair(dtype: torch.dtype = torch.float32, **network: Any) -> tuple[LinearGaussian, MeanFieldGuide]:
    torch.manual_seed(0)
    return LinearGaussian(2, 5).to(dtype), MeanFieldGuide(MLP(5, hidden=(8,), **network), 2).to(dtype)


def linear_data(n: int = 50, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(100)
    return LinearGaussian(2, 5)(None, size=n).detach().to(dtype)


def near_posterior(model: LinearGaussian, spread: float = 1.2) -> Callable[[Tensor], None]:
    """Return the guide that is the exact posterior, widened: importance weights have little spread."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), torch.no_grad():
            exact = model.posterior(x)
            wider = dist.MultivariateNormal(exact.mean, spread**2 * exact.covariance_matrix)
            pyro.sample("z", wider)

    return guide


def exact_log_prob(model: LinearGaussian, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.log_prob(x)


def parts(result: Evaluation) -> dict[str, Estimate]:
    named = {
        "elbo": result.elbo,
        "reconstruction": result.reconstruction,
        "log_likelihood": result.log_likelihood,
    }
    return named | {f"kl_{site}": estimate for site, estimate in result.kl.items()}


# -- what comes out ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(n=st.integers(1, 20), num_particles=st.integers(1, 9), memory=st.integers(1, 200_000))
def test_parts_have_a_value_per_datum_and_sum_to_the_elbo(n: int, num_particles: int, memory: int) -> None:
    result = evaluate(*linear_pair(), linear_data(n), num_particles=num_particles, memory=memory, **QUIET)
    assert (result.num_data, result.num_particles, list(result.kl)) == (n, num_particles, ["z"])
    for estimate in parts(result).values():
        assert estimate.values.shape == (n,) and estimate.values.dtype == torch.float64
        assert estimate.num_particles == num_particles and bool(estimate.values.isfinite().all())
        assert estimate.mean == pytest.approx(float(estimate.values.mean()))
    # the terms are float32 sums of some 10 nats, averaged
    torch.testing.assert_close(
        result.elbo.values, result.reconstruction.values - result.kl["z"].values, rtol=1e-5, atol=1e-5
    )
    # Jensen: the log of a mean of weights is above the mean of their logs
    assert bool((result.log_likelihood.values >= result.elbo.values - 1e-5).all())
    if num_particles == 1:
        torch.testing.assert_close(result.log_likelihood.values, result.elbo.values)


def test_mean_and_standard_error_are_over_data() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    estimate = Estimate(values, 10, 0.5)
    assert estimate.mean == 4.0
    assert estimate.standard_error == pytest.approx(np.std(values.numpy(), ddof=1) / 2)
    assert math.isnan(Estimate(values[:1], 10, 0.5).standard_error)
    assert str(estimate) == "4.00 +- 1.78"


def test_a_difference_of_estimates_is_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    common, extra = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    first, second = Estimate(10 * common + extra, 8, 0.3), Estimate(10 * common, 5, 0.4)
    found = first - second
    assert found.mean == pytest.approx(float(extra.mean()))
    assert found.standard_error == pytest.approx(float(extra.std()) / 50**0.5)
    assert (found.num_particles, found.monte_carlo_error) == (5, pytest.approx(0.5))
    with pytest.raises(ValueError, match="other: expected an estimate of the same 50 data, got one of 49"):
        first - Estimate(common[1:], 5, 0.4)
    with pytest.raises(TypeError, match="unsupported operand"):
        first - 3


def test_the_summary_is_plain_numbers_and_the_text_says_all() -> None:
    result = evaluate(*linear_pair(), linear_data(), num_particles=3, **QUIET)
    summary = result.summary()
    assert summary["num_data"] == 50 and summary["num_particles"] == 3
    for name, estimate in parts(result).items():
        expected = {
            "mean": estimate.mean,
            "standard_error": estimate.standard_error,
            "monte_carlo_error": estimate.monte_carlo_error,
        }
        assert summary[name] == expected and all(type(value) is float for value in summary[name].values())
    text = str(result)
    for word in (
        "nats per datum",
        "50 data",
        "ELBO",
        "reconstruction",
        "KL of z",
        "K=3",
        f"{result.elbo.mean:.2f}",
    ):
        assert word in text


def test_one_draw_has_no_monte_carlo_error_to_tell() -> None:
    result = evaluate(*linear_pair(), linear_data(), num_particles=1, **QUIET)
    assert all(math.isnan(estimate.monte_carlo_error) for estimate in parts(result).values())
    one = evaluate(*linear_pair(), linear_data(1), num_particles=5, **QUIET)
    assert math.isnan(one.elbo.standard_error) and one.elbo.monte_carlo_error > 0


def test_two_latent_sites_have_two_kls_whatever_their_names() -> None:
    """One site has the name that the variance of the other would have."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("a_variance", dist.Normal(a, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(b.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 0.5).to_event(1))
            pyro.sample("a_variance", dist.Normal(a, 1.0).to_event(1))

    result = evaluate(model, guide, torch.randn(20, 1), num_particles=2000, **QUIET)
    assert set(result.kl) == {"a", "a_variance"}
    exact = 2 * (math.log(2) + 0.5 * 0.25 - 0.5)  # of N(0, 1/4) to N(0, 1), two dimensions
    assert abs(result.kl["a"].mean - exact) < 5 * result.kl["a"].monte_carlo_error
    assert float(result.kl["a_variance"].values.abs().max()) == 0.0  # the same conditional: no draw differs


# -- against the truth -------------------------------------------------------------------------------


def test_with_the_exact_posterior_every_number_is_exact() -> None:
    model, _ = linear_pair(torch.float64)
    x = linear_data(dtype=torch.float64)
    result = evaluate(model, near_posterior(model, 1.0), x, num_particles=3, **QUIET)
    for estimate in (result.elbo, result.log_likelihood):
        torch.testing.assert_close(estimate.values, exact_log_prob(model, x), rtol=1e-10, atol=1e-10)
        assert estimate.monte_carlo_error < 1e-6  # of differences of equal numbers
    with torch.no_grad():
        prior = dist.MultivariateNormal(torch.zeros(2, dtype=x.dtype), torch.eye(2, dtype=x.dtype))
        kl = torch.distributions.kl_divergence(model.posterior(x), prior)
    many = evaluate(model, near_posterior(model, 1.0), x, num_particles=4000, **QUIET).kl["z"]
    assert abs(many.mean - float(kl.mean())) < 4 * many.monte_carlo_error


def test_importance_sampling_finds_the_exact_evidence() -> None:
    model, _ = linear_pair()
    x = linear_data(200)
    exact = float(exact_log_prob(model, x).mean())
    result = evaluate(model, near_posterior(model), x, num_particles=1000, **QUIET)
    error = result.log_likelihood.monte_carlo_error
    assert abs(result.log_likelihood.mean - exact) < 4 * error < 0.02
    elbo_error = result.elbo.monte_carlo_error
    assert result.elbo.mean < exact + 4 * elbo_error
    assert result.elbo.mean < result.log_likelihood.mean
    # KL(q | p) of a posterior widened by s in two dimensions is known: s^2 - 1 - 2 log s
    gap = 1.2**2 - 1 - 2 * math.log(1.2)
    assert abs(exact - gap - result.elbo.mean) < 4 * elbo_error


def test_the_bound_tightens_with_the_number_of_particles() -> None:
    model, guide = linear_pair()
    x = linear_data(400)
    means = [evaluate(model, guide, x, num_particles=k, **QUIET).log_likelihood.mean for k in (1, 10, 300)]
    assert means == sorted(means) and means[0] < means[2] - 0.1
    assert means[2] < float(exact_log_prob(model, x).mean()) + 0.05


def test_the_monte_carlo_error_is_the_spread_over_seeds() -> None:
    """Over 40 seeds the spread of each mean is the stated error, which itself varies little.

    A standard deviation of 40 values is within 3 / sqrt(2 * 39) = 34 % of its expectation.
    """
    model, _ = linear_pair()
    x, guide = linear_data(20), near_posterior(model)
    results = [evaluate(model, guide, x, num_particles=40, seed=seed, **QUIET) for seed in range(40)]
    for name in ("elbo", "reconstruction", "kl_z", "log_likelihood"):
        estimates = [parts(result)[name] for result in results]
        spread = float(np.std([estimate.mean for estimate in estimates], ddof=1))
        stated = float(np.mean([estimate.monte_carlo_error for estimate in estimates]))
        assert 0.66 < spread / stated < 1.34, name


# -- in parts ----------------------------------------------------------------------------------------


def delta_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Delta(x[:, :2] * 0.3, event_dim=1))


@pytest.mark.parametrize("memory", [1, 5_000, 100_000, 10**9])
def test_chunks_of_a_guide_without_noise_give_the_same_numbers(memory: int) -> None:
    """All draws are one value: K, the chunks and the memory can't matter, beyond float32's rounding."""
    model, _ = linear_pair(torch.float64)
    x = linear_data(10, dtype=torch.float64)
    weights = log_weights(model, delta_guide, x, num_particles=1)[0].detach()
    for num_particles in (1, 7, 100):
        result = evaluate(model, delta_guide, x, num_particles=num_particles, memory=memory, **QUIET)
        torch.testing.assert_close(result.elbo.values, weights, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.log_likelihood.values, weights, rtol=1e-12, atol=1e-12)


def test_chunked_draws_have_the_same_distribution() -> None:
    """K = 400 in passes of a few rows and in one pass: means within 4 errors, errors within a third."""
    model, _ = linear_pair()
    x, guide = linear_data(30), near_posterior(model)
    whole = evaluate(model, guide, x, num_particles=400, **QUIET)
    small = evaluate(model, guide, x, num_particles=400, memory=20_000, seed=1, **QUIET)
    for name, estimate in parts(whole).items():
        other = parts(small)[name]
        error = math.hypot(estimate.monte_carlo_error, other.monte_carlo_error)
        assert 0 < abs(estimate.mean - other.mean) < 4 * error, name
        assert 0.67 < estimate.monte_carlo_error / other.monte_carlo_error < 1.5, name


@pytest.mark.parametrize("num_particles", [1, 6, 50])
def test_each_draw_and_each_datum_is_counted_once(
    num_particles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    model, guide = linear_pair()
    forward = type(guide).forward

    def counting(self: MeanFieldGuide, x: Tensor) -> Tensor:
        z = forward(self, x)
        rows.append(z[..., 0].numel())
        return z

    monkeypatch.setattr(MeanFieldGuide, "forward", counting)
    for memory in (3_000, 10**8):
        rows.clear()
        evaluate(model, guide, linear_data(23), num_particles=num_particles, memory=memory, **QUIET)
        # runs that check the pair (2 data, 1 datum) and measure it (1, 5 and 2 rows) come first
        assert rows[:5] == [2, 1, 1, 5, 2] and sum(rows[5:]) == 23 * num_particles


class Peak(TorchDispatchMode):
    """Follows the bytes of the tensors that are made inside its context and alive."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.before = {tensor.untyped_storage().data_ptr() for tensor in before}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key and key not in self.alive and key not in self.before:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(tensor, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


class Wide(nn.Module):
    """An encoder with many features inside, in a pair whose decoder is small."""

    out_features = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("num_particles", [1, 20, 400])
@pytest.mark.parametrize("heavy", ["decoder", "encoder"])
@pytest.mark.parametrize("memory", [MIB, 8 * MIB])
def test_tensors_stay_within_the_memory(num_particles: int, heavy: str, memory: int) -> None:
    """Whatever is wide, encoder or decoder, and whatever K is: the tensors alive at once fit the budget."""
    torch.manual_seed(0)
    if heavy == "decoder":
        model: nn.Module = VAE(StandardNormal(2), Bernoulli(MLP(2, (784,), (400,))))
        guide, x = MeanFieldGuide(MLP(784, hidden=(4,)), 2), (torch.rand(12, 784) > 0.5).float()
    else:
        model, guide, x = LinearGaussian(2, 5), MeanFieldGuide(Wide(10_000), 2), linear_data(200)
    with Peak(x, *model.parameters(), *guide.parameters()) as peak:
        evaluate(model, guide, x, num_particles=num_particles, memory=memory, **QUIET)
    assert memory / 100 < peak.peak < memory


MEASURE = """
import resource, torch
from ppl_vae import evaluate
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

torch.manual_seed(0)
torch.set_num_threads(1)
model = VAE(StandardNormal(10), Bernoulli(MLP(10, (1, 28, 28), (200, 200))))
guide = MeanFieldGuide(MLP((1, 28, 28), hidden=(200, 200)), 10)
x = (torch.rand(20, 1, 28, 28) > 0.5).float()
evaluate(model, guide, x[:2], num_particles=2, progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
evaluate(model, guide, x, num_particles=1000, memory=8 * 2**20, progress=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_the_process_grows_by_no_more_than_the_memory() -> None:
    """A pass of 4096 rows (the most on a CPU) has 12 MiB per pixel tensor."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 2 * 8  # MiB; the allocator keeps some of what was freed


# -- which data, which programs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        Split,
        lambda x: (x, torch.arange(len(x))),
        TensorDataset,
        Rows,
        lambda x: x.numpy(),
        lambda x: DataLoader(TensorDataset(x), batch_size=7),
        lambda x: Stream(x, 7),
    ],
    ids=["tensor", "split", "labelled", "tensor-dataset", "map-style", "numpy", "loader", "stream"],
)
def test_all_forms_of_data_are_evaluated_in_order(wrap: Callable) -> None:
    model, _ = linear_pair()
    x = linear_data()
    weights = log_weights(model, delta_guide, x)[0].detach()
    result = evaluate(model, delta_guide, wrap(x), num_particles=2, **QUIET)
    torch.testing.assert_close(result.elbo.values.float(), weights, rtol=1e-5, atol=1e-5)


def test_programs_of_x_and_y_get_the_labels() -> None:
    x, y = linear_data(40), torch.arange(40) % 3

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = y.float().unsqueeze(-1) + 0 * z.sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(mean.expand(*mean.shape[:-1], 5), 1.0).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    exact = dist.Normal(y.float().unsqueeze(-1), 1.0).log_prob(x).sum(-1).double()
    for data in ((x, y), DataLoader(TensorDataset(x, y), batch_size=9)):
        result = evaluate(model, guide, data, num_particles=4, **QUIET)
        torch.testing.assert_close(result.log_likelihood.values, exact, rtol=1e-5, atol=1e-5)


def test_a_progress_bar_counts_data(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(*linear_pair(), linear_data(), num_particles=2)
    assert "50/50" in capsys.readouterr().err


# -- what it leaves alone ----------------------------------------------------------------------------


def random_states() -> tuple:
    states = get_rng_state()
    name, keys, *rest = states["numpy"]
    return states["torch"].tolist(), states["random"], (name, keys.tolist(), *rest)


def test_nothing_of_the_callers_changes() -> None:
    model, guide = linear_pair(normalization="batch", dropout=0.5)
    guide.encoder.layers[0].eval()
    x, store = linear_data(), list(pyro.get_param_store())
    modes = [module.training for module in guide.modules()]
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    states = random_states()
    results = [evaluate(model, guide, x, num_particles=3, **QUIET) for _ in range(2)]
    assert random_states() == states
    assert [module.training for module in guide.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))
    assert list(pyro.get_param_store()) == store
    # the same seed gives the same draws, and dropout none of its own
    assert torch.equal(results[0].elbo.values, results[1].elbo.values)
    assert not results[0].elbo.values.requires_grad
    other = evaluate(model, guide, x, num_particles=3, seed=1, **QUIET)
    assert not torch.equal(results[0].elbo.values, other.elbo.values)


def test_networks_of_plain_functions_are_evaluated_in_eval_mode() -> None:
    """With dropout of nearly all, training mode would give other numbers each time."""
    net = nn.Sequential(nn.Linear(5, 50), nn.BatchNorm1d(50), nn.Dropout(0.9), nn.Linear(50, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand((*z.shape[:-1], 5)).to_event(1), obs=x
            )

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(net(x), event_dim=1))

    x = linear_data()
    a, b = (evaluate(model, guide, x, num_particles=2, seed=seed, **QUIET) for seed in (0, 1))
    assert torch.equal(a.elbo.values, b.elbo.values)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_modes_come_back_after_an_error() -> None:
    model, guide = linear_pair(dropout=0.5)
    with pytest.raises(ValueError, match="expected shape"):
        evaluate(model, guide, torch.zeros(4, 3), **QUIET)
    assert all(module.training for program in (model, guide) for module in program.modules())


# -- what it refuses ---------------------------------------------------------------------------------


def bernoulli_pair() -> tuple[VAE, MeanFieldGuide]:
    torch.manual_seed(0)
    return VAE(StandardNormal(2), Bernoulli(MLP(2, (1, 4, 4), (8,)))), MeanFieldGuide(
        MLP((1, 4, 4), hidden=(8,)), 2
    )


def one_site(name: str) -> Callable[[Tensor], None]:
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return program


def with_value(x: Tensor, row: int, value: float) -> Tensor:
    x = x.clone()
    x[row].view(-1)[3] = value
    return x


X, BITS, NAN = linear_data(100), (torch.rand(100, 1, 4, 4) > 0.5).float(), float("nan")


class Refused:
    """A call with one thing wrong."""

    def __init__(
        self,
        message: str,
        *,
        pair: Callable = linear_pair,
        kind: type[Exception] = ValueError,
        **arguments: Any,
    ) -> None:
        self.message, self.pair, self.kind = message, pair, kind
        self.arguments: dict[str, Any] = {"data": X, **QUIET, **arguments}


REFUSED: dict[str, Refused] = {
    "K 0": Refused("^num_particles: .*above 0, got 0", num_particles=0),
    "K -3": Refused("^num_particles: .*got -3", num_particles=-3),
    "K 1.5": Refused("^num_particles: .*got 1.5", kind=TypeError, num_particles=1.5),
    "K text": Refused("^num_particles: .*got '5000'", kind=TypeError, num_particles="5000"),
    "K True": Refused("^num_particles: .*got True", kind=TypeError, num_particles=True),
    "memory 0": Refused("^memory: .*got 0", memory=0),
    "memory text": Refused("^memory: .*got '1G'", kind=TypeError, memory="1G"),
    "seed": Refused("^seed: .*got -1", seed=-1),
    "device": Refused("^device: .*got 'gpu'", device="gpu"),
    "device far away": Refused("^device: .*got 'cuda:99'", device="cuda:99"),
    "nan": Refused("^data: .*finite.*row 57", data=with_value(X, 57, NAN)),
    "nan in a loader": Refused(
        "^data, batch 3: .*row 17", data=DataLoader(TensorDataset(with_value(X, 57, NAN)), 20)
    ),
    "grey": Refused("^data: datum 57 .*site 'x'", pair=bernoulli_pair, data=with_value(BITS, 57, 0.5)),
    "grey in a loader": Refused(
        "^data, batch 3: datum 17",
        pair=bernoulli_pair,
        data=DataLoader(TensorDataset(with_value(BITS, 57, 0.5)), 20),
    ),
    "dynamic above 1": Refused(
        r"^data: .*\[0, 1\]", pair=bernoulli_pair, data=Split(with_value(BITS, 0, 1.5), dynamic=True)
    ),
    "image size": Refused("4, 4.*5, 5", pair=bernoulli_pair, data=torch.zeros(9, 1, 5, 5)),
    "empty": Refused("^data: .*above 0", data=X[:0]),
    "empty loader": Refused("^data: .*got none", data=DataLoader(TensorDataset(X), 200, drop_last=True)),
    "no data": Refused("^data: expected .*NoneType", kind=TypeError, data=None),
    "labels missing": Refused(
        r"^data: .*\['x', 'y'\], got 1", pair=lambda: (lambda x, y: None, lambda x, y: None), kind=TypeError
    ),
    "other sites": Refused(
        r"^guide: lacks .*\['z'\].*\['w'\]", pair=lambda: (linear_pair()[0], one_site("w"))
    ),
    "nothing observed": Refused(
        "^model: expected an observed site", pair=lambda: (one_site("z"), one_site("z"))
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named_in_one_line(name: str) -> None:
    wrong = REFUSED[name]
    model, guide = wrong.pair()
    with pytest.raises(wrong.kind, match=wrong.message) as caught:
        evaluate(model, guide, **wrong.arguments)
    assert type(caught.value) is wrong.kind and "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^device: .*got 'cuda'; it has 0 CUDA"):
        evaluate(*linear_pair(), X, device="cuda", **QUIET)
