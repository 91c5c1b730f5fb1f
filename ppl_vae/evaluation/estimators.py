"""Comparison of ELBO estimators on one pair: bound, gradient noise and bias, time and memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer import ELBO, ReweightedWakeSleep
from torch import Tensor
from tqdm import tqdm

from ppl_vae._checks import check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.evaluation._compared import (
    as_before,
    is_bound,
    named_estimators,
    naming,
    plain_of,
)
from ppl_vae.evaluation._gradients import Gradients, peak_memory, relative_bias, standing, take_gradients
from ppl_vae.evaluation.evaluate import evaluate
from ppl_vae.infer.checking import check_all, running_on
from ppl_vae.infer.estimators import CUBO
from ppl_vae.infer.objective import Objective
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.running import (
    Program,
    batch_arguments,
    check_pair,
    data_plate,
    evaluating,
    latent_sites,
    observed_sites,
    trace_pair,
)

if TYPE_CHECKING:
    import pandas as pd

_ROLES = ("model", "guide")
_WIDTH = 120  # of the printed table


@dataclass(frozen=True, eq=False)
class EstimatorComparison:
    r"""What ``compare_estimators`` measured.

    The columns of ``table``, with ``model_`` and ``guide_`` for the two groups of parameters. Gradients are
    of the bound per datum; a group without a gradient has NaN.

    ``bound`` is what the estimator maximises (``CUBO``: minimises). Where that is penalised or weighted
    (``BetaTC_ELBO``, ``DIP_ELBO``, ``KL_ELBO`` with a capacity or free bits, a KL weight other than 1) it is
    that objective, no bound on log p(x), and ``bound_bias`` is NaN.

    ===========================  ======================================================================
    particles                    K, the estimator's draws per datum
    bound                        nats per datum, mean over repeats; NaN of ``ReweightedWakeSleep``
    bound_sd                     its standard deviation over repeats
    bound_se                     the standard error of its mean
    bound_bias, _bias_se         bound minus ``log_likelihood``; its standard error
    model_gradient_norm          the norm of the mean gradient
    model_gradient_variance      the variance over repeats, summed over the coordinates
    model_snr                    signal-to-noise ratio :math:`\sqrt{\max(0, |m|^2 - v / R) / v}` of mean m and
                                 variance v: v / R is what the noise adds to the square of m over R repeats.
                                 Infinite without variance
    model_gradient_bias          the norm of mean minus reference gradient over that of the reference, without
                                 what noise adds to either; NaN without a reference, or with one that is not
                                 told from zero (its square is below three of its standard errors)
    model_gradient_bias_se       the standard error of the bias' square over the bias: bias / se tests against
                                 zero, one below 3 or so is not told from it. A clear bias is itself known to
                                 about half of it. NaN of two repeats
    seconds_per_step             median time of a loss with its gradients
    peak_memory_mib              most memory of one such step beyond what was there: on CUDA what the
                                 allocator gave, on a CPU tensors alive at one time
    ===========================  ======================================================================

    Attributes:
        table: one row per estimator, the index ``"estimator"`` holds the names.
        log_likelihood: log p(x), nats per datum, importance-sampled in evaluation mode; NaN if the model
            has latent sites that the guide lacks.
        log_likelihood_se: its Monte Carlo standard error, for the same data.
        num_data: the data in the batch.
        repeats: R, the gradients taken of each estimator.
        seed: of the draws.
    """

    table: "pd.DataFrame" = field(repr=False)
    log_likelihood: float
    log_likelihood_se: float
    num_data: int
    repeats: int
    seed: int

    def __str__(self) -> str:
        import pandas as pd

        columns: dict[str, list[str]] = {}
        rows: list[dict[str, Any]] = [
            dict(zip(self.table.columns, row, strict=True)) for row in self.table.itertuples(index=False)
        ]
        columns["K"] = [f"{row['particles']}" for row in rows]
        for name, heading in (("bound", "bound"), ("bound_bias", "- log p(x)")):
            columns[heading] = [_shown(row[name], row[f"{name}_se"], "z.2f", ".2g") for row in rows]
        for role in _ROLES:
            columns[f"{role} SNR"] = [_shown(row[f"{role}_snr"], math.nan, ".3g", "") for row in rows]
        for role in _ROLES:
            key = f"{role}_gradient_bias"
            columns[f"{role} bias"] = [_shown(row[key], row[f"{key}_se"], ".2g", ".1g") for row in rows]
        columns["ms"] = [f"{1e3 * row['seconds_per_step']:.3g}" for row in rows]
        columns["MiB"] = [f"{row['peak_memory_mib']:.3g}" for row in rows]
        printed = pd.DataFrame(columns, index=pd.Index(list(map(str, self.table.index))))
        names = max(map(len, printed.index))
        room = _WIDTH - (max(map(len, printed.to_string(line_width=10_000).splitlines())) - names)
        if names > room:
            printed.index = pd.Index([n if len(n) <= room else f"{n[: room - 1]}…" for n in printed.index])
        head = f"nats per datum, {self.repeats} gradients of each on {self.num_data} data"
        if not math.isnan(self.log_likelihood):
            head += f"; log p(x) = {_shown(self.log_likelihood, self.log_likelihood_se, 'z.2f', '.2g')}"
        if not self.table[[f"{role}_gradient_bias" for role in _ROLES]].isna().all(axis=None):
            head += "\nbias: of the gradient, over its norm; bias / se (after ±) tests against zero"
        return f"{head}\n{printed.to_string(line_width=10_000)}"


def _shown(value: float, error: float, form: str, error_form: str) -> str:
    """Return a number with its error, if that is known; a dash for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:{form}}" + ("" if math.isnan(error) else f" ±{error:{error_form}}")


def compare_estimators(
    model: Program,
    guide: Program,
    batch: Tensor | tuple[Tensor, ...],
    estimators: Mapping[str, ELBO] | Sequence[ELBO],
    repeats: int = 100,
    *,
    seed: int = 0,
    reference_particles: int = 1000,
    reference_repeats: int | None = None,
    progress: bool = True,
) -> EstimatorComparison:
    """Measure bound, gradient noise, gradient bias, time and memory of estimators on one batch.

    Takes ``repeats`` independent gradients of each estimator as training does, at the present parameters, in
    the modes that the programs are in: bounds too, while log p(x) is taken in evaluation mode. Parameters,
    buffers, gradients, random streams and the estimators themselves are as before afterwards; a schedule
    stands where it stood. The draws of each estimator start from the same seed.

    A gradient's bias is held against the mean plain gradient of the same bound: the fully reparameterised or
    score-function one of the ELBO, ``Renyi`` for ``DReG``, ``IWAE`` for ``stick_the_landing`` and for
    ``VIMCO`` of reparameterised sites. An estimator that is plain itself, or of another objective, has none.

    Args:
        model: program over the latent sites and the data.
        guide: program over the latent sites.
        batch: a tensor ``[n, *event]`` or a tuple ``(x, y)``.
        estimators: by name; or a sequence of them, named by their classes.
        repeats: R, the number of gradients of each, at least 2.
        seed: of the draws.
        reference_particles: draws per datum for the log p(x) that bounds are held against.
        reference_repeats: the number of plain gradients that others are held against, at least 2; by
            default ten times ``repeats``, at least 100; 0 for no gradient bias.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; for an estimator that
            can't run on the pair, its name, before any is measured.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), arXiv:1802.04537

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> from ppl_vae.infer import STL_ELBO
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> x = model(None, size=10).detach()
        >>> result = compare_estimators(model, guide, x, [Trace_ELBO(), STL_ELBO()], 5, progress=False)
        >>> list(result.table.index)
        ['Trace_ELBO', 'STL_ELBO']
    """
    import pandas as pd

    named = named_estimators(estimators)
    reference_repeats = check_repeats(repeats, reference_particles, reference_repeats)
    check_seed(seed)
    if not isinstance(batch, (Tensor, tuple)):
        raise TypeError(f"batch: expected a tensor or a tuple (x, y), got {type(batch).__name__}")
    where = place(None, model, guide)
    data = prepare_data(batch, "batch", where)
    tensors = batch_arguments(model, (data.x,) if data.y is None else (data.x, data.y), "batch")
    with seeded(seed), evaluating(model, guide):
        with running_on("batch", tensors):
            traces = trace_pair(model, guide, *tensors)
            check_pair(*traces, tensors)
        check_all(model, guide, data, "batch", where)
        guide_sites = latent_sites(traces[1])
        complete = latent_sites(traces[0]).keys() <= guide_sites.keys()
        reparameterized = all(site["fn"].has_rsample for site in guide_sites.values())
        plate = data_plate(*next(iter(observed_sites(traces[0]).items())))
        size = plate.full_size or plate.size  # N, what a loss is the sum over
        del traces
    objectives = {}
    for name, estimator in named.items():
        with naming(name):
            objectives[name] = Objective(model, guide, estimator)
    references: dict[str, tuple[Any, ...]] = {}
    if reference_repeats and complete:
        plain = {name: plain_of(estimator, reparameterized) for name, estimator in named.items()}
        references = {name: key for name, key in plain.items() if key is not None}
    total = repeats * len(named) + reference_repeats * len(set(references.values()))
    with (
        tqdm(total=total, unit="gradient", disable=not progress, dynamic_ncols=True) as bar,
        as_before(objectives, tensors),
        torch.enable_grad(),
    ):
        log_likelihood = log_likelihood_se = math.nan
        if complete:  # first: gradients in training mode move running statistics
            found = evaluate(
                model, guide, batch, num_particles=reference_particles, seed=seed, progress=False
            ).log_likelihood
            log_likelihood, log_likelihood_se = found.mean, found.monte_carlo_error
        for name, objective in objectives.items():
            with seeded(seed, 0), naming(name), standing(objective.estimator):
                objective.loss_and_grads(*tensors)
                take_gradients(objective)
        with pyro.validation_enabled(False):
            means: dict[tuple[Any, ...], dict[str, Tensor]] = {}
            for key in references.values():
                if key not in means:
                    kind, arguments = key
                    objective = Objective(model, guide, kind(**dict(arguments)))
                    with seeded(seed, 1):
                        run = Gradients(objective, size, reference_repeats)
                        run.take(tensors, bar)
                    means[key] = run.blocks
            rows = []
            for name, objective in objectives.items():
                bar.set_description(name)
                estimator = named[name]
                with seeded(seed, 2), standing(estimator):  # a warm-up, too
                    memory = peak_memory(objective, tensors)
                with seeded(seed, 3):
                    gradients = Gradients(objective, size, repeats)
                    losses, seconds = gradients.take(tensors, bar)
                bounds = losses / size * (1 if isinstance(estimator, CUBO) else -1)
                if isinstance(estimator, ReweightedWakeSleep):
                    bounds = bounds * math.nan  # two losses in one: no bound
                sd = float(bounds.std())
                row: dict[str, Any] = {
                    "particles": int(estimator.num_particles),
                    "bound": float(bounds.mean()),
                    "bound_sd": sd,
                    "bound_se": sd / math.sqrt(repeats),
                }
                against = (log_likelihood, log_likelihood_se) if is_bound(estimator) else (math.nan,) * 2
                row["bound_bias"] = row["bound"] - against[0]
                row["bound_bias_se"] = math.hypot(row["bound_se"], against[1])
                for role in _ROLES:
                    noise = gradients.noise(role)
                    row |= {f"{role}_{key}": value for key, value in noise.items()}
                    bias = bias_se = math.nan
                    if name in references and not math.isnan(noise["gradient_norm"]):
                        bias, bias_se = relative_bias(gradients.blocks[role], means[references[name]][role])
                    row |= {f"{role}_gradient_bias": bias, f"{role}_gradient_bias_se": bias_se}
                rows.append(row | {"seconds_per_step": seconds, "peak_memory_mib": memory / 2**20})
    return EstimatorComparison(
        pd.DataFrame(rows, index=pd.Index(list(named), name="estimator")),
        log_likelihood,
        log_likelihood_se,
        len(data),
        repeats,
        seed,
    )


def check_repeats(repeats: int, reference_particles: int, reference_repeats: int | None) -> int:
    """Check those arguments of ``compare_estimators``; return the number of gradients of a reference."""
    if check_positive_int("repeats", repeats) < 2:
        raise ValueError(f"repeats: expected at least 2, got {repeats!r}")
    check_positive_int("reference_particles", reference_particles)
    if reference_repeats is None:
        return max(100, 10 * repeats)
    if isinstance(reference_repeats, bool) or reference_repeats != 0:
        if check_positive_int("reference_repeats", reference_repeats) < 2:
            raise ValueError(f"reference_repeats: expected 0 or at least 2, got {reference_repeats!r}")
    return reference_repeats
