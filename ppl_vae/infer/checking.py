"""Checks of data against the programs that are to run on them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from ppl_vae.data import Split, batches, check_data
from ppl_vae.infer.running import (
    Program,
    batch_arguments,
    check_support,
    evaluating,
    observed_sites,
    trace_pair,
)


@dataclass(frozen=True)
class Observation:
    """A tensor of the batch as a site observes it.

    Attributes:
        index: which tensor of the batch.
        site: the observed site's name.
        fn: its distribution.
        shape: a datum's shape there, ``[*event]``.
    """

    index: int
    site: str
    fn: Any
    shape: tuple[int, ...]


def observations(model: Program, guide: Program, *batch: Tensor) -> list[Observation]:
    """Return which tensors of the batch are observed as they are, where the support is one for all data."""
    with evaluating(model, guide):
        model_trace, _ = trace_pair(model, guide, *batch)
    return [
        Observation(i, name, site["fn"], tuple(site["value"].shape[1:]))
        for name, site in observed_sites(model_trace).items()
        for i, x in enumerate(batch)
        if site["value"].data_ptr() == x.data_ptr()
        and site["value"].numel() == x.numel()
        and len(site["value"]) == len(x)
        and is_fixed(site["fn"])
    ]


def is_fixed(fn: Any) -> bool:
    """Return whether the support of a distribution is the same whatever its parameters are."""
    try:
        return not _holds_tensors(fn.support)
    except NotImplementedError:
        return False


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(item) for item in value)
    return isinstance(value, Constraint) and any(_holds_tensors(item) for item in vars(value).values())


def check_observations(
    name: str, batch: Sequence[Tensor | None], observed: list[Observation], *, dynamic: bool = False
) -> None:
    """Raise if a datum is outside the support of a site that observes it.

    Args:
        name: the argument that the data came in.
        batch: any number of data, ``[n, ...]`` each.
        observed: what ``observations`` found.
        dynamic: the first tensor holds probabilities of bits.

    Raises:
        ValueError: naming the argument, the datum, the site and the values found.
    """
    for o in observed:
        x = batch[o.index]
        if x is not None and math.prod(x.shape[1:]) == math.prod(o.shape):
            probabilities = dynamic and o.index == 0
            check_support(name, o.site, o.fn, x.reshape(len(x), *o.shape), probabilities=probabilities)


def check_batch(name: str, batch: Sequence[Tensor], observed: list[Observation]) -> None:
    """Raise if a loader's batch has values that are NaN, infinite or outside the support of their site."""
    if batch[0].is_floating_point():
        check_data(batch[0], name)
    check_observations(name, batch, observed)


def first_batch(model: Program, data: Any, name: str, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return the arguments for the model from the data's first batch.

    Raises:
        ValueError: if a loader gives no batch.
    """
    batch = next(iter(batches(data, size, device=device, shuffle=False)), None)
    if batch is None or not len(batch[0]):
        raise ValueError(f"{name}: expected a loader that gives batches, got none from it")
    return batch_arguments(model, batch, name)


def check_all(
    model: Program, guide: Program, data: Any, name: str, device: torch.device
) -> list[Observation]:
    """Raise if the pair can't run on the data, or if any datum of a ``Split`` is outside its site's support.

    Returns:
        What ``check_batch`` needs to check a loader's batches as they come.
    """
    batch = tuple(x[:1] for x in first_batch(model, data, name, 1, device))
    with running_on(name, batch):
        observed = observations(model, guide, *batch)
    if isinstance(data, Split):
        check_observations(name, (data.x, data.y), observed, dynamic=data.dynamic)
    return observed


def checked_batches(
    model: Program, data: Any, observed: list[Observation], size: int, device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the model's arguments for at most ``size`` data at a time; a loader's are checked as they come.

    Args:
        model: the model.
        data: what ``prepare_data`` gave.
        observed: what ``check_all`` gave.
        size: of a split's batches; larger ones of a loader are cut.
        device: where to work.
    """
    for i, whole in enumerate(batches(data, size, device=device, shuffle=False), 1):
        batch = batch_arguments(model, whole)
        if not isinstance(data, Split):
            check_batch(f"data, batch {i}", batch, observed)
        yield from zip(*(t.split(size) for t in batch), strict=True)


def check_validation(model: Program, guide: Program, data: Any, size: int, device: torch.device) -> None:
    """Raise as ``check_all`` and ``check_batch`` do if the pair can't run on any of the validation data."""
    observed = check_all(model, guide, data, "validation", device)
    if not isinstance(data, Split):
        for i, batch in enumerate(batches(data, size, device=device, shuffle=False), 1):
            check_batch(f"validation, batch {i}", batch, observed)


@contextmanager
def running_on(name: str, batch: Sequence[Tensor]) -> Iterator[None]:
    """Let what goes wrong in a program's run on a batch name the argument that the batch came from."""
    try:
        yield
    except ValueError as error:
        if name == "data" or str(error).startswith(name):
            raise
        raise ValueError(f"{name}: {error}") from error
    except RuntimeError as error:
        shapes = ", ".join(f"{list(x.shape)} ({x.dtype})" for x in batch)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: model and guide can't run on a batch of shape {shapes}: {reason}"
        ) from error
