"""Comparison of guides of one model: bounds, importance weights, and distances from the posterior itself."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vae._checks import check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.evaluation._latents import Latents
from ppl_vae.evaluation._weights import effective_sample_size, estimate_of, log_mean_weight
from ppl_vae.evaluation.distances import median_distance, sliced_wasserstein, squared_mmd
from ppl_vae.evaluation.evaluate import CPU_ROWS, Estimate, pass_size
from ppl_vae.evaluation.log_likelihood import RELIABLE
from ppl_vae.evaluation.pareto import pareto_k_hat
from ppl_vae.evaluation.reference_posterior import ReferencePosterior, gather
from ppl_vae.infer.log_weights import PARTICLE_DIM, Terms, terms, terms_of_sites
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.running import (
    Program,
    check_pair,
    evaluating,
    latent_sites,
    observed_sites,
    trace_pair,
)

if TYPE_CHECKING:
    import pandas as pd

COVERAGES = (0.5, 0.9)
_FREEDOM = 5  # of the Student t that log p(x) is importance-sampled with
_FROM_REFERENCE = "the reference"


@dataclass(frozen=True, eq=False)
class GuideComparison:
    r"""What ``compare_guides`` measured.

    The columns of ``table``, means over data, each with its standard error over data in ``<column>_se``.
    Those from ``sliced_wasserstein`` on need a reference. Each latent dimension of a datum is divided by the
    reference's standard deviation there, so that all dimensions count alike.

    =====================  ================================================================================
    elbo                   nats per datum
    log_likelihood         log p(x), importance-sampled with the guide's draws, nats per datum
    inference_gap          the best log p(x), which is ``log_likelihood`` of the comparison, minus ELBO:
                           KL(q(z | x) || p(z | x)), nats per datum
    k_hat                  Pareto shape of the importance weights, over data where it is finite
    k_hat_above            share of data whose k-hat is above 0.7: their weights are not to be trusted
    ess_share              effective sample size of the importance weights over their number
    sliced_wasserstein     sliced Wasserstein-2 distance from the reference, in its standard deviations
    squared_mmd            unbiased squared maximum mean discrepancy, Gaussian kernel, bandwidth the median
                           distance of the reference's draws
    mean_error             root mean square over dimensions of the means' difference, over the reference's
                           standard deviations
    sd_error               root mean square over dimensions of the ratio of standard deviations minus 1
    coverage_50            share of the reference's draws in the guide's central 50 % intervals, mean over
                           dimensions: below 0.5 if the guide is too narrow
    coverage_90            the same of 90 %
    =====================  ================================================================================

    Attributes:
        table: one row per guide, the index ``"guide"`` holds the names.
        values: for each guide the columns for each datum, ``[n]`` each; but ``k_hat_above``.
        log_likelihood: the best estimate of log p(x). Each is a lower bound in expectation: the best is that
            whose mean over data, less two Monte Carlo errors, is the highest.
        proposal: whose draws that is from: a guide's name, or ``"the reference"``: a Student t of the
            reference's means and covariances.
        noise: ``sliced_wasserstein`` and ``squared_mmd`` of one half of the reference's draws from the other,
            ``[n]`` each, which no guide can be expected to be below; empty without a reference.
        num_data: n.
        num_particles: K, draws of each guide for each datum.
        seed: of the draws.
    """

    table: "pd.DataFrame" = field(repr=False)
    values: dict[str, dict[str, Tensor]] = field(repr=False)
    log_likelihood: Estimate
    proposal: str
    noise: dict[str, Tensor] = field(repr=False)
    num_data: int
    num_particles: int
    seed: int

    def summary(self) -> dict[str, Any]:
        """Return the table and the best log p(x) as plain numbers, for a file."""
        guides = {
            str(name): {column: float(value) for column, value in row.items()}
            for name, row in self.table.to_dict("index").items()
        }
        return {
            "num_data": self.num_data,
            "num_particles": self.num_particles,
            "seed": self.seed,
            "log_likelihood": {
                "mean": self.log_likelihood.mean,
                "standard_error": self.log_likelihood.standard_error,
                "monte_carlo_error": self.log_likelihood.monte_carlo_error,
                "proposal": self.proposal,
            },
            "noise": {name: float(value.mean()) for name, value in self.noise.items()},
            "guides": guides,
        }

    def __str__(self) -> str:
        import pandas as pd

        shown = [
            ("elbo", "ELBO", ".2f"),
            ("log_likelihood", "log p(x)", ".2f"),
            ("inference_gap", "gap", ".3f"),
            ("k_hat", "k-hat", ".2f"),
            ("k_hat_above", "> 0.7", ".0%"),
            ("ess_share", "ESS", ".0%"),
            ("sliced_wasserstein", "SW2", ".3f"),
            ("squared_mmd", "MMD²", ".4f"),
            ("mean_error", "mean error", ".3f"),
            ("sd_error", "sd error", ".3f"),
            ("coverage_50", "in 50 %", ".0%"),
            ("coverage_90", "in 90 %", ".0%"),
        ]
        columns: dict[str, list[str]] = {}
        for column, heading, form in shown:
            if column not in self.table:
                continue
            pairs = zip(self.table[column], self.table[f"{column}_se"], strict=True)
            errors = column in ("elbo", "log_likelihood", "inference_gap")
            columns[heading] = [
                f"{value:z{form}}" + (f" ±{error:.2g}" if errors and not math.isnan(error) else "")
                for value, error in pairs
            ]
        printed = pd.DataFrame(columns, index=pd.Index(list(map(str, self.table.index))))
        lines = [
            f"means over {self.num_data} data, {self.num_particles} draws of each; bounds in nats, "
            "± standard error over data",
            printed.to_string(line_width=10_000),
            f"log p(x) for the gap: {self.log_likelihood.mean:.2f} with draws of {self.proposal}",
        ]
        if self.noise:
            noise = {name: float(value.mean()) for name, value in self.noise.items()}
            lines.append(
                "halves of the reference from each other: "
                f"SW2 {noise['sliced_wasserstein']:.3f}, MMD² {noise['squared_mmd']:z.4f}"
            )
        return "\n".join(lines)


def compare_guides(
    model: Program,
    guides: Mapping[str, Program],
    data: Any,
    *,
    reference: ReferencePosterior | None = None,
    num_particles: int = 1000,
    num_projections: int = 100,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> GuideComparison:
    """Measure how near guides of one model come to its posterior, on the same data.

    Runs all programs in evaluation mode; no parameter, buffer or random stream of the caller changes. The
    draws of each guide start from the same seed. Any programs over the model's latent sites will do.

    Args:
        model: program over the latent sites and the data.
        guides: programs over the latent sites, by name.
        data: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch ``Dataset`` or
            ``DataLoader``.
        reference: what ``reference_posterior`` returned for the same model and data; None to do without.
        num_particles: K, the number of draws of each guide for each datum, at least 2. k-hat needs some 25.
        num_projections: directions of the sliced Wasserstein distance.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; for a guide, its name,
            before any is measured.

    References:
        Yes, but Did It Work?: Evaluating Variational Inference (Yao et al., 2018), arXiv:1802.02538
        Inference Suboptimality in Variational Autoencoders (Cremer et al., 2018), arXiv:1801.03558

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import FullRankGuide, MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model = LinearGaussian(2, 5)
        >>> guides = {"mean field": MeanFieldGuide(MLP(5), 2), "full rank": FullRankGuide(MLP(5), 2)}
        >>> result = compare_guides(model, guides, torch.randn(20, 5), num_particles=50, progress=False)
        >>> list(result.table.index), result.values["full rank"]["inference_gap"].shape
        (['mean field', 'full rank'], torch.Size([20]))
    """
    import pandas as pd

    named = _check_guides(guides)
    if not callable(model):
        raise TypeError(f"model: expected a module or a function, got {model!r}")
    if reference is not None and not isinstance(reference, ReferencePosterior):
        raise TypeError(f"reference: expected a ReferencePosterior or None, got {type(reference).__name__}")
    if check_positive_int("num_particles", num_particles) < 2:
        raise ValueError(f"num_particles: expected at least 2, got {num_particles!r}")
    check_positive_int("num_projections", num_projections)
    check_positive("memory", memory)
    check_seed(seed)
    where = place(device, model, *named.values())
    prepared = prepare_data(data, "data", where)
    batch = _gather(model, named, prepared, where, seed)
    n = len(batch[0])
    start = tuple(t[:2] for t in batch)
    with seeded(seed), evaluating(model, *named.values()):
        for name, guide in named.items():
            with _naming(name):
                traces = trace_pair(model, guide, *start)
                check_pair(*traces, start)
    if reference is not None:
        _check_reference(reference, batch, list(latent_sites(traces[0])))
    found: dict[str, dict[str, Tensor]] = {}
    candidates: dict[str, tuple[Tensor, Tensor]] = {}
    total = n * (len(named) + (reference is not None))
    noise: dict[str, Tensor] = {}
    with (
        evaluating(model, *named.values()),
        pyro.validation_enabled(False),
        tqdm(total=total, unit="datum", disable=not progress, dynamic_ncols=True) as bar,
    ):
        if reference is not None:
            bar.set_description("reference")
            with seeded(seed, 1):
                measured = _measure_reference(model, reference, batch, num_particles, num_projections, bar)
            candidates[_FROM_REFERENCE] = measured.pop("log_likelihood"), measured.pop("variance")
            noise = measured
        for name, guide in named.items():
            bar.set_description(name)
            with seeded(seed, 0), _naming(name):
                measured = _measure(
                    model, guide, batch, reference, num_particles, num_projections, memory, bar
                )
            candidates[name] = measured["log_likelihood"], measured.pop("variance")
            found[name] = measured
    proposal = max(candidates, key=lambda name: _at_least(*candidates[name]))
    best, variance = candidates[proposal]
    rows = []
    for values in found.values():
        values["inference_gap"] = best - values["elbo"]
        rows.append(_row(values))
    return GuideComparison(
        pd.DataFrame(rows, index=pd.Index(list(named), name="guide")),
        {name: {column: values[column] for column in _order(values)} for name, values in found.items()},
        estimate_of([best], [variance], num_particles),
        proposal,
        noise,
        n,
        num_particles,
        seed,
    )


def _check_guides(guides: Any) -> dict[str, Program]:
    if not isinstance(guides, Mapping):
        raise TypeError(f"guides: expected a mapping of names to guides, got {type(guides).__name__}")
    if not guides:
        raise ValueError("guides: expected at least one, got none")
    for name, guide in guides.items():
        if not isinstance(name, str):
            raise TypeError(f"guides: expected names that are strings, got {name!r}")
        if not callable(guide):
            raise TypeError(f"guides: {name!r}: expected a module or a function, got {guide!r}")
    return dict(guides)


def _check_reference(reference: ReferencePosterior, batch: tuple[Tensor, ...], sites: list[str]) -> None:
    """Raise unless the reference is of these data and latents."""
    if reference.num_data != len(batch[0]):
        raise ValueError(
            f"reference: expected draws for the {len(batch[0])} data, got those for {reference.num_data}"
        )
    same = len(batch) == len(reference.data) and all(
        torch.equal(a.cpu(), b) for a, b in zip(batch, reference.data, strict=True)
    )
    if not same:
        raise ValueError(
            "reference: expected draws for the same data in the same order, got those for others; bits of "
            "a dynamic split are the same for the same seed"
        )
    if sorted(sites) != sorted(reference.draws):
        raise ValueError(
            f"reference: expected the model's latent sites {sorted(sites)}, got {sorted(reference.draws)}"
        )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let what goes wrong with a guide name it."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        reason = (str(error).splitlines() or [type(error).__name__])[0].removeprefix("guide: ")
        raise kind(f"guides: {name!r}: {reason}") from error


def _gather(
    model: Program, named: Mapping[str, Program], data: Any, where: torch.device, seed: int
) -> tuple[Tensor, ...]:
    """Return all data as the model's arguments, checked against the programs."""
    name, guide = next(iter(named.items()))
    try:
        return gather(model, guide, data, where, seed)
    except (ValueError, TypeError) as error:
        if str(error).startswith(("data", "model")):
            raise
        with _naming(name):
            raise


def _order(values: Mapping[str, Tensor]) -> list[str]:
    columns = ["elbo", "log_likelihood", "inference_gap"]
    return columns + [column for column in values if column not in columns]


def _row(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return means and standard errors over data."""
    row: dict[str, float] = {}
    for column in _order(values):
        value = values[column]
        if column == "k_hat":
            finite = value[value.isfinite()]
            row |= _mean(column, finite if len(finite) else value)
            row |= _mean("k_hat_above", (value > RELIABLE).double())
        else:
            row |= _mean(column, value)
    return row


def _at_least(log_likelihood: Tensor, variance: Tensor) -> float:
    """Return the mean over data less two Monte Carlo errors."""
    estimate = estimate_of([log_likelihood], [variance], 0)
    value = estimate.mean - 2 * estimate.monte_carlo_error
    return -math.inf if math.isnan(value) else value


def _mean(column: str, value: Tensor) -> dict[str, float]:
    error = float(value.std() / math.sqrt(len(value))) if len(value) > 1 else math.nan
    return {column: float(value.mean()), f"{column}_se": error}


# -- one guide ---------------------------------------------------------------------------------------


def _measure(
    model: Program,
    guide: Program,
    batch: tuple[Tensor, ...],
    reference: ReferencePosterior | None,
    num_particles: int,
    num_projections: int,
    memory: float,
    bar: Any,
) -> dict[str, Tensor]:
    """Return each column for each datum, ``[n]``, and the variance of log p(x)."""

    def run(n: int, k: int) -> Terms:
        return terms(model, guide, *(t[:n] for t in batch), num_particles=k)

    rows = CPU_ROWS if batch[0].device.type == "cpu" else sys.maxsize
    size, chunk = pass_size(memory, num_particles, rows, run)
    parts = []
    for i, small in enumerate(zip(*(t.split(size) for t in batch), strict=True)):
        log_w, draws = _run(model, guide, small, num_particles, chunk, reference is not None)
        part = _from_weights(log_w)
        part = {"elbo": log_w.mean(0), "log_likelihood": part.pop("log_likelihood")} | part
        if reference is not None:
            rows_here = slice(i * size, i * size + len(small[0]))
            flat = _side_by_side([draws[site] for site in reference.draws])
            part |= _against(_flat(reference, rows_here, flat.device), flat, num_projections)
        parts.append(part)
        bar.update(len(small[0]))
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _run(
    model: Program, guide: Program, batch: tuple[Tensor, ...], num_particles: int, chunk: int, keep: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log weights ``[K, n]`` and, to keep, the model's latents ``[K, n, *event]``."""
    log_weights: list[Tensor] = []
    draws: dict[str, list[Tensor]] = {}
    while (left := num_particles - sum(map(len, log_weights))) > 0:
        k = min(chunk, left)
        plate = pyro.plate("num_particles", k, dim=PARTICLE_DIM)
        model_trace, guide_trace = trace_pair(plate(model), plate(guide), *batch)
        sites = latent_sites(model_trace)
        found = terms_of_sites(sites | observed_sites(model_trace), latent_sites(guide_trace))
        log_weights.append(found.log_weights().double().expand(k, len(batch[0])))
        for name, site in sites.items() if keep else ():
            event = site["value"].shape[site["value"].dim() - len(site["fn"].event_shape) :]
            draws.setdefault(name, []).append(site["value"].expand(k, len(batch[0]), *event))
    return torch.cat(log_weights), {name: torch.cat(values) for name, values in draws.items()}


def _from_weights(log_w: Tensor) -> dict[str, Tensor]:
    """Return what is made of log weights ``[K, n]``, ``[n]`` each."""
    log_likelihood, variance = log_mean_weight(log_w)
    return {
        "log_likelihood": log_likelihood,
        "variance": variance,
        "k_hat": pareto_k_hat(log_w),
        "ess_share": effective_sample_size(log_w) / len(log_w),
    }


def _against(reference: Tensor, draws: Tensor, num_projections: int) -> dict[str, Tensor]:
    """Return distances of draws ``[K, n, d]`` from a reference ``[S, n, d]``, ``[n]`` each."""
    mean, sd = reference.mean(0), _sd(reference)
    reference, draws = (reference - mean) / sd, (draws - mean) / sd
    result = {
        **_distances(_thinned(reference, len(draws)), draws, num_projections),
        "mean_error": draws.mean(0).square().mean(-1).sqrt(),
        "sd_error": (draws.std(0) - 1).square().mean(-1).sqrt(),
    }
    ordered = draws.sort(0).values
    for share in COVERAGES:
        low, high = _quantile(ordered, (1 - share) / 2), _quantile(ordered, (1 + share) / 2)
        inside = (reference >= low) & (reference <= high)
        result[f"coverage_{100 * share:.0f}"] = inside.double().mean((0, -1))
    return result


def _distances(reference: Tensor, draws: Tensor, num_projections: int) -> dict[str, Tensor]:
    """Return both distances of draws ``[K, n, d]`` from a reference ``[S, n, d]``, ``[n]`` each."""
    x, y = reference.transpose(0, 1), draws.transpose(0, 1)
    width = median_distance(x)
    return {
        "sliced_wasserstein": sliced_wasserstein(x, y, num_projections=num_projections),
        "squared_mmd": squared_mmd(x, y, bandwidth=torch.where(width > 0, width, 1.0)),
    }


def _flat(reference: ReferencePosterior, rows: slice, device: torch.device) -> Tensor:
    """Return the reference's draws of some data, all sites side by side, ``[S, n, d]``."""
    sites = [draws[:, :, rows].flatten(0, 1) for draws in reference.draws.values()]
    return _side_by_side(sites).to(device)


def _side_by_side(sites: Sequence[Tensor]) -> Tensor:
    """Return draws ``[S, n, *event]`` of several sites as ``[S, n, d]``."""
    return torch.cat([draws.reshape(*draws.shape[:2], -1).double() for draws in sites], -1)


def _sd(draws: Tensor) -> Tensor:
    sd = draws.std(0)
    return torch.where(sd > 0, sd, 1.0)


def _thinned(draws: Tensor, most: int) -> Tensor:
    """Return at most so many draws, evenly spaced."""
    if len(draws) <= most:
        return draws
    return draws[torch.linspace(0, len(draws) - 1, most, device=draws.device).long()]


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Return a quantile of draws in order, interpolated; ``torch.quantile`` takes 2^24 numbers at most."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], place - low)


# -- the reference -----------------------------------------------------------------------------------


def _measure_reference(
    model: Program,
    reference: ReferencePosterior,
    batch: tuple[Tensor, ...],
    num_particles: int,
    num_projections: int,
    bar: Any,
) -> dict[str, Tensor]:
    """Return log p(x), its variance, and the distances of halves of the reference, ``[n]`` each."""
    size = max(1, CPU_ROWS // num_particles)
    parts = []
    for i, small in enumerate(zip(*(t.split(size) for t in batch), strict=True)):
        rows = slice(i * size, i * size + len(small[0]))
        flat = _flat(reference, rows, small[0].device)
        flat = (flat - flat.mean(0)) / _sd(flat)
        first, second = (_thinned(half, num_particles) for half in flat.tensor_split(2))
        weights = _from_weights(_reference_weights(model, reference, small, rows, num_particles))
        parts.append(
            {name: weights[name] for name in ("log_likelihood", "variance")}
            | _distances(first, second, num_projections)
        )
        bar.update(len(small[0]))
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _reference_weights(
    model: Program, reference: ReferencePosterior, batch: tuple[Tensor, ...], rows: slice, num_particles: int
) -> Tensor:
    """Return log weights ``[K, n]`` of draws from a Student t with the reference's means and covariances."""
    latents = Latents(model, batch)
    values = {
        site: draws[:, :, rows].flatten(0, 1).to(batch[0].device) for site, draws in reference.draws.items()
    }
    u = latents.flatten(values).double().transpose(0, 1)  # [n, S, size]
    mean = u.mean(1)
    centred = u - mean.unsqueeze(1)
    covariance = centred.mT @ centred / (u.shape[1] - 1)
    ridge = 1e-6 * covariance.diagonal(dim1=-2, dim2=-1) + 1e-12
    factor = torch.linalg.cholesky(covariance + torch.diag_embed(ridge))
    proposal = dist.MultivariateStudentT(u.new_tensor(float(_FREEDOM)), mean, factor)
    draws = proposal.sample((num_particles,))
    parts = draws.to(latents.dtype).split(max(1, CPU_ROWS // latents.n))
    log_joint = torch.cat([latents.log_joint(part).double() for part in parts])
    return log_joint.nan_to_num(-math.inf, -math.inf, -math.inf) - proposal.log_prob(draws)


# -- densities in a plane ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PosteriorDensity:
    """Densities of one datum's latents in a plane.

    Attributes:
        x: the grid along the first dimension, ``[g]``.
        y: the grid along the second dimension, ``[g]``.
        guides: each guide's density, ``[g, g]``, a row for each value of ``y``.
        posterior: p(z | x) of the model, normalised on the grid, ``[g, g]``; None if there are more
            dimensions than the two.
        draws: the reference's draws, ``[S, 2]``, or None.
        scored: whether a guide's density is its own; otherwise it is a kernel estimate from its draws.
        dims: the two dimensions.
        site: the latent site.
        datum: the number of the datum.
    """

    x: Tensor
    y: Tensor
    guides: dict[str, Tensor]
    posterior: Tensor | None
    draws: Tensor | None
    scored: dict[str, bool]
    dims: tuple[int, int]
    site: str
    datum: int


def posterior_density(
    model: Program,
    guides: Mapping[str, Program],
    data: Any,
    reference: ReferencePosterior | None = None,
    *,
    datum: int = 0,
    site: str = "z",
    dims: tuple[int, int] = (0, 1),
    num_particles: int = 2000,
    grid: int = 100,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> PosteriorDensity:
    """Return the densities of guides, and the posterior's, of two latent dimensions of one datum.

    Where the latents are two real numbers in all, guides are conditioned on the points of a grid and scored,
    and so is the model. Of more dimensions, and for guides that can't score what they have not drawn,
    densities are kernel estimates from draws.

    Args:
        model: program over the latent sites and the data.
        guides: programs over the latent sites, by name.
        data: as of ``compare_guides``, ``n`` data.
        reference: what ``reference_posterior`` returned for the same model and data, or None.
        datum: which of the data.
        site: which latent site; its event is one vector.
        dims: which two of its dimensions.
        num_particles: draws of each guide, which set the grid's limits and make kernel estimates.
        grid: points along each side, at least 2.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> posterior_density(model, {"mean field": guide}, torch.randn(3, 5), grid=20).posterior.shape
        torch.Size([20, 20])
    """
    named = _check_guides(guides)
    if reference is not None and not isinstance(reference, ReferencePosterior):
        raise TypeError(f"reference: expected a ReferencePosterior or None, got {type(reference).__name__}")
    if check_positive_int("num_particles", num_particles) < 10:
        raise ValueError(f"num_particles: expected at least 10, got {num_particles!r}")
    if check_positive_int("grid", grid) < 2:
        raise ValueError(f"grid: expected at least 2, got {grid!r}")
    check_seed(seed)
    where = place(device, model, *named.values())
    batch = _gather(model, named, prepare_data(data, "data", where), where, seed)
    n = len(batch[0])
    if isinstance(datum, bool) or not isinstance(datum, int) or not 0 <= datum < n:
        raise ValueError(f"datum: expected a number from 0 to {n - 1}, got {datum!r}")
    one = tuple(t[datum : datum + 1] for t in batch)
    points: dict[str, Tensor] = {}
    with seeded(seed), evaluating(model, *named.values()):
        latents = Latents(model, one)
        if site not in latents.shapes:
            raise ValueError(f"site: expected one of {list(latents.shapes)}, got {site!r}")
        for name, guide in named.items():
            with seeded(seed), _naming(name):
                check_pair(*trace_pair(model, guide, *one), one)
                drawn = _run(model, guide, one, num_particles, num_particles, True)[1][site][:, 0]
            _check_dims(site, drawn.shape[1:], dims)
            points[name] = drawn[:, list(dims)].double()
        draws = None
        if reference is not None:
            _check_reference(reference, batch, list(latents.shapes))
            draws = reference.samples(site)[:, datum].to(where).double()[:, list(dims)]
        shown = [*points.values()] if draws is None else [*points.values(), draws]
        x, y = (_line(torch.stack([_limits(part[:, i]) for part in shown]), grid) for i in (0, 1))
        plane = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 1, 2)
        u = plane[..., [1, 0] if dims[0] == 1 else [0, 1]].to(latents.dtype)
        exact = latents.size == 2 and torch.equal(latents.unflatten(u)[site], u)
        densities, scored = {}, {}
        posterior = None
        if exact:
            log_joint = latents.log_joint(u).double().reshape(grid, grid)
            weights = (log_joint - log_joint.max()).exp()
            posterior = (weights / (weights.sum() * (x[1] - x[0]) * (y[1] - y[0]))).cpu()
        for name, guide in named.items():
            density = _scored(latents, guide, u) if exact else None
            scored[name] = density is not None
            if density is None:
                density = _kernel_density(points[name], plane[:, 0])
            densities[name] = density.reshape(grid, grid).cpu()
    return PosteriorDensity(
        x.cpu(),
        y.cpu(),
        densities,
        posterior,
        None if draws is None else draws.cpu(),
        scored,
        (dims[0], dims[1]),
        site,
        datum,
    )


def _check_dims(site: str, event: torch.Size, dims: Any) -> None:
    if len(event) != 1 or event[0] < 2:
        raise ValueError(
            f"site: expected one whose latent is a vector of 2 dimensions or more, got {site!r} "
            f"of event shape {list(event)}"
        )
    valid = isinstance(dims, (tuple, list)) and len(dims) == 2 and len(set(dims)) == 2
    if not valid or any(dim not in range(event[0]) for dim in dims):
        raise ValueError(f"dims: expected two of the dimensions 0 to {event[0] - 1}, got {dims!r}")


def _limits(values: Tensor) -> Tensor:
    ordered = values.sort().values
    return torch.stack([_quantile(ordered, 0.002), _quantile(ordered, 0.998)])


def _line(limits: Tensor, grid: int) -> Tensor:
    low, high = float(limits[:, 0].min()), float(limits[:, 1].max())
    margin = 0.15 * (high - low) or 1.0
    return torch.linspace(low - margin, high + margin, grid, dtype=torch.float64, device=limits.device)


def _scored(latents: Latents, guide: Program, u: Tensor) -> Tensor | None:
    """Return a guide's density at u, or None if it can't be conditioned on values.

    Far from its draws the inverse of a flow may overflow; the density is 0 there.
    """
    try:
        with pyro.validation_enabled(False):
            log_density = latents.log_guide(guide, u).double()
    except (ValueError, NotImplementedError, KeyError):
        return None
    if log_density.isnan().all() or (log_density == math.inf).any():
        return None
    return log_density.nan_to_num(nan=-math.inf).exp()


def _kernel_density(draws: Tensor, points: Tensor) -> Tensor:
    """Return a kernel estimate of the density of draws ``[K, 2]`` at points ``[m, 2]``, ``[m]``."""
    from scipy.stats import gaussian_kde

    estimate = gaussian_kde(draws.T.cpu().numpy())
    return torch.from_numpy(estimate(points.T.cpu().numpy()))
