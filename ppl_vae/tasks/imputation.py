"""Imputation: missing elements of x given the observed ones."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import pyro
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm import tqdm

from ppl_vae._checks import check_choice, check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.data import Split, check_data
from ppl_vae.infer.log_weights import PARTICLE_DIM, per_datum_log_prob
from ppl_vae.infer.placing import place
from ppl_vae.infer.running import (
    Program,
    evaluating,
    latent_sites,
    observed_sites,
    trace_pair,
)
from ppl_vae.tasks._passes import (
    WeightedMoments,
    arguments,
    check_programs,
    event_sum,
    log_ratio,
    mean_and_error,
    per_element,
    run_one,
    run_pair,
    sizes_of_passes,
    spread,
    unmasked,
)

Method = Literal["metropolis-within-gibbs", "pseudo-gibbs", "importance"]

_METHODS: tuple[Method, ...] = ("metropolis-within-gibbs", "pseudo-gibbs", "importance")
_ROUNDS = 5  # of pseudo-Gibbs, which fills in missing elements before importance weights are drawn
_FILLS = 16  # how many versions of the filled data give proposals


@dataclass(frozen=True, eq=False)
class Imputation:
    """Data whose missing elements are filled in.

    Attributes:
        x: the data, missing elements filled with their posterior means, ``[n, *event]``.
        missing: which elements are missing, bool, ``[n, *event]``.
        draws: draws of the missing elements given the observed ones, beside those, ``[draws, n, *event]``.
        variance: the posterior variance of each missing element, 0 of observed ones, ``[n, *event]``.
        monte_carlo_error: the standard error of the mean in ``x`` over new draws, ``[n, *event]``: from the
            spread of chains, NaN of one; or from the importance weights, somewhat too large since draws are
            spread evenly over 16 proposals.
        method: how it was done.
        acceptance_rate: the share of proposals that Metropolis-within-Gibbs took, ``[n]``, or None.
        effective_sample_size: of the importance weights, ``[n]``, or None.
        truth: the true data, ``[n, *event]``, or None where they are not known.
        log_loss: minus the log of the posterior predictive density of each missing element at the truth,
            averaged over a datum's missing elements, nats per element, ``[n]``; NaN of data without any.
            None without ``truth``.
    """

    x: Tensor
    missing: Tensor
    draws: Tensor = field(repr=False)
    variance: Tensor = field(repr=False)
    monte_carlo_error: Tensor = field(repr=False)
    method: Method
    acceptance_rate: Tensor | None = None
    effective_sample_size: Tensor | None = None
    truth: Tensor | None = None
    log_loss: Tensor | None = None

    def mean_squared_error(self) -> Tensor:
        """Return each datum's mean squared error over its missing elements, ``[n]``; NaN of data without any.

        Raises:
            ValueError: if the truth is not known.
        """
        if self.truth is None:
            raise ValueError("truth: expected the true data to compare with, got None; give them to `impute`")
        return _mean_of_missing((self.x - self.truth).double().square(), self.missing)

    def root_mean_squared_error(self) -> tuple[float, float]:
        """Return the root of the mean squared error over data that miss something, and its standard error.

        Raises:
            ValueError: if the truth is not known.
        """
        values = self.mean_squared_error()
        mean, error = mean_and_error(values[~values.isnan()])
        return math.sqrt(mean), error / (2 * math.sqrt(mean)) if mean > 0 else 0.0

    def summary(self) -> dict[str, Any]:
        """Return plain numbers, for a file: means and standard errors over data that miss something."""
        result: dict[str, Any] = {
            "method": self.method,
            "num_data": len(self.x),
            "share_missing": float(self.missing.double().mean()),
        }
        for name in ("acceptance_rate", "effective_sample_size"):
            values = getattr(self, name)
            if values is not None:
                result[name] = float(values.mean())
        if self.truth is not None and self.log_loss is not None:
            rmse, error = self.root_mean_squared_error()
            result["root_mean_squared_error"] = {"mean": rmse, "standard_error": error}
            mean, error = mean_and_error(self.log_loss[~self.log_loss.isnan()])
            result["log_loss"] = {"mean": mean, "standard_error": error}
        return result

    def __str__(self) -> str:
        summary = self.summary()
        lines = [f"{self.method}: {len(self.x)} data, {summary['share_missing']:.1%} of the elements missing"]
        for name in ("acceptance_rate", "effective_sample_size"):
            if name in summary:
                lines.append(f"{name.replace('_', ' '):<36} {summary[name]:>9.3g}")
        for name, label in (
            ("root_mean_squared_error", "root mean squared error"),
            ("log_loss", "log-loss, nats per missing element"),
        ):
            if name in summary:
                lines.append(
                    f"{label:<36} {summary[name]['mean']:>9.4f} +- {summary[name]['standard_error']:.4f}"
                )
        return "\n".join(lines)


def impute(
    model: Program,
    guide: Program,
    x: Tensor,
    missing: Tensor,
    *,
    y: Tensor | None = None,
    truth: Tensor | None = None,
    method: Method = "metropolis-within-gibbs",
    num_chains: int = 4,
    num_iterations: int = 500,
    warmup: int = 100,
    num_particles: int = 1000,
    num_draws: int = 8,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Imputation:
    r"""Draw missing elements of x given the observed ones, and return their posterior mean.

    - ``"pseudo-gibbs"``: draw z from the guide at the current x, then the missing elements from p(x | z),
      and so on (Rezende et al., 2014). It ends at the wrong distribution unless the guide is the exact
      posterior.
    - ``"metropolis-within-gibbs"``: the guide's z is a proposal, taken by the Metropolis-Hastings rule
      (Mattei & Frellsen, 2018a). It ends at :math:`p(x_{missing} \mid x_{observed})` whatever the guide,
      provided that the guide's density is above zero where the posterior's is; a poor guide has few proposals
      taken.
    - ``"importance"``: draws weighted with :math:`p(x_{observed} \mid z) \, p(z) / q(z)` (Mattei & Frellsen,
      2018b), exact as their number grows. The guide was trained on whole data, and at data that are filled in
      it is too sure of z; so q is the mixture of the guide at 16 versions of the data, filled in by a few
      iterations of pseudo-Gibbs.

    The mean is that of the likelihood's means, which has less noise than that of draws.

    Args:
        model: program over the latent sites and the data, whose likelihood has elements of x that are
            independent given the latents.
        guide: program over the latent sites.
        x: data ``[n, *event]``; the values of missing elements are not looked at, and may be NaN.
        missing: which elements are missing, bool, ``[n, *event]``, or one mask ``[*event]`` for all data.
        y: labels, for programs that take them.
        truth: the true data, ``[n, *event]``, to score the result with.
        method: one of the three above.
        num_chains: chains for each datum, of the two Gibbs methods.
        num_iterations: iterations of each chain that are kept.
        warmup: iterations of each chain before those.
        num_particles: K, the draws for each datum, of ``"importance"``; rounded up to a multiple of 16.
        num_draws: how many draws of the missing elements to return.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        Stochastic Backpropagation (Rezende et al., 2014), arXiv:1401.4082
        Leveraging the Exact Likelihood of Deep Latent Variable Models (Mattei & Frellsen, 2018a),
        arXiv:1802.04826
        MIWAE: Deep Generative Modelling and Imputation of Incomplete Data (Mattei & Frellsen, 2018b),
        arXiv:1812.02633

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 4), MeanFieldGuide(MLP(4), 2)
        >>> missing = torch.tensor([True, False, False, False])
        >>> result = impute(model, guide, torch.randn(6, 4), missing, num_iterations=10, progress=False)
        >>> result.x.shape, result.draws.shape
        (torch.Size([6, 4]), torch.Size([8, 6, 4]))
    """
    check_choice("method", method, _METHODS)
    num_chains = check_positive_int("num_chains", num_chains)
    num_iterations = check_positive_int("num_iterations", num_iterations)
    num_particles = check_positive_int("num_particles", num_particles)
    num_draws = check_positive_int("num_draws", num_draws)
    warmup = check_positive_int("warmup", warmup) if warmup != 0 or isinstance(warmup, bool) else 0
    check_positive("memory", memory)
    check_seed(seed)
    if method != "importance" and num_draws > num_chains * num_iterations:
        raise ValueError(
            f"num_draws: expected at most num_chains * num_iterations, {num_chains * num_iterations}, "
            f"got {num_draws}"
        )
    where = place(device, model, guide)
    x, missing, truth = _check(x, missing, truth, where)
    labels = None if y is None else torch.as_tensor(y, device=where)
    with seeded(seed), evaluating(model, guide):
        split = Split(_from_other_data(x, missing, 1, slice(None))[0], labels)
        check_data(split, "x")
        batch = arguments(model, split, "x")
        site = check_programs(model, guide, batch, "x")
        per_element(site["fn"])
        if method != "pseudo-gibbs":
            _check_scores(guide, batch)
        if truth is not None:
            _check_truth(per_element(site["fn"]), truth, missing)
        if method == "importance":  # the guide scores each draw at each version
            each = math.ceil(num_particles / _FILLS)
            size, chunk = sizes_of_passes(model, guide, batch, each, memory, 4 * _FILLS, _FILLS)
        else:  # a pass has all chains, and two draws for each
            size, chunk = sizes_of_passes(model, guide, batch, 1, memory, times=2 * num_chains)
        steps = 1 if method == "importance" else warmup + num_iterations
        bar = tqdm(
            total=len(x) * steps,
            unit="datum" if method == "importance" else "datum iteration",
            desc="imputing",
            disable=not progress,
            dynamic_ncols=True,
        )
        parts: list[dict[str, Tensor]] = []
        with pyro.validation_enabled(False), bar:
            for start in range(0, len(x), size):
                rows = slice(start, start + size)
                small = _Rows(x[rows], missing[rows], None if truth is None else truth[rows], batch[1:], rows)
                if method == "importance":
                    starts = _from_other_data(x, missing, _FILLS, rows)
                    parts.append(_importance(model, guide, small, starts, each, chunk, num_draws))
                    bar.update(len(small.x))
                else:
                    starts = _from_other_data(x, missing, num_chains, rows)
                    parts.append(
                        _gibbs(
                            model,
                            guide,
                            small,
                            starts,
                            warmup,
                            num_iterations,
                            num_draws,
                            method == "metropolis-within-gibbs",
                            bar.update,
                        )
                    )
    found = {
        name: torch.cat([part[name] for part in parts], dim=1 if name == "draws" else 0).cpu()
        for name in parts[0]
    }
    mean = found["mean"].to(x.dtype)
    if bool(mean.isnan().any()):
        row = int(mean.reshape(len(mean), -1).isnan().any(1).nonzero()[0])
        raise ValueError(
            f"x: the missing elements of datum {row} have a mean that is NaN: no draw has weight"
        )
    missing, x = missing.cpu(), x.cpu()
    return Imputation(
        torch.where(missing, mean, x),
        missing,
        found["draws"],
        torch.where(missing, found["variance"].to(x.dtype), 0.0),
        torch.where(missing, found["error"].to(x.dtype), 0.0),
        method,
        found.get("acceptance"),
        found.get("ess"),
        None if truth is None else truth.cpu(),
        None if truth is None else _mean_of_missing(found["log_loss"], missing),
    )


@dataclass(frozen=True)
class _Rows:
    """Some data: values ``[n, *event]``, the mask, the truth if known, and what follows x in the batch."""

    x: Tensor
    missing: Tensor
    truth: Tensor | None
    others: tuple[Tensor, ...]
    rows: slice

    def batch(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the arguments of the programs for data x ``[copies, n, *event]``, copies as data."""
        copies = len(x)
        others = (t[self.rows] for t in self.others)
        return (x.flatten(0, 1), *(t.repeat(copies, *(1 for _ in t.shape[1:])) for t in others))


class _LogMean:
    """Log of a weighted mean of densities, element by element, from chunks of draws."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, log_values: Tensor) -> None:
        """Add the logs of weighted densities, ``[k, n, *event]``."""
        new = log_values.double().logsumexp(0)
        self._total = new if self._total is None else torch.logaddexp(self._total, new)

    def loss(self, log_total_weight: Tensor | float) -> Tensor:
        """Return minus the log of the mean, ``[n, *event]``."""
        return log_total_weight - cast(Tensor, self._total)  # draws came first


class _Propose(Messenger):
    """Lets the first row of a program's draws be the current ones, and the second row proposals."""

    def __init__(self, current: dict[str, Tensor]) -> None:
        super().__init__()
        self.current = current

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg):
            return
        drawn = msg["fn"](*msg["args"], **msg["kwargs"])
        msg["value"] = torch.stack([self.current[msg["name"]], drawn[1]])
        msg["done"] = True


def _gibbs(
    model: Program,
    guide: Program,
    data: _Rows,
    x: Tensor,
    warmup: int,
    num_iterations: int,
    num_draws: int,
    metropolis: bool,
    update: Callable[[int], Any],
) -> dict[str, Tensor]:
    """Run chains from data with missing elements filled in, ``[chains, n, *event]``."""
    chains, n = x.shape[:2]
    total = second = torch.zeros((), dtype=torch.float64)
    accepted = torch.zeros((chains, n), dtype=torch.float64, device=x.device)
    log_mean, kept = _LogMean(), []
    rounds = math.ceil(num_draws / chains)
    keep = {num_iterations - 1 - (i * num_iterations) // rounds for i in range(rounds)}
    current: dict[str, Tensor] | None = None
    for i in range(-warmup, num_iterations):
        if metropolis and current is not None:
            site, current, taken = _step(model, guide, data.batch(x), current)
        else:
            site, current, taken = _draw(model, guide, data.batch(x))
        fn, chosen = per_element(site["fn"]), taken.long()

        def pick(values: Tensor, chosen: Tensor = chosen, shape: torch.Size = x.shape) -> Tensor:
            return _pick(values, chosen).reshape(shape)

        drawn = pick(fn.sample())
        x = torch.where(data.missing, drawn, data.x)
        if i >= 0:
            mean, variance = _moments(fn, pick, drawn)
            total = total + mean
            second = second + variance + mean.square()
            accepted += taken.reshape(chains, n)
            if data.truth is not None:
                log_mean.add(pick(fn.log_prob(data.batch(data.truth.expand_as(x))[0])))
            if i in keep:
                kept.append(x)
        update(n)
    means = total / num_iterations
    mean = means.mean(0)
    result = {
        "mean": mean,
        "variance": (second.mean(0) / num_iterations - mean.square()).clamp(min=0),
        "error": means.std(0) / math.sqrt(chains) if chains > 1 else torch.full_like(mean, math.nan),
        "draws": torch.cat(kept)[:num_draws],
    }
    if metropolis:
        result["acceptance"] = accepted.mean(0) / num_iterations
    if data.truth is not None:
        result["log_loss"] = log_mean.loss(math.log(chains * num_iterations))
    return result


def _draw(model: Program, guide: Program, batch: tuple[Tensor, ...]) -> tuple[Any, dict[str, Tensor], Tensor]:
    """Draw latents from the guide; return the model's site "x", the latents, and which row is taken: 0."""
    model_trace, guide_trace = run_pair(model, guide, batch, 1)
    latents = {name: site["value"][0] for name, site in latent_sites(guide_trace).items()}
    return (
        model_trace.nodes["x"],
        latents,
        torch.zeros(len(batch[0]), dtype=torch.bool, device=batch[0].device),
    )


def _step(
    model: Program, guide: Program, batch: tuple[Tensor, ...], current: dict[str, Tensor]
) -> tuple[Any, dict[str, Tensor], Tensor]:
    """Make a Metropolis-Hastings step: as ``_draw``, row 1 where the proposal is taken."""
    plate = pyro.plate("num_particles", 2, dim=PARTICLE_DIM)
    proposing: Program = _Propose(current)(plate(guide))
    model_trace, guide_trace = trace_pair(plate(model), proposing, *batch)
    extra = sorted(latent_sites(guide_trace).keys() - latent_sites(model_trace).keys())
    if extra:
        raise ValueError(
            "guide: expected the model's latent sites alone, as a proposal for them, "
            f"got auxiliary sites {extra}"
        )
    site = model_trace.nodes["x"]
    weights = log_ratio(model_trace, guide_trace) + per_datum_log_prob("x", site)
    taken = torch.rand_like(weights[0]).log() < weights[1] - weights[0]
    latents = {name: _pick(site["value"], taken.long()) for name, site in latent_sites(guide_trace).items()}
    return site, latents, taken


def _pick(values: Tensor, row: Tensor) -> Tensor:
    """Return ``values[row[i], i]``, ``[n, ...]``, of values ``[rows, n, ...]``."""
    return values[row, torch.arange(len(row), device=row.device)]


def _moments(fn: Any, pick: Callable[[Tensor], Tensor], drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each element, or a draw and 0 where the likelihood does not know them."""
    try:
        return pick(fn.mean).double(), pick(fn.variance).double()
    except NotImplementedError:
        return drawn.double(), torch.zeros_like(drawn, dtype=torch.float64)


def _importance(
    model: Program,
    guide: Program,
    data: _Rows,
    x: Tensor,
    num_particles: int,
    chunk: int,
    num_draws: int,
) -> dict[str, Tensor]:
    """Weigh draws of the guide at several versions of the data, filled in, ``[fills, n, *event]``.

    The proposal is the equal mixture of the guide at each: it is as wide as what is missing leaves open.
    """
    for _ in range(_ROUNDS):
        site, _latents, _taken = _draw(model, guide, data.batch(x))
        x = torch.where(data.missing, site["fn"].sample().reshape(x.shape), data.x)
    fills, n = x.shape[:2]
    batch, small, observed = data.batch(x), data.batch(x[:1]), ~data.missing
    x = data.x
    moments, log_mean = WeightedMoments(), _LogMean()
    draws = x.new_zeros((num_draws, *x.shape))
    columns = torch.arange(len(x), device=x.device)
    log_total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    for start in range(0, num_particles, chunk):
        each = min(chunk, num_particles - start)
        k = each * fills
        sites = latent_sites(run_one(guide, batch, each))
        latents = {name: s["value"].unflatten(1, (fills, n)).flatten(0, 1) for name, s in sites.items()}
        repeated = {
            name: z[:, None].expand(k, fills, *z.shape[1:]).flatten(1, 2) for name, z in latents.items()
        }
        guide_sites = observed_sites(run_one(guide, batch, k, repeated))
        log_each = sum(per_datum_log_prob(name, guide_sites[name]) for name in latents)
        log_q = torch.as_tensor(log_each).unflatten(1, (fills, n)).logsumexp(1) - math.log(fills)
        model_trace = run_one(model, small, k, latents)
        _check_same_sites(model_trace, latents)
        site = model_trace.nodes["x"]
        fn = per_element(site["fn"])
        log_p = sum(
            per_datum_log_prob(name, s) for name, s in observed_sites(model_trace).items() if name != "x"
        )
        log_observed = event_sum(torch.where(observed, fn.log_prob(x), 0.0), 2)
        weights = (log_p + unmasked(site, log_observed) - log_q).double()
        drawn = fn.sample()
        moments.add(weights, *_moments(fn, lambda values: values, drawn))
        if data.truth is not None:
            log_prob = fn.log_prob(data.truth)
            log_mean.add(spread(weights, log_prob) + log_prob)
        # each draw so far stays with the odds of all weights before to those of this chunk
        new_total = torch.logaddexp(log_total, weights.logsumexp(0))
        share = (weights - torch.where(new_total.isfinite(), new_total, 0.0)).exp()  # [k, n]
        cumulative = share.cumsum(0)
        level = torch.rand((num_draws, len(x)), dtype=torch.float64, device=x.device)
        rows = torch.searchsorted(cumulative.mT.contiguous(), level.mT.contiguous()).mT  # [draws, n]
        is_new = rows < k
        if start == 0:
            rows, is_new = rows.clamp(max=k - 1), torch.ones_like(is_new)
        chosen = drawn[rows.clamp(max=k - 1), columns]
        draws = torch.where(spread(is_new, draws), torch.where(data.missing, chosen, data.x), draws)
        log_total = new_total
    result = {
        "mean": moments.mean,
        "variance": moments.variance,
        "error": moments.standard_error,
        "ess": moments.effective_sample_size,
        "draws": draws,
    }
    if data.truth is not None:
        result["log_loss"] = log_mean.loss(spread(moments.log_total, x))
    return result


def _check_same_sites(model_trace: Trace, latents: dict[str, Tensor]) -> None:
    """Raise unless the latents are all those of the model, which was run at them."""
    drawn = sorted(latent_sites(model_trace))
    extra = sorted(latents.keys() - observed_sites(model_trace).keys())
    if drawn or extra:
        raise ValueError(
            "guide: expected the model's latent sites alone, as a proposal for them, "
            + (f"got auxiliary sites {extra}" if extra else f"it lacks {drawn}")
        )


def _from_other_data(x: Tensor, missing: Tensor, copies: int, rows: slice) -> Tensor:
    """Return data with each missing element set to its value in some datum that has it, drawn at random.

    Where no datum has it, it is some observed value. Such values are in the likelihood's support.

    Args:
        x: all data, ``[n, *event]``.
        missing: which elements are missing.
        copies: how many draws.
        rows: which data to fill in.

    Returns:
        ``[copies, rows, *event]``.
    """
    values, observed = x.reshape(len(x), -1), ~missing.reshape(len(x), -1)
    some = x[rows]
    size = copies * len(some)
    nowhere = ~observed.any(0)
    chances = (observed | nowhere).mT.double()
    donors = torch.multinomial(chances, size, replacement=True)  # [elements, size]
    drawn = values.mT.gather(1, donors)
    pool = values[observed]
    anything = pool[torch.randint(len(pool), drawn.shape, device=x.device)]
    drawn = torch.where(nowhere[:, None], anything, drawn)
    filled = drawn.mT.reshape(copies, *some.shape)
    return torch.where(missing[rows], filled, some)


def _mean_of_missing(values: Tensor, missing: Tensor) -> Tensor:
    """Return the mean over each datum's missing elements, ``[n]``; NaN of data without any."""
    mask = missing.reshape(len(missing), -1)
    flat = torch.where(mask, values.reshape(mask.shape), 0.0)
    return flat.sum(1) / mask.sum(1)


def _check(
    x: object, missing: object, truth: object, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return data with zeros where elements are missing, the mask of each datum, and the truth, or raise."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor [n, *event], got {got}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: expected data [n, *event], n above 0, got shape {list(x.shape)}")
    if not isinstance(missing, Tensor) or missing.dtype != torch.bool:
        got = missing.dtype if isinstance(missing, Tensor) else type(missing).__name__
        raise TypeError(f"missing: expected a bool tensor, True where x is missing, got {got}")
    if missing.shape not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"missing: expected x's shape {list(x.shape)}, or {list(x.shape[1:])} for all data, "
            f"got {list(missing.shape)}"
        )
    missing = missing.detach().to(device).expand_as(x)
    if not bool(missing.any()) or bool(missing.all()):
        raise ValueError(
            f"missing: expected some elements missing and some not, got all {bool(missing.any())}"
        )
    x = torch.where(missing, 0.0, x.detach().to(device))
    check_data(x, "x")
    if truth is None:
        return x, missing, None
    if not isinstance(truth, Tensor) or truth.shape != x.shape:
        got = f"shape {list(truth.shape)}" if isinstance(truth, Tensor) else type(truth).__name__
        raise ValueError(f"truth: expected a tensor of x's shape {list(x.shape)}, got {got}")
    truth = truth.detach().to(x)
    check_data(truth, "truth")
    return x, missing, truth


def _check_scores(guide: Program, batch: tuple[Tensor, ...]) -> None:
    """Raise unless the guide scores values which it has not drawn."""
    one = tuple(t[:1] for t in batch)
    drawn = {name: site["value"].clone() for name, site in latent_sites(run_one(guide, one, 1)).items()}
    try:
        for name, site in observed_sites(run_one(guide, one, 1, drawn)).items():
            per_datum_log_prob(name, site)
    except (KeyError, NotImplementedError, ValueError) as error:
        raise ValueError(
            "guide: expected distributions that can score a value which they have not drawn, as proposals, "
            f"got others at sites {sorted(drawn)}; use method='pseudo-gibbs'"
        ) from error


def _check_truth(base: Any, truth: Tensor, missing: Tensor) -> None:
    """Raise if a missing element's true value is outside the support of the likelihood."""
    try:
        inside = base.support.check(truth) | ~missing
    except (NotImplementedError, RuntimeError):  # no stated support, or one that differs between data
        return
    if not bool(inside.all()):
        row = int((~inside).reshape(len(inside), -1).any(1).nonzero()[0])
        raise ValueError(f"truth: datum {row} has missing elements outside the support {base.support}")
