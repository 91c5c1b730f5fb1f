"""Which latent dimensions a trained pair uses, and which have collapsed to the prior."""

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from tqdm import tqdm

from ppl_vae._checks import check_at_least, check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.data import Split
from ppl_vae.evaluation.evaluate import CPU_ROWS, pass_size
from ppl_vae.infer.aggregate import marginals
from ppl_vae.infer.checking import Observation, check_all, checked_batches, first_batch, running_on
from ppl_vae.infer.divergence import factorises
from ppl_vae.infer.log_weights import PARTICLE_DIM, Terms, per_datum_log_prob
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.running import (
    Program,
    Site,
    check_pair,
    evaluating,
    in_own_store,
    latent_sites,
    observed_sites,
    trace_pair,
)

if TYPE_CHECKING:
    import pandas as pd

THRESHOLD = 0.01  # of Burda et al.


@dataclass(frozen=True, eq=False)
class ActiveUnits:
    """What ``active_units`` found.

    Attributes:
        variances: for each latent site the variance over data of the posterior mean, ``[dimensions]``.
        threshold: a dimension of more variance is active.
        num_data: the number of data. The variance of few data is noisy, and counts of other data differ.
        num_particles: draws per datum; 1 where the posterior mean needs none.
    """

    variances: dict[str, Tensor] = field(repr=False)
    threshold: float
    num_data: int
    num_particles: int

    @property
    def active(self) -> dict[str, Tensor]:
        """For each latent site which dimensions are active, booleans ``[dimensions]``."""
        return {name: variance > self.threshold for name, variance in self.variances.items()}

    @property
    def counts(self) -> dict[str, int]:
        """For each latent site the number of active dimensions."""
        return {name: int(active.sum()) for name, active in self.active.items()}

    def summary(self) -> dict[str, Any]:
        """Return counts and sizes as plain numbers, for a file."""
        plain = {"threshold": self.threshold, "num_data": self.num_data, "num_particles": self.num_particles}
        return plain | {
            f"active_{name}": {"active": count, "dimensions": len(self.variances[name])}
            for name, count in self.counts.items()
        }

    def __str__(self) -> str:
        head = f"active: variance of the posterior mean over {self.num_data} data above {self.threshold:g}"
        lines = [f"{name:<8} {n:>6} of {len(self.variances[name])}" for name, n in self.counts.items()]
        return "\n".join([head, *lines])


def active_units(
    model: Program,
    guide: Program,
    data: Any,
    *,
    threshold: float = THRESHOLD,
    num_particles: int = 100,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ActiveUnits:
    r"""Count the latent dimensions whose posterior mean varies over the data, per latent site.

    A dimension u is active if :math:`\mathrm{Var}_x(E_{q(u \mid x)}[u])` is above the threshold. The mean is
    that of the distribution which the guide gives a site, where it has one, else that of draws. In a
    hierarchy a site's distribution depends on what the guide has drawn before it, and the mean is over
    ``num_particles`` of those draws too. Noise of the draws adds to the variance of the means: it is taken
    off, unless ``num_particles`` is 1, as in Burda's code, where layer 2 sees one draw of layer 1.

    Burda et al. take 500 data. Sites that are not floating-point are left out; a site's event is flattened.

    Args:
        model: program over the latent sites and the data; its decoder is not asked for anything.
        guide: program over the latent sites.
        data: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch ``Dataset`` or
            ``DataLoader``, of 2 data or more.
        threshold: the least variance of an active dimension.
        num_particles: draws per datum, where the posterior mean needs them.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519, section 5.2

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> active_units(model, guide, torch.randn(20, 5), progress=False).variances["z"].shape
        torch.Size([2])
    """
    run = _Passes(model, guide, data, num_particles, memory, device, seed, progress)
    threshold = check_at_least("threshold", threshold)
    moments: dict[str, _Moments] = {}
    with run.working("active units", guide_alone=True) as passes:
        for batch, chunks in passes:
            for name, mean in _posteriors(guide, batch, chunks, list(run.sites)).items():
                moments.setdefault(name, _Moments()).add(mean)
    n = _check_count(next(iter(moments.values())).count)
    variances = {name: moment.variance() for name, moment in moments.items()}
    return ActiveUnits(variances, threshold, n, run.num_particles)


@dataclass(frozen=True, eq=False)
class CollapseReport:
    """What ``collapse_report`` found.

    ====================  ============================================================================
    variance_of_means     the variance over data of the posterior mean, without the noise of draws
    kl                    the mean over data of E[log q(z_d | x) - log p(z_d)], nats; NaN where it is not
                          known. In a hierarchy given the layers that each program draws before
    posterior_sd          the mean over data of the standard deviation of q(z_d | x)
    active                whether ``variance_of_means`` is above the threshold
    signal                with ``signal=True``: nats per datum by which log p of the data, and of other
                          latents given this one, falls if the dimension is drawn from the prior instead
    signal_se             its standard error over data
    ====================  ============================================================================

    A collapsed dimension has a variance and a KL of 0, the prior's standard deviation and no signal.

    Attributes:
        table: a row per latent site and dimension of its event, flattened: index (site, dimension).
        reasons: why ``kl`` is not known, by site.
        threshold: a dimension of more variance is active.
        num_data: the number of data.
        num_particles: draws per datum.
    """

    table: "pd.DataFrame" = field(repr=False)
    reasons: dict[str, str]
    threshold: float
    num_data: int
    num_particles: int

    def summary(self) -> dict[str, Any]:
        """Return for each site how many dimensions are active, and the sum of their KL, as plain numbers."""
        plain: dict[str, Any] = {
            "threshold": self.threshold,
            "num_data": self.num_data,
            "num_particles": self.num_particles,
        }
        for name, rows in self.table.groupby(level="site"):
            plain[str(name)] = {
                "active": int(rows["active"].sum()),
                "dimensions": len(rows),
                "kl": float(rows["kl"].sum(skipna=False)),
            }
        return plain

    def __str__(self) -> str:
        head = f"{self.num_data} data; active: variance of the posterior mean above {self.threshold:g}"
        shown = self.table.dropna(axis="columns", how="all")
        printed = shown.to_string(float_format=lambda v: f"{v:.4g}", line_width=10_000, max_rows=60)
        why = [f"kl of {site}: {reason}" for site, reason in self.reasons.items()]
        return "\n".join([head, printed, *why])


def collapse_report(
    model: Program,
    guide: Program,
    data: Any,
    *,
    threshold: float = THRESHOLD,
    num_particles: int = 50,
    signal: bool = False,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> CollapseReport:
    """Say for each latent dimension whether it has collapsed to the prior, and by what signs.

    The KL of a dimension is a mean over draws, exact where a dimension is the prior. It needs a prior that
    factorises, and known marginals of the guide: where those of a site are correlated, the KL of its
    dimensions do not sum to that of the site.

    Args:
        model: program over the latent sites and the data.
        guide: program over the latent sites.
        data: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch ``Dataset`` or
            ``DataLoader``, of 2 data or more.
        threshold: the least variance of an active dimension.
        num_particles: draws per datum, of the posterior's moments and of the KL; ``signal`` takes one.
        signal: measure the signal in the decoder too: one run of the model per dimension.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519, section 5.2;
        Understanding Posterior Collapse in Generative Latent Variable Models (Lucas et al., 2019)

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> report = collapse_report(model, guide, torch.randn(20, 5), num_particles=5, progress=False)
        >>> report.table.index.tolist()
        [('z', 0), ('z', 1)]
    """
    import pandas as pd

    run = _Passes(model, guide, data, num_particles, memory, device, seed, progress)
    threshold = check_at_least("threshold", threshold)
    means: dict[str, _Moments] = {}
    deviations: dict[str, _Moments] = {}
    signals: dict[str, _Moments] = {}
    sums: dict[str, Tensor] = {}
    with run.working("collapse") as passes:
        if missing := sorted(run.model_sites.keys() - run.latents):
            raise ValueError(f"guide: expected draws of all latent sites of the model, got none of {missing}")
        reasons = {
            name: reason
            for name, site in run.sites.items()
            if (reason := _why_no_kl(name, site, run.model_sites))
        }
        for batch, chunks in passes:
            kls: dict[str, Tensor] = {}
            found = _posteriors(guide, batch, chunks, list(run.sites), model, reasons, kls)
            for name, mean in found.items():
                means.setdefault(name, _Moments()).add(mean)
                spread = _Posterior(mean.spread.sqrt(), None, mean.spread)
                deviations.setdefault(name, _Moments()).add(spread)
            for name, kl in kls.items():
                sums[name] = sums.get(name, torch.zeros(())).to(kl) + kl
            if signal:
                for name, change in _signals(model, guide, batch, list(run.sites), run.rows).items():
                    signals.setdefault(name, _Moments()).add(_Posterior(change, None, change))
    n = _check_count(next(iter(means.values())).count)
    tables = []
    for name, moment in means.items():
        variance = moment.variance()
        columns = {
            "variance_of_means": variance.tolist(),
            "kl": (sums[name] / n).tolist() if name in sums else math.nan,
            "posterior_sd": deviations[name].mean.tolist(),
            "active": (variance > threshold).tolist(),
            "signal": signals[name].mean.tolist() if signal else math.nan,
            "signal_se": (signals[name].variance() / n).sqrt().tolist() if signal else math.nan,
        }
        index = pd.MultiIndex.from_product([[name], range(len(variance))], names=["site", "dimension"])
        tables.append(pd.DataFrame(columns, index=index))
    return CollapseReport(pd.concat(tables), reasons, threshold, n, run.num_particles)


# -- passes over the data --------------------------------------------------------------------------


def _trace(guide: Program, *batch: Tensor) -> Trace:
    trace: Trace = poutine.trace(in_own_store(guide)).get_trace(*batch)
    return trace


class _Passes:
    """The data of a call in batches, each with the numbers of draws of its passes."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: Any,
        num_particles: int,
        memory: float,
        device: str | torch.device | None,
        seed: int,
        progress: bool,
    ) -> None:
        self.num_particles = check_positive_int("num_particles", num_particles)
        self.memory = check_positive("memory", memory)
        self.seed = check_seed(seed)
        self.model, self.guide, self.progress = model, guide, progress
        self.where = place(device, model, guide)
        self.data = prepare_data(data, "data", self.where)
        if isinstance(self.data, Split):
            _check_count(len(self.data))
        self.rows = CPU_ROWS if self.where.type == "cpu" else sys.maxsize

    @contextmanager
    def working(
        self, what: str, *, guide_alone: bool = False
    ) -> Iterator[Iterator[tuple[tuple[Tensor, ...], list[int]]]]:
        """Check the pair, set ``sites`` and ``model_sites``, and give the batches with their passes.

        Args:
            what: the bar's name.
            guide_alone: the model is not run, and one draw is enough where means are exact.
        """
        model, guide = self.model, self.guide
        total = len(self.data) if isinstance(self.data, Split) else None
        with (
            seeded(self.seed),
            evaluating(model, guide),
            tqdm(total=total, unit="datum", desc=what, disable=not self.progress, dynamic_ncols=True) as bar,
        ):
            first = first_batch(model, self.data, "data", 2, self.where)
            with running_on("data", first):
                check_pair(*trace_pair(model, guide, *first), first)
                plate = pyro.plate("num_particles", 2, dim=PARTICLE_DIM)
                traces = trace_pair(plate(model), plate(guide), *(t[:2] for t in first))
            observed = check_all(model, guide, self.data, "data", self.where)
            self.model_sites = latent_sites(traces[0])
            self.latents = set(latent_sites(traces[1]))
            self.sites = _continuous(latent_sites(traces[1]), self.model_sites)
            if guide_alone and all(_mean_is_exact(site) for site in self.sites.values()):
                self.num_particles = 1
            elif self.num_particles < 2:
                _check_moments(self.sites)

            def run(n: int, k: int) -> Terms:
                plate = pyro.plate("num_particles", k, dim=PARTICLE_DIM)
                batch = (t[:n] for t in first)
                found = (
                    _trace(plate(guide), *batch)
                    if guide_alone
                    else trace_pair(plate(model), plate(guide), *batch)[1]
                )
                return Terms(next(iter(latent_sites(found).values()))["value"], {})

            size, particles = pass_size(self.memory, self.num_particles, self.rows, run)
            self.rows = size * particles
            with pyro.validation_enabled(False):
                yield self._batches(size, particles, observed, bar)

    def _batches(
        self, size: int, particles: int, observed: list[Observation], bar: tqdm
    ) -> Iterator[tuple[tuple[Tensor, ...], list[int]]]:
        for small in checked_batches(self.model, self.data, observed, size, self.where):
            done = range(0, self.num_particles, particles)
            yield small, [min(particles, self.num_particles - k) for k in done]
            bar.update(len(small[0]))


def _continuous(sites: Mapping[str, Site], in_model: Mapping[str, Site]) -> dict[str, Site]:
    """Return the latent sites of both programs whose values are floating-point."""
    found = {k: s for k, s in sites.items() if k in in_model and s["value"].is_floating_point()}
    if not found:
        raise ValueError(
            f"guide: expected a latent site of floating-point values, got {sorted(sites)} of "
            f"{sorted({str(site['value'].dtype) for site in sites.values()})}"
        )
    for name, site in found.items():
        if site["mask"] is not None or in_model[name]["mask"] is not None:
            raise ValueError(f"site {name!r}: expected no mask, since means of all data are compared")
    return found


def _check_count(n: int) -> int:
    if n < 2:
        raise ValueError(f"data: expected at least 2 data, since their means' variance is asked for, got {n}")
    return n


def _check_moments(sites: Mapping[str, Site]) -> None:
    """Raise if one draw per datum is too little."""
    for name, site in sites.items():
        if _mean_of(site) is None or _variance_of(site) is None:
            raise ValueError(
                f"num_particles: expected at least 2, since {type(site['fn']).__name__} at site {name!r} "
                "does not know its mean or variance, got 1"
            )


# -- moments ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Posterior:
    """Moments of each datum's posterior, ``[n, dimensions]``.

    Attributes:
        mean: an estimate of the posterior mean.
        noise: its variance over draws; None for none.
        spread: the variance of the posterior.
    """

    mean: Tensor
    noise: Tensor | None
    spread: Tensor


class _Moments:
    """Mean and variance over data of what comes in batches ``[n, dimensions]``."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = self.noise = torch.zeros((), dtype=torch.float64)

    def add(self, posterior: _Posterior) -> None:
        values = posterior.mean
        n, mean = len(values), values.mean(0).cpu()
        delta, total = mean - self.mean, self.count + n
        squares = (values - values.mean(0)).square().sum(0).cpu()
        self.squares = self.squares + squares + delta.square() * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        if posterior.noise is not None:
            self.noise = self.noise + posterior.noise.sum(0).cpu()
        self.count = total

    def variance(self) -> Tensor:
        """Return the variance over data without that of the draws, ``[dimensions]``."""
        return (self.squares / (self.count - 1) - self.noise / self.count).clamp(min=0)


def _posteriors(
    guide: Program,
    batch: tuple[Tensor, ...],
    chunks: list[int],
    names: list[str],
    model: Program | None = None,
    no_kl: Mapping[str, str] | None = None,
    kls: dict[str, Tensor] | None = None,
) -> dict[str, _Posterior]:
    """Return the moments of each site, and put its KL, summed over data, into ``kls`` if there is a model."""
    sums: dict[str, list[Tensor]] = {}
    total = sum(chunks)
    for k in chunks:
        plate = pyro.plate("num_particles", k, dim=PARTICLE_DIM)
        if model is None:
            sites = latent_sites(_trace(plate(guide), *batch))
        else:
            model_trace, guide_trace = trace_pair(plate(model), plate(guide), *batch)
            sites = latent_sites(guide_trace)
        for name in names:
            site = sites[name]
            mean, variance = _mean_of(site), _variance_of(site)
            flat = _flat(site, site["value"] if mean is None else mean)
            within = torch.zeros_like(flat) if mean is None or variance is None else _flat(site, variance)
            if mean is not None and variance is None:  # spread from the draws, about the known mean
                within = (_flat(site, site["value"]) - flat).square()
            parts = [flat.sum(0), flat.square().sum(0), within.sum(0)]
            sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)] if name in sums else parts
            if kls is not None and no_kl is not None and name not in no_kl:
                z, prior = site["value"], latent_sites(model_trace)[name]["fn"].base_dist
                kl = marginals(name, site["fn"]).log_prob(z).double() - prior.log_prob(z).double()
                kls[name] = kls.get(name, 0) + kl.sum((0, 1)) / total
    found = {}
    for name, (first, second, within) in sums.items():
        mean = first / total
        between = torch.zeros_like(mean)
        if total > 1:
            between = ((second - total * mean.square()) / (total - 1)).clamp(min=0)
        found[name] = _Posterior(mean, between / total, within / total + between)
    return found


def _flat(site: Site, value: Tensor) -> Tensor:
    """Return a value of a site in double precision, ``[K, n, dimensions]``, its event flattened."""
    event = len(site["fn"].event_shape)
    value = value.expand(site["value"].shape).double()
    return value.flatten(value.dim() - event) if event else value.unsqueeze(-1)


def _mean_of(site: Site) -> Tensor | None:
    return _moment(site, "mean")


def _variance_of(site: Site) -> Tensor | None:
    return _moment(site, "variance")


def _moment(site: Site, name: str) -> Tensor | None:
    """Return a moment of a site's distribution, or None if it does not know it."""
    try:
        moment: Tensor = getattr(site["fn"], name)
    except (NotImplementedError, AttributeError):
        return None
    return moment if bool(moment.isfinite().all()) else None


def _mean_is_exact(site: Site) -> bool:
    """Return whether a site's mean, of two draws, is known and does not depend on draws before it."""
    mean = _mean_of(site)
    if mean is None:
        return False
    first, second = mean.expand(site["value"].shape)
    return bool((first == second).all())


def _why_no_kl(name: str, site: Site, in_model: Mapping[str, Site]) -> str | None:
    """Return why the KL of a site's dimensions is not known, or None."""
    prior = in_model[name]["fn"]
    if not factorises(prior):
        return f"expected a prior that factorises (`.to_event(1)`), got {type(prior).__name__}"
    try:
        marginals(name, site["fn"])
    except ValueError as error:
        return str(error)
    return None


# -- the signal in the decoder ---------------------------------------------------------------------


def _signals(
    model: Program, guide: Program, batch: tuple[Tensor, ...], names: list[str], rows: int
) -> dict[str, Tensor]:
    """Return for each site by how much log p of all else falls if a dimension is the prior's: ``[n, d]``."""
    model_trace, _ = trace_pair(model, guide, *batch)
    sites = latent_sites(model_trace)
    drawn = {name: site["value"] for name, site in sites.items()}
    found = {}
    for name in names:
        site = sites[name]
        z, other = (_flat(site, v).to(drawn[name]) for v in (drawn[name], site["fn"].sample()))
        before = _all_but(name, model_trace)[0]
        changes = []
        for dims in torch.arange(z.shape[-1], device=z.device).split(max(1, rows // len(z))):
            swap = torch.zeros(len(dims), 1, z.shape[-1], dtype=torch.bool, device=z.device)
            swap[torch.arange(len(dims)), 0, dims] = True
            changed = torch.where(swap, other, z).view(len(dims), *drawn[name].shape)
            values = {k: v.expand(len(dims), *v.shape) for k, v in drawn.items()} | {name: changed}
            plate = pyro.plate("num_particles", len(dims), dim=PARTICLE_DIM)
            conditioned = poutine.condition(in_own_store(model), data=values)
            changes.append(before - _all_but(name, poutine.trace(plate(conditioned)).get_trace(*batch)))
        found[name] = torch.cat(changes).T
    return found


def _all_but(name: str, trace: Trace) -> Tensor:
    """Return the log-probability of all sites but one, ``[K, n]``."""
    sites = latent_sites(trace) | observed_sites(trace)
    others = [per_datum_log_prob(k, site).double() for k, site in sites.items() if k != name]
    return sum(others[1:], others[0])
