"""Denoising: the posterior mean of clean data given noisy ones."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vae._checks import check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.evaluation.generation import likelihood_mean
from ppl_vae.infer.checking import is_fixed
from ppl_vae.infer.log_weights import per_datum_log_prob
from ppl_vae.infer.placing import place
from ppl_vae.infer.running import Program, evaluating
from ppl_vae.tasks._passes import (
    WeightedMoments,
    arguments,
    check_programs,
    event_sum,
    in_memory,
    log_ratio,
    mean_and_error,
    per_element,
    run_pair,
    sizes_of_passes,
    unmasked,
)

Noise = float | Callable[[Tensor], Any]


@dataclass(frozen=True, eq=False)
class Denoised:
    """Noisy data and the posterior mean of the clean ones.

    Attributes:
        noisy: the data, ``[n, *event]``.
        mean: the posterior mean, ``[n, *event]``.
        monte_carlo_error: the standard error of ``mean`` over new draws, ``[n, *event]``.
        effective_sample_size: of the importance weights, from 1 to K, ``[n]``. Where it is near 1, the mean
            rests on one draw: the guide is far from the posterior.
        num_particles: K, the draws per datum.
        clean: the clean data, ``[n, *event]``, or None where they are not known.
    """

    noisy: Tensor
    mean: Tensor
    monte_carlo_error: Tensor = field(repr=False)
    effective_sample_size: Tensor
    num_particles: int
    clean: Tensor | None = None

    def mean_squared_error(self, *, of_noisy: bool = False) -> Tensor:
        """Return each datum's mean squared error to the clean one, ``[n]``, float64.

        Args:
            of_noisy: that of the noisy data, to compare with.

        Raises:
            ValueError: if the clean data are not known.
        """
        if self.clean is None:
            raise ValueError(
                "clean: expected the clean data to compare with, got None; give them to `denoise`"
            )
        values = self.noisy if of_noisy else self.mean
        return (values - self.clean).double().square().reshape(len(values), -1).mean(1)

    def peak_signal_to_noise_ratio(self, *, peak: float = 1.0, of_noisy: bool = False) -> Tensor:
        """Return each datum's PSNR to the clean one, decibels, ``[n]``: infinite where they are the same.

        Args:
            peak: the largest value that data can have.
            of_noisy: that of the noisy data, to compare with.

        Raises:
            ValueError: if the clean data are not known.
        """
        peak = check_positive("peak", peak)
        return 20 * math.log10(peak) - 10 * self.mean_squared_error(of_noisy=of_noisy).log10()

    def summary(self) -> dict[str, Any]:
        """Return plain numbers, for a file: means and standard errors over data."""
        result: dict[str, Any] = {
            "num_data": len(self.noisy),
            "num_particles": self.num_particles,
            "effective_sample_size": float(self.effective_sample_size.mean()),
        }
        if self.clean is not None:
            for prefix, of_noisy in (("", False), ("noisy_", True)):
                for name, values in (
                    ("mean_squared_error", self.mean_squared_error(of_noisy=of_noisy)),
                    ("peak_signal_to_noise_ratio", self.peak_signal_to_noise_ratio(of_noisy=of_noisy)),
                ):
                    mean, error = mean_and_error(values)
                    result[prefix + name] = {"mean": mean, "standard_error": error}
        return result

    def __str__(self) -> str:
        summary = self.summary()
        lines = [
            f"{len(self.noisy)} data, K={self.num_particles}, "
            f"effective sample size {summary['effective_sample_size']:.1f}"
        ]
        if self.clean is not None:
            lines.append(f"{'':<10} {'mean squared error':>22} {'PSNR (dB, peak 1)':>20}")
            for label, prefix in (("noisy", "noisy_"), ("denoised", "")):
                mse = summary[f"{prefix}mean_squared_error"]
                psnr = summary[f"{prefix}peak_signal_to_noise_ratio"]
                lines.append(
                    f"{label:<10} {mse['mean']:>11.4g} +- {mse['standard_error']:<7.2g} "
                    f"{psnr['mean']:>12.2f} +- {psnr['standard_error']:.2f}"
                )
        return "\n".join(lines)


def denoise(
    model: Program,
    guide: Program,
    noisy: Any,
    *,
    clean: Tensor | None = None,
    noise: Noise | None = None,
    num_particles: int = 1000,
    inner_draws: int = 50,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Denoised:
    r"""Return the posterior mean of clean data, by self-normalised importance sampling with the guide.

    Without ``noise``, the likelihood is the model of the noise: the noisy data are the model's x, and the
    result is :math:`E[m(z) \mid x]` where m(z) is the likelihood's mean.

    With ``noise``, p(noisy | x), the clean data are the model's x and :math:`E[x \mid noisy]` is returned.
    The weights of z are :math:`p(z) \, p(noisy \mid z) / q(z \mid noisy)`, where x is integrated out element
    by element: in closed form for a normal likelihood and normal noise, by a sum over the values of
    a discrete one, else by ``inner_draws`` draws, which leaves the weights unbiased.

    The guide sees the noisy data. One that was trained on clean data is a worse proposal for them: look at
    the effective sample size.

    Args:
        model: program over the latent sites and the data, the site "x".
        guide: program over the latent sites, the importance sampler's proposal.
        noisy: what ``evaluate`` takes.
        clean: the clean data, ``[n, *event]``, to score the result with.
        noise: None; the standard deviation of normal noise; or a function from x to the distribution of the
            noisy data given x, element by element: ``lambda x: dist.Bernoulli(0.1 + 0.8 * x)`` flips a
            tenth of all bits.
        num_particles: K, the number of draws per datum.
        inner_draws: draws of each element of x for each draw of z, where there is no closed form.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        NotImplementedError: if the likelihood has no mean, without ``noise``.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 4), MeanFieldGuide(MLP(4), 2)
        >>> denoise(model, guide, torch.randn(6, 4), noise=0.5, progress=False).mean.shape
        torch.Size([6, 4])
    """
    num_particles = check_positive_int("num_particles", num_particles)
    inner_draws = check_positive_int("inner_draws", inner_draws)
    check_positive("memory", memory)
    check_seed(seed)
    if isinstance(noise, Real) or not (noise is None or callable(noise)):
        noise = check_positive("noise", noise)
    where = place(device, model, guide)
    with seeded(seed), evaluating(model, guide):
        split = in_memory(noisy, "noisy", where, seed)
        batch = arguments(model, split, "noisy")
        x = batch[0]
        if clean is not None:
            clean = _check_clean(clean, x)
        site = check_programs(model, guide, batch, "noisy", support=noise is None)
        if noise is not None:
            base = per_element(site["fn"])
            with pyro.validation_enabled(False):
                _conditional(base, x[:2], noise, inner_draws)
                _check_possible(noise, base.sample(), x)
        times = 1 if noise is None or isinstance(noise, float) else 2 + 2 * _values(site["fn"], inner_draws)
        size, chunk = sizes_of_passes(model, guide, batch, num_particles, memory, times)
        moments: list[WeightedMoments] = []
        bar = tqdm(total=len(x), unit="datum", desc="denoising", disable=not progress, dynamic_ncols=True)
        with pyro.validation_enabled(False), bar:
            for small in zip(*(t.split(size) for t in batch), strict=True):
                moments.append(WeightedMoments())
                for k in _chunks(num_particles, chunk):
                    _add(moments[-1], model, guide, small, k, noise, inner_draws)
                bar.update(len(small[0]))
    mean = torch.cat([m.mean for m in moments])
    if bool(mean.isnan().any()):
        row = int(mean.reshape(len(mean), -1).isnan().any(1).nonzero()[0])
        raise ValueError(
            f"noisy: all importance weights of datum {row} are 0; is it possible under the noise?"
        )
    return Denoised(
        x.cpu(),
        mean.to(x).cpu(),
        torch.cat([m.standard_error for m in moments]).to(x).cpu(),
        torch.cat([m.effective_sample_size for m in moments]).cpu(),
        num_particles,
        clean,
    )


def _add(
    moments: WeightedMoments,
    model: Program,
    guide: Program,
    batch: tuple[Tensor, ...],
    k: int,
    noise: Noise | None,
    inner_draws: int,
) -> None:
    """Add k draws for each datum of the batch."""
    model_trace, guide_trace = run_pair(model, guide, batch, k)
    weights, site = log_ratio(model_trace, guide_trace), model_trace.nodes["x"]
    if noise is None:
        moments.add(weights + per_datum_log_prob("x", site), likelihood_mean(model_trace))
        return
    log_prob, mean = _conditional(per_element(site["fn"]), batch[0], noise, inner_draws)
    moments.add(weights + unmasked(site, event_sum(log_prob, weights.dim())), mean)


def _conditional(base: Any, noisy: Tensor, noise: Noise, inner_draws: int) -> tuple[Tensor, Tensor]:
    """Return log p(noisy | z) and E[x | z, noisy] of each element, ``[*batch, *event]``.

    Args:
        base: p(x | z) of each element, ``[*batch, *event]``.
        noisy: ``[n, *event]``.
        noise: p(noisy | x).
        inner_draws: of each element, where there is no closed form.
    """
    if isinstance(noise, float) and isinstance(base, torch.distributions.Normal):
        variance, added = base.scale.square(), noise**2
        log_prob = dist.Normal(base.loc, (variance + added).sqrt()).log_prob(noisy)
        return log_prob, base.loc + variance / (variance + added) * (noisy - base.loc)
    if base.has_enumerate_support:
        x = base.enumerate_support(expand=False)  # [values, 1, ...]
        log_prior = base.log_prob(x)
    else:
        x = base.sample((inner_draws,))
        log_prior = x.new_full((), -math.log(inner_draws))
    log_joint = log_prior + _noise_log_prob(noise, x, noisy)
    log_prob = log_joint.logsumexp(0)
    weights = (log_joint - torch.where(log_prob.isfinite(), log_prob, 0.0)).exp()
    return log_prob, (weights * x).sum(0)


def _noise_log_prob(noise: Noise, x: Tensor, noisy: Tensor) -> Tensor:
    """Return log p(noisy | x) of each element."""
    if isinstance(noise, float):
        return dist.Normal(x, noise).log_prob(noisy)
    fn = noise(x)
    if not isinstance(fn, torch.distributions.Distribution):
        raise TypeError(f"noise: expected a function that returns a Distribution, got {type(fn).__name__}")
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    result: Tensor | None = None if fn.event_shape else fn.log_prob(noisy)
    if result is None or result.shape[-noisy.dim() :] != noisy.shape:
        raise ValueError(
            f"noise: expected a distribution for each element of x, of batch shape {list(x.shape)}, got "
            f"batch shape {list(fn.batch_shape)} and event shape {list(fn.event_shape)}"
        )
    return result


def _check_possible(noise: Noise, x: Tensor, noisy: Tensor) -> None:
    """Raise if noisy data are outside the support of the noise, where that is one for all x."""
    if isinstance(noise, float):
        return
    fn = noise(x)
    if not is_fixed(fn):
        return
    inside = fn.support.check(noisy).reshape(len(noisy), -1).all(1)
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        raise ValueError(f"noisy: datum {row} is outside the support of the noise, {fn.support}")


def _values(fn: Any, inner_draws: int) -> int:
    """Return for how many values of x the noise is computed."""
    base = per_element(fn)
    return len(base.enumerate_support(expand=False)) if base.has_enumerate_support else inner_draws


def _check_clean(clean: object, x: Tensor) -> Tensor:
    if not isinstance(clean, Tensor) or clean.shape != x.shape:
        got = f"shape {tuple(clean.shape)}" if isinstance(clean, Tensor) else type(clean).__name__
        raise ValueError(f"clean: expected a tensor of the noisy data's shape {tuple(x.shape)}, got {got}")
    if not bool(torch.isfinite(clean).all()):
        raise ValueError("clean: expected finite values, got NaN or infinite ones")
    return clean.detach().cpu().to(x.dtype)


def _chunks(total: int, most: int) -> list[int]:
    """Return how many draws each pass makes."""
    return [min(most, total - start) for start in range(0, total, most)]
