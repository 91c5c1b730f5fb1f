"""Draws of a model's posterior itself, by NUTS or Hamiltonian Monte Carlo: what guides are held against."""

import math
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from pyro.infer.mcmc import MCMC, NUTS
from torch import Tensor
from tqdm import tqdm

from ppl_vae._checks import check_choice, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae._warnings import warn
from ppl_vae.evaluation._arviz import import_arviz
from ppl_vae.evaluation._hmc import DualAveraging, Evaluate, traced, transition
from ppl_vae.evaluation._latents import Latents, no_guide
from ppl_vae.infer.checking import check_all, checked_batches, first_batch, running_on
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.running import Program, check_pair, evaluating, trace_pair

Method = Literal["hmc", "nuts"]

MAX_R_HAT = 1.01
MIN_ESS_PER_CHAIN = 100
_START = 0.1  # of step sizes, in units of the scale
_SCALE_DRAWS = 200  # of a guide, for its standard deviations
_WINDOWS = (0.1, 0.25, 0.5, 0.9)  # the scale is taken anew at these parts of the warm-up, but the first
_REDRAWS = 20  # of starts whose density is not finite
_VALUES = 2**24  # numbers in a pass over draws


@dataclass(frozen=True, eq=False)
class ReferencePosterior:
    """Draws of p(z | x) of each datum, and how far they are to be trusted.

    Attributes:
        draws: of each latent site, ``[chains, draws, n, *event]``, on the CPU.
        r_hat: the largest rank-normalised split R-hat of a datum's dimensions, ``[n]``; at most 1.01 where
            chains agree.
        ess: the smallest bulk effective sample size of a datum's dimensions, over all chains, ``[n]``.
        acceptance: the mean probability of acceptance, ``[n]``.
        divergences: how many transitions of a datum went astray, ``[n]``.
        data: what the model was called with, ``[n, ...]`` each, on the CPU.
        method: ``"hmc"`` or ``"nuts"``.
        warmup: the number of transitions of a chain before the draws.
        seed: of the draws.
    """

    draws: dict[str, Tensor] = field(repr=False)
    r_hat: Tensor = field(repr=False)
    ess: Tensor = field(repr=False)
    acceptance: Tensor = field(repr=False)
    divergences: Tensor = field(repr=False)
    data: tuple[Tensor, ...] = field(repr=False)
    method: str
    warmup: int
    seed: int

    @property
    def num_data(self) -> int:
        """The number of data, n."""
        return len(self.r_hat)

    @property
    def num_chains(self) -> int:
        """The number of chains of a datum."""
        return next(iter(self.draws.values())).shape[0]

    @property
    def num_samples(self) -> int:
        """The number of draws of a chain."""
        return next(iter(self.draws.values())).shape[1]

    @property
    def converged(self) -> Tensor:
        """Whether a datum's R-hat is at most 1.01 and its ESS at least 100 per chain, ``[n]``."""
        return (self.r_hat <= MAX_R_HAT) & (self.ess >= MIN_ESS_PER_CHAIN * self.num_chains)

    def samples(self, site: str = "z") -> Tensor:
        """Return the draws of a site, its chains one after the other, ``[chains * draws, n, *event]``.

        Raises:
            ValueError: if there is no such site.
        """
        if site not in self.draws:
            raise ValueError(f"site: expected one of {list(self.draws)}, got {site!r}")
        return self.draws[site].flatten(0, 1)

    def summary(self) -> dict[str, Any]:
        """Return numbers and settings, for a file."""
        return {
            "method": self.method,
            "num_data": self.num_data,
            "num_chains": self.num_chains,
            "num_samples": self.num_samples,
            "warmup": self.warmup,
            "seed": self.seed,
            "r_hat_max": float(self.r_hat.max()),
            "ess_min": float(self.ess.min()),
            "acceptance": float(self.acceptance.mean()),
            "divergences": int(self.divergences.sum()),
            "not_converged": int((~self.converged).sum()),
        }

    def __str__(self) -> str:
        head = (
            f"posterior draws of {self.num_data} data by {self.method.upper()}: {self.num_chains} chains of "
            f"{self.num_samples} draws after {self.warmup} of warm-up"
        )
        rows = [
            ("", "median", "worst"),
            ("R-hat", f"{float(self.r_hat.median()):.3f}", f"{float(self.r_hat.max()):.3f}"),
            ("bulk ESS", f"{float(self.ess.median()):.0f}", f"{float(self.ess.min()):.0f}"),
            ("acceptance", f"{float(self.acceptance.median()):.2f}", f"{float(self.acceptance.min()):.2f}"),
        ]
        lines = [f"{name:<12}{median:>10}{worst:>10}" for name, median, worst in rows]
        lines.append(f"divergences {int(self.divergences.sum()):>10} in all")
        lines.append(f"{int((~self.converged).sum())} data have not converged")
        return "\n".join([head, *lines])


def reference_posterior(
    model: Program,
    data: Any,
    method: Method = "hmc",
    *,
    guide: Program | None = None,
    num_samples: int = 1000,
    warmup: int = 500,
    num_chains: int = 4,
    leapfrog: int = 10,
    batch_size: int = 1000,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ReferencePosterior:
    r"""Draw from the posterior p(z | x) of a trained model, each datum by itself, as exactly as can be.

    ``"hmc"`` moves all chains of all data at once, and is the one for many data. Step sizes, by dual
    averaging to an acceptance of 80 %, and a scale for each dimension are found in the warm-up, for each
    datum its own. The number of leapfrog steps changes from one transition to the next, so that no orbit
    closes. ``"nuts"`` is Pyro's No-U-Turn sampler, a run for each datum and chain: minutes for some ten data.

    Both work where latents are unconstrained, at fixed parameters, in evaluation mode. They don't know of
    modes that no chain came to: R-hat tells only if chains start in different ones. Starts are draws of the
    prior, which is wide, or of the guide.

    Args:
        model: program over continuous latent sites and the data.
        data: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch ``Dataset`` or
            ``DataLoader``.
        method: ``"hmc"`` or ``"nuts"``.
        guide: gives the starts of the chains and the first scale of each dimension; None for draws of the
            prior and 1. Any program over the latent sites.
        num_samples: draws of each chain, at least 4.
        warmup: transitions of each chain before, which are not kept.
        num_chains: chains of each datum, at least 2.
        leapfrog: the mean number of leapfrog steps of ``"hmc"``; each transition takes 1 to
            2 * leapfrog - 1, all equally likely.
        batch_size: how many data ``"hmc"`` takes at a time.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Warns:
        UserWarning: with the number of data whose R-hat is above 1.01 or whose bulk ESS is below 100 per
            chain.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; for a discrete latent
            site; for a datum whose density is not finite where chains would start.

    References:
        MCMC using Hamiltonian dynamics (Neal, 2011), arXiv:1206.1901
        The No-U-Turn Sampler (Hoffman & Gelman, 2014), arXiv:1111.4246
        Rank-normalization, folding, and localization: An improved R-hat (Vehtari et al., 2021),
        arXiv:1903.08008

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> model = LinearGaussian(1, 3)
        >>> result = reference_posterior(
        ...     model, torch.zeros(2, 3), num_samples=500, warmup=100, leapfrog=2, progress=False
        ... )
        >>> result.samples("z").shape
        torch.Size([2000, 2, 1])
    """
    check_choice("method", method, ("hmc", "nuts"))
    if not callable(model):
        raise TypeError(f"model: expected a module or a function, got {model!r}")
    if guide is not None and not callable(guide):
        raise TypeError(f"guide: expected a module or a function, or None, got {guide!r}")
    if check_positive_int("num_samples", num_samples) < 4:
        raise ValueError(f"num_samples: expected at least 4, for R-hat, got {num_samples!r}")
    if check_positive_int("num_chains", num_chains) < 2:
        raise ValueError(f"num_chains: expected at least 2, for R-hat, got {num_chains!r}")
    check_positive_int("warmup", warmup)
    check_positive_int("leapfrog", leapfrog)
    check_positive_int("batch_size", batch_size)
    check_seed(seed)

    programs = [model] if guide is None else [model, guide]
    where = place(device, *programs)
    data = prepare_data(data, "data", where)
    batch = gather(model, guide, data, where, seed)
    size = 1 if method == "nuts" else batch_size
    n = len(batch[0])
    transitions = (warmup + num_samples) * (n * num_chains if method == "nuts" else math.ceil(n / size))
    draws: dict[str, list[Tensor]] = {}
    parts: list[_Chains] = []
    r_hat, ess = [], []
    with (
        evaluating(*programs),
        pyro.validation_enabled(False),  # chains may try what has no density
        tqdm(
            total=transitions, unit="step", desc=method.upper(), disable=not progress, dynamic_ncols=True
        ) as bar,
    ):
        for i, small in enumerate(zip(*(t.split(size) for t in batch), strict=True)):
            with seeded(seed, i):
                latents = Latents(model, small)
                start, scale = _start(latents, guide, num_chains, i * size)
                density = traced(latents.log_joint, start[:1] if method == "nuts" else start)
                if method == "hmc":
                    part = _hmc(density, start, scale, num_samples, warmup, leapfrog, bar)
                else:
                    part = _nuts(density, start, scale, num_samples, warmup, (seed, i), bar)
                for site, value in _unflatten(latents, part.u).items():
                    draws.setdefault(site, []).append(value.cpu())
            diagnosed = _diagnose(part.u)
            r_hat.append(diagnosed[0])
            ess.append(diagnosed[1])
            parts.append(part)
    result = ReferencePosterior(
        {site: torch.cat(values, 2) for site, values in draws.items()},
        torch.cat(r_hat),
        torch.cat(ess),
        torch.cat([part.acceptance for part in parts]).double().cpu(),
        torch.cat([part.divergences for part in parts]).long().cpu(),
        tuple(t.detach().cpu() for t in batch),
        method,
        warmup,
        seed,
    )
    _warn(result)
    return result


def gather(
    model: Program, guide: Program | None, data: Any, where: torch.device, seed: int
) -> tuple[Tensor, ...]:
    """Return all data as the model's arguments, checked against the programs, ``[n, ...]`` each.

    Bits of a dynamic split are drawn once, from ``seed``. Without a guide, latents must have a density with a
    gradient.
    """
    stand_in = no_guide if guide is None else guide
    with seeded(seed), evaluating(model, stand_in):
        first = first_batch(model, data, "data", 2, where)
        with running_on("data", first):
            traces = trace_pair(model, stand_in, *first)
            if guide is None:
                _check_fits(Latents(model, first))
            else:
                check_pair(*traces, first)
        observed = check_all(model, stand_in, data, "data", where)
    with seeded(seed):
        found = list(checked_batches(model, data, observed, sys.maxsize, where))
    return tuple(torch.cat(tensors) for tensors in zip(*found, strict=True))


def _check_fits(latents: Latents) -> None:
    """Raise unless the model can be scored on the data: of a wrong size, say."""
    try:
        latents.log_joint(latents.draw_prior(1))
    except (ValueError, RuntimeError) as error:
        shapes = ", ".join(str(list(x.shape)) for x in latents.batch)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"data: the model can't score a batch of shape {shapes}: {reason}") from error


# -- what the samplers start from --------------------------------------------------------------------


def _start(latents: Latents, guide: Program | None, num_chains: int, first: int) -> tuple[Tensor, Tensor]:
    """Return where chains start, ``[chains, n, size]``, and the scale of each dimension, ``[n, size]``.

    Raises:
        ValueError: naming the datum, ``first`` being the number of the batch's first one.
    """

    def draw(count: int) -> Tensor:
        return latents.draw_prior(count) if guide is None else latents.draw_guide(guide, count)

    u = draw(num_chains)
    for _ in range(_REDRAWS):
        possible = u.isfinite().all(-1) & latents.log_joint(u.nan_to_num()).isfinite()
        if bool(possible.all()):
            break
        u = torch.where(possible.unsqueeze(-1), u, draw(num_chains))
    else:
        datum = first + int((~possible).any(0).nonzero()[0])
        origin = "the prior" if guide is None else "the guide"
        raise ValueError(
            f"data: expected a finite log p(x, z) of datum {datum} where chains start, got none in "
            f"{_REDRAWS} draws of {origin}"
        )
    if guide is None:
        return u, torch.ones_like(u[0])
    many = max(2, min(_SCALE_DRAWS, _VALUES // max(1, u[0].numel())))
    return u, draw(many).std(0).nan_to_num(1.0).clamp(min=1e-4)


@dataclass(frozen=True, eq=False)
class _Chains:
    """What a sampler found.

    Attributes:
        u: ``[chains, draws, n, size]``.
        acceptance: ``[n]``.
        divergences: ``[n]``.
    """

    u: Tensor
    acceptance: Tensor
    divergences: Tensor


# -- Hamiltonian Monte Carlo -------------------------------------------------------------------------


def _hmc(
    density: Evaluate,
    u: Tensor,
    scale: Tensor,
    num_samples: int,
    warmup: int,
    leapfrog: int,
    bar: Any,
) -> _Chains:
    """Run chains ``[chains, n, size]`` together. Where they move, each dimension is divided by its scale."""
    ends = sorted({round(part * warmup) for part in _WINDOWS} - {0, warmup})
    step_size = torch.full_like(scale[:, 0], _START).unsqueeze(0)
    for start, end in zip([0, *ends], [*ends, warmup], strict=True):
        adaptation = DualAveraging(step_size)
        run = _scaled(density, scale)
        point = [u / scale, *run(u / scale)]
        found = []
        for _ in range(start, end):
            point, accept = transition(run, point, adaptation.step_size, _leaps(leapfrog))
            adaptation.update(accept)
            found.append(point[0])
            bar.update()
        u, step_size = point[0] * scale, adaptation.average
        if start > 0 and end < warmup and len(found) * len(u) > 4:  # not where chains come from their starts
            scale = scale * _regularised(torch.stack(found))
            step_size = torch.full_like(step_size, _START)
    run = _scaled(density, scale)
    point = [u / scale, *run(u / scale)]
    kept = torch.empty(len(u), num_samples, *u.shape[1:], dtype=u.dtype, device=u.device)
    acceptance = u.new_zeros(u.shape[1])
    divergences = torch.zeros_like(acceptance)
    for i in range(num_samples):
        point, accept = transition(run, point, step_size, _leaps(leapfrog))
        kept[:, i] = point[0] * scale
        acceptance += accept.mean(0) / num_samples
        divergences += (accept == 0).sum(0)
        bar.update()
    return _Chains(kept, acceptance, divergences)


def _leaps(mean: int) -> int:
    return int(torch.randint(1, 2 * mean, ()))


def _scaled(density: Evaluate, scale: Tensor) -> Evaluate:
    """Return the density of u / scale with its gradient."""

    def run(v: Tensor) -> tuple[Tensor, Tensor]:
        log_p, gradient = density(v * scale)
        return log_p, gradient * scale

    return run


def _regularised(v: Tensor) -> Tensor:
    """Return standard deviations over ``[draws, chains, n, size]``, ``[n, size]``, drawn to 0.03 by few."""
    v = v.flatten(0, 1)
    share = len(v) / (len(v) + 5)
    return (share * v.var(0) + (1 - share) * 1e-3).sqrt()


# -- NUTS --------------------------------------------------------------------------------------------


class _Potential(torch.autograd.Function):
    """-log p at a point, whose gradient comes with it."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, run: Any) -> Tensor:
        log_p, gradient = run(v.detach().reshape(1, 1, -1))
        ctx.save_for_backward(gradient)
        return -log_p.reshape(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return -grads[0] * gradient.reshape(-1), None


def _nuts(
    density: Evaluate,
    u: Tensor,
    scale: Tensor,
    num_samples: int,
    warmup: int,
    key: tuple[int, ...],
    bar: Any,
) -> _Chains:
    """Run Pyro's NUTS for one datum, each chain ``[1, size]`` of ``u`` by itself."""
    run = _scaled(density, scale)
    found, acceptance, divergences = [], 0.0, 0
    last: dict[str, Any] = {}  # of a chain, which ends by forgetting it

    def hook(kernel: Any, *_: Any) -> None:
        last.update(acceptance=kernel._mean_accept_prob, divergences=kernel._divergences)
        bar.update()

    for chain, start in enumerate(u[:, 0] / scale[0]):
        with seeded(*key, chain), torch.enable_grad():
            kernel = NUTS(potential_fn=lambda params: _Potential.apply(params["v"], run))
            mcmc = MCMC(
                kernel,
                num_samples,
                warmup_steps=warmup,
                initial_params={"v": start.detach()},
                disable_progbar=True,
                transforms={},
                hook_fn=hook,
            )
            mcmc.run()
            found.append(mcmc.get_samples()["v"].detach() * scale[0])
            acceptance += float(last["acceptance"]) / len(u)
            divergences += len(last["divergences"])
    kept = torch.stack(found).unsqueeze(2)
    return _Chains(kept, kept.new_tensor([acceptance]), torch.tensor([divergences]))


# -- what comes out ----------------------------------------------------------------------------------


def _unflatten(latents: Latents, u: Tensor) -> dict[str, Tensor]:
    """Return the value of each site, ``[chains, draws, n, *event]``, in passes over draws."""
    size = max(1, _VALUES // max(1, u[:, 0].numel()))
    parts = [latents.unflatten(part) for part in u.split(size, 1)]
    return {site: torch.cat([part[site] for part in parts], 1) for site in parts[0]}


def _diagnose(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest R-hat and the smallest bulk ESS of each datum's dimensions, ``[n]`` each."""
    import numpy as np

    az = import_arviz()
    data = az.convert_to_dataset({"u": u.double().cpu().numpy()})
    with np.errstate(all="ignore"):  # chains that don't move have no R-hat
        r_hat = torch.from_numpy(az.rhat(data)["u"].to_numpy())
        ess = torch.from_numpy(az.ess(data)["u"].to_numpy())
    moves = (u.double().var((0, 1)) > 0).cpu()
    r_hat = torch.where(moves & ~r_hat.isnan(), r_hat, math.inf)
    return r_hat.amax(-1), torch.where(moves, ess, 0.0).nan_to_num(0.0).amin(-1)


def _warn(result: ReferencePosterior) -> None:
    if not (bad := int((~result.converged).sum())):
        return
    least = MIN_ESS_PER_CHAIN * result.num_chains
    apart = int((~(result.r_hat <= MAX_R_HAT)).sum())
    few = int((result.ess < least).sum())
    warn(
        f"reference_posterior: {bad} of {result.num_data} data have not converged: {apart} have an R-hat "
        f"above {MAX_R_HAT} (the largest is {float(result.r_hat.max()):.3f}), {few} a bulk ESS below {least} "
        f"(the smallest is {float(result.ess.min()):.0f}); take more num_samples, warmup or leapfrog steps"
    )
