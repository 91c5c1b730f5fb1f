"""Tests of the ladder guide."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Draws
from pyro import poutine
from torch import Tensor, nn

from ppl_vae import evaluate, fit
from ppl_vae.guides.ladder import LadderGuide, combine
from ppl_vae.infer import KL_ELBO, STL_ELBO, SVI, CompiledSVI, WakeSleep, log_weights, tracing
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models.hierarchical import HierarchicalVAE
from ppl_vae.networks import MLP
from ppl_vae.networks.residual import ResidualMLP
from ppl_vae.priors import StandardNormal
from ppl_vae.priors.conditional_normal import ConditionalNormal


def conditional(above: int, latent_dim: int) -> ConditionalNormal:
    return ConditionalNormal(MLP(above, hidden=3), latent_dim)


def pair(normalization: str | None = None) -> tuple[HierarchicalVAE, LadderGuide]:
    torch.manual_seed(0)
    likelihood = Bernoulli(MLP(6, 4, hidden=3))
    conditionals = [conditional(1, 2), conditional(3, 3)]
    model = HierarchicalVAE(StandardNormal(1), conditionals, likelihood, skip=True).double()
    encoders = [
        ResidualMLP(size, hidden=3, blocks=1, activation="tanh", normalization=normalization)
        for size in (4, 3, 3)
    ]
    return model, LadderGuide(encoders, (3, 2, 1), model).double()


SIZES = {"z1": 3, "z2": 2, "z3": 1}


def bits(n: int = 5) -> Tensor:
    return torch.bernoulli(torch.full((n, 4), 0.5, dtype=torch.float64))


def test_combination_is_the_normalised_product_of_the_two_densities() -> None:
    torch.manual_seed(0)
    locs, scales = torch.randn(2, 4, 1).double(), torch.rand(2, 4, 1).double() + 0.3
    data, prior = (dist.Normal(*pair).to_event(1) for pair in zip(locs, scales, strict=True))
    axis = torch.linspace(-12, 12, 4001, dtype=torch.float64).view(-1, 1, 1)
    product = (data.log_prob(axis) + prior.log_prob(axis)).exp()
    product = product / (product.sum(0) * (axis[1] - axis[0]).squeeze())
    torch.testing.assert_close(combine(data, prior, 1).log_prob(axis).exp(), product, atol=1e-9, rtol=0)


def test_each_layer_combines_the_data_with_the_models_prior_given_the_layers_above() -> None:
    (model, guide), x = pair(), bits()
    with pyro.plate("particles", 7, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    z = {name: trace.nodes[name]["value"] for name in SIZES}
    features = [x]
    for encoder in guide.encoders:
        features.append(encoder(features[-1]))
    priors = {
        "z2": model.layers[0](z["z3"]).base_dist,
        "z1": model.layers[1](torch.cat([z["z2"], z["z3"]], -1)).base_dist,
    }
    for level, name in enumerate(SIZES, 1):
        loc, log_scale = guide.heads[level - 1](features[level]).chunk(2, -1)
        precision, weighted = (-2 * log_scale).exp(), loc * (-2 * log_scale).exp()
        if name in priors:
            precision = precision + priors[name].scale ** -2
            weighted = weighted + priors[name].loc * priors[name].scale ** -2
        found = trace.nodes[name]["fn"].base_dist
        torch.testing.assert_close(found.mean, (weighted / precision).expand(7, 5, -1))
        torch.testing.assert_close(found.stddev, precision.rsqrt().expand(7, 5, -1))


def test_data_that_say_nothing_leave_the_prior() -> None:
    (model, guide), x = pair(), bits()
    with torch.no_grad():
        for level, head in enumerate(guide.heads):
            nn.init.zeros_(head.weight)
            head.bias.copy_(torch.tensor([0.0] * (3 - level) + [0.0 if level == 2 else 7.0] * (3 - level)))
    result = evaluate(model, guide, x, num_particles=50, progress=False)
    assert all(abs(kl.mean) < 1e-4 for kl in result.kl.values())


def test_particles_and_batch_are_their_loop_and_encoders_run_once() -> None:
    (model, guide), x, rows = pair(), bits(), []
    noise = {name: torch.randn(7, 5, size).double() for name, size in SIZES.items()}
    with Draws(**noise):
        weights = log_weights(model, guide, x, num_particles=7)
    for k in range(7):
        for i in range(5):
            with Draws(**{name: e[k : k + 1, i : i + 1] for name, e in noise.items()}):
                alone = log_weights(model, guide, x[i : i + 1])
            torch.testing.assert_close(weights[k, i], alone[0, 0], rtol=1e-10, atol=1e-10)
    for encoder in guide.encoders:
        encoder.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with pyro.plate("particles", 7, dim=-2):
        assert [z.shape for z in guide(x)] == [(7, 5, 3), (7, 5, 2), (7, 5, 1)]
    assert rows == [5, 5, 5]


def test_gradients_reach_every_parameter_and_those_of_the_model_through_the_guide() -> None:
    (model, guide), x = pair(), bits()
    with torch.no_grad():
        for parameter in guide.parameters():  # residual blocks start at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    log_weights(model, guide, x, num_particles=3).logsumexp(0).sum().backward()
    named = [*model.named_parameters(), *guide.named_parameters()]
    assert [name for name, p in named if p.grad is None or not p.grad.any()] == []
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in guide.parameters())
    model.zero_grad()
    guide(x)[0].sum().backward()
    assert all(p.grad is not None for p in model.layers.parameters())


def test_closed_form_kl_agrees_with_draws() -> None:
    (model, guide), x, k = pair(), bits(2), 20_000
    elbo = KL_ELBO(k)
    with torch.no_grad():
        closed = -elbo.loss(model, guide, x)
        drawn = log_weights(model, guide, x, num_particles=k).sum(-1)
    assert elbo.analytic == {"z1": True, "z2": True, "z3": True}
    # Both are means over draws; the closed form has the lesser variance.
    assert (closed - drawn.mean()).abs() < 4 * 2**0.5 * drawn.std() / k**0.5


ELBOS: dict[str, Any] = {"KL_ELBO": lambda: KL_ELBO(free_bits=0.1), "STL_ELBO": STL_ELBO}


@pytest.mark.parametrize("name", ELBOS)
def test_compiled_steps_are_plain_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    found = []
    for engine in (SVI, CompiledSVI):
        (model, guide), x = pair("batch" if name == "KL_ELBO" else None), bits(6)
        torch.manual_seed(1)
        svi = engine(model, guide, torch.optim.Adam, ELBOS[name]())
        losses = [svi.step(x) for _ in range(3)]
        found.append([*losses, *model.state_dict().values(), *guide.state_dict().values()])
    assert not svi.plain and svi._failure is None
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_fit_raises_the_elbo() -> None:
    # Bits that are all alike in a datum: log 2 = 0.69 nats at best, 4 log 2 = 2.77 for independent bits.
    torch.manual_seed(0)
    x = torch.randint(2, (200, 1)).float().expand(-1, 4).contiguous()
    model, guide = (program.float() for program in pair())
    run = fit(model, guide, x, elbo=KL_ELBO(), epochs=40, batch_size=50, learning_rate=2e-2, progress=False)
    assert run.history[0]["train_elbo"] < -2.2
    assert -1.2 < evaluate(model, guide, x, num_particles=100, progress=False).log_likelihood.mean < -0.64


def test_another_model_than_the_guides_is_refused() -> None:
    (model, _), (_, guide), x = pair(), pair(), bits()
    with pytest.raises(ValueError, match="guide: expected a LadderGuide of the model that it is run with"):
        evaluate(model, guide, x, num_particles=2, progress=False)
    guide.model = model
    assert log_weights(model, guide, x).shape == (1, 5)
    assert not any(name.startswith("model") for name in guide.state_dict())


def test_bad_arguments_are_named() -> None:
    model, guide = pair()
    with pytest.raises(TypeError, match="model: expected a HierarchicalVAE, got MLP"):
        LadderGuide(guide.encoders, (3, 2, 1), MLP(2, 2))
    with pytest.raises(ValueError, match="encoders: expected one for each of the model's 3 layers, got 2"):
        LadderGuide(guide.encoders[:2], (3, 2), model)
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)
    )
    with pytest.raises(ValueError, match=r"model: expected a normal.*at site 'z2'.*got MixtureSameFamily"):
        combine(dist.Normal(torch.zeros(3), 1.0).to_event(1), mixture, 2)


def test_wake_sleep_refuses_a_guide_whose_gradients_go_through_the_model() -> None:
    (model, guide), x = pair(), bits()
    with pytest.raises(ValueError, match=r"^guide: expected one whose gradients leave the model alone"):
        WakeSleep(3).loss_and_grads(model, guide, x)
