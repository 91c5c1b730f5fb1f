"""All continuous latents of a model as one unconstrained vector per datum, and log densities of it."""

import math
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint

from ppl_vae.infer.log_weights import PARTICLE_DIM, per_datum_log_prob
from ppl_vae.infer.running import (
    Program,
    Site,
    data_plate_size,
    in_own_store,
    latent_sites,
    observed_sites,
    without_table,
)
from ppl_vae.infer.scoring import name_of


class Latents:
    r"""The latents of a model for a batch, flat and unconstrained: u, ``[*chains, n, size]``.

    Each site's part of u is mapped to the support of its distribution by ``biject_to``; densities are those
    of u, so log densities of the sites plus :math:`\log |dz / du|`. Chains are particles to the programs:
    they are in a plate left of the data plate.

    Args:
        model: program over the latent sites and the data.
        batch: what it is called with, ``[n, ...]`` each.

    Attributes:
        size: D, the number of unconstrained dimensions of a datum's latents.
        shapes: the unconstrained shape ``[*event]`` of each site, in the order of the model's run.

    Raises:
        ValueError: naming the site, if one is discrete, has no map from unconstrained space, or is outside of
            the data plate; or if the model has no latent site or no data.

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> latents = Latents(LinearGaussian(2, 5), (torch.zeros(3, 5),))
        >>> latents.log_joint(torch.zeros(7, 3, latents.size)).shape
        torch.Size([7, 3])
    """

    def __init__(self, model: Program, batch: tuple[Tensor, ...]) -> None:
        self.model = model
        self.batch = batch
        self.n = len(batch[0])
        with torch.no_grad():
            trace = poutine.trace(in_own_store(model)).get_trace(*batch)
        sites = latent_sites(trace)
        if not sites:
            raise ValueError("model: expected a latent site, found none")
        if not observed_sites(trace):
            raise ValueError("model: expected an observed site (`obs=x`), found none")
        self.shapes: dict[str, torch.Size] = {}
        self._event_dims: dict[str, int] = {}  # of values, which a support may change: of a Cholesky factor
        self._fixed: dict[str, Any] = {}
        for name, site in sites.items():
            if (found := data_plate_size(name, site)) != self.n:
                raise ValueError(
                    f"site {name!r}: expected a data plate of the batch's size {self.n}, got {found}"
                )
            transform = _transform(name, site)
            value = site["value"]
            shape = value.shape if transform is None else transform.inverse_shape(value.shape)
            self._event_dims[name] = len(site["fn"].event_shape)
            self.shapes[name] = torch.Size(shape[value.dim() - self._event_dims[name] :])
            if transform is None or not _holds_tensors(site["fn"].support):
                self._fixed[name] = transform
            self.dtype, self.device = value.dtype, value.device
        self.size = sum(math.prod(shape) for shape in self.shapes.values())

    # -- values ------------------------------------------------------------------------------------------

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the values ``[*chains, n, *event]`` of all sites as u, ``[*chains, n, size]``.

        Raises:
            ValueError: if a site's value is missing.
        """
        if missing := sorted(self.shapes.keys() - values.keys()):
            raise ValueError(f"values: expected those of all latent sites, {missing} are missing")
        chains = self._chains_of(values)
        together = {name: self._together(values[name], name, chains) for name in self.shapes}
        transforms = self._fixed
        if len(transforms) < len(self.shapes):
            setting = _SetValues(together)
            self._run(self.model, setting, math.prod(chains))
            transforms = setting.transforms
        parts = []
        for name, shape in self.shapes.items():
            transform, part = transforms[name], together[name]
            part = part if transform is None else transform.inv(part)
            parts.append(part.reshape(*chains, self.n, math.prod(shape)))
        return torch.cat(parts, -1)

    def unflatten(self, u: Tensor) -> dict[str, Tensor]:
        """Return the value of each site, ``[*chains, n, *event]``, for u of ``[*chains, n, size]``."""
        if len(self._fixed) == len(self.shapes):
            split = self.split(u)
            return {
                name: part if self._fixed[name] is None else self._fixed[name](part)
                for name, part in split.items()
            }
        chains = u.shape[:-2]
        setting = _SetUnconstrained(self.split(self._rows(u)))
        self._run(self.model, setting, math.prod(chains))
        return {
            name: setting.values[name].reshape(*chains, self.n, *setting.values[name].shape[2:])
            for name in self.shapes
        }

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """Return each site's part of u, still unconstrained, ``[*chains, n, *shape]``."""
        if u.dim() < 2 or u.shape[-2:] != (self.n, self.size):
            raise ValueError(
                f"u: expected shape [*chains, n, size] of n={self.n} and size={self.size}, "
                f"got {list(u.shape)}"
            )
        parts = u.split([math.prod(shape) for shape in self.shapes.values()], -1)
        return {
            name: part.reshape(*u.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    # -- densities ---------------------------------------------------------------------------------------

    def log_joint(self, u: Tensor) -> Tensor:
        """Return log p(x, z) + log |dz/du|, nats, ``[*chains, n]``."""
        log_prior, log_likelihood = self.log_parts(u)
        return log_prior + log_likelihood

    def log_prior(self, u: Tensor) -> Tensor:
        """Return log p(z) + log |dz/du|, nats, ``[*chains, n]``."""
        return self.log_parts(u)[0]

    def log_parts(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(z) + log |dz/du| and log p(x | z), nats, ``[*chains, n]`` each, from one run."""
        chains = u.shape[:-2]
        setting = _SetUnconstrained(self.split(self._rows(u)))
        trace = self._run(self.model, setting, math.prod(chains))
        log_prior = setting.log_jacobian
        for name, site in latent_sites(trace).items():
            log_prior = log_prior + per_datum_log_prob(name, site)
        log_likelihood = sum(per_datum_log_prob(name, site) for name, site in observed_sites(trace).items())
        shape = *chains, self.n
        return self._shaped(log_prior, shape), self._shaped(log_likelihood, shape)

    def log_guide(self, guide: Program, u: Tensor) -> Tensor:
        """Return log q(z | x) + log |dz/du|, nats, ``[*chains, n]``.

        Raises:
            ValueError: naming the sites, if the guide has others than the model, an auxiliary one, or
                distributions that can't score values which they have not drawn.
        """
        chains = u.shape[:-2]
        rows = self._rows(u)
        log_jacobian: Any = 0.0
        if len(self._fixed) == len(self.shapes):
            values = {}
            for name, part in self.split(rows).items():
                transform = self._fixed[name]
                values[name] = part if transform is None else transform(part)
                log_jacobian = log_jacobian + _log_jacobian(transform, part, values[name])
        else:
            setting = _SetUnconstrained(self.split(rows))
            self._run(self.model, setting, len(rows))
            values, log_jacobian = setting.values, setting.log_jacobian
        trace = self._run(guide, _SetValues(values, program="guide"), len(rows))
        sites = latent_sites(trace)
        if missing := sorted(self.shapes.keys() - sites.keys()):
            raise ValueError(f"guide: lacks the model's latent sites {missing}; it has {sorted(sites)}")
        try:
            log_q = sum(_log_prob(name, site) for name, site in sites.items())
        except (KeyError, NotImplementedError) as error:
            raise ValueError(
                f"guide: sites {sorted(sites)}: expected distributions that can score a value which they "
                "have not drawn"
            ) from error
        return self._shaped(log_q + log_jacobian, (*chains, self.n))

    # -- draws -------------------------------------------------------------------------------------------

    def draw_prior(self, num_chains: int) -> Tensor:
        """Return draws of the model's prior (given what else is in the batch), ``[num_chains, n, size]``."""
        return self._draw(self.model, num_chains)

    def draw_guide(self, guide: Program, num_chains: int) -> Tensor:
        """Return draws of the guide, ``[num_chains, n, size]``."""
        return self._draw(guide, num_chains)

    def _draw(self, program: Program, num_chains: int) -> Tensor:
        plate = pyro.plate("chains", num_chains, dim=PARTICLE_DIM)
        with torch.no_grad():
            trace = poutine.trace(plate(in_own_store(program))).get_trace(*self.batch)
            sites = latent_sites(trace)
            values = {}
            for name in self.shapes:
                if name not in sites:
                    raise ValueError(f"guide: lacks the model's latent site {name!r}; it has {sorted(sites)}")
                site = sites[name]
                event = site["value"].shape[site["value"].dim() - len(site["fn"].event_shape) :]
                values[name] = site["value"].expand(num_chains, self.n, *event)
            return self.flatten(values)

    # -- runs --------------------------------------------------------------------------------------------

    def _run(self, program: Program, setting: "_Setting", num_chains: int) -> Trace:
        plate = pyro.plate("chains", num_chains, dim=PARTICLE_DIM)
        try:
            return poutine.trace(setting(plate(in_own_store(program)))).get_trace(*self.batch)
        except (ValueError, RuntimeError) as error:
            raise without_table(error) from None

    def _rows(self, u: Tensor) -> Tensor:
        return u.reshape(-1, *u.shape[-2:])

    def _shaped(self, log_prob: Any, shape: tuple[int, ...]) -> Tensor:
        result: Tensor = log_prob.expand(math.prod(shape[:-1]), self.n).reshape(shape)
        return result

    def _chains_of(self, values: Mapping[str, Tensor]) -> torch.Size:
        """Return the shape left of the data, of all sites together."""
        shapes = []
        for name in self.shapes:
            value = values[name]
            right = self._event_dims[name] + 1
            if value.dim() < right or value.shape[value.dim() - right] != self.n:
                raise ValueError(
                    f"values: site {name!r}: expected shape [*chains, n, *event] of n={self.n} and "
                    f"{right - 1} event dimensions, got {list(value.shape)}"
                )
            shapes.append(value.shape[: value.dim() - right])
        return torch.broadcast_shapes(*shapes)

    def _together(self, value: Tensor, name: str, chains: torch.Size) -> Tensor:
        """Return a value with its chains in one dimension, ``[chains, n, *event]``."""
        event = value.shape[value.dim() - self._event_dims[name] :]
        return value.expand(*chains, self.n, *event).reshape(-1, self.n, *event)


def no_guide(*batch: Tensor) -> None:
    """Draw nothing, as a guide: the model's latents are then from its prior."""


class _Setting(Messenger):
    """Sets the latent sites of a program."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self.program = program

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg):
            return
        msg["value"], msg["done"] = self.value(msg["name"], msg), True

    def value(self, name: str, site: Site) -> Tensor:
        raise NotImplementedError

    def unknown(self, name: str, known: Mapping[str, Tensor]) -> ValueError:
        return ValueError(
            f"{self.program}: site {name!r}: expected latent sites {sorted(known)} alone, whose density is "
            "known"
        )


class _SetUnconstrained(_Setting):
    """Sets sites to the images of unconstrained values in their supports, which may depend on other sites."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        super().__init__("model")
        self.parts = parts
        self.values: dict[str, Tensor] = {}
        first = next(iter(parts.values()))
        self.log_jacobian: Any = first.new_zeros(first.shape[:2])

    def value(self, name: str, site: Site) -> Tensor:
        if name not in self.parts:
            raise self.unknown(name, self.parts)
        transform = _transform(name, site)
        part = self.parts[name]
        value = part if transform is None else transform(part)
        self.log_jacobian = self.log_jacobian + _log_jacobian(transform, part, value)
        self.values[name] = value
        return value


class _SetValues(_Setting):
    """Sets sites to values, and notes the maps to their supports."""

    def __init__(self, values: Mapping[str, Tensor], program: str = "model") -> None:
        super().__init__(program)
        self.values = values
        self.transforms: dict[str, Any] = {}

    def value(self, name: str, site: Site) -> Tensor:
        if name not in self.values:
            raise self.unknown(name, self.values)
        if self.program == "model":
            self.transforms[name] = _transform(name, site)
        return self.values[name]


def _transform(name: str, site: Site) -> Any:
    """Return the map from unconstrained space to a site's support; None for the identity."""
    fn = site["fn"]
    try:
        support = fn.support
    except NotImplementedError:
        support = None
    if support is None or site["infer"].get("enumerate") or support.is_discrete:
        raise ValueError(
            f"site {name!r}: expected a continuous latent site, whose density has a gradient, got "
            f"{name_of(fn)}; sum it out, or use importance sampling"
        )
    if _is_real(support):
        return None
    try:
        return biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"site {name!r}: expected a support that unconstrained space is mapped to one to one, got "
            f"{support} of {name_of(fn)}; use importance sampling"
        ) from None


def _is_real(support: Any) -> bool:
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    return support is torch.distributions.constraints.real


def _log_prob(name: str, site: Site) -> Tensor:
    """Return a site's log-probability per datum, -inf outside its support whether torch validates or not."""
    log_prob, value = per_datum_log_prob(name, site), site["value"]
    try:
        inside = site["fn"].support.check(value)
    except NotImplementedError:  # a distribution without a stated support
        return log_prob
    inside = inside.reshape(*value.shape[: log_prob.dim()], -1).all(-1)
    return torch.where(inside, log_prob, -math.inf)


def _log_jacobian(transform: Any, u: Tensor, value: Tensor) -> Any:
    """Return log |dz/du|, ``[chains, n]``."""
    if transform is None:
        return 0.0
    log_jacobian = transform.log_abs_det_jacobian(u, value)
    return log_jacobian.reshape(*log_jacobian.shape[:2], -1).sum(-1)


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Constraint) and any(map(_holds_tensors, vars(value).values()))
