"""The parts of the ELBO that the aggregate posterior tells apart."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from ppl_vae._checks import check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.evaluation.evaluate import CPU_ROWS, Estimate, pass_size
from ppl_vae.infer.aggregate import marginals
from ppl_vae.infer.checking import check_all, checked_batches, first_batch, running_on
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
from ppl_vae.infer.scoring import name_of

if TYPE_CHECKING:
    import pandas as pd

# A pair of a draw and a datum costs no run of a decoder: passes may have more rows than in `evaluate`.
_CPU_PAIRS = 8 * CPU_ROWS
_CHECKED = 1000  # data whose prior is compared with that of other data


@dataclass(frozen=True, eq=False)
class ElboDecomposition:
    r"""What ``elbo_decomposition`` measured, nats per datum.

    For every draw, up to rounding,

    .. math::
        \text{ELBO} &= \text{reconstruction} - I(n; z) - KL(q(z) \,\|\, p(z)) \\
        KL(q(z) \,\|\, p(z)) &= TC(z) + \sum_d KL(q(z_d) \,\|\, p(z_d)),

    the second where the prior factorises over the dimensions and there is one latent site whose marginals in
    the guide are known; else what is not known is NaN, and ``reasons`` says why. Latent sites of a hierarchy
    are one z together.

    The values of a datum are means over its own draws. q(z) is the mixture over the data of the call, so that
    standard errors, which take data for independent, leave out what other data would change in q(z).

    Attributes:
        elbo: the evidence lower bound.
        reconstruction: E[log p(x | z)].
        mutual_information: I(n; z), index-code mutual information: E[log q(z | x) - log q(z)]. At most
            log N, and in expectation no more than the mutual information of x and z under the distribution
            that the N data are drawn from.
        mutual_information_upper: the same with a q(z) of the other N - 1 data: in expectation no less than
            that mutual information. Infinite where a draw has no density under the others, NaN for one datum.
        marginal_kl: KL(q(z) || p(z)).
        total_correlation: KL(q(z) || prod_d q(z_d)).
        dimension_kl: the sum over dimensions of KL(q(z_d) || p(z_d)).
        dimension_kls: KL(q(z_d) || p(z_d)) of each dimension; empty where it is not known.
        reasons: why a term is NaN, by the term's name.
        num_data: N.
        num_particles: K, draws per datum.
    """

    elbo: Estimate
    reconstruction: Estimate
    mutual_information: Estimate
    mutual_information_upper: Estimate
    marginal_kl: Estimate
    total_correlation: Estimate
    dimension_kl: Estimate
    dimension_kls: tuple[Estimate, ...] = field(repr=False)
    reasons: dict[str, str]
    num_data: int
    num_particles: int

    def _terms(self) -> dict[str, Estimate]:
        names = (
            "elbo",
            "reconstruction",
            "mutual_information",
            "mutual_information_upper",
            "marginal_kl",
            "total_correlation",
            "dimension_kl",
        )
        named = {name: getattr(self, name) for name in names}
        return named | {f"dimension_kl[{d}]": estimate for d, estimate in enumerate(self.dimension_kls)}

    @property
    def table(self) -> "pd.DataFrame":
        """A row for each term: mean, standard_error, monte_carlo_error."""
        import pandas as pd

        rows = {
            name: (estimate.mean, estimate.standard_error, estimate.monte_carlo_error)
            for name, estimate in self._terms().items()
        }
        columns = ["mean", "standard_error", "monte_carlo_error"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("term")

    def summary(self) -> dict[str, Any]:
        """Return means, standard errors and Monte Carlo errors as plain numbers, for a file."""
        return {"num_data": self.num_data, "num_particles": self.num_particles} | {
            name: {
                "mean": estimate.mean,
                "standard_error": estimate.standard_error,
                "monte_carlo_error": estimate.monte_carlo_error,
            }
            for name, estimate in self._terms().items()
        }

    def __str__(self) -> str:
        rows = [
            ("ELBO", self.elbo),
            ("reconstruction", self.reconstruction),
            ("mutual information", self.mutual_information),
            ("KL(q(z) || p(z))", self.marginal_kl),
            ("  total correlation", self.total_correlation),
            ("  dimension-wise KL", self.dimension_kl),
        ]
        lines = [
            f"{name:<20} "
            + (f"{e.mean:>10.2f} +- {e.standard_error:.2f}" if not math.isnan(e.mean) else f"{'-':>10}")
            for name, e in rows
        ]
        head = f"nats per datum, mean and standard error over {self.num_data} data"
        at_most = f"log N = {math.log(self.num_data):.2f} is the most that the mutual information can be"
        why = [f"{name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join([head, *lines, at_most, *why])


def elbo_decomposition(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 1,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ElboDecomposition:
    r"""Split the ELBO into reconstruction, mutual information, total correlation and dimension-wise KL.

    The aggregate posterior :math:`q(z) = \frac1N \sum_n q(z \mid x_n)` is the exact mixture over all N data
    of the call: the guide is run on every datum with every draw in its place, N x (N K) densities in
    blocks. So only the expectation over draws is estimated. But it is the q(z) of these N data: the mutual
    information is at most log N, whatever the guide, and too low where the true one comes near that; KL(q(z)
    || p(z)) is too high by as much. Compare numbers of equal N alone. ``mutual_information_upper`` says from
    above how far more data could move it.

    Both programs run in evaluation mode; no parameter, buffer or random stream of the caller changes.

    Args:
        model: program over the latent sites and the data, whose prior does not depend on the datum.
        guide: program over the same latent sites.
        data: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch ``Dataset`` or
            ``DataLoader``; all are held on the device at once. Bits of a dynamic split are drawn once.
        num_particles: K, the number of draws per datum.
        memory: bytes that a pass may take beyond the data, the draws and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected. For a prior that depends
            on the datum (p(z | y) of a ``CVAE``, say), since there is no one p(z) to compare q(z) with; a
            guide with auxiliary or masked sites, or one that can't score what it has not drawn.

    References:
        ELBO surgery (Hoffman & Johnson, 2016);
        Isolating Sources of Disentanglement in VAEs (Chen et al., 2018), arXiv:1802.04942;
        Fixing a Broken ELBO (Alemi et al., 2018), arXiv:1711.00464;
        both bounds on the mutual information: On Variational Bounds of Mutual Information (Poole et al.,
        2019), arXiv:1905.06922

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> parts = elbo_decomposition(model, guide, torch.randn(20, 5), progress=False)
        >>> kl = parts.mutual_information.mean + parts.total_correlation.mean + parts.dimension_kl.mean
        >>> abs(parts.elbo.mean - (parts.reconstruction.mean - kl)) < 1e-5
        True
    """
    num_particles = check_positive_int("num_particles", num_particles)
    check_positive("memory", memory)
    check_seed(seed)
    where = place(device, model, guide)
    data = prepare_data(data, "data", where)
    rows = CPU_ROWS if where.type == "cpu" else sys.maxsize
    pairs = _CPU_PAIRS if where.type == "cpu" else sys.maxsize
    with seeded(seed, 0), evaluating(model, guide):
        batch = in_memory(model, guide, data, where)  # a loader may draw from the stream
    with seeded(seed, 1), evaluating(model, guide):
        with running_on("data", batch):
            reasons = _check(model, guide, *(t[:2] for t in batch))
        n = len(batch[0])
        with (
            tqdm(total=2 * n, unit="datum", desc="q(z)", disable=not progress, dynamic_ncols=True) as bar,
            pyro.validation_enabled(False),
        ):
            size, particles = pass_size(
                memory,
                num_particles,
                rows,
                lambda n, k: _as_terms(_draw(model, guide, *(t[:n] for t in batch), num_particles=k)),
            )
            drawn = _draw_all(model, guide, batch, num_particles, size, particles, bar)
            draws = {name[2:]: v.flatten(0, 1) for name, v in drawn.items() if name.startswith("z ")}
            _check_prior(model, batch, {name: z[:n] for name, z in draws.items()}, drawn["prior"][0], size)
            by_dimension = "total_correlation" not in reasons
            size, particles = pass_size(
                memory,
                n * num_particles,
                pairs,
                lambda n, k: _as_terms(
                    _densities(
                        guide,
                        tuple(t[:n] for t in batch),
                        {name: z[:1].expand(k, *z.shape[1:]) for name, z in draws.items()},
                        by_dimension,
                    )
                ),
            )
            mixture = _mixture(guide, batch, draws, size, particles, by_dimension, bar)
    return _result(drawn, {name: v.unflatten(0, (num_particles, n)) for name, v in mixture.items()}, reasons)


def in_memory(model: Program, guide: Program, data: Any, where: torch.device) -> tuple[Tensor, ...]:
    """Return all data that ``prepare_data`` gave, as the model's arguments, checked, on the device."""
    first = first_batch(model, data, "data", 2, where)
    with running_on("data", first):
        check_pair(*trace_pair(model, guide, *first), first)
    observed = check_all(model, guide, data, "data", where)
    parts = checked_batches(model, data, observed, sys.maxsize, where)
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


# -- the draws -------------------------------------------------------------------------------------


def _draw(model: Program, guide: Program, *batch: Tensor, num_particles: int) -> dict[str, Tensor]:
    """Return draws of each site, ``"z name"``, and the log-probabilities of each draw, ``[K, n, ...]``."""
    plate = pyro.plate("num_particles", num_particles, dim=PARTICLE_DIM)
    model_trace, guide_trace = trace_pair(plate(model), plate(guide), *batch)
    in_model, in_guide = latent_sites(model_trace), latent_sites(guide_trace)
    likelihoods = [per_datum_log_prob(*item).double() for item in observed_sites(model_trace).items()]
    found = {
        "reconstruction": torch.stack(likelihoods).sum(0),
        "prior": torch.stack([per_datum_log_prob(*item).double() for item in in_model.items()]).sum(0),
        "guide": torch.stack([per_datum_log_prob(*item).double() for item in in_guide.items()]).sum(0),
    }
    found |= {f"z {name}": site["value"] for name, site in in_guide.items()}
    if len(in_model) == 1:
        ((_, site),) = in_model.items()
        if factorises(site["fn"]):
            found["prior dims"] = site["fn"].base_dist.log_prob(site["value"]).double()
    return found


def _draw_all(
    model: Program,
    guide: Program,
    batch: tuple[Tensor, ...],
    num_particles: int,
    size: int,
    particles: int,
    bar: tqdm,
) -> dict[str, Tensor]:
    """Return what ``_draw`` does of all data, ``[num_particles, N, ...]``, in passes."""
    columns = []
    for small in zip(*(t.split(size) for t in batch), strict=True):
        counts = [min(particles, num_particles - done) for done in range(0, num_particles, particles)]
        parts = [_draw(model, guide, *small, num_particles=k) for k in counts]
        columns.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        bar.update(len(small[0]))
    return {name: torch.cat([column[name] for column in columns], 1) for name in columns[0]}


# -- the mixture -----------------------------------------------------------------------------------


def _densities(
    guide: Program, batch: tuple[Tensor, ...], draws: Mapping[str, Tensor], by_dimension: bool
) -> dict[str, Tensor]:
    """Return log q(z_m | x_n) of draws ``[M, *event]`` for every datum: ``[M, n]``, per dimension too."""
    count, n = len(next(iter(draws.values()))), len(batch[0])
    values = {name: z.unsqueeze(1).expand(count, n, *z.shape[1:]) for name, z in draws.items()}
    plate = pyro.plate("num_particles", count, dim=PARTICLE_DIM)
    trace = poutine.trace(plate(poutine.condition(in_own_store(guide), data=values))).get_trace(*batch)
    sites = observed_sites(trace)
    found: dict[str, Tensor] = {}
    if by_dimension:
        ((name, site),) = sites.items()
        found["dims"] = marginals(name, site["fn"]).log_prob(site["value"])
        if factorises(site["fn"]):
            return found | {"joint": found["dims"].sum(-1, dtype=torch.float64)}
    total = [per_datum_log_prob(*item).double() for item in sites.items()]
    return found | {"joint": sum(total[1:], total[0])}


def _mixture(
    guide: Program,
    batch: tuple[Tensor, ...],
    draws: Mapping[str, Tensor],
    size: int,
    particles: int,
    by_dimension: bool,
    bar: tqdm,
) -> dict[str, Tensor]:
    """Return log q(z) of ``"all"`` data and of the ``"others"``, ``[M]``; log q(z_d) as ``"dims"``."""
    n, z = len(batch[0]), next(iter(draws.values()))
    log_sum = torch.full((len(z),), -math.inf, dtype=torch.float64, device=z.device)
    others = log_sum.clone()
    dims = log_sum.new_full((len(z), z.shape[-1]), -math.inf) if by_dimension else None
    own = torch.arange(len(z), device=z.device) % n
    for index in torch.arange(n, device=z.device).split(size):
        small = tuple(t.index_select(0, index) for t in batch)
        for rows in torch.arange(len(z), device=z.device).split(particles):
            found = _densities(guide, small, {name: v[rows] for name, v in draws.items()}, by_dimension)
            joint = found["joint"]
            log_sum[rows] = torch.logaddexp(log_sum[rows], joint.logsumexp(1))
            joint = torch.where(own[rows].unsqueeze(1) == index, -math.inf, joint)
            others[rows] = torch.logaddexp(others[rows], joint.logsumexp(1))
            if dims is not None:
                # few terms, in the precision of the programs: the sum over all passes is in double
                dims[rows] = torch.logaddexp(dims[rows], found["dims"].logsumexp(1).double())
        bar.update(len(index))
    without = others - math.log(n - 1) if n > 1 else torch.full_like(others, math.nan)
    found = {"all": log_sum - math.log(n), "others": without}
    return found if dims is None else found | {"dims": dims - math.log(n)}


def _result(
    drawn: Mapping[str, Tensor], mixture: Mapping[str, Tensor], reasons: dict[str, str]
) -> ElboDecomposition:
    log_q = mixture["all"]
    num_particles, n = log_q.shape

    def estimate(values: Tensor) -> Estimate:
        values = values.cpu()
        spread = values.var(0).sum() if num_particles > 1 else torch.tensor(math.nan)
        return Estimate(values.mean(0), num_particles, float((spread / num_particles).sqrt()) / n)

    unknown = torch.full_like(log_q, math.nan)
    correlation, dimensions = unknown, None
    if "dims" in mixture:
        correlation = log_q - mixture["dims"].sum(-1)
        if "dimension_kl" not in reasons:
            dimensions = mixture["dims"] - drawn["prior dims"]
    return ElboDecomposition(
        elbo=estimate(drawn["reconstruction"] + drawn["prior"] - drawn["guide"]),
        reconstruction=estimate(drawn["reconstruction"]),
        mutual_information=estimate(drawn["guide"] - log_q),
        mutual_information_upper=estimate(drawn["guide"] - mixture["others"]),
        marginal_kl=estimate(log_q - drawn["prior"]),
        total_correlation=estimate(correlation),
        dimension_kl=estimate(unknown if dimensions is None else dimensions.sum(-1)),
        dimension_kls=() if dimensions is None else tuple(estimate(v) for v in dimensions.unbind(-1)),
        reasons=reasons,
        num_data=n,
        num_particles=num_particles,
    )


def _as_terms(found: dict[str, Tensor]) -> Terms:
    """Return what ``pass_size`` asks of a pass."""
    return Terms(next(iter(found.values())), {})


# -- checks ----------------------------------------------------------------------------------------


def _check(model: Program, guide: Program, *batch: Tensor) -> dict[str, str]:
    """Raise unless there is a q(z) that can be scored; return which terms are not known, and why."""
    plate = pyro.plate("num_particles", 2, dim=PARTICLE_DIM)
    model_trace, guide_trace = trace_pair(plate(model), plate(guide), *batch)
    in_model, in_guide = latent_sites(model_trace), latent_sites(guide_trace)
    if seen := sorted(observed_sites(guide_trace)):
        raise ValueError(f"guide: expected no observed site (`obs=`, `pyro.factor`), got {seen}")
    if missing := sorted(in_model.keys() - in_guide.keys()):
        raise ValueError(
            f"guide: expected draws of all latent sites of the model, got none of {missing}, which is summed "
            "over"
        )
    if auxiliary := sorted(in_guide.keys() - in_model.keys()):
        raise ValueError(
            f"guide: expected no auxiliary sites, since q(z) has them summed over, got {auxiliary}"
        )
    for sites in (in_model, in_guide):
        for name, site in sites.items():
            if site["mask"] is not None:
                raise ValueError(
                    f"site {name!r}: expected no mask, since all data have a part in the aggregate posterior"
                )
    reasons = _reasons(in_model, in_guide)
    draws = {name: site["value"].flatten(0, 1) for name, site in in_guide.items()}
    try:
        _densities(guide, batch, draws, "total_correlation" not in reasons)
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            "guide: expected distributions that can score a value which they have not drawn, got "
            f"{[type(site['fn']).__name__ for site in in_guide.values()]}"
        ) from error
    return reasons


def _reasons(in_model: Mapping[str, Site], in_guide: Mapping[str, Site]) -> dict[str, str]:
    """Return why total correlation and dimension-wise KL are not known, by their names."""
    both = ("total_correlation", "dimension_kl")
    if len(in_guide) > 1:
        return dict.fromkeys(both, f"expected one latent site, got {sorted(in_guide)}")
    ((name, site),) = in_guide.items()
    try:
        if len(site["fn"].event_shape) != 1:
            raise ValueError(
                f"site {name!r}: expected one event dimension, got {tuple(site['fn'].event_shape)}"
            )
        marginals(name, site["fn"])
    except ValueError as error:
        return dict.fromkeys(both, str(error))
    prior = in_model[name]["fn"]
    if not factorises(prior):
        reason = f"site {name!r}: expected a prior that factorises (`.to_event(1)`), got {name_of(prior)}"
        return {"dimension_kl": reason}
    return {}


def _check_prior(
    model: Program, batch: tuple[Tensor, ...], draws: Mapping[str, Tensor], log_prior: Tensor, size: int
) -> None:
    """Raise if log p(z) of a draw is another for another datum: draws ``[N, *event]``, a thousand at most."""
    n = len(batch[0])
    every = torch.randperm(n, device=log_prior.device)
    rows, partners = every[:_CHECKED], every.roll(1)[:_CHECKED]
    for own, other in zip(rows.split(size), partners.split(size), strict=True):
        values = {name: z[own] for name, z in draws.items()}
        small = (t.index_select(0, other) for t in batch)
        trace = poutine.trace(poutine.condition(in_own_store(model), data=values)).get_trace(*small)
        sites = observed_sites(trace)
        found = sum((per_datum_log_prob(name, sites[name])[0].double() for name in draws), log_prior[:1] * 0)
        expected = log_prior[own]
        differ = (found - expected).abs() > 1e-3 * (1 + expected.abs())
        if bool(differ.any()):
            i = int(differ.nonzero()[0])
            raise ValueError(
                "model: expected a prior that does not depend on the datum, since q(z) is compared with one "
                f"p(z); log p(z) of one draw is {float(expected[i]):.6g} with its own datum and "
                f"{float(found[i]):.6g} with another"
            )
