"""Simulation-based calibration of an amortised guide."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from tqdm import tqdm

from ppl_vae._checks import check_choice, check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.evaluation.evaluate import CPU_ROWS, pass_size
from ppl_vae.evaluation.generation import prior_trace
from ppl_vae.infer.checking import running_on
from ppl_vae.infer.log_weights import PARTICLE_DIM, Terms, per_datum_log_prob
from ppl_vae.infer.placing import place
from ppl_vae.infer.running import (
    Program,
    Site,
    batch_arguments,
    check_pair,
    evaluating,
    in_own_store,
    latent_sites,
    observed_sites,
    trace_pair,
)

if TYPE_CHECKING:
    import pandas as pd

Function = Callable[[dict[str, Tensor], Tensor], Tensor]

LEVELS = (0.5, 0.8, 0.9, 0.95)
LOG_JOINT = "log p(x, z)"
_LEAST = 5  # expected data per bin, for the chi-square distribution


@dataclass(frozen=True, eq=False)
class Calibration:
    r"""What ``simulation_based_calibration`` found.

    Each quantity has, for every simulated datum, the rank of its true value among the L draws of the guide:
    uniform on 0 to L if the guide is the posterior.

    Attributes:
        ranks: for each quantity, ``"z[0]"`` say, whole numbers from 0 to L, ``[n]``.
        num_draws: L.
        bins: of the histograms and the chi-square test.
    """

    ranks: dict[str, Tensor] = field(repr=False)
    num_draws: int
    bins: int

    @property
    def num_data(self) -> int:
        """The number n of simulated data."""
        return len(next(iter(self.ranks.values())))

    def histogram(self, quantity: str) -> Tensor:
        """Return how many ranks of a quantity are in each bin, ``[bins]``; n / bins are expected."""
        width = (self.num_draws + 1) // self.bins
        return torch.bincount(self.ranks[quantity] // width, minlength=self.bins)

    def coverage(self, levels: Sequence[float] | None = None) -> "pd.DataFrame":
        """Return how often central intervals of the draws hold the true value.

        An interval of m of the L + 1 ranks in the middle holds it with probability m / (L + 1) if the guide
        is the posterior; each level is put at the nearest such number.

        Args:
            levels: between 0 and 1; None for all that there are.

        Returns:
            A row per quantity and level: ``coverage``, and ``standard_error``, the binomial one of a
            calibrated guide.

        Raises:
            ValueError: if a level is not between 0 and 1.
        """
        import pandas as pd

        ranks = self.num_draws + 1
        if levels is None:
            sizes = list(range(2 - ranks % 2, ranks, 2)) or [ranks]
        else:
            for level in levels:
                if not 0 < level < 1:
                    raise ValueError(f"levels: expected numbers between 0 and 1, got {level!r}")
            odd = ranks % 2  # an interval in the middle has the parity of all
            near = [2 * round((level * ranks - odd) / 2) + odd for level in levels]
            least = 2 - odd
            sizes = list(dict.fromkeys(max(least, min(m, ranks - 2)) for m in near))
        rows = []
        for name, found in self.ranks.items():
            away = (2 * found - self.num_draws).abs()  # from the middle, in half ranks
            for m in sizes:
                level = m / ranks
                error = math.sqrt(level * (1 - level) / len(found))
                rows.append((name, level, float((away < m).double().mean()), error))
        columns = ["quantity", "level", "coverage", "standard_error"]
        return pd.DataFrame(rows, columns=columns).set_index(["quantity", "level"])

    @property
    def table(self) -> "pd.DataFrame":
        r"""A row per quantity, tests against uniform ranks.

        ================  ============================================================================
        chi_square        of the histogram, with bins - 1 degrees of freedom
        p_value           of the chi-square
        adjusted_p_value  by Holm over all quantities: one below 0.05 rejects the guide, at that level for
                          all together
        mean              of (rank + 1/2) / (L + 1): 1/2 if calibrated, above it if draws are too low
        mean_se           its standard error if calibrated
        spread            root mean square distance of the ranks from L / 2, over that of uniform ones: above
                          1 if the guide is too narrow (the histogram is a U), below if it is too wide
        spread_se         its standard error if calibrated, about
        ================  ============================================================================
        """
        import pandas as pd
        from scipy.stats import chi2

        n, ranks = self.num_data, self.num_draws + 1
        expected = n / self.bins
        uniform = (ranks**2 - 1) / 12  # the variance of ranks
        fourth = (ranks**2 - 1) * (3 * ranks**2 - 7) / 240
        rows = {}
        for name, found in self.ranks.items():
            chi_square = float((self.histogram(name).double() - expected).square().sum() / expected)
            away = found.double() - self.num_draws / 2
            rows[name] = {
                "chi_square": chi_square,
                "p_value": float(chi2.sf(chi_square, self.bins - 1)),
                "mean": float((found.double() + 0.5).mean() / ranks),
                "mean_se": math.sqrt(uniform / n) / ranks,
                "spread": float((away.square().mean() / uniform).sqrt()),
                "spread_se": 0.5 * math.sqrt((fourth / uniform**2 - 1) / n),
            }
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("quantity")
        table.insert(2, "adjusted_p_value", _holm(table["p_value"].tolist()))
        return table

    @property
    def rejected(self) -> list[str]:
        """The quantities whose ranks are not uniform, at level 0.05 for all together."""
        table = self.table
        return [str(name) for name in table.index[table["adjusted_p_value"] < 0.05]]

    def summary(self) -> dict[str, Any]:
        """Return tests and coverage of each quantity as plain numbers, for a file."""
        coverage = self.coverage(LEVELS)
        plain: dict[str, Any] = {
            "num_data": self.num_data,
            "num_draws": self.num_draws,
            "bins": self.bins,
            "rejected": self.rejected,
        }
        for name, row in self.table.iterrows():
            shares = coverage["coverage"].xs(name, level="quantity")
            levels = {f"{level:g}": float(share) for level, share in shares.items()}
            plain[str(name)] = {str(k): float(v) for k, v in row.items()} | {"coverage": levels}
        return plain

    def __str__(self) -> str:
        coverage = self.coverage(LEVELS)
        error = coverage["standard_error"].groupby(level="level").first()
        shown = self.table[["adjusted_p_value", "mean", "spread"]].rename(columns={"adjusted_p_value": "p"})
        for level in coverage.index.unique("level"):
            shown[f"{level:.0%}"] = coverage["coverage"].xs(level, level="level")
        printed = shown.to_string(float_format=lambda v: f"{v:.3f}", line_width=10_000, max_rows=60)
        first = self.table.iloc[0]
        errors = ", ".join(f"{e:.3f}" for e in error)
        head = (
            f"{self.num_data} data, {self.num_draws} draws each; p adjusted for {len(self.ranks)} quantities"
        )
        tail = (
            f"if calibrated: mean 0.5 +- {first['mean_se']:.3f}, spread 1 +- {first['spread_se']:.3f}, "
            f"coverage +- {errors}"
        )
        rejected = self.rejected
        found = "rejected: " + ", ".join(rejected) if rejected else "no quantity is rejected at level 0.05"
        return "\n".join([head, printed, tail, found])


def simulation_based_calibration(
    model: Program,
    guide: Program,
    *,
    size: int = 1000,
    num_draws: int = 99,
    bins: int = 20,
    y: Tensor | None = None,
    sites: Sequence[str] | None = None,
    dimensions: Sequence[int] | None = None,
    log_joint: bool = True,
    functions: Mapping[str, Function] | None = None,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    r"""Test a guide against the model's exact posterior, by data that the model draws.

    Draws ``size`` pairs (z, x) from the model, and L draws of z from the guide for each x: were the guide
    the posterior, the rank of the true value of any function of z and x among those of the draws would be
    uniform. The guide is not fitted again. What is tested is the model's own data, not those that the guide
    was trained on: an amortised guide may be good on the one and poor on the other. Uniform ranks of every
    dimension do not prove that the guide is the posterior, since each is looked at alone (the prior has them
    too); log p(x, z) is a function of all dimensions and the data, and finds what they miss.

    Ties, of discrete sites say, are broken at random.

    Args:
        model: program that draws data by ``model(None, size=n)``, or ``model(None, y, size=n)``.
        guide: program over the model's latent sites.
        size: n, the number of data to draw.
        num_draws: L, the number of draws for each.
        bins: of the rank histogram, a divisor of L + 1; ``size`` is to be at least 5 per bin.
        y: what the model is conditioned on, ``[size, ...]``; None for models that take no labels.
        sites: latent sites to rank; None for all.
        dimensions: dimensions of each site to rank, of its flattened event; None for all.
        log_joint: rank log p(x, z) too, of all latent sites together.
        functions: more quantities, by name: functions of the latent sites ``{"z": [K, n, latent]}`` and of
            x, ``[n, *event]``, to ``[K, n]``.
        memory: bytes that a pass may take beyond the draws of the model and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018),
        arXiv:1804.06788;
        the joint density as a quantity: Simulation-Based Calibration Checking for Bayesian Computation: The
        Choice of Test Quantities Shapes Sensitivity (Modrák et al., 2023), arXiv:2211.02383

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> result = simulation_based_calibration(model, guide, size=200, progress=False)
        >>> list(result.ranks)
        ['z[0]', 'z[1]', 'log p(x, z)']
    """
    size = check_positive_int("size", size)
    num_draws = check_positive_int("num_draws", num_draws)
    bins = _check_bins(bins, num_draws, size)
    check_positive("memory", memory)
    check_seed(seed)
    named = _check_functions(functions, log_joint)
    where = place(device, model, guide)
    labels = _check_labels(y, size, where)
    with (
        seeded(seed),
        evaluating(model, guide),
        tqdm(total=size, unit="datum", desc="calibration", disable=not progress, dynamic_ncols=True) as bar,
    ):
        simulate = _Simulation(model, labels)
        first = simulate.draw(slice(0, min(2, size)))
        with running_on("model(None)", first.batch):
            traces = trace_pair(model, guide, *first.batch)
            check_pair(*traces, first.batch)
        _check_guide(latent_sites(traces[1]), first.z)
        chosen = _check_chosen(first.z, sites, dimensions)
        del traces
        ranking = _Ranking(model, guide, chosen, log_joint, named)
        ranking.check(first)
        rows = CPU_ROWS if where.type == "cpu" else sys.maxsize
        with pyro.validation_enabled(False):
            n, particles = pass_size(
                memory,
                num_draws,
                rows,
                lambda n, k: Terms(next(iter(ranking.values(first.rows(n), k).values())), {}),
            )
            parts = []
            for start in range(0, size, n):
                part = simulate.draw(slice(start, min(start + n, size)))
                parts.append(ranking.ranks(part, num_draws, particles))
                bar.update(len(part.batch[0]))
    ranks = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    return Calibration(ranks, num_draws, bins)


# -- what the model draws --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Simulated:
    """Draws of the model.

    Attributes:
        batch: the arguments of model and guide, x ``[n, *event]`` first.
        z: the latent sites, ``[n, *event]`` each.
    """

    batch: tuple[Tensor, ...]
    z: dict[str, Tensor]

    def rows(self, n: int) -> "_Simulated":
        """Return the first n data."""
        return _Simulated(tuple(t[:n] for t in self.batch), {k: v[:n] for k, v in self.z.items()})


class _Simulation:
    def __init__(self, model: Program, y: Tensor | None) -> None:
        self.model = model
        self.y = y

    def draw(self, rows: slice) -> _Simulated:
        """Return draws of the data that the slice counts."""
        n = rows.stop - rows.start
        if self.y is None:
            trace = prior_trace(in_own_store(self.model), n)
            labels: tuple[Tensor, ...] = ()
        else:
            labels = (self.y[rows],)
            try:
                trace = poutine.trace(in_own_store(self.model)).get_trace(None, *labels, size=n)
            except TypeError as error:
                reason = str(error).partition("\n")[0]
                raise TypeError(f"model: model(None, y, size={n}) failed ({reason})") from error
        sites = latent_sites(trace)
        if "x" not in sites:
            raise ValueError(f"model: expected a site 'x' that `model(None)` draws, got sites {list(sites)}")
        z = {name: site["value"] for name, site in sites.items() if name != "x"}
        return _Simulated(batch_arguments(self.model, (sites["x"]["value"], *labels)), z)


# -- ranks -----------------------------------------------------------------------------------------


class _Ranking:
    def __init__(
        self,
        model: Program,
        guide: Program,
        chosen: Mapping[str, list[int] | None],
        log_joint: bool,
        functions: Mapping[str, Function],
    ) -> None:
        self.model, self.guide, self.chosen = model, guide, chosen
        self.log_joint, self.functions = log_joint, functions

    def values(self, part: _Simulated, num_draws: int | None) -> dict[str, Tensor]:
        """Return each quantity of K draws of the guide, ``[K, n]``, or of the true z, ``[1, n]``."""
        plate = pyro.plate("num_particles", num_draws or 1, dim=PARTICLE_DIM)
        if num_draws is None:
            z = {name: value.unsqueeze(0) for name, value in part.z.items()}
        else:
            sites = latent_sites(poutine.trace(plate(in_own_store(self.guide))).get_trace(*part.batch))
            z = {name: sites[name]["value"] for name in part.z}
        found: dict[str, Tensor] = {}
        for name, dims in self.chosen.items():
            if z[name].dim() == 2:
                found[name] = z[name]
                continue
            flat = z[name].flatten(2)
            for d in range(flat.shape[-1]) if dims is None else dims:
                found[f"{name}[{d}]"] = flat[..., d]
        if self.log_joint:
            conditioned = plate(poutine.condition(in_own_store(self.model), data=z))
            found[LOG_JOINT] = _log_joint(poutine.trace(conditioned).get_trace(*part.batch))
        for name, function in self.functions.items():
            found[name] = function(dict(z), part.batch[0])
        return found

    def check(self, part: _Simulated) -> None:
        """Raise unless each function gives a value per draw and datum."""
        n = len(part.batch[0])
        for count in (3, None):
            for name, value in self.values(part, count).items():
                if name in self.functions and (
                    not isinstance(value, Tensor) or value.shape != (count or 1, n)
                ):
                    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    expected = f"a value per draw and datum, {[count or 1, n]}"
                    raise ValueError(f"functions[{name!r}]: expected {expected}, got {got}")

    def ranks(self, part: _Simulated, num_draws: int, particles: int) -> dict[str, Tensor]:
        """Return the ranks of the true values among the draws', ties broken at random, ``[n]``."""
        truth = {name: value[0] for name, value in self.values(part, None).items()}
        below = {name: torch.zeros(value.shape, dtype=torch.long) for name, value in truth.items()}
        equal = dict(below)
        for done in range(0, num_draws, particles):
            for name, value in self.values(part, min(particles, num_draws - done)).items():
                if bool(value.isnan().any()) or bool(truth[name].isnan().any()):
                    raise ValueError(f"{name}: expected values that can be ranked, got NaN")
                below[name] = below[name].to(value.device) + (value < truth[name]).sum(0)
                equal[name] = equal[name].to(value.device) + (value == truth[name]).sum(0)
        return {name: count + _up_to(equal[name]) for name, count in below.items()}


def _up_to(largest: Tensor) -> Tensor:
    """Return whole numbers from 0 to each of these, drawn at random."""
    uniform = torch.rand(largest.shape, dtype=torch.float64, device=largest.device)
    return (uniform * (largest + 1)).long()


def _log_joint(trace: Trace) -> Tensor:
    """Return log p(x, z), ``[K, n]``."""
    parts = [per_datum_log_prob(name, site).double() for name, site in observed_sites(trace).items()]
    return sum(parts[1:], parts[0])


def _holm(p_values: list[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for k, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - k) * p_values[i]))
        adjusted[i] = largest
    return adjusted


# -- checks ----------------------------------------------------------------------------------------


def _check_bins(bins: int, num_draws: int, size: int) -> int:
    bins = check_positive_int("bins", bins)
    if bins < 2 or (num_draws + 1) % bins:
        raise ValueError(
            f"bins: expected a divisor of num_draws + 1 = {num_draws + 1} above 1, so that each has as many "
            f"ranks, got {bins}"
        )
    if size < _LEAST * bins:
        raise ValueError(f"size: expected at least {_LEAST} data per bin, {_LEAST * bins}, got {size}")
    return bins


def _check_functions(functions: Any, log_joint: bool) -> dict[str, Function]:
    named = {} if functions is None else functions
    if not isinstance(named, Mapping) or not all(map(callable, named.values())):
        raise TypeError(f"functions: expected functions of (z, x) by name, got {functions!r}")
    if log_joint and LOG_JOINT in named:
        raise ValueError(f"functions: expected another name than {LOG_JOINT!r}")
    return dict(named)


def _check_labels(y: Any, size: int, where: torch.device) -> Tensor | None:
    if y is None:
        return None
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a tensor [{size}, ...], got {type(y).__name__}")
    if y.shape[:1] != (size,):
        raise ValueError(f"y: expected as many rows as size, {size}, got shape {list(y.shape)}")
    return y.to(where)


def _check_guide(in_guide: Mapping[str, Site], drawn: Mapping[str, Tensor]) -> None:
    """Raise unless the guide draws all latent sites that the model does, without a mask."""
    if missing := sorted(drawn.keys() - in_guide.keys()):
        raise ValueError(
            f"guide: expected draws of all latent sites that `model(None)` draws, {sorted(drawn)}, got "
            f"none of {missing}"
        )
    for name in drawn:
        if in_guide[name]["mask"] is not None:
            raise ValueError(f"site {name!r}: expected no mask, since all draws are ranked")


def _check_chosen(
    drawn: Mapping[str, Tensor], sites: Sequence[str] | None, dimensions: Sequence[int] | None
) -> dict[str, list[int] | None]:
    """Return which dimensions of which sites to rank, None for all."""
    for argument, what, value in (("sites", "names", sites), ("dimensions", "whole numbers", dimensions)):
        if isinstance(value, str) or not (value is None or isinstance(value, Sequence)):
            raise TypeError(f"{argument}: expected a sequence of {what}, got {value!r}")
    for name in sites or ():
        check_choice("sites", name, drawn)
    chosen: dict[str, list[int] | None] = {}
    for name in drawn if sites is None else sites:
        count = math.prod(drawn[name].shape[1:])
        if dimensions is not None and (not dimensions or any(d not in range(count) for d in dimensions)):
            expected = f"whole numbers from 0 to {count - 1} for site {name!r}"
            raise ValueError(f"dimensions: expected {expected}, got {dimensions!r}")
        chosen[name] = None if dimensions is None else [int(d) for d in dimensions]
    return chosen
