"""The log-likelihood of data, log p(x), with what says how far it can be trusted."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae._checks import check_choice, check_positive, check_positive_int, check_seed
from ppl_vae._warnings import warn
from ppl_vae.evaluation._annealing import Schedule, Start
from ppl_vae.evaluation._weights import effective_sample_size, estimate_of, log_mean_weight
from ppl_vae.evaluation.annealed_importance_sampling import annealed_importance_sampling
from ppl_vae.evaluation.evaluate import Estimate, passes
from ppl_vae.evaluation.pareto import LEAST_TAIL, pareto_k_hat, tail_size
from ppl_vae.infer.log_weights import log_weights
from ppl_vae.infer.running import Program

RELIABLE = 0.7  # the largest k-hat


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """What ``log_likelihood`` measured.

    Attributes:
        log_likelihood: log p(x) of each datum, in expectation a lower bound.
        k_hat: the tail shape of each datum's weights, ``[n]``, float64: above 0.7 the estimate is unreliable,
            infinite where there are too few draws to tell, minus infinite where all weights are equal.
        ess: the effective sample size of each datum's weights, ``[n]``, between 1 and ``num_particles``.
        num_particles: K, weights per datum: draws of the guide, or annealed chains.
        method: ``"importance"`` or ``"ais"``.
    """

    log_likelihood: Estimate
    k_hat: Tensor = field(repr=False)
    ess: Tensor = field(repr=False)
    num_particles: int
    method: Literal["importance", "ais"]

    @property
    def num_unreliable(self) -> int:
        """How many data have a k-hat above 0.7, or one that can't be told."""
        return int((self.k_hat > RELIABLE).sum())

    @property
    def _has_tail(self) -> bool:
        return tail_size(self.num_particles) >= LEAST_TAIL

    def summary(self) -> dict[str, Any]:
        """Return means, errors and diagnostics as plain numbers, for a file; k-hat where it can be told."""
        found: dict[str, Any] = {
            "num_data": len(self.k_hat),
            "num_particles": self.num_particles,
            "method": self.method,
            "log_likelihood": {
                "mean": self.log_likelihood.mean,
                "standard_error": self.log_likelihood.standard_error,
                "monte_carlo_error": self.log_likelihood.monte_carlo_error,
            },
            "ess_mean": float(self.ess.mean()),
        }
        if self._has_tail:
            found |= {"k_hat_median": float(self.k_hat.median()), "num_unreliable": self.num_unreliable}
        return found

    def __str__(self) -> str:
        n = len(self.k_hat)
        rows = [
            (f"log p(x), K={self.num_particles}", f"{self.log_likelihood}"),
            ("Monte Carlo error", f"{self.log_likelihood.monte_carlo_error:.3f}"),
            ("effective sample size", f"{float(self.ess.mean()):.1f}"),
        ]
        if self._has_tail:
            rows += [
                ("k-hat, median", f"{float(self.k_hat.median()):.2f}"),
                (f"k-hat above {RELIABLE}", f"{self.num_unreliable} of {n}"),
            ]
        head = f"nats per datum, mean and standard error over {n} data; {_METHODS[self.method]}"
        return "\n".join([head, *(f"{name:<24} {text:>18}" for name, text in rows)])


_METHODS = {"importance": "importance sampling", "ais": "annealed importance sampling"}


def log_likelihood(
    model: Program,
    guide: Program | None,
    data: Any,
    *,
    num_particles: int = 1000,
    method: Literal["importance", "ais"] = "importance",
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
) -> LogLikelihood:
    r"""Measure log p(x) of each datum, by importance sampling from the guide or annealed chains.

    Importance sampling takes K draws of the guide and the log of their mean weight. It is quick, and too low
    where the guide is narrower than the posterior: the Pareto k-hat of the weights tells, and a warning says
    how many data have one above 0.7. A mode that no draw has found shows in neither. Annealed importance
    sampling needs no guide, continuous latents and much more time.

    Args:
        model: program over the latent sites and the data.
        guide: program over the same latent sites, the proposal; may be None for ``"ais"`` from the prior.
        data: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch ``Dataset`` or
            ``DataLoader``.
        num_particles: K, draws per datum, for ``"importance"``; k-hat needs 21 or more.
        method: ``"importance"``, or ``"ais"`` for ``annealed_importance_sampling``.
        num_temperatures: for ``"ais"``, as there.
        num_chains: likewise.
        leapfrog: likewise.
        schedule: likewise.
        start: likewise.
        target_acceptance: likewise.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Warns:
        UserWarning: how many data have an unreliable estimate, and what to do.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519;
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), arXiv:1507.02646

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(1, 2, scale=3.0), MeanFieldGuide(MLP(2), 1)
        >>> result = log_likelihood(model, guide, torch.zeros(4, 2), num_particles=200, progress=False)
        >>> result.k_hat.shape, result.ess.shape
        (torch.Size([4]), torch.Size([4]))
    """
    check_choice("method", method, ("importance", "ais"))
    if method == "ais":
        annealed = annealed_importance_sampling(
            model,
            guide,
            data,
            num_temperatures=num_temperatures,
            num_chains=num_chains,
            leapfrog=leapfrog,
            schedule=schedule,
            start=start,
            target_acceptance=target_acceptance,
            memory=memory,
            device=device,
            seed=seed,
            progress=progress,
        )
        k_hat = pareto_k_hat(annealed.log_weights)
        return LogLikelihood(annealed.log_likelihood, k_hat, annealed.ess, num_chains, "ais")
    if guide is None:
        raise ValueError(
            "guide: expected the proposal of method='importance', got None; method='ais' needs none"
        )
    num_particles = check_positive_int("num_particles", num_particles)
    check_positive("memory", memory)
    check_seed(seed)
    result = _by_importance(model, guide, data, num_particles, memory, device, seed, progress)
    _warn_of_unreliable(result)
    return result


def _by_importance(
    model: Program,
    guide: Program,
    data: Any,
    num_particles: int,
    memory: float,
    device: str | torch.device | None,
    seed: int,
    progress: bool,
) -> LogLikelihood:
    values, variances, k_hat, ess = [], [], [], []
    with passes(model, guide, data, num_particles, memory, device, seed, progress) as (size, chunk, batches):
        # the weights of a pass are kept, in the few copies that the fit of their tail takes
        size = max(1, min(size, int(memory // (64 * num_particles))))
        for small in batches(size):
            weights = _log_weights(model, guide, small, num_particles, chunk)
            value, variance = log_mean_weight(weights)
            values.append(value)
            variances.append(variance)
            k_hat.append(pareto_k_hat(weights))
            ess.append(effective_sample_size(weights))
    return LogLikelihood(
        estimate_of(values, variances, num_particles),
        torch.cat(k_hat).cpu(),
        torch.cat(ess).cpu(),
        num_particles,
        "importance",
    )


def _log_weights(
    model: Program, guide: Program, batch: tuple[Tensor, ...], num_particles: int, chunk: int
) -> Tensor:
    """Return log weights ``[K, n]``, float64, from chunks of draws."""
    sizes = [min(chunk, num_particles - done) for done in range(0, num_particles, chunk)]
    return torch.cat([log_weights(model, guide, *batch, num_particles=k).double() for k in sizes])


def _warn_of_unreliable(result: LogLikelihood) -> None:
    n, draws = len(result.k_hat), result.num_particles
    if not result._has_tail:
        warn(
            f"log_likelihood: {draws} draws are too few to tell whether the estimates are reliable; k-hat "
            "needs num_particles=21 or more"
        )
    elif count := result.num_unreliable:
        warn(
            f"log_likelihood: unreliable, and likely too low, for {count} of {n} data, whose weights have a "
            f"Pareto k-hat above {RELIABLE}; take more num_particles, a wider guide or method='ais'"
        )
