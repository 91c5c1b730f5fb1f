"""Comparison of ELBO estimators on one pair: bound, gradient noise and bias, time and memory."""

import math
import statistics
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer import (
    ELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from ppl_vae._checks import check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.evaluation.evaluate import evaluate
from ppl_vae.infer.checking import check_all, running_on
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.estimators import (
    CUBO,
    IWAE,
    KL_ELBO,
    STL_ELBO,
    VIMCO,
    DReG,
    EnumELBO,
    RelaxedELBO,
    Renyi,
    ScoreFunctionELBO,
)
from ppl_vae.infer.objective import Objective
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.running import (
    Program,
    batch_arguments,
    check_pair,
    evaluating,
    latent_sites,
    observed_sites,
    trace_pair,
)

if TYPE_CHECKING:
    import pandas as pd

_ROLES = ("model", "guide")
_BLOCKS = 20  # of repeats, whose means tell the standard error of the gradient's bias
_PARTICLES = 50  # of a gradient of the plain ELBO, to hold others against
_WIDTH = 120  # of the printed table


@dataclass(frozen=True, eq=False)
class EstimatorComparison:
    r"""What ``compare_estimators`` measured.

    The columns of ``table``, with ``model_`` and ``guide_`` for the two groups of parameters. Gradients are
    of the bound per datum; a group without a gradient has NaN.

    ===========================  ======================================================================
    particles                    K, the estimator's draws per datum
    bound                        nats per datum, mean over repeats; of a weighted estimator its objective
    bound_sd                     its standard deviation over repeats
    bound_se                     the standard error of its mean
    bound_bias, _bias_se         bound minus ``log_likelihood``; its standard error
    model_gradient_norm          the norm of the mean gradient
    model_gradient_variance      the variance over repeats, summed over the coordinates
    model_snr                    signal-to-noise ratio :math:`\sqrt{\max(0, |m|^2 - v / R) / v}` of mean m and
                                 variance v: v / R is what the noise adds to the square of m over R repeats.
                                 Infinite without variance
    model_gradient_bias          the norm of mean minus reference gradient over that of the reference, without
                                 what noise adds to either; NaN without a reference
    model_gradient_bias_se       the standard error of the bias' square over the bias, so that bias / se tests
                                 whether there is any: one below 3 or so is not told from zero
    seconds_per_step             median time of a loss with its gradients
    peak_memory_mib              most memory of one such step beyond what was there: on CUDA what the
                                 allocator gave, on a CPU tensors alive at one time
    ===========================  ======================================================================

    Attributes:
        table: one row per estimator, the index ``"estimator"`` holds the names.
        log_likelihood: log p(x), nats per datum, importance-sampled; NaN if the model has latent sites that
            the guide lacks.
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
            columns[heading] = [f"{row[name]:.2f} ±{row[f'{name}_se']:.2g}" for row in rows]
        for role in _ROLES:
            columns[f"{role} SNR"] = [f"{row[f'{role}_snr']:.3g}" for row in rows]
        for role in _ROLES:
            key = f"{role}_gradient_bias"
            columns[f"{role} bias"] = [
                "-" if math.isnan(row[key]) else f"{row[key]:.2g} ±{row[f'{key}_se']:.1g}" for row in rows
            ]
        columns["ms"] = [f"{1e3 * row['seconds_per_step']:.3g}" for row in rows]
        columns["MiB"] = [f"{row['peak_memory_mib']:.3g}" for row in rows]
        printed = pd.DataFrame(columns, index=pd.Index(list(map(str, self.table.index))))
        names = max(map(len, printed.index))
        room = _WIDTH - (max(map(len, printed.to_string(line_width=10_000).splitlines())) - names)
        if names > room:
            printed.index = pd.Index([n if len(n) <= room else f"{n[: room - 1]}…" for n in printed.index])
        head = (
            f"nats per datum, {self.repeats} gradients of each on {self.num_data} data; "
            f"log p(x) = {self.log_likelihood:.2f} ±{self.log_likelihood_se:.2g}"
        )
        return f"{head}\n{printed.to_string(line_width=10_000)}"


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
    the modes that the programs are in. Parameters, buffers, gradients, random streams and the estimators
    themselves are as before afterwards; a schedule stands where it stood. The draws of each estimator start
    from the same seed.

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

    named = _named(estimators)
    if check_positive_int("repeats", repeats) < 2:
        raise ValueError(f"repeats: expected at least 2, got {repeats!r}")
    check_positive_int("reference_particles", reference_particles)
    if reference_repeats is None:
        reference_repeats = max(100, 10 * repeats)
    elif isinstance(reference_repeats, bool) or reference_repeats != 0:
        if check_positive_int("reference_repeats", reference_repeats) < 2:
            raise ValueError(f"reference_repeats: expected 0 or at least 2, got {reference_repeats!r}")
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
        size = _size_of_plate(next(iter(observed_sites(traces[0]).values())))
        del traces
    objectives = {name: Objective(model, guide, estimator) for name, estimator in named.items()}
    references: dict[str, tuple[Any, ...]] = {}
    if reference_repeats and complete:
        plain = {name: _plain(estimator, reparameterized) for name, estimator in named.items()}
        references = {name: key for name, key in plain.items() if key is not None}
    total = repeats * len(named) + reference_repeats * len(set(references.values()))
    with (
        tqdm(total=total, unit="gradient", disable=not progress, dynamic_ncols=True) as bar,
        _as_before(objectives, tensors),
        torch.enable_grad(),
    ):
        for name, objective in objectives.items():
            with seeded(seed, 0), _naming(name), _standing(objective.estimator):
                objective.loss_and_grads(*tensors)
                _take_gradients(objective)
        log_likelihood = log_likelihood_se = math.nan
        with pyro.validation_enabled(False):
            if complete:
                found = evaluate(
                    model, guide, batch, num_particles=reference_particles, seed=seed, progress=False
                ).log_likelihood
                log_likelihood, log_likelihood_se = found.mean, found.monte_carlo_error
            means: dict[tuple[Any, ...], dict[str, Tensor]] = {}
            for key in references.values():
                if key not in means:
                    kind, arguments = key
                    objective = Objective(model, guide, kind(**dict(arguments)))
                    with seeded(seed, 1):
                        run = _Gradients(objective, size, reference_repeats)
                        run.take(tensors, bar)
                    means[key] = run.blocks
            rows = []
            for name, objective in objectives.items():
                bar.set_description(name)
                estimator = named[name]
                with seeded(seed, 2), _standing(estimator):  # a warm-up, too
                    memory = _peak_memory(objective, tensors)
                with seeded(seed, 3):
                    gradients = _Gradients(objective, size, repeats)
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
                row["bound_bias"] = row["bound"] - log_likelihood
                row["bound_bias_se"] = math.hypot(row["bound_se"], log_likelihood_se)
                for role in _ROLES:
                    noise = gradients.noise(role)
                    row |= {f"{role}_{key}": value for key, value in noise.items()}
                    bias = bias_se = math.nan
                    if name in references and not math.isnan(noise["gradient_norm"]):
                        bias, bias_se = _bias(gradients.blocks[role], means[references[name]][role])
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


# -- what is compared ------------------------------------------------------------------------------


def _named(estimators: Any) -> dict[str, ELBO]:
    """Return the estimators by name."""
    if isinstance(estimators, Mapping):
        named = dict(estimators)
    elif isinstance(estimators, Sequence) and not isinstance(estimators, str):
        classes = [type(estimator).__name__ for estimator in estimators]
        named = {}
        for kind, estimator in zip(classes, estimators, strict=True):
            k = getattr(estimator, "num_particles", None)
            name = kind if classes.count(kind) == 1 else f"{kind} (K={k})"
            others = sum(other == name or other.startswith(f"{name} #") for other in named)
            named[f"{name} #{others + 1}" if others else name] = estimator
    else:
        raise TypeError(
            "estimators: expected a mapping of names to instances of pyro.infer.ELBO, or a sequence of them, "
            f"got {estimators!r}"
        )
    if not named:
        raise ValueError("estimators: expected at least one, got none")
    for name, estimator in named.items():
        if not isinstance(name, str):
            raise TypeError(f"estimators: expected names that are strings, got {name!r}")
        if not isinstance(estimator, ELBO):
            raise TypeError(
                f"estimators[{name!r}]: expected an instance of pyro.infer.ELBO such as Trace_ELBO(), "
                f"got {estimator!r}"
            )
    return named


def _plain(estimator: ELBO, reparameterized: bool) -> tuple[Any, ...] | None:
    """Return class and arguments of the plain estimator of the same bound, or None if there is no other."""
    kl_weight = 1.0
    if isinstance(estimator, Estimator):
        kl_weight = float(estimator.at_step(estimator.kl_weight))
    k = estimator.num_particles
    kind: Any = type(estimator)  # a subclass may be of another bound
    if isinstance(estimator, KL_ELBO) and (estimator.capacity is not None or estimator.free_bits is not None):
        return None
    if kind is DReG:
        alpha = estimator.alpha  # type: ignore[attr-defined]
        return Renyi, (("num_particles", k), ("alpha", alpha), ("kl_weight", kl_weight))
    if kind is VIMCO or kind is IWAE:
        plain = kind is IWAE and not estimator.stick_the_landing  # type: ignore[attr-defined]
        if plain or not reparameterized:
            return None
        return IWAE, (("num_particles", k), ("kl_weight", kl_weight))
    pyros = (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)
    if kind not in (*pyros, STL_ELBO, KL_ELBO, RelaxedELBO, EnumELBO):
        return None
    if reparameterized:
        return KL_ELBO, (("num_particles", _PARTICLES), ("kl_weight", kl_weight), ("analytic_kl", False))
    return ScoreFunctionELBO, (("num_particles", _PARTICLES), ("kl_weight", kl_weight))


def _size_of_plate(site: Any) -> int:
    """Return N, the full size of the data plate: what a loss is the sum over."""
    frame = next(f for f in site["cond_indep_stack"] if f.vectorized and f.dim == -1)
    return int(frame.full_size or frame.size)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let what goes wrong with an estimator name it."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise kind(f"estimators: {name}: {reason}") from error


@contextmanager
def _standing(estimator: ELBO) -> Iterator[None]:
    """Let an estimator's schedules stand where they are."""
    step = estimator.step.clone() if isinstance(estimator, Estimator) else None
    yield
    if isinstance(estimator, Estimator) and step is not None:
        estimator.step = step


@contextmanager
def _as_before(objectives: Mapping[str, Objective], batch: tuple[Tensor, ...]) -> Iterator[None]:
    """Put gradients, buffers and the estimators' own state back at the end."""
    state = [
        (objective.estimator, {k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()})
        for objective in objectives.values()
        for own in [vars(objective.estimator)]
    ]
    parameters: list[nn.Parameter] = []
    buffers: list[tuple[Tensor, Tensor]] = []
    gradients: list[Tensor | None] = []
    try:
        for i, (name, objective) in enumerate(objectives.items()):
            with _naming(name):
                objective.setup(*batch)
            if i == 0:
                parameters = _parameters(objective)
                gradients = [p.grad for p in parameters]
                tensors = objective.tensors().values()
                buffers = [(t, t.clone()) for t in tensors if not isinstance(t, nn.Parameter)]
                for p in parameters:
                    p.grad = None
        yield
    finally:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for estimator, own in state:
            vars(estimator).clear()
            vars(estimator).update(own)


# -- gradients -------------------------------------------------------------------------------------


def _parameters(objective: Objective) -> list[nn.Parameter]:
    return [p for group in (objective.trainable or {}).values() for p in group.values()]


def _take_gradients(objective: Objective) -> dict[str, list[Tensor | None]]:
    """Return the gradients of each group's parameters, and forget them there."""
    found: dict[str, list[Tensor | None]] = {}
    for role, parameters in (objective.trainable or {}).items():
        found[role] = [p.grad for p in parameters.values()]
        for p in parameters.values():
            p.grad = None
    return found


class _Gradients:
    """Sums over repeated gradients of an estimator, of the bound per datum.

    Attributes:
        blocks: the mean gradient of each block of repeats, ``[blocks, coordinates]`` for each group.
    """

    def __init__(self, objective: Objective, size: int, repeats: int) -> None:
        self.objective, self.size, self.repeats = objective, size, repeats
        self.blocks: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}  # subtracted, so that equal gradients have no variance at all
        self._squares: dict[str, Tensor] = {}
        self._found: dict[str, bool] = {}

    def take(self, batch: tuple[Tensor, ...], bar: Any) -> tuple[Tensor, float]:
        """Take the gradients; return the losses, ``[repeats]``, and the median seconds of one."""
        self.objective.setup(*batch)
        losses, seconds = [], []
        num_blocks = min(_BLOCKS, self.repeats)
        sums: dict[str, Tensor] = {}
        for i in range(self.repeats):
            with _standing(self.objective.estimator):
                _synchronize(batch)
                start = time.perf_counter()
                losses.append(self.objective.loss_and_grads(*batch))
                _synchronize(batch)
                seconds.append(time.perf_counter() - start)
            for role, gradients in _take_gradients(self.objective).items():
                flat = self._flatten(role, gradients)
                if i == 0:
                    self._first[role] = flat
                    self._squares[role] = torch.zeros_like(flat)
                    sums[role] = flat.new_zeros(num_blocks, len(flat))
                flat = flat - self._first[role]
                self._squares[role] += flat.square()
                sums[role][i % num_blocks] += flat
            bar.update()
        self._sums = {role: total.sum(0) for role, total in sums.items()}
        for role, total in sums.items():
            counts = [len(range(b, self.repeats, num_blocks)) for b in range(num_blocks)]
            total /= total.new_tensor(counts).unsqueeze(-1)
            self.blocks[role] = total.add_(self._first[role])
        return torch.stack(losses).double(), statistics.median(seconds)

    def _flatten(self, role: str, gradients: list[Tensor | None]) -> Tensor:
        """Return a group's gradient per datum as one vector in float64, zero where there is none."""
        parameters = list((self.objective.trainable or {})[role].values())
        self._found[role] = self._found.get(role, False) or any(g is not None for g in gradients)
        parts = [
            (torch.zeros_like(p) if g is None else g).detach().to(torch.float64).reshape(-1)
            for p, g in zip(parameters, gradients, strict=True)
        ]
        return torch.cat(parts) / self.size if parts else torch.zeros(0, dtype=torch.float64)

    def noise(self, role: str) -> dict[str, float]:
        """Return norm, variance and signal-to-noise ratio of a group's gradient; NaN if it has none."""
        keys = ("gradient_norm", "gradient_variance", "snr")
        if not self._found[role]:
            return dict.fromkeys(keys, math.nan)
        r, total = self.repeats, self._sums[role]
        squared_norm = float((self._first[role] + total / r).square().sum())
        variance = max(0.0, float(((self._squares[role] - total.square() / r) / (r - 1)).sum()))
        if variance == 0:
            snr = math.inf if squared_norm > 0 else math.nan
        else:
            snr = math.sqrt(max(0.0, squared_norm - variance / r) / variance)
        return dict(zip(keys, (math.sqrt(squared_norm), variance, snr), strict=True))


def _bias(blocks: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the relative norm of the difference of two mean gradients, and its standard error.

    Args:
        blocks: the means of independent blocks of the one, ``[blocks, coordinates]``.
        reference: of the other.
    """
    count = min(len(blocks), len(reference))
    blocks, reference = (_merge(t, count) for t in (blocks, reference))
    difference = blocks - reference
    # products of different blocks have no share of the noise: the U-statistic of the square
    products = difference @ difference.mT
    off = products - products.diagonal().diag()
    norm = reference @ reference.mT
    scale = float((norm.sum() - norm.trace()) / (count * (count - 1)))
    if not scale > 0:
        return math.nan, math.nan
    square = float(off.sum()) / (count * (count - 1)) / scale
    if count < 3:
        return math.sqrt(max(0.0, square)), math.nan
    without = (off.sum() - 2 * off.sum(1)) / ((count - 1) * (count - 2)) / scale  # each block left out
    error = math.sqrt((count - 1) / count * float((without - without.mean()).square().sum()))
    bias = math.sqrt(max(0.0, square))
    return bias, error / max(bias, math.sqrt(error)) if error > 0 else 0.0


def _merge(blocks: Tensor, count: int) -> Tensor:
    """Return the means of ``count`` groups of blocks."""
    return (
        blocks if len(blocks) == count else torch.stack([part.mean(0) for part in blocks.tensor_split(count)])
    )


# -- cost ------------------------------------------------------------------------------------------


def _synchronize(batch: tuple[Tensor, ...]) -> None:
    if batch[0].device.type == "cuda":
        torch.cuda.synchronize(batch[0].device)


def _peak_memory(objective: Objective, batch: tuple[Tensor, ...]) -> float:
    """Return the most bytes that a loss with its gradients takes beyond what is there."""
    device = batch[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        objective.loss_and_grads(*batch)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with _LiveBytes() as live:
            objective.loss_and_grads(*batch)
        peak = live.peak
    _take_gradients(objective)
    return float(peak)


class _LiveBytes(TorchDispatchMode):
    """Follows the bytes of the tensors made inside its context that are alive.

    ``torch.profiler`` would count the insides of operators too, but takes seconds to start and writes to
    stderr.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(t.untyped_storage()) for t in args if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                storage = tensor.untyped_storage()
                if storage not in self._known and id(storage) not in before:
                    size = storage.nbytes()
                    self._known[storage] = None
                    self.bytes += size
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self._free, size)
        return result

    def _free(self, size: int) -> None:
        self.bytes -= size
