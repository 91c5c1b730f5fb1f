"""What the tasks share: data in memory, one pass over draws, and weighted moments."""

import math
import sys
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from ppl_vae._random import seeded
from ppl_vae.data import Split, batches, check_data
from ppl_vae.evaluation.evaluate import CPU_ROWS, pass_size
from ppl_vae.evaluation.generation import named_site
from ppl_vae.infer.checking import check_all, running_on
from ppl_vae.infer.log_weights import PARTICLE_DIM, Terms, check_auxiliary, per_datum_log_prob, terms
from ppl_vae.infer.placing import prepare_data
from ppl_vae.infer.running import (
    Program,
    Site,
    batch_arguments,
    check_pair,
    in_own_store,
    latent_sites,
    observed_sites,
    trace_pair,
    without_table,
)


def in_memory(data: Any, name: str, device: torch.device, seed: int) -> Split:
    """Return checked data as one split on the device: all of a loader's batches, dynamic bits drawn once."""
    data = prepare_data(data, name, device)
    with seeded(seed, 1):  # a loader draws from the stream too
        loaded = list(batches(data, sys.maxsize, device=device, shuffle=False))
    if not loaded:
        raise ValueError(f"{name}: expected a loader that gives batches, got none from it")
    width = min(len(batch) for batch in loaded)
    x, *ys = (torch.cat(parts) for parts in zip(*(batch[: min(width, 2)] for batch in loaded), strict=True))
    split = Split(x, ys[0] if ys else None)
    check_data(split, name)
    return split


def arguments(model: Program, split: Split, name: str) -> tuple[Tensor, ...]:
    """Return what the model is called with."""
    return batch_arguments(model, (split.x,) if split.y is None else (split.x, split.y), name)


def check_programs(
    model: Program, guide: Program, batch: tuple[Tensor, ...], name: str, *, support: bool = True
) -> Site:
    """Raise unless the pair runs on the batch and its data are possible; return the site "x" of one run.

    Args:
        model: the model.
        guide: the guide.
        batch: all data.
        name: the argument that they came in.
        support: look whether the data are in the support of the sites that observe them.
    """
    first = tuple(t[:2] for t in batch)
    with running_on(name, first):
        model_trace, guide_trace = trace_pair(model, guide, *first)
        check_pair(model_trace, guide_trace, first)
        site = named_site(model_trace, "x", "model")
        if tuple(site["fn"].shape()) != tuple(first[0].shape):
            raise ValueError(
                f"model: expected a site 'x' of the data's shape {list(first[0].shape[1:])}, "
                f"got {list(site['fn'].shape()[1:])}"
            )
    if support:
        check_all(model, guide, Split(batch[0], batch[1] if len(batch) > 1 else None), name, batch[0].device)
    return site


def sizes_of_passes(
    model: Program,
    guide: Program,
    batch: tuple[Tensor, ...],
    num_particles: int,
    memory: float,
    times: int = 1,
    copies: int | None = None,
) -> tuple[int, int]:
    """Return how many data, and how many draws for each, fit into a pass.

    Args:
        model: the model.
        guide: the guide.
        batch: all data.
        num_particles: the most draws for a datum.
        memory: bytes.
        times: what a pass makes of each draw, in multiples of the tensors of a run of the programs.
        copies: the rows that a pass makes of each draw; by default ``times``.
    """
    rows = max(1, CPU_ROWS // (copies or times)) if batch[0].device.type == "cpu" else sys.maxsize

    def run(n: int, k: int) -> Terms:
        with pyro.validation_enabled(False):
            return terms(model, guide, *(t[:n] for t in batch), num_particles=k)

    return pass_size(memory / times, num_particles, rows, run)


def run_pair(
    model: Program, guide: Program, batch: tuple[Tensor, ...], num_particles: int
) -> tuple[Trace, Trace]:
    """Run the pair once with K draws per datum; return the model's and the guide's trace."""
    plate = pyro.plate("num_particles", num_particles, dim=PARTICLE_DIM)
    return trace_pair(plate(model), plate(guide), *batch)


def run_one(
    program: Program, batch: tuple[Tensor, ...], num_particles: int, latents: dict[str, Tensor] | None = None
) -> Trace:
    """Return the trace of one program with K draws per datum, or at these latents, ``[K, n, ...]``."""
    plate = pyro.plate("num_particles", num_particles, dim=PARTICLE_DIM)
    own = in_own_store(plate(program))
    run = poutine.trace(own if latents is None else poutine.condition(own, data=latents))
    try:
        return run.get_trace(*batch)
    except (ValueError, RuntimeError) as error:
        raise without_table(error) from None


def log_ratio(model_trace: Trace, guide_trace: Trace) -> Tensor:
    """Return log p(z) - log q(z | x), with observed sites other than "x", nats, ``[K, n]``."""
    in_model = latent_sites(model_trace) | observed_sites(model_trace)
    in_guide = latent_sites(guide_trace)
    check_auxiliary(in_guide, in_model)
    if missing := sorted(latent_sites(model_trace).keys() - in_guide.keys()):
        raise ValueError(f"guide: lacks the model's latent sites {missing}; it has {sorted(in_guide)}")
    parts = [per_datum_log_prob(name, site) for name, site in in_model.items() if name != "x"]
    parts += [-per_datum_log_prob(name, site) for name, site in in_guide.items()]
    return sum(parts[1:], parts[0])


def per_element(fn: Any) -> Any:
    """Return the distribution of each element of x, batch shape ``[*batch, *event]``.

    Raises:
        ValueError: if the elements are not independent given the latents.
    """
    base, shape = fn, fn.shape()
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    if len(base.event_shape) or base.batch_shape != shape:
        raise ValueError(
            "model: expected a likelihood whose elements of x are independent given the latents, an "
            f"Independent of a distribution per element, got {type(base).__name__} with event shape "
            f"{tuple(base.event_shape)}"
        )
    return base


def unmasked(site: Site, log_prob: Tensor) -> Tensor:
    """Return log-probabilities ``[K, n]`` of a site, zero where the program masks it."""
    if site["mask"] is None:
        return log_prob
    return torch.where(torch.as_tensor(site["mask"], device=log_prob.device), log_prob, 0.0)


def event_sum(values: Tensor, lead: int) -> Tensor:
    """Return the sum over all dimensions but the first ``lead``."""
    return values if values.dim() == lead else values.flatten(lead).sum(-1)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` with trailing dimensions of size 1, to broadcast over the events of ``like``."""
    return values.reshape(*values.shape, *(1 for _ in range(like.dim() - values.dim())))


class WeightedMoments:
    """Self-normalised mean and variance of a value for each datum, from chunks of weighted draws."""

    def __init__(self) -> None:
        self._log_scale = torch.tensor(-math.inf, dtype=torch.float64)
        self._sums: list[Tensor] = []

    def add(self, log_weights: Tensor, value: Tensor, variance: Tensor | None = None) -> None:
        """Add draws.

        Args:
            log_weights: ``[k, n]``.
            value: the value, or its mean given the draw, ``[k, n, *event]``.
            variance: its variance given the draw; by default 0.
        """
        log_weights, value = log_weights.double(), value.double()
        before = self._log_scale.to(log_weights)
        self._log_scale = torch.maximum(before, log_weights.amax(0))  # -inf as long as all weights are zero
        scale = torch.where(self._log_scale.isfinite(), self._log_scale, 0.0)
        old, weights = (before - scale).exp(), (log_weights - scale).exp()
        squares = weights.square()
        second = value.square() if variance is None else value.square() + variance.double()
        new = [
            weights.sum(0),
            squares.sum(0),
            _weigh(weights, value),
            _weigh(weights, second),
            _weigh(squares, value),
            _weigh(squares, value.square()),
        ]
        if self._sums:
            factors = [old, old**2, old, old, old**2, old**2]
            new = [
                part + spread(factor, part) * total
                for part, factor, total in zip(new, factors, self._sums, strict=True)
            ]
        self._sums = new

    @property
    def log_total(self) -> Tensor:
        """The log of the sum of weights, ``[n]``."""
        return self._sums[0].log() + self._log_scale

    @property
    def effective_sample_size(self) -> Tensor:
        """The square of the sum of weights over the sum of their squares, ``[n]``; 0 without any weight."""
        return self._sums[0].square() / self._sums[1].clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def mean(self) -> Tensor:
        """The weighted mean, ``[n, *event]``; NaN where all weights are zero."""
        return self._sums[2] / spread(self._sums[0], self._sums[2])

    @property
    def variance(self) -> Tensor:
        """The weighted variance, ``[n, *event]``."""
        return (self._sums[3] / spread(self._sums[0], self._sums[3]) - self.mean.square()).clamp(min=0)

    @property
    def standard_error(self) -> Tensor:
        """The Monte Carlo standard error of the mean by the delta method, ``[n, *event]``."""
        mean = self.mean
        total = self._sums[5] - 2 * mean * self._sums[4] + mean.square() * spread(self._sums[1], mean)
        return total.clamp(min=0).sqrt() / spread(self._sums[0], mean)


def _weigh(weights: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("kn,kn...->n...", weights, value)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of finite values over data, and its standard error; NaN for one datum."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error
