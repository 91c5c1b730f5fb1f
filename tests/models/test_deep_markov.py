"""The deep Markov model against the Gaussian joint of its linear case, and its guide."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae import fit
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.guides.deep_markov import DeepMarkovGuide
from ppl_vae.infer import KL_ELBO, STL_ELBO, SVI, CompiledSVI, log_weights, tracing
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE
from ppl_vae.models.deep_markov import DeepMarkovModel
from ppl_vae.networks import MLP
from ppl_vae.networks.recurrent import GatedTransition, RecurrentEncoder
from ppl_vae.networks.transformer import TransformerEncoder
from ppl_vae.priors import StandardNormal

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
LATENT, DIM, SIZE = 2, 3, 4
LENGTHS = torch.tensor([4, 1, 3])


@pytest.fixture(autouse=True)
def plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)


def linear_model() -> DeepMarkovModel:
    """Return z_t ~ N(A z_{t-1} + b, diag s^2), x_t ~ N(C z_t + d, 0.5^2 I)."""
    transition = nn.Linear(LATENT, 2 * LATENT)
    transition.weight.data = torch.tensor([[0.8, 0.3], [-0.2, 0.7], [0.0, 0.0], [0.0, 0.0]])
    transition.bias.data = torch.tensor([0.1, -0.2, math.log(0.6), math.log(0.9)])
    likelihood = Normal(nn.Linear(LATENT, DIM), scale=0.5)
    return DeepMarkovModel(StandardNormal(LATENT), transition, likelihood, SIZE).double()


def joint(model: DeepMarkovModel, steps: int) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of (z_1 ... z_T, x_1 ... x_T), by propagation of the linear maps."""
    maps, offset = model.transition.weight[:LATENT], model.transition.bias[:LATENT]
    noise = (2 * model.transition.bias[LATENT:]).exp().diag()
    means, blocks = [torch.zeros(LATENT).double()], {(0, 0): torch.eye(LATENT).double()}
    for t in range(1, steps):
        means.append(maps @ means[-1] + offset)
        for s in range(t):
            blocks[t, s] = maps @ blocks[t - 1, s]
            blocks[s, t] = blocks[t, s].mT
        blocks[t, t] = maps @ blocks[t - 1, t - 1] @ maps.mT + noise
    mean = torch.cat(means)
    covariance = torch.cat([torch.cat([blocks[t, s] for s in range(steps)], 1) for t in range(steps)], 0)
    decoder = model.likelihood.decoder
    emit = torch.block_diag(*[decoder.weight] * steps)
    every = torch.cat([torch.eye(steps * LATENT).double(), emit], 0)
    mean = every @ mean + torch.cat([torch.zeros(steps * LATENT).double(), decoder.bias.repeat(steps)])
    covariance = every @ covariance @ every.mT
    covariance[steps * LATENT :, steps * LATENT :] += 0.25 * torch.eye(steps * DIM).double()
    return mean.detach(), covariance.detach()


def evidence(model: DeepMarkovModel, x: Tensor, lengths: Tensor) -> Tensor:
    """Return the exact log p(x) of each sequence up to its end."""
    found = []
    for row, length in zip(x, lengths.tolist(), strict=True):
        mean, covariance = joint(model, length)
        rest = slice(length * LATENT, None)
        found.append(
            dist.MultivariateNormal(mean[rest], covariance[rest, rest]).log_prob(row[:length].flatten())
        )
    return torch.stack(found)


def exact_guide(model: DeepMarkovModel) -> Callable[[Tensor, Tensor], None]:
    """Return the guide of the exact posterior: z_t given z_{t-1} and all of x, by Gaussian conditioning."""

    def guide(x: Tensor, lengths: Tensor) -> None:
        last = None
        with pyro.plate("data", len(x), dim=-1):
            for t in range(x.shape[1]):
                locs, factors = [], []
                for i, length in enumerate(lengths.tolist()):
                    if t >= length:  # masked
                        locs.append(torch.zeros(1, LATENT).double())
                        factors.append(torch.eye(LATENT).double())
                        continue
                    mean, covariance = joint(model, length)
                    a = torch.arange(t * LATENT, (t + 1) * LATENT)
                    b = torch.arange(length * LATENT, len(mean))
                    known = x[i, :length].flatten().unsqueeze(0)
                    if last is not None:
                        before = last.reshape(-1, len(x), LATENT)[:, i]
                        known = torch.cat([before, known.expand(len(before), -1)], -1)
                        b = torch.cat([a - LATENT, b])
                    gain = torch.linalg.solve(covariance[b][:, b], covariance[b][:, a]).mT
                    locs.append(mean[a] + (known - mean[b]) @ gain.mT)
                    factors.append(torch.linalg.cholesky(covariance[a][:, a] - gain @ covariance[b][:, a]))
                k = max(map(len, locs))
                loc = torch.stack([one.expand(k, LATENT) for one in locs], 1)
                q = dist.MultivariateNormal(loc if k > 1 else loc[0], scale_tril=torch.stack(factors))
                last = pyro.sample(f"z_{t + 1}", q.mask(t < lengths))

    return guide


def encoder(**options: Any) -> RecurrentEncoder:
    return RecurrentEncoder(
        data_dim=DIM, embedding=4, hidden=6, direction="backward", every_step=True, **options
    )


def pair() -> tuple[nn.Module, nn.Module]:
    step = Bernoulli(MLP(LATENT, DIM, hidden=4))
    model = DeepMarkovModel(StandardNormal(LATENT), GatedTransition(LATENT, 4), step, SIZE)
    return model.double(), DeepMarkovGuide(encoder(), LATENT).double()


def bits(n: int = 3, size: int = SIZE) -> Tensor:
    return torch.bernoulli(torch.full((n, size, DIM), 0.5, dtype=torch.float64))


def scores(model: nn.Module, guide: nn.Module, x: Tensor, lengths: Tensor | None, z: Tensor) -> Tensor:
    """Return the log weights of given latents ``[K, n, T, latent]``."""
    sites = {f"z_{t + 1}": z[:, :, t] for t in range(x.shape[1])}
    batch = (x,) if lengths is None else (x, lengths)
    with Given(sites):
        return log_weights(model, guide, *batch, num_particles=len(z))


class Given(poutine.messenger.Messenger):
    """Makes latent sites have these values."""

    def __init__(self, sites: dict[str, Tensor]) -> None:
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and msg["name"] in self.sites:
            msg["value"], msg["done"] = self.sites[msg["name"]], True


def test_log_weights_of_the_exact_posterior_are_the_exact_evidence() -> None:
    model, x = linear_model(), torch.randn(3, SIZE, DIM).double()
    weights = log_weights(model, exact_guide(model), x, LENGTHS, num_particles=5)
    torch.testing.assert_close(weights, evidence(model, x, LENGTHS).expand(5, 3), **CLOSE)


def test_importance_sampling_with_a_trained_guide_finds_the_exact_evidence() -> None:
    # Seed 0; 4 standard errors of the mean weight, by the delta method.
    model = linear_model().requires_grad_(False).eval()
    x, lengths = model(None, size=3).detach(), LENGTHS
    guide = DeepMarkovGuide(encoder(), LATENT).double()
    exact, draws = evidence(model, x, lengths), 4000
    before = (exact - log_weights(model, guide, x, lengths, num_particles=200).mean(0)).detach()
    svi = SVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.03), STL_ELBO())
    for _ in range(120):
        svi.step(x, lengths)
    with torch.no_grad():
        weights = log_weights(model, guide, x, lengths, num_particles=draws)
    gap = exact - weights.mean(0)
    assert gap.sum() < 0.25 * before.sum()
    assert (gap > -4 * weights.std(0) / draws**0.5).all()
    ratio = (weights - exact).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / draws**0.5).all()


def test_log_joint_is_the_sum_of_its_terms_before_each_end() -> None:
    model, _ = pair()
    x, z = bits(), torch.randn(3, SIZE, LATENT).double()
    trace = poutine.trace(poutine.condition(model, {f"z_{t + 1}": z[:, t] for t in range(SIZE)})).get_trace(
        x, LENGTHS
    )
    total = torch.zeros(()).double()
    for i, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            loc, scale = torch.zeros(LATENT).double(), torch.ones(LATENT).double()
            if t:
                loc, log_scale = model.transition(z[i, t - 1]).chunk(2)
                scale = log_scale.exp()
            total = total + dist.Normal(loc, scale).log_prob(z[i, t]).sum()
            total = total + model.likelihood(z[i, t]).log_prob(x[i, t])
    torch.testing.assert_close(trace.log_prob_sum(), total, **CLOSE)


def test_with_one_step_it_is_the_plain_vae() -> None:
    model, _ = pair()
    plain, guide = VAE(model.prior, model.likelihood), MeanFieldGuide(MLP(DIM, hidden=4), LATENT).double()
    x = bits(3, 1)

    def one_step(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z_1", guide.posterior(x[:, 0]))

    weights = []
    for program, inference, batch in ((model, one_step, x), (plain, guide, x[:, 0])):
        torch.manual_seed(1)
        weights.append(log_weights(program, inference, batch, num_particles=5))
    torch.testing.assert_close(*weights, **CLOSE)


@pytest.mark.parametrize("kind", ["recurrent", "transformer"])
def test_padding_has_no_effect_and_sequences_are_as_cut_one_by_one(kind: str) -> None:
    model, guide = pair()
    if kind == "transformer":
        features = TransformerEncoder(data_dim=DIM, width=8, heads=2, layers=1, every_step=True)
        guide = DeepMarkovGuide(features, LATENT).double()
    x, z = bits(), torch.randn(5, 3, SIZE, LATENT).double()
    weights = scores(model, guide, x, LENGTHS, z)
    other, other_z = x.clone(), z.clone()
    for i, length in enumerate(LENGTHS.tolist()):
        other[i, length:] = 1 - x[i, length:]
        other_z[:, i, length:] = 7.0
        for k in range(5):
            alone = scores(model, guide, x[i : i + 1, :length], None, z[k : k + 1, i : i + 1, :length])
            torch.testing.assert_close(weights[k : k + 1, i : i + 1], alone, **CLOSE)
    torch.testing.assert_close(scores(model, guide, other, LENGTHS, other_z), weights, rtol=0, atol=0)


def test_guide_looks_from_each_step_on_and_at_the_latent_before() -> None:
    _, guide = pair()
    z = torch.randn(1, SIZE, LATENT).double().requires_grad_()
    x = bits(1).requires_grad_()
    with Given({f"z_{t + 1}": z[:, t] for t in range(SIZE)}):
        trace = poutine.trace(guide).get_trace(x)
    for t in range(SIZE):
        loc = trace.nodes[f"z_{t + 1}"]["fn"].mean.sum()
        by_x, by_z = torch.autograd.grad(loc, (x, z), retain_graph=True, allow_unused=True)
        seen = (by_x[0].abs().amax(-1) > 0).tolist()
        assert seen == [s >= t for s in range(SIZE)]
        latents = [False] * SIZE if by_z is None else (by_z[0].abs().amax(-1) > 0).tolist()
        assert latents == [s == t - 1 for s in range(SIZE)]


def test_draws_of_model_and_guide_have_their_shapes() -> None:
    model, guide = pair()
    assert model(None, size=6).shape == (6, SIZE, DIM)
    assert model(None, LENGTHS).shape == (3, SIZE, DIM)
    assert guide(bits(), LENGTHS).shape == (3, SIZE, LATENT)
    with pyro.plate("particles", 5, dim=-2):
        drawn = poutine.trace(model).get_trace(None, size=3)
        given = poutine.trace(guide).get_trace(bits(3, 6))
    assert drawn.nodes["x"]["value"].shape == (5, 3, SIZE, DIM)
    assert drawn.nodes[f"z_{SIZE}"]["value"].shape == (5, 3, LATENT)
    assert given.nodes["z_6"]["value"].shape == (5, 3, LATENT)


def test_closed_form_kl_agrees_with_the_draws() -> None:
    # Seed 0; both estimates of one ELBO from 4000 draws, within 4 standard errors of the plain one.
    model, guide = pair()
    x, draws = bits(), 4000
    with torch.no_grad():
        weights = log_weights(model, guide, x, LENGTHS, num_particles=draws).sum(1)
        loss = SVI(model, guide, torch.optim.Adam, KL_ELBO(draws)).objective.evaluate_loss(x, LENGTHS)
    assert abs(-loss - weights.mean()) < 4 * (2 * weights.var() / draws).sqrt()


@pytest.mark.parametrize("elbo", [Trace_ELBO, KL_ELBO, STL_ELBO])
def test_compiled_steps_are_plain_steps(elbo: Callable[[], Any]) -> None:
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        model, guide = pair()
        svi = engine(model, guide, torch.optim.Adam, elbo())
        losses = [svi.step(bits(size=2), LENGTHS.clamp(max=2).roll(i)) for i in range(3)]
        assert not getattr(svi, "plain", False)
        assert getattr(svi, "_failure", None) is None
        found.append([*losses, *model.state_dict().values(), *guide.state_dict().values()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_gradients_reach_every_parameter() -> None:
    model, guide = pair()
    log_weights(model, guide, bits(20), torch.full((20,), 3), num_particles=2).sum().backward()
    for key, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad is not None, key
        assert key == "start" or parameter.grad.abs().max() > 0, key


def test_fit_and_pyros_own_svi_train_the_pair() -> None:
    x, lengths = bits(20), torch.full((20,), 3)
    x[:, :, 0] = 1.0
    model, guide = pair()
    run = fit(model, guide, (x, lengths), epochs=10, batch_size=10, learning_rate=0.05, progress=False)
    assert run.history[-1]["train_elbo"] > run.history[0]["train_elbo"] + 0.5
    model, guide = pair()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(x, lengths) for _ in range(25)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_arguments_that_do_not_fit() -> None:
    model, guide = pair()
    with pytest.raises(ValueError, match=r"lengths: expected one per sequence, \[3\], got \[2\]"):
        model(bits(), LENGTHS[:2])
    with pytest.raises(
        ValueError, match=r"x: expected steps of the likelihood's event shape \(3,\), got \(2,\)"
    ):
        model(bits()[:, :, :2])
    with pytest.raises(ValueError, match=r"x: expected sequences \[n, T, \*event\]"):
        model(torch.zeros(3))
    with pytest.raises(ValueError, match=r"encoder: expected features of each step, \[3, 4, 'features'\]"):
        DeepMarkovGuide(RecurrentEncoder(data_dim=DIM), LATENT).double()(bits())
    with pytest.raises(TypeError, match="features: expected the number of features that Identity gives"):
        DeepMarkovGuide(nn.Identity(), LATENT)
    assert guide.features is None


@pytest.mark.parametrize("padding", [math.inf, math.nan, 1e30])
def test_padding_has_no_gradient_whatever_is_there(padding: float) -> None:
    torch.manual_seed(0)
    likelihood = Normal(MLP(2, 3, hidden=4), scale="learned")
    model = DeepMarkovModel(StandardNormal(2), GatedTransition(2, 4), likelihood, 4).double()
    x, lengths, z = torch.randn(3, 4, 3).double(), torch.tensor([2, 4, 1]), torch.randn(3, 4, 2).double()
    outside = torch.arange(4) >= lengths[:, None]
    found = []
    for value in (0.0, padding):
        filled = torch.where(outside.unsqueeze(-1), value, x)
        draws = {f"z_{t + 1}": z[:, t] for t in range(4)}
        with pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(model, draws)).get_trace(filled, lengths)
            log_prob = trace.log_prob_sum()
        found.append([log_prob, *torch.autograd.grad(log_prob, list(likelihood.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_transition_of_another_size_is_refused() -> None:
    model = DeepMarkovModel(StandardNormal(2), MLP(2, 3, hidden=4), Bernoulli(MLP(2, 3, hidden=4)), 4)
    with pytest.raises(ValueError, match=r"^transition: expected 4 outputs, .* got 3"):
        model(None, size=2)
