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
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ppl_vae.infer.running import Program as AnyProgram
from ppl_vae.infer.running import calls_of_modules, in_own_store, latent_sites, observed_sites, without_table
from ppl_vae.program import Program, Referring


class ModelBasedGuide(Referring, Program):
    """A guide that starts from another's posterior and looks at the model's log p(x, z).

    The model is no part of it: ``parameters()``, ``state_dict()``, ``train()`` and ``to()`` leave it alone.
    Another model can be set as ``guide.model``. A copy of the guide alone (``copy.deepcopy``) has a copy of
    the model; of a pair that is copied together, the guide has the pair's.

    Args:
        guide: the guide to start from, whose ``posterior`` is reparameterised.
        model: the model that both are trained with, of one latent site ``z``.

    Raises:
        TypeError: if ``guide`` has no ``posterior``, or ``model`` can't be called.
    """

    references = ("model",)
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


def log_joint(
    model: AnyProgram, z: Tensor, batch: tuple[Tensor, ...], *, prior_weight: float = 1.0
) -> Tensor:
    """Return log p(x, z) of each draw and datum, ``[*particles, n]``, for z of ``[*particles, n, latent]``.

    Args:
        model: a program with one latent site ``z``.
        z: where.
        batch: what the model is called with.
        prior_weight: multiplies log p(z).

    Raises:
        ValueError: if the model has another latent site than ``z``, a ``z`` of another size, or no data; or
            if it runs a module that couples data, or that a run changes: batch normalisation in training.
    """

    def check_module(module: nn.Module) -> None:
        if isinstance(module, _NormBase) and (module.training or module.running_mean is None):
            _check_normalization(module, model)

    tracer = poutine.trace(poutine.condition(in_own_store(model), data={"z": z}))
    try:
        with outside_of_handlers(), calls_of_modules(check_module):
            trace = tracer.get_trace(*batch)
    except (ValueError, RuntimeError) as error:  # of a decoder, say, that takes z of another size
        _check_size(observed_sites(tracer.trace).get("z"), z)
        raise without_table(error) from None
    sites = observed_sites(trace)
    if (others := sorted(latent_sites(trace))) or "z" not in sites:
        raise ValueError(f"model: expected one latent site 'z', found {others or 'none'}")
    _check_size(sites["z"], z)
    if len(sites) == 1:
        raise ValueError("model: expected an observed site (`obs=x`), found none")
    total = z.new_zeros(z.shape[:-1])
    for name, site in sites.items():
        log_prob = site["fn"].log_prob(site["value"])
        if site["mask"] is not None:
            log_prob = torch.where(torch.as_tensor(site["mask"], device=z.device), log_prob, 0.0)
        total = total + (prior_weight * log_prob if name == "z" and prior_weight != 1 else log_prob)
    return total


def _check_size(site: Any, z: Tensor) -> None:
    """Raise if the model's z is of another size than the guide's."""
    if site is not None and site["fn"].event_shape != z.shape[-1:]:
        raise ValueError(
            f"guide: expected the latent_dim of the model, whose z has event shape "
            f"{tuple(site['fn'].event_shape)}, got {z.shape[-1]}"
        )


def _check_normalization(module: Any, model: AnyProgram) -> None:
    """Raise if a module of the model couples data, or changes its running statistics in a run."""
    if isinstance(module, _BatchNorm) or module.track_running_stats:
        own = model.named_modules() if isinstance(model, nn.Module) else ()
        name = next((f" {name!r}" for name, part in own if part is module), "")
        raise ValueError(
            "model: expected modules that treat each datum apart and that a run does not change, since the "
            f"guide runs the model several times in a step, got {type(module).__name__}{name} in training "
            "mode; use layer normalisation, or call `.eval()` on the model"
        )


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
