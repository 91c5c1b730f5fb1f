"""Tests of the residual top-down pair."""

import functools
from typing import Any

import pyro
import pytest
import torch
from helpers import Draws
from pyro import poutine
from torch import Tensor, nn

from ppl_vae import evaluate
from ppl_vae.guides.very_deep import VeryDeepGuide
from ppl_vae.infer import KL_ELBO, SVI, CompiledSVI, LinearWarmup, log_weights, tracing
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models.very_deep import VeryDeepVAE
from ppl_vae.networks.pixel_head import PixelHead

SIDES = (1, 2, 2, 4)


def pair(sides: tuple[int, ...] = SIDES) -> tuple[VeryDeepVAE, VeryDeepGuide]:
    torch.manual_seed(0)
    model = VeryDeepVAE(sides, 3, 2, Bernoulli(PixelHead((3, 4, 4), 1))).double()
    guide = VeryDeepGuide((1, 4, 4), model).double()
    with torch.no_grad():
        for parameter in [*model.parameters(), *guide.parameters()]:  # some start at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, guide


def bits(n: int = 3) -> Tensor:
    return torch.bernoulli(torch.full((n, 1, 4, 4), 0.5, dtype=torch.float64))


def noise(*batch: int) -> dict[str, Tensor]:
    return {f"z{4 - i}": torch.randn(*batch, 2, s, s, dtype=torch.float64) for i, s in enumerate(SIDES)}


def test_priors_start_near_standard_normals() -> None:
    torch.manual_seed(0)
    model = VeryDeepVAE(SIDES, 3, 2, Bernoulli(PixelHead((3, 4, 4), 1)))
    trace = poutine.trace(model).get_trace(None, size=3)
    for name in ("z1", "z2", "z3", "z4"):
        fn = trace.nodes[name]["fn"]
        assert fn.mean.abs().max() < 0.1 and (fn.stddev - 1).abs().max() < 0.1


def test_particles_and_batch_are_their_loop() -> None:
    (model, guide), x, e = pair(), bits(), noise(4, 3)
    with Draws(**e):
        weights = log_weights(model, guide, x, num_particles=4)
    assert weights.shape == (4, 3)
    for k in range(4):
        for i in range(3):
            with Draws(**{name: value[k : k + 1, i : i + 1] for name, value in e.items()}):
                alone = log_weights(model, guide, x[i : i + 1])
            torch.testing.assert_close(weights[k, i], alone[0, 0], rtol=1e-10, atol=1e-10)


def test_sites_are_in_the_data_plate_and_events_are_images() -> None:
    (model, guide), x = pair(), bits()
    for program in (model, guide):
        with pyro.plate("particles", 5, dim=-2):
            trace = poutine.trace(program).get_trace(x)
        trace.compute_log_prob()
        names = [name for name in trace.nodes if name[0] == "z"]
        assert names == ["z4", "z3", "z2", "z1"]
        assert [trace.nodes[name]["value"].shape for name in names] == [(5, 3, 2, s, s) for s in SIDES]
        assert all(trace.nodes[name]["log_prob"].shape == (5, 3) for name in names)


def test_gradients_reach_every_parameter() -> None:
    (model, guide), x = pair(), bits()
    log_weights(model, guide, x, num_particles=3).logsumexp(0).sum().backward()
    named = [*model.named_parameters(), *guide.named_parameters()]
    assert [name for name, p in named if p.grad is None or not p.grad.any()] == []
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in guide.parameters())


def test_compiled_steps_are_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    found = []
    for engine in (SVI, CompiledSVI):
        (model, guide), x = pair((1, 4)), bits(6)
        torch.manual_seed(1)
        svi: Any = engine(model, guide, torch.optim.Adam, KL_ELBO())
        losses = [svi.step(x) for _ in range(3)]
        found.append([*losses, *model.state_dict().values(), *guide.state_dict().values()])
    assert svi._failure is None
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_many_layers_train_without_divergence_and_learn() -> None:
    # Four images in equal parts: log 4 = 1.39 nats at best, 8.1 for pixels independent of one another.
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((4, 1, 4, 4), 0.5)).repeat(5, 1, 1, 1)
    model = VeryDeepVAE((1, 1, 2, 2, 4, 4), 8, 2, Bernoulli(PixelHead((8, 4, 4), 1)))
    guide = VeryDeepGuide((1, 4, 4), model)
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    svi = SVI(model, guide, adam, KL_ELBO(kl_weight=LinearWarmup(50)), clip_norm=200.0)
    with pyro.validation_enabled(False):
        losses = torch.stack([svi.step(x) for _ in range(60)]) / len(x)
    assert losses.isfinite().all()
    assert losses[0] > 9
    assert -6 < evaluate(model, guide, x, num_particles=10, progress=False).elbo.mean < -1.39


def test_bad_arguments_are_named() -> None:
    likelihood = Bernoulli(PixelHead((3, 4, 4), 1))
    with pytest.raises(ValueError, match=r"sizes: expected sides of images that never fall.*got \(4, 2\)"):
        VeryDeepVAE((4, 2), 3, 2, likelihood)
    with pytest.raises(TypeError, match="model: expected a VeryDeepVAE, got ReLU"):
        VeryDeepGuide((1, 4, 4), nn.ReLU())
    with pytest.raises(ValueError, match=r"in_shape: expected \(C, 4, 4\), the model's last side"):
        VeryDeepGuide((1, 8, 8), VeryDeepVAE((4,), 3, 2, likelihood))
    with pytest.raises(ValueError, match=r"state_shape: expected \(C, H, W\), got \(3, 4\)"):
        PixelHead((3, 4), 1)
