"""What guides share that compute with the model: its log p(x, z), where they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor, nn

from ppl_vae.infer.running import Program as AnyProgram
from ppl_vae.infer.running import in_own_store, latent_sites, observed_sites
from ppl_vae.program import Program


class ModelBasedGuide(Program):
    """A guide that starts from another's posterior and looks at the model's log p(x, z).

    The model is no part of it: ``parameters()``, ``state_dict()``, ``train()`` and ``to()`` leave it alone.
    Another model can be set as ``guide.model``.

    Args:
        guide: the guide to start from, whose ``posterior`` is reparameterised.
        model: the model that both are trained with, of one latent site ``z``.

    Raises:
        TypeError: if ``guide`` has no ``posterior``, or ``model`` can't be called.
    """

    guide: Any
    model: AnyProgram

    def __init__(self, guide: nn.Module, model: AnyProgram) -> None:
        super().__init__()
        if not (isinstance(guide, nn.Module) and callable(getattr(guide, "posterior", None))):
            raise TypeError(f"guide: expected a guide with a `posterior`, got {type(guide).__name__}")
        if not callable(model):
            raise TypeError(f"model: expected a module or a function, got {model!r}")
        self.guide = guide
        self.model = model

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":
            object.__setattr__(self, name, value)  # a reference: it is not registered
        else:
            super().__setattr__(name, value)

    def posterior(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return q(z | x): batch shape ``[n]``, event shape ``[latent]``, for ``x`` of ``[n, *event]``."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the program: site ``z`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``.
            y: labels ``[n, ...]``, for programs that take them.

        Returns:
            z, ``[*particles, n, latent]``.
        """
        posterior = self.posterior(x, y)
        with pyro.plate("data", x.shape[0], dim=-1):
            return pyro.sample("z", posterior)

    def start(self, x: Tensor, y: Tensor | None) -> tuple[Any, tuple[Tensor, ...]]:
        """Return the posterior to start from, and the batch.

        Raises:
            ValueError: if it is not reparameterised.
        """
        batch = (x,) if y is None else (x, y)
        posterior = self.guide.posterior(*batch)
        check_gradient(posterior)
        return posterior, batch


def check_gradient(posterior: Any) -> None:
    """Raise if draws have no gradient to the posterior's parameters."""
    if not posterior.has_rsample:
        raise ValueError(
            "guide: expected a reparameterised posterior (`has_rsample`), since gradients go through draws, "
            f"got {type(posterior).__name__}"
        )


def log_joint(model: AnyProgram, z: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Return log p(x, z) of each draw and datum, ``[*particles, n]``, for z of ``[*particles, n, latent]``.

    Raises:
        ValueError: if the model has another latent site than ``z``, or no data.
    """
    with outside_of_handlers():
        program = poutine.condition(in_own_store(model), data={"z": z})
        trace = poutine.trace(program).get_trace(*batch)
    sites = observed_sites(trace)
    if (others := sorted(latent_sites(trace))) or "z" not in sites:
        raise ValueError(f"model: expected one latent site 'z', found {others or 'none'}")
    if len(sites) == 1:
        raise ValueError("model: expected an observed site (`obs=x`), found none")
    total = z.new_zeros(z.shape[:-1])
    for site in sites.values():
        log_prob = site["fn"].log_prob(site["value"])
        if site["mask"] is not None:
            log_prob = torch.where(torch.as_tensor(site["mask"], device=z.device), log_prob, 0.0)
        total = total + log_prob
    return total


@contextmanager
def outside_of_handlers() -> Iterator[None]:
    """Run a program as if no handler of Pyro and no plate were active, in the middle of a run of another."""
    handlers, plates = _PYRO_STACK[:], _DIM_ALLOCATOR._stack[:]
    _PYRO_STACK.clear()
    _DIM_ALLOCATOR._stack.clear()
    try:
        yield
    finally:
        _PYRO_STACK[:] = handlers
        _DIM_ALLOCATOR._stack[:] = plates


def gradient_of(density: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Return the gradient of each row's density, which depends on that row alone."""
    gradient: Tensor = torch.func.grad(lambda value: density(value).sum())(value)
    return gradient
