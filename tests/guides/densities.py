"""What tests of guides share: checks of a posterior's density and draws, an exact model, estimators."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from ppl_vae.infer import IWAE, KL_ELBO, STL_ELBO, SVI, CompiledSVI, DReG
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal


def integral(posterior: Any, half_width: float = 10.0, points: int = 801) -> Tensor:
    """Return the integral of each density of two dimensions over a square, ``[n]``, by the trapezium rule."""
    axis = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    density = posterior.log_prob(grid.expand(-1, *posterior.batch_shape, 2)).exp()
    return density.sum(0) * (axis[1] - axis[0]) ** 2


def moments_agree(posterior: Any, draws: int = 20_000, half_width: float = 10.0, points: int = 801) -> bool:
    """Return whether mean and second moments of draws are those of the density, within 5 standard errors."""
    axis = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    z = grid.expand(-1, *posterior.batch_shape, 2)
    with torch.no_grad():
        weights = posterior.log_prob(z).exp() * (axis[1] - axis[0]) ** 2
        drawn = posterior.sample((draws,))
    agree = []
    for moment in (lambda z: z, lambda z: z**2, lambda z: z.prod(-1, keepdim=True), lambda z: z.tanh()):
        expected = (weights.unsqueeze(-1) * moment(z)).sum(0)
        values = moment(drawn)
        error = values.std(0) / draws**0.5
        agree.append(((values.mean(0) - expected).abs() < 5 * error + 1e-3).all())
    return bool(torch.stack(agree).all())


def log_prob_by_jacobian(draw: Callable[[Tensor], Tensor], base: Any, noise: Tensor) -> Tensor:
    """Return log q of ``draw(noise)`` by the change of variables, ``noise`` of one datum ``[latent]``."""
    jacobian = torch.autograd.functional.jacobian(draw, noise)
    return base.log_prob(noise) - torch.linalg.slogdet(jacobian)[1]


def gradients_reach_every_parameter(guide: nn.Module, x: Tensor) -> list[str]:
    """Return the names of parameters that draws and their density have no gradient for."""
    posterior = guide.posterior(x)
    z = posterior.rsample((3,))
    (z.square().sum() + z.sin().sum() + posterior.log_prob(z).sum()).backward()
    return [name for name, p in guide.named_parameters() if p.grad is None or not p.grad.any()]


def steps_compiled_and_plain(make: Callable[[], nn.Module], elbo: Callable[[], Any]) -> list[list[Tensor]]:
    """Return losses and final tensors of plain and of compiled steps; to be alike up to rounding.

    ``make`` gives a guide of two latent dimensions for data ``[n, 4]``. Patch ``compile_graph`` first.
    """
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        model, guide = VAE(StandardNormal(2), Bernoulli(MLP(2, 4, hidden=3))).double(), make().double()
        x = torch.bernoulli(torch.full((6, 4), 0.5, dtype=torch.float64))
        svi = engine(model, guide, torch.optim.Adam, elbo())
        losses = [svi.step(x if i < 4 else x[:4]) for i in range(6)]
        found.append([*losses, *model.state_dict().values(), *guide.state_dict().values()])
    return found


ELBOS = {
    "DReG": lambda: DReG(3),
    "IWAE": lambda: IWAE(3),
    "KL_ELBO": KL_ELBO,
    "STL_ELBO": STL_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "Trace_ELBO": Trace_ELBO,
}


def data(n: int = 3) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64)


def correlated_model() -> LinearGaussian:
    """Return a model whose posterior has correlation -0.86."""
    model = LinearGaussian(2, 5, scale=0.7).double()
    weight = torch.tensor([[1.2, 0.9], [0.8, 1.1], [1.0, 1.0], [-0.7, -0.4], [0.3, 0.5]])
    model.weight.data.copy_(weight)
    return model.requires_grad_(False)


def train(model: nn.Module, guide: nn.Module, x: Tensor, steps: int = 500) -> None:
    """Take steps at a rate that goes to zero; the sticking landing has no noise at the exact posterior."""
    optim = torch.optim.Adam(guide.parameters(), lr=0.03)
    svi = SVI(model, guide, optim, STL_ELBO())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
    for _ in range(steps):
        svi.step(x)
        schedule.step()


def gap(model: LinearGaussian, guide: nn.Module, x: Tensor) -> Tensor:
    """Return the mean KL(q || exact posterior), in closed form."""
    q, p = guide.posterior(x), model.posterior(x)
    if isinstance(q, dist.Independent):  # of dimensions
        q = dist.MultivariateNormal(q.mean, q.variance.diag_embed())
    return torch.distributions.kl_divergence(q, p).mean()
