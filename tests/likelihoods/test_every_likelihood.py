"""What all likelihoods have in common: contexts, compiled steps."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import KL_ELBO, SVI, CompiledSVI, tracing
from ppl_vae.likelihoods.autoregressive import Autoregressive
from ppl_vae.likelihoods.bernoulli import Bernoulli
from ppl_vae.likelihoods.categorical import Categorical
from ppl_vae.likelihoods.continuous_bernoulli import ContinuousBernoulli
from ppl_vae.likelihoods.discretized_logistic import DiscretizedLogistic
from ppl_vae.likelihoods.low_rank_normal import LowRankNormal
from ppl_vae.likelihoods.negative_binomial import NegativeBinomial
from ppl_vae.likelihoods.normal import Normal
from ppl_vae.likelihoods.poisson import Poisson
from ppl_vae.likelihoods.student_t import StudentT
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

# Data are bits, images of 1 x 2 x 3, which all likelihoods can have; levels are three.
LIKELIHOODS: dict[str, tuple[Callable[[nn.Module], nn.Module], int]] = {
    "Autoregressive": (lambda d: Autoregressive(d, hidden=3, kernel_size=3), 2),
    "Autoregressive-levels": (lambda d: Autoregressive(d, levels=3, hidden=3, kernel_size=3), 2),
    "Bernoulli": (Bernoulli, 1),
    "Categorical": (lambda d: Categorical(d, 3), 3),
    "ContinuousBernoulli": (ContinuousBernoulli, 1),
    "DiscretizedLogistic": (lambda d: DiscretizedLogistic(d, levels=3), 2),
    "DiscretizedLogistic-mixture": (lambda d: DiscretizedLogistic(d, 2, 3), 6),
    "LowRankNormal": (lambda d: LowRankNormal(d, 2), 4),
    "NegativeBinomial": (lambda d: NegativeBinomial(d, "network"), 2),
    "Normal": (Normal, 1),
    "Normal-elementwise": (lambda d: Normal(d, "elementwise"), 1),
    "Poisson": (Poisson, 1),
    "StudentT": (lambda d: StudentT(d, "network", "network"), 3),
}
every = pytest.mark.parametrize("name", LIKELIHOODS)


class Conditional(nn.Module):
    """A decoder of z and a context, whose sum it decodes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.network = MLP(2, (channels, 2, 3), hidden=4)
        self.out_shape = (channels, 2, 3)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.network(z if context is None else z + context)


def bits(n: int) -> Tensor:
    return torch.bernoulli(torch.full((n, 1, 2, 3), 0.5).double())


@every
def test_outputs_are_what_the_decoder_needs_for_each_value(name: str) -> None:
    make, channels = LIKELIHOODS[name]
    if "Autoregressive" in name:
        pytest.skip("its decoder gives features, of any number")
    likelihood = make(Conditional(channels))
    outputs = getattr(likelihood, "outputs", lambda: 1)
    names = inspect.signature(outputs).parameters
    assert names.keys() == inspect.signature(type(likelihood)).parameters.keys() - {"decoder"}
    assert outputs(**{name: getattr(likelihood, name) for name in names}) == channels
    assert likelihood(torch.zeros(4, 2)).event_shape == (1, 2, 3)
    for name, parameter in names.items():
        assert parameter.default == inspect.signature(type(likelihood)).parameters[name].default


@every
def test_a_context_reaches_the_decoder(name: str) -> None:
    make, channels = LIKELIHOODS[name]
    likelihood = make(Conditional(channels)).double()
    z, context, x = torch.randn(4, 3, 2).double(), torch.randn(3, 2).double(), bits(3)
    found = likelihood(z, context).log_prob(x)
    torch.testing.assert_close(found, likelihood(z + context).log_prob(x))
    assert (found - likelihood(z).log_prob(x)).abs().min() > 0


@every
def test_compiled_steps_are_plain_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    make, channels = LIKELIHOODS[name]
    x, found = bits(5), []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        model = VAE(StandardNormal(2), make(MLP(2, (channels, 2, 3), hidden=4))).double()
        guide = MeanFieldGuide(MLP((1, 2, 3), hidden=4), 2).double()
        svi: Any = engine(model, guide, torch.optim.Adam, KL_ELBO(num_particles=2))
        losses = [svi.step(x) for _ in range(2)]
        found.append([*losses, *model.state_dict().values(), *guide.state_dict().values()])
        assert not getattr(svi, "plain", False)
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-9, atol=1e-10)
    torch._dynamo.reset()
