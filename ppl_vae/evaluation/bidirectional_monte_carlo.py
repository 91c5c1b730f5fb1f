"""Bidirectional Monte Carlo: log p(x) of simulated data, between two bounds."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm import tqdm

from ppl_vae._checks import check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.evaluation._annealing import (
    Annealing,
    Schedule,
    Start,
    bound_of,
    check_settings,
    data_per_pass,
    inverse_temperatures,
)
from ppl_vae.evaluation._latents import Latents
from ppl_vae.evaluation.evaluate import Estimate
from ppl_vae.infer.placing import place
from ppl_vae.infer.running import Program, batch_arguments, evaluating, in_own_store


@dataclass(frozen=True, eq=False)
class BidirectionalMonteCarlo:
    """What ``bidirectional_monte_carlo`` measured on data that the model drew.

    Attributes:
        lower: of log p(x), by chains to the posterior.
        upper: of log p(x), by chains back from the latents that each datum was drawn with.
        batch: the simulated data, ``(x,)`` or ``(x, y)``, ``[n, ...]`` each.
        acceptance: the mean acceptance of each datum's transitions in both, ``[n]``.
        num_chains: C.
        num_temperatures: T.
    """

    lower: Estimate
    upper: Estimate
    batch: tuple[Tensor, ...] = field(repr=False)
    acceptance: Tensor = field(repr=False)
    num_chains: int
    num_temperatures: int

    @property
    def gap(self) -> Estimate:
        """Upper minus lower bound: in expectation both are at most that far from log p(x)."""
        return self.upper - self.lower

    def summary(self) -> dict[str, Any]:
        """Return means, standard errors and Monte Carlo errors as plain numbers, for a file."""
        named = {"lower": self.lower, "upper": self.upper, "gap": self.gap}
        return {
            "num_data": len(self.acceptance),
            "num_chains": self.num_chains,
            "num_temperatures": self.num_temperatures,
            "acceptance": float(self.acceptance.mean()),
        } | {
            name: {
                "mean": bound.mean,
                "standard_error": bound.standard_error,
                "monte_carlo_error": bound.monte_carlo_error,
            }
            for name, bound in named.items()
        }

    def __str__(self) -> str:
        rows = [("log p(x), lower bound", self.lower), ("log p(x), upper bound", self.upper)]
        lines = [f"{name:<24} {bound!s:>18}" for name, bound in [*rows, ("gap", self.gap)]]
        head = (
            f"nats per datum, mean and standard error over {len(self.acceptance)} simulated data; "
            f"{self.num_temperatures} temperatures, {self.num_chains} chains"
        )
        return "\n".join([head, *lines])


def bidirectional_monte_carlo(
    model: Program,
    guide: Program | None,
    size: int,
    *,
    y: Tensor | None = None,
    num_temperatures: int = 1000,
    num_chains: int = 16,
    leapfrog: int = 10,
    schedule: Schedule = "sigmoidal",
    start: Start = "prior",
    target_acceptance: float = 0.65,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> BidirectionalMonteCarlo:
    r"""Bound log p(x) from below and above on data of the model's own, by annealed importance sampling.

    The latents that a datum was drawn with are an exact draw of its posterior. Chains from there back to the
    start have weights whose inverse has the mean 1 / p(x), so that the log of their mean is an upper bound in
    expectation (over data, too), where chains from the start give the lower one. The gap says how far
    annealed importance sampling with these settings can be trusted, on data like these.

    All reverse chains of a datum start at the same draw: the Monte Carlo error of the upper bound is that
    over chains, given the draw. Both directions have the same frozen step sizes.

    Args:
        model: program over continuous latent sites and the data, called as ``model(None, size=n)``.
        guide: program over the same latent sites, for ``start="guide"``; may be None.
        size: n, how many data to draw.
        y: what the model is conditioned on, ``[n, ...]``, for models that are called as ``model(None, y)``.
        num_temperatures: as in ``annealed_importance_sampling``.
        num_chains: likewise, in each direction.
        leapfrog: likewise.
        schedule: likewise.
        start: likewise.
        target_acceptance: likewise.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of all draws, the data's too.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo (Grosse et al., 2015),
        arXiv:1511.02543

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> result = bidirectional_monte_carlo(
        ...     LinearGaussian(2, 5), None, 4, num_temperatures=20, num_chains=4, leapfrog=3, progress=False
        ... )
        >>> result.gap.values.shape
        torch.Size([4])
    """
    betas = inverse_temperatures(num_temperatures, schedule)
    n = check_positive_int("size", size)
    check_settings(guide, num_chains, leapfrog, start, target_acceptance)
    check_positive("memory", memory)
    check_seed(seed)
    if y is not None and (not isinstance(y, Tensor) or y.shape[:1] != (n,)):
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y: expected a tensor [size, ...] of size={n}, got {got}")
    programs = [model] if guide is None else [model, guide]
    where = place(device, *programs)
    starts = guide if start == "guide" else None
    lower, upper, acceptance = [], [], []
    with (
        seeded(seed),
        evaluating(*programs),
        tqdm(unit="temperature", desc="BDMC", disable=not progress, dynamic_ncols=True) as bar,
    ):
        values, batch = _simulate(model, n, None if y is None else y.to(where), where)
        rows = data_per_pass(model, starts, tuple(t[:2] for t in batch), num_chains, memory)
        passes = math.ceil(n / rows)
        rows = math.ceil(n / passes)
        bar.reset(total=3 * num_temperatures * passes)
        with pyro.validation_enabled(False):
            for begin in range(0, n, rows):
                latents = Latents(model, tuple(t[begin : begin + rows] for t in batch))
                annealing = Annealing(
                    latents,
                    starts,
                    betas=betas,
                    leapfrog=leapfrog,
                    target=target_acceptance,
                    num_chains=num_chains,
                    tick=bar.update,
                )
                part = {name: values[name][begin : begin + rows] for name in latents.shapes}
                exact = latents.flatten(part).expand(num_chains, -1, -1).contiguous()
                forward, accepted = annealing.forward()
                backward, accepted_back = annealing.reverse(exact)
                lower.append(forward)
                upper.append(backward)
                acceptance.append((accepted + accepted_back) / 2)
    return BidirectionalMonteCarlo(
        bound_of(torch.cat(lower, 1).cpu()),
        bound_of(torch.cat(upper, 1).cpu(), reverse=True),
        tuple(t.cpu() for t in batch),
        torch.cat(acceptance).cpu(),
        num_chains,
        num_temperatures,
    )


def _simulate(
    model: Program, size: int, y: Tensor | None, device: torch.device
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """Return the values of all sites of one draw of the model, and the batch that it is."""
    given = (None,) if y is None else (None, y)
    how = f"model(None, size={size})" if y is None else f"model(None, y, size={size})"
    try:
        call = model.forward if isinstance(model, nn.Module) else model
        inspect.signature(call).bind(*given, size=size)
    except TypeError:
        raise TypeError(f"model: can't be called as {how}, which draws data from the prior") from None
    except ValueError:  # a callable without a signature
        pass
    trace = poutine.trace(in_own_store(model)).get_trace(*given, size=size)
    values = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    x = values.get("x", trace.nodes["_RETURN"]["value"])
    if not isinstance(x, Tensor) or x.shape[:1] != (size,):
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"model: expected {how} to draw or return x, [{size}, *event], got {got}")
    x = x.detach().to(device)
    return values, batch_arguments(model, (x,) if y is None else (x, y), "y")
