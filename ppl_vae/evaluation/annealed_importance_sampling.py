"""Annealed importance sampling: log p(x) where the guide is too far from the posterior."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vae._checks import check_choice, check_positive, check_seed
from ppl_vae._random import seeded
from ppl_vae.data import Split
from ppl_vae.evaluation._annealing import (
    Annealing,
    Schedule,
    Start,
    bound_of,
    check_settings,
    data_per_pass,
    inverse_temperatures,
)
from ppl_vae.evaluation._latents import Latents, no_guide
from ppl_vae.evaluation._weights import effective_sample_size
from ppl_vae.evaluation.evaluate import Estimate
from ppl_vae.infer.checking import check_all, checked_batches, first_batch, running_on
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.running import Program, check_pair, evaluating, trace_pair


@dataclass(frozen=True, eq=False)
class AnnealedImportanceSampling:
    """What ``annealed_importance_sampling`` measured.

    Attributes:
        log_likelihood: log p(x) of each datum, a bound in expectation.
        bound: ``"lower"``, of forward chains, or ``"upper"``, of reverse ones.
        log_weights: of each chain, ``[num_chains, n]``. A forward chain's weight has the mean p(x), the
            inverse of a reverse one's has the mean 1 / p(x).
        acceptance: the mean acceptance of each datum's transitions, ``[n]``; NaN for one temperature.
        num_chains: C.
        num_temperatures: T.
        leapfrog: steps of a transition.
    """

    log_likelihood: Estimate
    bound: Literal["lower", "upper"]
    log_weights: Tensor = field(repr=False)
    acceptance: Tensor = field(repr=False)
    num_chains: int
    num_temperatures: int
    leapfrog: int

    @property
    def ess(self) -> Tensor:
        """The effective sample size of each datum's chains, ``[n]``, between 1 and C."""
        return effective_sample_size(-self.log_weights if self.bound == "upper" else self.log_weights)

    def summary(self) -> dict[str, Any]:
        """Return means and errors as plain numbers, for a file."""
        return {
            "num_data": len(self.acceptance),
            "num_chains": self.num_chains,
            "num_temperatures": self.num_temperatures,
            "leapfrog": self.leapfrog,
            "bound": self.bound,
            "log_likelihood": {
                "mean": self.log_likelihood.mean,
                "standard_error": self.log_likelihood.standard_error,
                "monte_carlo_error": self.log_likelihood.monte_carlo_error,
            },
            "acceptance": float(self.acceptance.mean()),
            "ess": float(self.ess.mean()),
        }

    def __str__(self) -> str:
        rows = [
            (f"log p(x), {self.bound} bound", f"{self.log_likelihood}"),
            ("Monte Carlo error", f"{self.log_likelihood.monte_carlo_error:.3f}"),
            ("acceptance", f"{float(self.acceptance.mean()):.2f}"),
            ("ESS of the chains", f"{float(self.ess.mean()):.1f} of {self.num_chains}"),
        ]
        head = (
            f"nats per datum, mean and standard error over {len(self.acceptance)} data; "
            f"{self.num_temperatures} temperatures, {self.num_chains} chains"
        )
        return "\n".join([head, *(f"{name:<24} {text:>18}" for name, text in rows)])


def annealed_importance_sampling(
    model: Program,
    guide: Program | None,
    data: Any,
    *,
    num_temperatures: int = 1000,
    num_chains: int = 16,
    leapfrog: int = 10,
    schedule: Schedule = "sigmoidal",
    start: Start = "prior",
    direction: Literal["forward", "reverse"] = "forward",
    draws: Mapping[str, Tensor] | None = None,
    target_acceptance: float = 0.65,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AnnealedImportanceSampling:
    r"""Measure log p(x) by annealed importance sampling, with Hamiltonian Monte Carlo on all latents.

    Chains start at draws of the prior (or the guide), with density :math:`f_0`, and go through
    :math:`f_0(z)^{1 - \beta} \, p(x, z)^\beta` as beta rises to 1. The mean weight of the chains is unbiased
    for p(x), so its log is a lower bound in expectation that rises to log p(x) with temperatures and chains.

    Transitions have step sizes of their own for each temperature and datum. A quarter as many chains find
    them, in a run before by the rule of Wu et al. (a step is 2 % longer after acceptance), and they are
    frozen, so that adaptation biases nothing; each transition takes one up to 20 % longer or shorter, at
    random. Latents with constraints move in unconstrained space.

    Args:
        model: program over continuous latent sites and the data.
        guide: program over the same latent sites, for ``start="guide"``; may be None.
        data: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch ``Dataset`` or
            ``DataLoader``.
        num_temperatures: T, the steps of beta from 0 to 1.
        num_chains: C, for each datum.
        leapfrog: steps of a transition, a gradient each; a chain costs T times as many.
        schedule: of beta: ``"sigmoidal"``, with small steps near 0 and 1, or ``"linear"``.
        start: ``"prior"``, or ``"guide"``, which must be able to score any z.
        direction: ``"forward"``; or ``"reverse"``, from exact posterior draws back to the start, for an upper
            bound: exact draws are known for data of the model's own alone, see
            ``bidirectional_monte_carlo``.
        draws: for ``"reverse"``, an exact posterior draw of each latent site for each datum,
            ``[n, *event]``, or ``[num_chains, n, *event]``.
        target_acceptance: what step sizes aim at.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of all draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; a latent site that is
            discrete is named.

    References:
        Annealed Importance Sampling (Neal, 2001), arXiv:physics/9803008;
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017), arXiv:1611.04273

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> result = annealed_importance_sampling(
        ...     LinearGaussian(2, 5), None, torch.randn(4, 5), num_temperatures=20, num_chains=4, leapfrog=3,
        ...     progress=False,
        ... )
        >>> result.log_weights.shape
        torch.Size([4, 4])
    """
    betas = inverse_temperatures(num_temperatures, schedule)
    check_settings(guide, num_chains, leapfrog, start, target_acceptance)
    check_choice("direction", direction, ("forward", "reverse"))
    check_positive("memory", memory)
    check_seed(seed)
    reverse = direction == "reverse"
    if reverse != (draws is not None):
        raise ValueError(
            "draws: expected exact posterior draws of all latent sites for direction='reverse', got None"
            if reverse
            else "draws: expected none for direction='forward', whose chains start elsewhere"
        )
    programs = [model] if guide is None else [model, guide]
    where = place(device, *programs)
    data = prepare_data(data, "data", where)
    if draws is not None:
        if not isinstance(data, Split) or data.dynamic:
            got = "bits that are drawn anew" if isinstance(data, Split) else "a loader"
            raise TypeError(f"data: expected tensors for direction='reverse', got {got}")
        if not isinstance(draws, Mapping):
            raise TypeError(f"draws: expected a mapping of sites to draws, got {type(draws).__name__}")
    starts = guide if start == "guide" else None
    found: list[tuple[Tensor, Tensor]] = []
    with (
        seeded(seed),
        evaluating(*programs),
        tqdm(unit="temperature", desc="AIS", disable=not progress, dynamic_ncols=True) as bar,
    ):
        first = first_batch(model, data, "data", 2, where)
        with running_on("data", first):
            if starts is not None:
                check_pair(*trace_pair(model, starts, *first), first)
            size = data_per_pass(model, starts, first, num_chains, memory)
        observed = check_all(model, starts or no_guide, data, "data", where)
        if isinstance(data, Split):
            passes = math.ceil(len(data) / size)
            size = math.ceil(len(data) / passes)  # in equal parts
            bar.reset(total=2 * num_temperatures * passes)
        given = None if draws is None else _check_draws(draws, Latents(model, first), len(data), num_chains)
        done = 0
        with pyro.validation_enabled(False):
            for small in checked_batches(model, data, observed, size, where):
                latents = Latents(model, small)
                exact = None if given is None else _rows(latents, given, done)
                annealing = Annealing(
                    latents,
                    starts,
                    betas=betas,
                    leapfrog=leapfrog,
                    target=target_acceptance,
                    num_chains=num_chains,
                    tick=bar.update,
                )
                found.append(annealing.forward() if exact is None else annealing.reverse(exact))
                done += latents.n
    log_weights = torch.cat([part[0] for part in found], 1).cpu()
    return AnnealedImportanceSampling(
        log_likelihood=bound_of(log_weights, reverse=reverse),
        bound="upper" if reverse else "lower",
        log_weights=log_weights,
        acceptance=torch.cat([part[1] for part in found]).cpu(),
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        leapfrog=leapfrog,
    )


def _rows(latents: Latents, draws: Mapping[str, Tensor], first: int) -> Tensor:
    """Return the draws for the data of a pass, unconstrained, or raise."""
    u = latents.flatten({name: z[:, first : first + latents.n] for name, z in draws.items()})
    if not bool(u.isfinite().all()):
        raise ValueError("draws: expected values inside the supports of their sites, got others or NaN")
    return u


def _check_draws(draws: Mapping[str, Tensor], latents: Latents, n: int, num_chains: int) -> dict[str, Tensor]:
    """Return draws of all latent sites, ``[num_chains, n, *event]``, or raise."""
    if draws.keys() != latents.shapes.keys():
        raise ValueError(
            f"draws: expected the model's latent sites {sorted(latents.shapes)}, got {sorted(draws)}"
        )
    drawn = latents.unflatten(latents.draw_prior(1))
    result = {}
    for name, z in draws.items():
        event = drawn[name].shape[2:]
        if not isinstance(z, Tensor):
            raise TypeError(f"draws: site {name!r}: expected a tensor, got {type(z).__name__}")
        if z.shape not in ((n, *event), (num_chains, n, *event)):
            raise ValueError(
                f"draws: site {name!r}: expected shape {[n, *event]} or {[num_chains, n, *event]}, "
                f"got {list(z.shape)}"
            )
        result[name] = z.detach().to(drawn[name]).expand(num_chains, n, *event)
    return result
