"""Tests of the bottom-up guide."""

from typing import Any

import pyro
import pytest
import torch
from helpers import Draws
from torch import Tensor, nn

from ppl_vae import evaluate, fit
from ppl_vae.guides.hierarchical import HierarchicalGuide
from ppl_vae.infer import KL_ELBO, SVI, CompiledSVI, DReG, log_weights, tracing
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models.hierarchical import HierarchicalVAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.priors.conditional_normal import ConditionalNormal


def conditional(above: int, latent_dim: int) -> ConditionalNormal:
    return ConditionalNormal(MLP(above, hidden=3), latent_dim)


def pair() -> tuple[HierarchicalVAE, HierarchicalGuide]:
    torch.manual_seed(0)
    model = HierarchicalVAE(StandardNormal(2), [conditional(2, 3)], Bernoulli(MLP(3, 4, hidden=3)))
    return model.double(), HierarchicalGuide([MLP(4, hidden=3), MLP(3, hidden=3)], (3, 2)).double()


def bits(n: int = 5) -> Tensor:
    return torch.bernoulli(torch.full((n, 4), 0.5, dtype=torch.float64))


def test_particles_and_batch_are_their_loop_and_the_first_encoder_runs_once() -> None:
    (model, guide), x, rows = pair(), bits(), []
    noise = {"z1": torch.randn(7, 5, 3).double(), "z2": torch.randn(7, 5, 2).double()}
    with Draws(**noise):
        weights = log_weights(model, guide, x, num_particles=7)
    for k in range(7):
        for i in range(5):
            with Draws(**{name: e[k : k + 1, i : i + 1] for name, e in noise.items()}):
                alone = log_weights(model, guide, x[i : i + 1])
            torch.testing.assert_close(weights[k, i], alone[0, 0], rtol=1e-10, atol=1e-10)
    guide.encoders[0].register_forward_hook(lambda module, args, out: rows.append(args[0].shape))
    with pyro.plate("particles", 7, dim=-2):
        z1, z2 = guide(x)
    assert (z1.shape, z2.shape, rows) == ((7, 5, 3), (7, 5, 2), [(5, 4)])


def test_gradients_reach_every_parameter() -> None:
    (model, guide), x = pair(), bits()
    log_weights(model, guide, x, num_particles=3).logsumexp(0).sum().backward()
    named = [*model.named_parameters(), *guide.named_parameters()]
    assert [name for name, p in named if p.grad is None or not p.grad.any()] == []


def test_closed_form_kl_is_refused_since_the_orders_differ() -> None:
    (model, guide), x = pair(), bits()
    with pytest.raises(ValueError, match=r"site 'z1': the closed form of its KL is wrong.*analytic_kl=False"):
        KL_ELBO().differentiable_loss(model, guide, x)


ELBOS: dict[str, Any] = {
    "DReG": lambda: DReG(3),
    "KL_ELBO": lambda: KL_ELBO(analytic_kl=False, free_bits=0.1),
}


@pytest.mark.parametrize("name", ELBOS)
def test_compiled_steps_are_plain_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    found = []
    for engine in (SVI, CompiledSVI):
        (model, guide), x = pair(), bits(6)
        torch.manual_seed(1)
        svi = engine(model, guide, torch.optim.Adam, ELBOS[name]())
        losses = [svi.step(x if i < 3 else x[:4]) for i in range(4)]
        found.append([*losses, *model.state_dict().values(), *guide.state_dict().values()])
    assert not svi.plain and svi._failure is None
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_fit_raises_the_elbo_and_records_every_layer() -> None:
    # Bits that are all alike in a datum: log 2 = 0.69 nats at best, 4 log 2 = 2.77 for independent bits.
    torch.manual_seed(0)
    x = torch.randint(2, (200, 1)).float().expand(-1, 4).contiguous()
    model, guide = (program.float() for program in pair())
    run = fit(model, guide, x, epochs=40, batch_size=50, learning_rate=2e-2, progress=False)
    assert {"train_kl_z1", "train_kl_z2"} <= run.history[0].keys()
    result = evaluate(model, guide, x, num_particles=100, progress=False)
    assert result.kl.keys() == {"z1", "z2"}
    assert run.history[0]["train_elbo"] < -2.5
    assert -1.5 < result.log_likelihood.mean < -0.69 + 0.05


def test_bad_arguments_are_named() -> None:
    encoder = MLP(4, hidden=3)
    with pytest.raises(
        ValueError, match=r"latent_dims: expected one size for each encoder, 1 and at least 1"
    ):
        HierarchicalGuide([encoder], (3, 2))
    with pytest.raises(
        ValueError, match=r"latent_dims: expected one size for each encoder, 0 and at least 1"
    ):
        HierarchicalGuide([], ())
    with pytest.raises(ValueError, match=r"latent_dims\[1\]: expected a whole number above 0, got 0"):
        HierarchicalGuide([encoder, encoder], (3, 0))
    with pytest.raises(TypeError, match=r"encoders\[0\]: expected a network with `out_features`, got ReLU"):
        HierarchicalGuide([nn.ReLU()], (3,))
