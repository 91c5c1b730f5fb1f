"""Programs on which an estimator could go wrong without a word: right, or refused with the site's name."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import (
    CUBO,
    IWAE,
    KL_ELBO,
    MIWAE,
    PIWAE,
    STL_ELBO,
    VIMCO,
    DReG,
    EnumELBO,
    Objective,
    Renyi,
    ScoreFunctionELBO,
    WakeSleep,
    log_weights,
)
from ppl_vae.infer.bounds import renyi_bound
from ppl_vae.infer.estimator import Estimator
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

N = 6


class Guide(nn.Module):
    """z ~ N(2 loc, 2 scale), drawn as it is, or as a transform of an auxiliary site u."""

    def __init__(self, *, auxiliary: bool) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor([-0.5], dtype=torch.float64))
        self.auxiliary = auxiliary

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            u = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
            if self.auxiliary:
                u = pyro.sample("u", u, infer={"is_auxiliary": True})
                pyro.sample("z", dist.Delta(2 * u, log_density=-math.log(2.0), event_dim=1))
            else:
                pyro.sample("z", dist.Normal(2 * self.loc, 2 * self.log_scale.exp()).to_event(1))


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)


def data(n: int = N) -> Tensor:
    return torch.linspace(-1, 2, n, dtype=torch.float64).unsqueeze(-1)


def gradients(estimator: Estimator, model: Any, guide: nn.Module, x: Tensor, seed: int = 1) -> list[Tensor]:
    guide.zero_grad()
    torch.manual_seed(seed)
    Objective(model, guide, estimator).loss_and_grads(x)
    return [p.grad.clone() for p in guide.parameters() if p.grad is not None]


# -- networks that couple data -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [DReG(4), PIWAE(4, num_groups=2), CUBO(4), WakeSleep(4, dreg=True)],
    ids=lambda e: type(e).__name__,
)
def test_weighted_draws_refuse_batch_norm_in_training(estimator: Estimator) -> None:
    def pair(normalization: Any) -> tuple[nn.Module, nn.Module]:
        decoder = MLP(2, 5, hidden=3, normalization=normalization)
        return VAE(StandardNormal(2), Bernoulli(decoder)), MeanFieldGuide(MLP(5, hidden=3), 2)

    x = torch.ones(N, 5)
    coupled, guide = pair("batch")
    with pytest.raises(ValueError, match=f"model: .* since {type(estimator).__name__} .* got .*Norm.* IWAE"):
        estimator.loss_and_grads(coupled, guide, x)
    coupled.eval()
    assert estimator.loss_and_grads(coupled, guide, x).isfinite()
    assert estimator.loss_and_grads(*pair("layer"), x).isfinite()
    assert MIWAE(4, num_groups=2).loss_and_grads(*pair("batch"), x).isfinite()


@pytest.mark.parametrize("estimator", [VIMCO(2), ScoreFunctionELBO(2)], ids=["VIMCO", "ScoreFunctionELBO"])
def test_baselines_per_datum_refuse_batch_norm_in_training(estimator: Estimator) -> None:
    decoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def discrete(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.OneHotCategorical(logits=x.new_zeros(3)))
            loc = decoder(z.reshape(-1, 3)).reshape(*z.shape[:-1], 4)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.OneHotCategorical(logits=x.new_zeros(3).requires_grad_()))

    with pytest.raises(ValueError, match="got BatchNorm1d in training mode"):
        estimator.loss_and_grads(discrete, guide, torch.ones(N, 4))


# -- auxiliary sites ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: DReG(4), lambda: WakeSleep(4, dreg=True), lambda: STL_ELBO(4)])
def test_an_auxiliary_site_has_the_gradient_of_the_same_guide_without(make: Callable[[], Estimator]) -> None:
    found, expected = (gradients(make(), model, Guide(auxiliary=a), data()) for a in (True, False))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_density_of_a_delta_counts() -> None:
    plain, auxiliary = (Guide(auxiliary=a) for a in (False, True))
    torch.manual_seed(1)
    expected = -log_weights(model, plain, data(), num_particles=3).mean(0).sum()
    torch.manual_seed(1)
    elbo = KL_ELBO(3)
    torch.testing.assert_close(elbo.loss(model, auxiliary, data()), expected)
    assert elbo.analytic == {"u": False, "z": False}
    with pytest.raises(ValueError, match=r"free_bits: .* got the auxiliary sites \['u'\]"):
        KL_ELBO(free_bits=0.1, free_bits_per="site").loss(model, auxiliary, data())


# -- guides that are run twice -----------------------------------------------------------------------


class Outside(torch.autograd.Function):
    """A square that torch's modes do not see into."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a * a

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w: nn.functional.dropout(h), "draws nothing but its sites"),
        (lambda h, w: h + torch.randn_like(h), "draws nothing but its sites"),
        (lambda h, w: h + Outside.apply(w), "parameters can be held constant"),
    ],
    ids=["functional dropout", "noise", "autograd.Function"],
)
@pytest.mark.parametrize("estimator", [STL_ELBO(), DReG(2)], ids=["STL", "DReG"])
def test_a_second_run_that_differs_is_refused(
    estimator: Estimator, change: Callable[..., Tensor], message: str
) -> None:
    network, weight = nn.Linear(1, 1).double(), nn.Parameter(torch.ones(1, dtype=torch.float64))

    def two_sites(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            w = pyro.sample("w", dist.Normal(z, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w, 0.7).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(change(network(x), weight), 1.0).to_event(1))
            pyro.sample("w", dist.Normal(network(z), 1.0).to_event(1))

    with pytest.raises(ValueError, match=f"sites \\['w', 'z'\\]: .*{message}.* use KL_ELBO or IWAE"):
        estimator.loss_and_grads(two_sites, guide, data())
    assert IWAE(2).loss_and_grads(two_sites, guide, data()).isfinite()


# -- shapes, scales, observed sites --------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [IWAE(1), IWAE(3), KL_ELBO(), STL_ELBO()], ids=["1", "3", "KL", "STL"])
def test_a_forgotten_to_event_is_refused_when_it_is_as_wide_as_the_batch(estimator: Estimator) -> None:
    def narrow(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"\[4, 4\]|[Ss]hape|dims"):
        estimator.loss(narrow, guide, torch.zeros(4, 4))


def test_the_true_elbo_has_no_weight_of_the_likelihood() -> None:
    def weighted(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            with poutine.scale(scale=0.1):
                pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)

    guide, elbo = Guide(auxiliary=False), STL_ELBO(3)
    torch.manual_seed(1)
    elbo.loss(weighted, guide, data())
    torch.manual_seed(1)
    expected = log_weights(model, guide, data(), num_particles=3)
    assert elbo.terms is not None
    torch.testing.assert_close(elbo.terms.log_weights(), expected)


@pytest.mark.parametrize(
    "run", [lambda m, g, x: IWAE(2).loss(m, g, x), lambda m, g, x: Objective(m, g, IWAE(2))(x)]
)
def test_a_factor_in_the_guide_is_refused(run: Callable[..., Any]) -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            pyro.factor("bonus", x.new_full((len(x),), -5.0), has_rsample=True)

    with pytest.raises(ValueError, match="site 'bonus': expected no observed site"):
        run(model, guide, data())


# -- numbers -------------------------------------------------------------------------------------------


def ruling_out(x: Tensor) -> None:
    """The model, which rules out all z below -1."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        pyro.factor("bound", torch.where(z.squeeze(-1) > -1, 0.0, -math.inf))
        pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)


@pytest.mark.parametrize(
    "estimator",
    [DReG(64), PIWAE(64, num_groups=2), WakeSleep(64), WakeSleep(64, dreg=True), VIMCO(64), Renyi(64)],
    ids=["DReG", "PIWAE", "WakeSleep", "WakeSleep-dreg", "VIMCO", "Renyi"],
)
def test_draws_of_no_weight_leave_value_and_gradient_finite(estimator: Estimator) -> None:
    guide = Guide(auxiliary=False)
    torch.manual_seed(1)
    assert log_weights(ruling_out, guide, data(), num_particles=64).isinf().any()
    torch.manual_seed(1)
    expected = IWAE(64).loss(ruling_out, guide, data())
    torch.manual_seed(1)
    loss = estimator.loss_and_grads(ruling_out, guide, data())
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())
    if not isinstance(estimator, Renyi):
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("alpha", [1 - 1e-8, 1 + 1e-7, 1 - 1e-5, 1 - 1e-3, 0.98, 1.02, 0.5, -1.0])
def test_renyi_keeps_its_digits_near_one(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = -100 + 3 * torch.randn(50, 200, generator=generator, dtype=torch.float64)
    order = 1 - alpha
    deviation = exact - exact.mean(0)
    expected = exact.mean(0) + torch.expm1(order * deviation).mean(0).log1p() / order
    torch.testing.assert_close(renyi_bound(exact.float(), alpha).double(), expected, atol=2e-3, rtol=0)


def test_a_weight_of_zero_drops_an_infinite_kl() -> None:
    def bounded(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Uniform(x.new_zeros(1), 0.1).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)

    with pyro.validation_enabled(False):
        for estimator in (KL_ELBO(kl_weight=0.0), IWAE(3, kl_weight=0.0), STL_ELBO(kl_weight=0.0)):
            assert estimator.loss_and_grads(bounded, Guide(auxiliary=False), data()).isfinite()


def test_frozen_pairs_have_a_loss() -> None:
    guide = Guide(auxiliary=False).requires_grad_(False)
    assert IWAE(2).loss_and_grads(model, guide, data()).isfinite()


def test_nothing_of_torch_func_stays_in_an_estimator() -> None:
    guide, elbo = Guide(auxiliary=False), IWAE(2)
    objective = Objective(model, guide, elbo)
    parameters = {k: p.detach() for k, p in objective.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(objective, p, (data(),)))(parameters)
    copy.deepcopy(elbo).loss_and_grads(model, guide, data())


# -- wake-sleep and enumeration ------------------------------------------------------------------------


def test_wake_phi_with_and_without_dreg_agree_on_weighted_sites() -> None:
    """40 batches of 500 copies of one datum, seeds 0 to 39; 4 standard errors of the difference."""

    def scaled(program: Any) -> Any:
        def run(x: Tensor) -> None:
            with poutine.scale(scale=1.0), Weighted(0.3):
                program(x)

        return run

    guide = Guide(auxiliary=False)
    x = torch.full((500, 1), 0.8, dtype=torch.float64)
    runs = [
        [
            torch.cat(gradients(WakeSleep(3, dreg=dreg), scaled(model), Scaled(guide), x, seed)) / 500
            for seed in range(40)
        ]
        for dreg in (False, True)
    ]
    plain, double = (torch.stack(run) for run in runs)
    difference = plain.mean(0) - double.mean(0)
    error = ((plain.var(0) + double.var(0)) / 40).sqrt()
    assert (difference.abs() < 4 * error).all()
    assert (plain.mean(0).abs() > 8 * error).all()


class Weighted(poutine.messenger.Messenger):
    """Scales the latent sites."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.scale


class Scaled(nn.Module):
    """A guide with weighted sites."""

    def __init__(self, guide: nn.Module) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, x: Tensor) -> None:
        with Weighted(0.3):
            self.guide(x)


def test_sleep_learns_from_data_and_not_from_what_a_model_returns() -> None:
    def returning(what: str) -> Any:
        def run(x: Tensor | None = None, *, size: int = 0) -> Tensor:
            with pyro.plate("data", size if x is None else len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
                value = pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)
                return value if what == "data" else z

        return run

    guide = MeanFieldGuide(MLP(1, hidden=2), 1).double()
    found = [gradients(WakeSleep(1, sleep=1.0), returning(what), guide, data()) for what in ("data", "mean")]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_sites_that_the_model_alone_has_are_summed_out() -> None:
    logits = torch.tensor([0.3, -0.8], dtype=torch.float64)

    def own(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            bits = pyro.sample("bits", dist.Bernoulli(logits=logits).to_event(1))
            pyro.sample("x", dist.Normal(bits.sum(-1, keepdim=True), 0.7).to_event(1), obs=x)

    p = logits.sigmoid()
    weights = torch.stack([(1 - p).prod(), p[0] * (1 - p[1]) + p[1] * (1 - p[0]), p.prod()])
    log_prob = dist.Normal(torch.arange(3.0, dtype=torch.float64), 0.7).log_prob(data())
    exact = (weights.log() + log_prob).logsumexp(-1).sum()
    loss = EnumELBO().loss(own, lambda x: None, data())
    assert loss == pytest.approx(-float(exact), rel=1e-10)
    with pytest.raises(ValueError, match="max_values=3 combinations"):
        EnumELBO(max_values=3).loss(own, lambda x: None, data())


def test_enumeration_is_pyros() -> None:
    def discrete(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=x.new_tensor([0.1, 0.2, -0.4])))
            pyro.sample("x", dist.Normal(z.double().unsqueeze(-1), 0.7).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Categorical(logits=x * x.new_tensor([0.5, -0.1, 0.2])))

    expected = TraceEnum_ELBO(max_plate_nesting=1).loss(discrete, config_enumerate(guide), data())
    assert EnumELBO().loss(discrete, guide, data()) == pytest.approx(expected, rel=1e-10)
