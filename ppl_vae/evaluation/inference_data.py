"""A pair and its data as ArviZ's InferenceData."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from tqdm import tqdm

from ppl_vae._checks import check_positive, check_positive_int, check_seed, did_you_mean
from ppl_vae._random import seeded
from ppl_vae.data import Split, batches
from ppl_vae.evaluation._arviz import import_arviz
from ppl_vae.evaluation.evaluate import CPU_ROWS, pass_size
from ppl_vae.evaluation.pareto import pareto_smooth, tail_size
from ppl_vae.infer.checking import check_all, check_batch, running_on
from ppl_vae.infer.log_weights import PARTICLE_DIM, per_datum_log_prob, terms, terms_of_sites
from ppl_vae.infer.placing import place, prepare_data
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
    without_table,
)

if TYPE_CHECKING:
    import xarray
    from arviz import InferenceData

    Groups = dict[str, xarray.Dataset]

SAMPLE_DIMS = ("chain", "draw")
IMAGE_DIMS = ("channel", "height", "width")
PASS_MEMORY = 512 * 2**20
LEAST_LOG_RATIO = -700.0  # to the largest weight: below it a weight's exponential is 0 in float64
NATS = {"units": "nats"}

Tensors = dict[str, Tensor]


def to_inference_data(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_draws: int = 1000,
    reference: Any = None,
    predictive_draws: int = 100,
    prior_draws: int = 100,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    memory: int = 2 * 2**30,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> "InferenceData":
    r"""Return the posterior of each datum, predictions and log-likelihoods for ArviZ.

    Groups and what they hold. Dims are ``chain``, ``draw``, ``datum`` and those of the event; what has one
    value per datum lacks the first two.

    =====================  =================================================================================
    posterior              the latent sites, drawn from the guide (one chain), or the reference's draws
    posterior_predictive   data drawn from p(x | z), for some of these draws
    prior                  the latent sites, drawn from the prior: each draw is a set of n data
    prior_predictive       the data drawn with them
    log_likelihood         ``x``: log p(x | z) at the draws. ``marginal``: see below. Nats
    sample_stats           ``lp``: log p(x, z) at the draws, nats. Of draws of the guide: ``log_weight``, log
                           p(x, z) - log q(z | x), nats; per datum ``marginal``, log p(x), nats, and
                           ``k_hat``, the Pareto shape of the weights
    observed_data          the data as the model observed them; of a ``dynamic`` split the bits drawn
    constant_data          ``y``, where the data have one
    =====================  =================================================================================

    Event dims are ``z_dim_0`` and so on; ``channel``, ``height``, ``width`` of an ``x`` with three.

    ``az.loo`` and ``az.compare`` need ``var_name``, since there are two questions:

    - ``"marginal"`` compares models. Parameters are fixed, and z belongs to one datum alone, so that without
      datum i nothing of its z is known: its leave-one-out predictive density is the marginal
      :math:`p(x_i)`. (Data that the parameters were trained on favour the larger model all the same.) The
      variable is made such that ``elpd_loo`` is the sum of ``sample_stats.marginal`` (what ``evaluate`` calls
      ``log_likelihood``), and Pareto k is ``k_hat``: above 0.7 the guide is too far from the posterior for
      the estimate to be trusted. With a reference, call ``az.loo(..., reff=1)``: by default ArviZ takes the
      efficiency of the reference's chains, but the weights are those of independent draws of the guide. It is
      no likelihood at a draw: its single values, ``p_loo`` and ``az.waic`` mean nothing.
    - ``"x"``, :math:`\log p(x_i \mid z_i)`, tells how well latents reconstruct their datum: its mean over
      the guide's draws is the reconstruction of the ELBO. It does not compare models. Given the very datum
      that is to be left out, draws z give ``elpd_loo`` as the harmonic mean estimate of
      :math:`\log p(x_i)` if they are exact draws of the posterior, with Pareto k above 0.7 as a rule; those
      of a guide give nothing of the kind.

    Args:
        model: program over the latent sites and the data.
        guide: program over the latent sites.
        data: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch ``Dataset`` or
            ``DataLoader``; all of it is held in memory.
        num_draws: draws of the guide per datum, at least 2; with a reference, as many as that has.
        reference: draws of the posterior by other means, ``{site: [chains, draws, n, *event]}`` for all
            latent sites of the model, or an object with these as ``draws``. ``marginal`` and ``k_hat`` remain
            those of the guide.
        predictive_draws: of how many draws in each chain data are drawn, spread evenly; 0 for none.
        prior_draws: draws from the prior, by ``model(None, size=...)``, or ``model(None, y)`` of models that
            need ``y``; 0 for none.
        dims: names of a site's event dims, ``{"x": ["time", "feature"]}``.
        coords: labels of dims, ``{"datum": names, "z_dim_0": ["slant", "width"]}``; others are numbered.
        memory: bytes that the result may take.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Returns:
        An ``arviz.InferenceData``; from ArviZ 1 on, an ``xarray.DataTree``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        Bayesian Comparison of Latent Variable Models: Conditional Versus Marginal Likelihoods
        (Merkle et al., 2019), arXiv:1802.04452;
        Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC
        (Vehtari et al., 2017), arXiv:1507.04544;
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), arXiv:1507.02646

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> found = to_inference_data(model, guide, torch.randn(4, 5), num_draws=50, progress=False)
        >>> found.posterior["z"].dims, found.posterior["z"].shape
        (('chain', 'draw', 'datum', 'z_dim_0'), (1, 50, 4, 2))
    """
    num_draws = check_positive_int("num_draws", num_draws)
    if num_draws < 2:
        raise ValueError(f"num_draws: expected at least 2, got {num_draws}")
    predictive_draws = _check_count("predictive_draws", predictive_draws)
    prior_draws = _check_count("prior_draws", prior_draws)
    check_positive("memory", memory)
    check_seed(seed)
    arviz = import_arviz()
    where = place(device, model, guide)
    data = prepare_data(data, "data", where)
    with seeded(seed, 0), evaluating(model, guide):
        observed = check_all(model, guide, data, "data", where)
        whole = _gather(model, data, observed, where, memory)
        batch = batch_arguments(model, whole)
        n, first = len(batch[0]), tuple(t[:2] for t in batch)
        with running_on("data", first):
            traces = trace_pair(model, guide, *first)
            check_pair(*traces, first)
        data_sites = [name for name, site in observed_sites(traces[0]).items() if _is_data(site)]
        if not data_sites:
            raise ValueError(
                f"model: expected a site that observes data, got {sorted(observed_sites(traces[0]))}"
            )
        draws = None if reference is None else _check_reference(reference, *traces, n)
        chains, per_chain = (1, num_draws) if draws is None else next(iter(draws.values())).shape[:2]
        predicted = torch.arange(min(predictive_draws, per_chain))
        predicted = predicted * per_chain // max(1, len(predicted))
        run_prior = _PriorRun(model, batch[1:]) if prior_draws else None
        events = {name: site["value"].shape[1:] for name, site in _sites(traces).items()}
        names = _Names(events, data_sites, dims, coords, n)
        counts = (chains * per_chain, chains * len(predicted), prior_draws)
        _check_memory(traces, data_sites, n, counts, memory)

        def run(n: int, k: int) -> Any:
            return terms(model, guide, *(t[:n] for t in first), num_particles=k)

        rows = CPU_ROWS if where.type == "cpu" else sys.maxsize
        passes = pass_size(min(memory, PASS_MEMORY), counts[0], rows, run)
        total = n * (counts[0] * (1 if draws is None else 2) + counts[1] + counts[2])
        with (
            pyro.validation_enabled(False),
            tqdm(total=total, unit="draw", disable=not progress, dynamic_ncols=True) as bar,
        ):
            work = _Work(model, guide, batch, data_sites, passes, bar)
            with seeded(seed, 1):
                found = work.guide_draws(counts[0], draws is None)
            _check_weights(found.log_weights)
            stats: Tensors = {}
            stats["marginal"], stats["k_hat"], loo_marginal = for_loo(found.log_weights)
            if draws is not None:
                found = work.reference_draws({name: value.flatten(0, 1) for name, value in draws.items()})
            latents = {name: v.unflatten(0, (chains, per_chain)) for name, v in found.latents.items()}
            predictive: Tensors = {}
            if len(predicted):
                chosen = {
                    name: latents[name][:, predicted].flatten(0, 1)
                    for name in latent_sites(traces[0])
                    if name in latents
                }
                with seeded(seed, 2):
                    predictive = work.predictive(chosen, counts[1])
            prior: Tensors = {}
            if run_prior is not None:
                with seeded(seed, 3):
                    prior = run_prior.draw(prior_draws, n, math.prod(passes), bar)

    def by_chain(value: Tensor) -> Tensor:
        return value.unflatten(0, (chains, -1))

    stats["lp"] = by_chain(found.log_joint)
    if draws is None:
        stats["log_weight"] = by_chain(found.log_weights)
    log_likelihood = {name: by_chain(v) for name, v in found.log_likelihood.items()}
    log_likelihood["marginal"] = by_chain(loo_marginal)
    predictive = {name: by_chain(v) for name, v in predictive.items()}
    source = {"draws_of": "guide" if draws is None else "reference"}
    groups: dict[str, Any] = {
        "posterior": names.draws(latents, source),
        "posterior_predictive": names.draws(predictive, source, draw=predicted),
        "prior": names.draws({k: v[None] for k, v in prior.items() if k not in data_sites}),
        "prior_predictive": names.draws({k: v[None] for k, v in prior.items() if k in data_sites}),
        "log_likelihood": names.numbers(log_likelihood, source),
        "sample_stats": names.numbers(stats, source),
        "observed_data": names.data(found.observed),
        "constant_data": names.data({} if len(whole) == 1 else {"y": whole[1]}),
    }
    groups = {name: group for name, group in groups.items() if group.data_vars}
    assembled: InferenceData = assemble(groups, tree=int(arviz.__version__.partition(".")[0]) >= 1)
    return assembled


def assemble(groups: "Groups", *, tree: bool) -> Any:
    """Return groups as an ``xarray.DataTree``, for ArviZ from 1 on, or as an ``arviz.InferenceData``."""
    if tree:
        import xarray

        return xarray.DataTree.from_dict(groups)
    return import_arviz().InferenceData(**groups)


@dataclass(frozen=True, eq=False)
class _Found:
    """What runs gave, draws first: ``[draws, n, ...]``, on the CPU."""

    latents: Tensors
    log_weights: Tensor
    log_joint: Tensor
    log_likelihood: Tensors
    observed: Tensors


class _Work:
    """Runs of the pair over all draws and data, in passes.

    Args:
        model: program over the latent sites and the data.
        guide: program over the latent sites.
        batch: all data.
        data_sites: the observed sites to record.
        passes: how many data, and draws of each, a pass may have.
        bar: the progress bar.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        batch: tuple[Tensor, ...],
        data_sites: list[str],
        passes: tuple[int, int],
        bar: Any,
    ) -> None:
        self.model = model
        self.guide = guide
        self.batch = batch
        self.data_sites = data_sites
        self.size, self.particles = passes
        self.bar = bar

    def guide_draws(self, count: int, complete: bool) -> _Found:
        """Return draws of the guide; of an incomplete run the log weights alone."""
        store = _Store(count, len(self.batch[0]))
        for at, small, k in self._passes(count):
            plate = pyro.plate("num_particles", k, dim=PARTICLE_DIM)
            model_trace, guide_trace = trace_pair(plate(self.model), plate(self.guide), *small)
            drawn, seen = latent_sites(model_trace), observed_sites(model_trace)
            parts = terms_of_sites(drawn | seen, latent_sites(guide_trace))
            store.put("weights", "", at, parts.log_weights())
            if complete:
                for name, site in latent_sites(guide_trace).items():
                    store.put("latents", name, at, _spread(site["value"], k, len(small[0]), site))
                self._put_model(store, at, drawn, seen)
        return store.found()

    def reference_draws(self, draws: Tensors) -> _Found:
        """Return given draws ``[draws, n, *event]``, with what the model says of them."""
        count = len(next(iter(draws.values())))
        store = _Store(count, len(self.batch[0]))
        for at, small, k in self._passes(count):
            given = {name: value[at] for name, value in draws.items()}
            seen = observed_sites(self._conditioned(given, small, k))
            self._put_model(store, at, {name: seen.pop(name) for name in given}, seen)
        return replace(store.found(), latents={name: value.cpu() for name, value in draws.items()})

    def predictive(self, latents: Tensors, count: int) -> Tensors:
        """Return data drawn from the likelihood at given latents ``[draws, n, *event]``."""
        store = _Store(count, len(self.batch[0]))
        where = self.batch[0].device
        for at, small, k in self._passes(count):
            given = {name: value[at].to(where) for name, value in latents.items()}
            sites = observed_sites(self._conditioned(given, small, k))
            for name in self.data_sites:
                try:
                    value = sites[name]["fn"].sample()
                except NotImplementedError:
                    continue
                store.put("latents", name, at, _spread(value, k, len(small[0]), sites[name]))
        if not store.parts.get("latents"):
            raise ValueError(
                f"model: none of the sites {self.data_sites} can be drawn from; predictive_draws=0 leaves "
                "the predictions out"
            )
        return store.parts["latents"]

    def _conditioned(self, given: Tensors, batch: tuple[Tensor, ...], k: int) -> Trace:
        """Return the model's trace at given latents ``[k, n, *event]``."""
        plate = pyro.plate("num_particles", k, dim=PARTICLE_DIM)
        program = poutine.condition(plate(in_own_store(self.model)), data=given)
        try:
            return poutine.trace(program).get_trace(*batch)
        except (ValueError, RuntimeError) as error:
            raise without_table(error) from None

    def _put_model(self, store: "_Store", at: Any, drawn: dict[str, Site], seen: dict[str, Site]) -> None:
        k, n = at[0].stop - at[0].start, at[1].stop - at[1].start
        log_probs = {name: per_datum_log_prob(name, site) for name, site in (drawn | seen).items()}
        joint = sum(value.double().expand(k, n) for value in log_probs.values())
        store.put("joint", "", at, torch.as_tensor(joint))
        for name in self.data_sites:
            store.put("log_likelihood", name, at, log_probs[name].expand(k, n))
            if at[0].start == 0:
                value, event_dim = seen[name]["value"], len(seen[name]["fn"].event_shape)
                store.put_data(name, at[1], value if value.dim() == event_dim + 1 else value[0])

    def _passes(self, count: int) -> Any:
        """Yield where a pass is, the slices of draws and data, with its batch and its number of draws."""
        for low in range(0, len(self.batch[0]), self.size):
            small = tuple(t[low : low + self.size] for t in self.batch)
            for start in range(0, count, self.particles):
                k = min(self.particles, count - start)
                yield (slice(start, start + k), slice(low, low + len(small[0]))), small, k
                self.bar.update(k * len(small[0]))


class _Store:
    """Takes the results of passes, ``[draws, n, ...]``; log-probabilities as float64."""

    def __init__(self, count: int, n: int) -> None:
        self.shape = (count, n)
        self.parts: dict[str, Tensors] = {}

    def put(self, part: str, name: str, at: Any, value: Tensor) -> None:
        tensors = self.parts.setdefault(part, {})
        if name not in tensors:
            dtype = value.dtype if part == "latents" else torch.float64
            tensors[name] = torch.empty(*self.shape, *value.shape[2:], dtype=dtype)
        tensors[name][at] = value.to(tensors[name])

    def put_data(self, name: str, at: slice, value: Tensor) -> None:
        tensors = self.parts.setdefault("observed", {})
        if name not in tensors:
            tensors[name] = torch.empty(self.shape[1], *value.shape[1:], dtype=value.dtype)
        tensors[name][at] = value.to(tensors[name])

    def found(self) -> _Found:
        none = torch.empty(0)
        return _Found(
            self.parts.get("latents", {}),
            self.parts.get("weights", {}).get("", none),
            self.parts.get("joint", {}).get("", none),
            self.parts.get("log_likelihood", {}),
            self.parts.get("observed", {}),
        )


class _PriorRun:
    """Draws from the prior, by ``model(None, size=n)``; by ``model(None, y)`` where the model needs y.

    Raises:
        TypeError: if the model takes neither.
    """

    def __init__(self, model: Program, others: tuple[Tensor, ...]) -> None:
        self.model = model
        self.others: tuple[Tensor, ...] = ()
        try:
            self._run(2, torch.arange(2))
        except (TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {without_table(error)}".partition("\n")[0]
            try:
                if not others:
                    raise
                self.others = others
                self._run(2, torch.arange(2) % len(others[0]))
            except (TypeError, ValueError, AttributeError):
                raise TypeError(
                    f"model: model(None, size=2) failed ({reason}); give it a keyword `size=None` and draw "
                    "size data where the batch is None, or leave the prior out: prior_draws=0"
                ) from error

    def _run(self, size: int, index: Tensor) -> Tensors:
        """Return the values of the sites that are drawn, ``[size, *event]``."""
        program = in_own_store(self.model)
        if self.others:
            others = tuple(t[index.to(t.device)] for t in self.others)
            trace = poutine.trace(program).get_trace(None, *others)
        else:
            trace = poutine.trace(program).get_trace(None, size=size)
        values = {name: site["value"] for name, site in latent_sites(trace).items()}
        for name, value in values.items():
            if value.dim() == 0 or len(value) != size:
                raise ValueError(
                    f"site {name!r}: expected {size} draws from the prior, got {list(value.shape)}"
                )
        return values

    def draw(self, draws: int, n: int, rows: int, bar: Any) -> Tensors:
        """Return draws ``[draws, n, *event]``, made in passes of so many rows."""
        result: Tensors = {}
        for start in range(0, draws * n, rows):
            index = torch.arange(start, min(start + rows, draws * n))
            for name, value in self._run(len(index), index % n).items():
                if name not in result:
                    result[name] = torch.empty(draws * n, *value.shape[1:], dtype=value.dtype)
                result[name][index] = value.to(result[name])
            bar.update(len(index))
        return {name: value.unflatten(0, (draws, n)) for name, value in result.items()}


class _Names:
    """Makes xarray's data sets, with names of dims and their labels.

    Args:
        events: the event shape of each site.
        data_sites: the observed ones.
        dims: names for a site's event dims.
        coords: labels of dims.
        n: the number of data.

    Raises:
        TypeError, ValueError: if ``dims`` or ``coords`` don't fit.
    """

    def __init__(
        self,
        events: Mapping[str, Sequence[int]],
        data_sites: list[str],
        dims: Mapping[str, Sequence[str]] | None,
        coords: Mapping[str, Any] | None,
        n: int,
    ) -> None:
        self.dims: dict[str, tuple[str, ...]] = {}
        self.sizes = {"datum": n}
        for name, value in (("dims", dims), ("coords", coords)):
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(f"{name}: expected a dictionary, got {type(value).__name__}")
        given = dict(dims or {})
        for name in given.keys() - events.keys():
            raise ValueError(
                f"dims: unknown site {name!r}{did_you_mean(name, events)}; expected one of {sorted(events)}"
            )
        for name, shape in events.items():
            own = self._default(name, len(shape), name in data_sites)
            if name in given:
                own = self._check_dims(name, given[name], shape)
            for dim, size in zip(own, shape, strict=True):
                if self.sizes.setdefault(dim, size) != size:
                    raise ValueError(
                        f"dims: expected one size of dim {dim!r}, got {self.sizes[dim]} and, of site "
                        f"{name!r}, {size}"
                    )
            self.dims[name] = own
        self.coords: dict[str, np.ndarray] = {}
        for dim, value in (coords or {}).items():
            if dim not in self.sizes:
                raise ValueError(
                    f"coords: unknown dim {dim!r}{did_you_mean(dim, self.sizes)}; expected one of "
                    f"{sorted(self.sizes)}"
                )
            labels = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
            if labels.shape != (self.sizes[dim],):
                raise ValueError(
                    f"coords: expected {self.sizes[dim]} labels for dim {dim!r}, got shape {labels.shape}"
                )
            self.coords[dim] = labels

    def _default(self, name: str, count: int, is_data: bool) -> tuple[str, ...]:
        if is_data and name == "x" and count == len(IMAGE_DIMS):
            return IMAGE_DIMS
        return tuple(f"{name}_dim_{i}" for i in range(count))

    def _check_dims(self, name: str, value: Any, shape: Sequence[int]) -> tuple[str, ...]:
        own = (value,) if isinstance(value, str) else tuple(value)
        if len(own) != len(shape) or not all(isinstance(dim, str) for dim in own):
            raise ValueError(
                f"dims: expected {len(shape)} names for the event {tuple(shape)} of site {name!r}, got "
                f"{value!r}"
            )
        reserved = {*SAMPLE_DIMS, "datum"}
        if len(set(own)) != len(own) or reserved & set(own):
            raise ValueError(
                f"dims: expected different names for site {name!r}, none of {sorted(reserved)}, got {value!r}"
            )
        return own

    def draws(
        self, values: Tensors, attrs: Mapping[str, str] | None = None, draw: Tensor | None = None
    ) -> "xarray.Dataset":
        """Return sites ``[chains, draws, n, *event]`` as a data set."""
        variables: dict[str, Any] = {
            name: ((*SAMPLE_DIMS, "datum", *self._of(name, value, 3)), value, {})
            for name, value in values.items()
        }
        return self._dataset(variables, attrs or {}, draw)

    def numbers(self, values: Tensors, attrs: Mapping[str, str]) -> "xarray.Dataset":
        """Return numbers per datum ``[n]``, or per draw and datum, as a data set."""
        variables: dict[str, Any] = {
            name: ((*SAMPLE_DIMS, "datum")[-value.dim() :], value, {} if name == "k_hat" else NATS)
            for name, value in values.items()
        }
        return self._dataset(variables, attrs)

    def data(self, values: Tensors) -> "xarray.Dataset":
        """Return data ``[n, *event]`` as a data set."""
        variables: dict[str, Any] = {
            name: (("datum", *self._of(name, value, 1)), value, {}) for name, value in values.items()
        }
        return self._dataset(variables, {})

    def _of(self, name: str, value: Tensor, leading: int) -> tuple[str, ...]:
        """Return the names of a value's event dims."""
        count = value.dim() - leading
        own = self.dims.get(name, ())
        return own if len(own) == count else self._default(name, count, False)

    def _dataset(
        self, variables: dict[str, Any], attrs: Mapping[str, str], draw: Tensor | None = None
    ) -> "xarray.Dataset":
        import xarray

        from ppl_vae import __version__

        arrays = {name: (dims, v.detach().cpu().numpy(), a) for name, (dims, v, a) in variables.items()}
        sizes = {dim: size for dims, v, _ in arrays.values() for dim, size in zip(dims, v.shape, strict=True)}
        labels = {dim: np.arange(size) for dim, size in sizes.items()}
        labels |= {dim: v for dim, v in self.coords.items() if sizes.get(dim) == len(v)}
        if draw is not None and "draw" in sizes:
            labels["draw"] = draw.numpy()
        about = {"inference_library": "ppl-vae", "inference_library_version": __version__}
        return xarray.Dataset(arrays, labels, {**about, **attrs})


def _gather(
    model: Program, data: Any, observed: list[Any], where: torch.device, memory: float
) -> tuple[Tensor, ...]:
    """Return all data, drawn once where they are dynamic.

    Raises:
        ValueError: if they alone take more than ``memory`` bytes, or a loader's are outside their support.
    """
    parts: list[tuple[Tensor, ...]] = []
    taken = 0
    size = len(data) if isinstance(data, Split) else 1
    for i, whole in enumerate(batches(data, size, device=where, shuffle=False), 1):
        if not isinstance(data, Split):
            check_batch(f"data, batch {i}", batch_arguments(model, whole), observed)
        taken += sum(t.numel() * t.element_size() for t in whole)
        if taken > memory:
            raise ValueError(
                f"memory: expected room for the data, got {_mib(memory)} for {_mib(taken)} or more; take "
                "fewer data"
            )
        parts.append(whole)
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _check_memory(
    traces: tuple[Trace, Trace],
    data_sites: list[str],
    n: int,
    counts: tuple[int, int, int],
    memory: float,
) -> None:
    """Raise if the result would take more than ``memory`` bytes."""
    draws, predicted, prior = counts

    def per_datum(site: Site) -> float:
        value = site["value"]
        return float(value.numel() * value.element_size() / len(value))

    latent = sum(per_datum(site) for site in latent_sites(traces[1]).values())
    data = sum(per_datum(observed_sites(traces[0])[name]) for name in data_sites)
    parts = {
        "posterior, num_draws or the reference": draws * n * latent,
        "log-likelihoods and weights, num_draws or the reference": draws * n * 8.0 * (3 + len(data_sites)),
        "posterior_predictive, predictive_draws": predicted * n * data,
        "prior and prior_predictive, prior_draws": prior * n * (latent + data),
        "observed_data": n * data,
    }
    total = sum(parts.values())
    if total > memory:
        listed = "; ".join(
            f"{name}: {_mib(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1]) if size
        )
        raise ValueError(
            f"memory: expected room for the result, {_mib(total)} of {n} data, got {_mib(memory)} ({listed})"
        )


def _mib(size: float) -> str:
    return f"{size / 2**20:.3g} MiB"


def _check_count(name: str, value: object) -> int:
    """Return ``value`` as an ``int``, or raise if it is not a whole number from 0."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a whole number from 0, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: expected a whole number from 0, got {value!r}")
    return int(value)


def _check_reference(reference: Any, model_trace: Trace, guide_trace: Trace, n: int) -> Tensors:
    """Return draws of the reference, ``[chains, draws, n, *event]``, where and of what type the guide's are.

    Raises:
        TypeError, ValueError: if they are not of all latent sites of the model and of these data.
    """
    draws = getattr(reference, "draws", reference)
    if not isinstance(draws, Mapping):
        raise TypeError(
            "reference: expected draws {site: [chains, draws, n, *event]}, or an object with them as "
            f"`draws`, got {type(reference).__name__}"
        )
    sites = {
        name: site for name, site in latent_sites(guide_trace).items() if name in latent_sites(model_trace)
    }
    if draws.keys() != sites.keys():
        raise ValueError(
            f"reference: expected draws of the model's latent sites {sorted(sites)}, got {sorted(draws)}"
        )
    result: Tensors = {}
    leading: tuple[int, ...] | None = None
    for name, site in sites.items():
        value = torch.as_tensor(draws[name]).detach()
        event = tuple(site["value"].shape[1:])
        if value.dim() != 3 + len(event) or tuple(value.shape[2:]) != (n, *event) or 0 in value.shape[:2]:
            expected = ", ".join(map(str, ("chains", "draws", n, *event)))
            raise ValueError(
                f"reference: expected draws [{expected}] of site {name!r}, got shape {list(value.shape)}"
            )
        if leading not in (None, tuple(value.shape[:2])):
            raise ValueError(
                f"reference: expected as many chains and draws of all sites, {list(leading or ())}, got "
                f"{list(value.shape[:2])} of site {name!r}"
            )
        leading = tuple(value.shape[:2])
        if math.prod(leading) < 2:
            raise ValueError(f"reference: expected at least 2 draws, got {list(leading)} (chains, draws)")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"reference: expected finite draws of site {name!r}, got NaN or infinite values")
        result[name] = value.to(site["value"])
    return result


def _check_weights(log_weights: Tensor) -> None:
    """Raise if a log weight is NaN or plus infinity."""
    bad = (log_weights.isnan() | (log_weights == math.inf)).any(0)
    if bad.any():
        raise ValueError(
            "model, guide: expected log weights that are finite or minus infinity, got others for "
            f"{int(bad.sum())} data, first for datum {int(bad.nonzero()[0])}"
        )


def for_loo(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return log p(x) and k-hat, ``[n]``, and what makes PSIS-LOO give both, ``[draws, n]``.

    PSIS-LOO weighs draws by the smoothed and normalised :math:`r_s \propto 1 / \exp L_s`, and returns
    :math:`\log \sum_s r_s \exp L_s`. With :math:`L_s = c - \log w_s` for the largest importance weights w,
    which are all that is smoothed, k-hat is theirs. The others are set to the largest of themselves, so that
    it is theirs if PSIS-LOO takes a longer tail too (a shorter one it takes where ``reff`` is above 1); c is
    chosen to make the sum :math:`\log p(x)`.

    Args:
        log_weights: :math:`\log w`, float64 ``[draws, n]``.
    """
    draws = len(log_weights)
    marginal = log_weights.logsumexp(0) - math.log(draws)
    k_hat = pareto_smooth(log_weights)[1]
    largest = log_weights.topk(tail_size(draws) + 1, 0).values
    possible = largest[0] > -math.inf
    floor = torch.maximum(largest[-1], largest[0] + LEAST_LOG_RATIO)
    tail = torch.maximum(log_weights, floor).masked_fill(~possible, 0.0)
    # PSIS calls k infinite where the weights have no tail: a spread that changes nothing else gives them one
    ramp = torch.linspace(0, 1e-6, draws, dtype=tail.dtype)[:, None]
    tail = torch.where(possible & (k_hat == -math.inf), tail + ramp, tail)
    smoothed = pareto_smooth(tail)[0]
    constant = marginal - (smoothed.log_softmax(0) - tail).logsumexp(0)
    return marginal, k_hat, constant - tail


def _is_data(site: Site) -> bool:
    """Return whether an observed site is of data: no factor, nothing computed, nothing that is only given."""
    fn = site["fn"]
    computed = isinstance(fn, dist.Unit) or site["infer"].get("_deterministic")
    return not computed and getattr(fn, "_mask", None) is not False


def _sites(traces: tuple[Trace, Trace]) -> dict[str, Site]:
    model_trace, guide_trace = traces
    data = {name: site for name, site in observed_sites(model_trace).items() if _is_data(site)}
    return latent_sites(guide_trace) | data


def _spread(value: Tensor, k: int, n: int, site: Site) -> Tensor:
    """Return a site's value as ``[k, n, *event]``."""
    event = value.shape[value.dim() - len(site["fn"].event_shape) :]
    return value.expand(k, n, *event)
