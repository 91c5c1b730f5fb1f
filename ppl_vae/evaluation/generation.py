"""Samples, reconstructions, latents, traversals and interpolations, made by running the programs."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine import Trace
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_positive_int
from ppl_vae.infer.placing import place
from ppl_vae.infer.running import (
    Program,
    Site,
    check_support,
    data_plate,
    evaluating,
    latent_sites,
    observed_sites,
    without_table,
)

_DRAWS = "give it a keyword `size=None` and draw size data where the batch is None"


@dataclass(frozen=True, eq=False)
class Samples:
    """Data drawn from the prior.

    Attributes:
        x: draws at the site "x", ``[n, *event]``.
        mean: means of the likelihood that they were drawn from, ``[n, *event]``; None if it has none.
    """

    x: Tensor
    mean: Tensor | None


@dataclass(frozen=True, eq=False)
class Reconstructions:
    """Data and the likelihood's mean given one draw of the guide for each.

    Attributes:
        x: the data, ``[n, *event]``.
        mean: the means, ``[n, *event]``.
    """

    x: Tensor
    mean: Tensor


@dataclass(frozen=True, eq=False)
class Latents:
    """The guide's latent of each datum.

    Attributes:
        z: posterior means, or draws where the guide's family has no mean, ``[n, latent]``. On a sphere,
            the means' directions.
        y: labels that were passed along, ``[n]``, or None.
    """

    z: Tensor
    y: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Traversal:
    """The likelihood's mean while one latent dimension moves and the others rest.

    Attributes:
        x: the means, ``[dims, steps, *event]``.
        values: what the moving dimension is set to, ``[steps]``; on a sphere, before the point is divided by
            its length.
        dims: the dimensions that move, whole numbers ``[dims]``.
    """

    x: Tensor
    values: Tensor
    dims: Tensor


@dataclass(frozen=True, eq=False)
class Interpolation:
    """The likelihood's mean along straight lines between pairs of latents, on a sphere great circles.

    Attributes:
        x: the means, ``[pairs, steps, *event]``.
        weights: weights of the end point, from 0 to 1, ``[steps]``.
    """

    x: Tensor
    weights: Tensor


def sample(model: Program, size: int | None = None, *, given: Mapping[str, Tensor] | None = None) -> Samples:
    """Draw data from the prior, with the mean of the likelihood that each was drawn from.

    Args:
        model: a program that takes ``model(None, size=n)``.
        size: how many data to draw; by default as many as are ``given``.
        given: what is held fixed, ``[size, *event]`` each, by name: an argument of the program, such as
            the labels ``y`` of a ``CVAE``, or a latent site, such as the cluster ``y`` of a
            ``GaussianMixtureVAE`` or the top layer ``z2`` of a ``HierarchicalVAE``.

    Returns:
        Draws and means, each ``[size, *event]``, on the CPU; no means if the likelihood has none, as an
        autoregressive one of sequences.

    Raises:
        TypeError: if the model can't be called as ``model(None, size=size)``, or something else than a
            tensor is given.
        ValueError: if the model has no site "x" or draws another number of data, neither a size nor a
            tensor is given, or what is given has no argument or latent site of the data plate of its name,
            another shape than its site, or values outside the site's support.

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> model = LinearGaussian(2, 4)
        >>> sample(model, 5).mean.shape
        torch.Size([5, 4])
        >>> sample(model, given={"z": torch.zeros(3, 2)}).x.shape
        torch.Size([3, 4])
    """
    fixed, size = _check_given(given, size)
    with evaluating(model):
        own = inspect.unwrap(model)  # of Pyro's handlers
        if isinstance(own, nn.Module):
            device = place(None, own)
            fixed = {name: value.to(device) for name, value in fixed.items()}
        arguments = {name: value for name, value in fixed.items() if name in _arguments(own)}
        sites = {name: value for name, value in fixed.items() if name not in arguments}
        if sites:  # conditioning on a site that the model lacks does nothing
            one = {name: value[:1] for name, value in arguments.items()}
            latents = latent_sites(prior_trace(model, 1, arguments=one))
            latents.pop("x", None)
            sites = {name: _check_site(name, value, latents) for name, value in sites.items()}
        trace = prior_trace(model, size, sites, arguments)
        for name, site in observed_sites(trace).items():
            if name not in sites:
                check_support("given", name, site["fn"], site["value"])
        drawn = named_site(trace, "x", "model")["value"]
        try:
            mean = likelihood_mean(trace).cpu()
        except NotImplementedError:
            mean = None
    return Samples(drawn.cpu(), mean)


def _check_site(name: str, value: Tensor, latents: Mapping[str, Site]) -> Tensor:
    """Return the values given for a latent site, in its dtype, or raise if it can't have them."""
    check_choice("given", name, latents)
    site = latents[name]
    data_plate(name, site)
    event = site["value"].shape[1:]
    if value.shape[1:] != event:
        wanted = ", ".join(["n", *map(str, event)])
        raise ValueError(f"given[{name!r}]: expected [{wanted}], got {list(value.shape)}")
    check_support(f"given[{name!r}]", name, site["fn"], value)
    return value.to(site["value"].dtype)


def _check_given(given: Mapping[str, Tensor] | None, size: int | None) -> tuple[dict[str, Tensor], int]:
    """Return what is given and the number of data to draw, or raise if they don't agree."""
    if not isinstance(given, Mapping | None):
        raise TypeError(f"given: expected a dictionary of tensors by name, got {type(given).__name__}")
    fixed = dict(given or {})
    for name, value in fixed.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"given[{name!r}]: expected a tensor, got {type(value).__name__}")
        if value.dim() == 0:
            raise ValueError(f"given[{name!r}]: expected a value for each datum, [n, ...], got a scalar")
    if size is None:
        if not fixed:
            raise ValueError("size: expected a number of data where nothing is given, got None")
        size = len(next(iter(fixed.values())))
    size = check_positive_int("size", size)
    for name, value in fixed.items():
        if len(value) != size:
            raise ValueError(f"given[{name!r}]: expected {size} data, got {len(value)}")
    return fixed, size


def reconstruct(model: Program, guide: Program, *batch: Any) -> Reconstructions:
    """Draw one latent of each datum from the guide, and return the likelihood's mean given it.

    Args:
        model: a program that takes the batch.
        guide: a program that takes the same batch.
        *batch: the batch, the data ``[n, *event]`` first.

    Returns:
        Data and means, each ``[n, *event]``, on the CPU.

    Raises:
        TypeError: if the batch doesn't start with a tensor.
        ValueError: if the model has no site "x".
        NotImplementedError: if the likelihood has no mean.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> guide = MeanFieldGuide(MLP(4), latent_dim=2)
        >>> reconstruct(LinearGaussian(2, 4), guide, torch.randn(5, 4)).mean.shape
        torch.Size([5, 4])
    """
    x = _check_batch(batch)
    # A store each: parameters of one name in both would become one.
    with evaluating(guide):
        guide_trace = poutine.trace(guide).get_trace(*batch)
    with evaluating(model):
        mean = likelihood_mean(poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch))
    return Reconstructions(x.detach().cpu(), mean.cpu())


def encode(guide: Program, *batch: Any, y: Tensor | None = None) -> Latents:
    """Return the guide's mean of each datum's latent, or a draw where its family has no mean.

    On a sphere it is the mean's direction: the mean itself is inside.

    Args:
        guide: a program that takes the batch.
        *batch: the batch, the data ``[n, *event]`` first.
        y: labels to pass along, for the colours of a plot, ``[n]``; the guide doesn't see them.

    Returns:
        Latents ``[n, latent]`` and labels, on the CPU.

    Raises:
        TypeError: if the batch doesn't start with a tensor.
        ValueError: if the guide has no site "z", or y hasn't one label for each datum.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> guide = MeanFieldGuide(MLP(4), latent_dim=2)
        >>> encode(guide, torch.randn(5, 4), y=torch.arange(5)).z.shape
        torch.Size([5, 2])
    """
    x = _check_batch(batch)
    labels = None if y is None else torch.as_tensor(y).detach().cpu()
    if labels is not None and labels.shape != x.shape[:1]:
        raise ValueError(f"y: expected one label for each of {len(x)} data, got shape {tuple(labels.shape)}")
    with evaluating(guide):
        site = named_site(poutine.trace(guide).get_trace(*batch), "z", "guide")
        try:
            z = site["fn"].mean
        except NotImplementedError:
            z = site["value"]
        if is_on_sphere(site):
            z = F.normalize(z, dim=-1)
    return Latents(z.cpu(), labels)


def traverse(
    model: Program,
    z: Tensor,
    *,
    dims: Sequence[int] | None = None,
    values: Sequence[float] | Tensor = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0),
) -> Traversal:
    """Move each dimension of one latent through values, the others at rest, and return x's means.

    Where the model's prior is on the unit sphere, ``z`` is divided by its length first, and so is each point
    after its dimension is set; zeros, the prior's mean, stand for the point whose coordinates are equal.

    Args:
        model: a program that takes ``model(None, size=n)``.
        z: the latent to start from, ``[latent]``; the prior's mean is a usual choice.
        dims: the dimensions to move; None moves each in turn.
        values: what the moving dimension is set to, ``[steps]``.

    Returns:
        Means ``[dims, steps, *event]`` with the values and dimensions, on the CPU.

    Raises:
        TypeError: if the model can't be called as ``model(None, size=n)``.
        ValueError: if a shape is wrong or a dimension doesn't exist.

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> traverse(LinearGaussian(2, 4), torch.zeros(2), values=[-1.0, 0.0, 1.0]).x.shape
        torch.Size([2, 3, 4])
    """
    _check_latents("z", z, "one latent [latent]", ndims=(1,))
    moved = list(range(len(z)) if dims is None else dims)
    if not moved or any(dim not in range(len(z)) for dim in moved):
        raise ValueError(f"dims: expected latent dimensions from 0 to {len(z) - 1}, got {dims!r}")
    steps = torch.as_tensor(values, dtype=z.dtype, device=z.device).detach()
    if steps.ndim != 1 or not len(steps):
        raise ValueError(f"values: expected a sequence of numbers, got {_describe(values)}")
    with evaluating(model):
        prior = prior_site(model, z)
        start, sphere = z.detach(), is_on_sphere(prior)
        if sphere:
            start = F.normalize(start if start.any() else torch.ones_like(start), dim=-1)
        grid = start.expand(len(moved), len(steps), len(z)).clone()
        for row, dim in zip(grid, moved, strict=True):
            row[:, dim] = steps
        if sphere and not (possible := grid.any(-1)).all():
            row, step = (~possible).nonzero()[0].tolist()
            raise ValueError(
                f"values: expected points that have a direction, got zeros where dimension {moved[row]} is "
                f"{float(steps[step])}: start from another z"
            )
        x = decode(model, prior, F.normalize(grid, dim=-1) if sphere else grid)
    return Traversal(x, steps.cpu(), torch.tensor(moved))


def interpolate(model: Program, z_start: Tensor, z_end: Tensor, *, steps: int = 9) -> Interpolation:
    """Go in a straight line from each start to its end, and return x's means on the way.

    Where the model's prior is on the unit sphere, both are divided by their lengths, and the way is the great
    circle between them.

    Args:
        model: a program that takes ``model(None, size=n)``.
        z_start: the latents to start from, ``[pairs, latent]``, or one ``[latent]``.
        z_end: the latents to end at, the same shape.
        steps: points on each line, both ends included, at least 2.

    Returns:
        Means ``[pairs, steps, *event]`` with the end point's weights, on the CPU.

    Raises:
        TypeError: if the model can't be called as ``model(None, size=n)``.
        ValueError: if the shapes are wrong or differ, or steps is below 2; on a sphere, if the ends are
            opposite, so that there are many ways, or one is zero.

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> z_start, z_end = torch.randn(2, 3, 2)
        >>> interpolate(LinearGaussian(2, 4), z_start, z_end, steps=5).x.shape
        torch.Size([3, 5, 4])
    """
    if check_positive_int("steps", steps) < 2:
        raise ValueError(f"steps: expected at least 2, the start and the end, got {steps!r}")
    for name, z in (("z_start", z_start), ("z_end", z_end)):
        _check_latents(name, z, "latents [pairs, latent] or [latent]", ndims=(1, 2))
    if z_start.shape != z_end.shape:
        raise ValueError(f"z_end: expected z_start's shape {_shape(z_start)}, got {_shape(z_end)}")
    start, end = (z.reshape(-1, 1, z.shape[-1]) for z in (z_start, z_end))
    weights = torch.linspace(0.0, 1.0, steps, dtype=start.dtype, device=start.device)
    with evaluating(model):
        prior = prior_site(model, z_start)
        between = _great_circle if is_on_sphere(prior) else torch.lerp
        x = decode(model, prior, between(start.detach(), end.detach(), weights[:, None]))
    return Interpolation(x, weights.cpu())


def prior_trace(
    model: Program,
    size: int,
    sites: Mapping[str, Tensor] | None = None,
    arguments: Mapping[str, Tensor] | None = None,
) -> Trace:
    """Trace ``model(None, size=size)``, with sites set to what is given, and further arguments."""
    keywords = dict(arguments or {}) | {"size": size}
    call = f"model(None, {''.join(f'{name}={name}, ' for name in arguments or {})}size={size})"
    try:
        _signature(inspect.unwrap(model)).bind(None, **keywords)
    except TypeError:
        raise TypeError(f"model: can't be called as {call}; {_DRAWS}") from None
    except ValueError:  # a callable without a signature
        pass
    program = poutine.condition(model, data=dict(sites)) if sites else model
    try:
        trace = poutine.trace(program).get_trace(None, **keywords)
    except (AttributeError, TypeError) as error:
        if "NoneType" not in str(error):  # an error of the model's own
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise TypeError(f"model: {call} failed ({reason}); {_DRAWS}") from error
    except (ValueError, RuntimeError) as error:
        raise without_table(error) from None
    site = named_site(trace, "x", "model")
    drawn = site["value"]
    if drawn.shape[: drawn.ndim - site["fn"].event_dim] != (size,):
        raise ValueError(f"model: expected {call} to draw {size} data, got {_shape(drawn)}")
    return trace


def _signature(model: Program) -> inspect.Signature:
    return inspect.signature(model.forward if isinstance(model, nn.Module) else model)


def _arguments(model: Program) -> Collection[str]:
    """Return the names of a program's arguments beside the data and the size."""
    try:
        parameters = list(_signature(model).parameters.values())[1:]
    except ValueError:  # a callable without a signature
        return ()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named - {"size"}


def prior_site(model: Program, z: Tensor) -> Site:
    """Return the model's site "z" of one datum, or raise if it has not the size of these latents.

    Conditioning on a site that the model lacks does nothing, so this comes first.
    """
    site = named_site(prior_trace(model, 1), "z", "model")
    if site["value"].shape != (1, z.shape[-1]):
        raise ValueError(f"z: expected the model's shape {_shape(site['value'])[1:]}, got {_shape(z)[-1:]}")
    return site


def is_on_sphere(site: Site) -> bool:
    """Return whether a site's values are on the unit sphere."""
    return site["fn"].support is constraints.sphere


def _great_circle(start: Tensor, end: Tensor, weights: Tensor) -> Tensor:
    """Return points on the unit sphere from start to end, ``[pairs, steps, latent]``.

    Args:
        start: ``[pairs, 1, latent]``, of any length.
        end: likewise.
        weights: of the end, ``[steps, 1]``.
    """
    for name, z in (("z_start", start), ("z_end", end)):
        if not z.any(-1).all():
            raise ValueError(f"{name}: expected directions on the model's sphere, got a vector of zeros")
    start, end = F.normalize(start, dim=-1), F.normalize(end, dim=-1)
    cosine = (start * end).sum(-1, keepdim=True)
    across = end - cosine * start
    sine = across.norm(dim=-1, keepdim=True)
    if ((cosine < 0) & (sine < 10 * torch.finfo(sine.dtype).eps)).any():
        raise ValueError("z_end: expected points of the sphere that are not opposite to z_start's")
    angle = weights * torch.atan2(sine, cosine)
    return F.normalize(start * angle.cos() + F.normalize(across, dim=-1) * angle.sin(), dim=-1)


def decode(model: Program, prior: Site, z: Tensor) -> Tensor:
    """Return the likelihood's means ``[*grid, *event]`` of latents ``[*grid, latent]``."""
    flat = z.to(prior["value"]).flatten(end_dim=-2)
    mean = likelihood_mean(prior_trace(model, len(flat), {"z": flat}))
    return mean.reshape(*z.shape[:-1], *mean.shape[1:]).cpu()


def likelihood_mean(trace: Trace) -> Tensor:
    """Return the mean of the likelihood at the site "x"."""
    distribution = named_site(trace, "x", "model")["fn"]
    try:
        mean: Tensor = distribution.mean
    except NotImplementedError:
        raise NotImplementedError(
            f"model: site 'x' has no mean that {type(distribution).__name__} knows, only draws"
        ) from None
    return mean


def named_site(trace: Trace, name: str, program: str) -> Site:
    """Return a sample site of a trace, or raise with the names of those that it has."""
    sites = latent_sites(trace) | observed_sites(trace)
    if name not in sites:
        raise ValueError(f"{program}: expected a site {name!r}, got sites {list(sites)}")
    return sites[name]


def _check_batch(batch: tuple[Any, ...]) -> Tensor:
    """Return the data of a batch, or raise if there are none."""
    if not batch or not isinstance(batch[0], Tensor) or batch[0].ndim == 0:
        got = _describe(batch[0]) if batch else "nothing"
        raise TypeError(f"batch: expected data [n, *event], a tensor, as the first argument, got {got}")
    return batch[0]


def _check_latents(name: str, z: object, expected: str, ndims: tuple[int, ...]) -> None:
    """Raise if ``z`` is not a tensor of floats with as many dims as expected, none of them empty."""
    if not isinstance(z, Tensor) or z.ndim not in ndims or z.numel() == 0:
        raise ValueError(f"{name}: expected {expected}, a tensor, got {_describe(z)}")
    if not z.is_floating_point():
        raise ValueError(f"{name}: expected floats, got {z.dtype}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _describe(value: object) -> str:
    """Return the shape of a tensor, or a short text of anything else."""
    return f"shape {_shape(value)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r:.60}"
