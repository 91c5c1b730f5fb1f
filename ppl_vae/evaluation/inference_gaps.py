"""Inference gaps: what the family of a guide loses on log p(x), and what its encoder loses on top."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm import tqdm

from ppl_vae._checks import (
    check_at_least,
    check_choice,
    check_positive,
    check_positive_int,
    check_seed,
    did_you_mean,
)
from ppl_vae._random import seeded
from ppl_vae._warnings import warn
from ppl_vae.data import Split
from ppl_vae.evaluation.evaluate import CPU_ROWS, Estimate, pass_size
from ppl_vae.guides.local import LocalGuide
from ppl_vae.infer.checking import check_all, checked_batches, first_batch, running_on
from ppl_vae.infer.log_weights import PARTICLE_DIM, Terms, terms
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.running import (
    Program,
    check_pair,
    evaluating,
    in_own_store,
    latent_sites,
    trace_pair,
)
from ppl_vae.infer.tracing import NoNumbers, trace

if TYPE_CHECKING:
    import pandas as pd

Head = str | nn.Module
Heads = dict[str, nn.Module]

BETAS = (0.9, 0.99)  # of Adam: gradients fall by orders of magnitude on the way from a poor start
WINDOW = 50  # steps that are averaged
RATES = 4  # the last one is CUT ** (RATES - 1) of the first
CUT = 0.25
SELECTION = 200  # draws per datum that one of several rows is chosen by

_ROWS = (
    ("log_likelihood", "log p(x)"),
    ("optimal_elbo", "ELBO, optimum of each datum"),
    ("amortized_elbo", "ELBO, amortised"),
    ("approximation_gap", "approximation gap"),
    ("amortization_gap", "amortisation gap"),
    ("inference_gap", "inference gap"),
)


@dataclass(frozen=True, eq=False)
class InferenceGaps:
    """What ``inference_gaps`` measured, nats per datum.

    For each datum ``inference_gap`` = log p(x) - ELBO = ``approximation_gap`` + ``amortization_gap``.
    Monte Carlo errors of gaps allow for the draws that their two ends share.

    Attributes:
        log_likelihood: log p(x), importance-sampled or as given.
        optimal_elbo: the ELBO at the optimum of each datum in the guide's family.
        amortized_elbo: the guide's ELBO.
        approximation_gap: log p(x) - ``optimal_elbo``: what the family can't do.
        amortization_gap: ``optimal_elbo`` - ``amortized_elbo``: what the encoder and head don't find.
        inference_gap: both together, KL(q(z | x) || p(z | x)).
        outputs: the heads' outputs at the optimum, by the head's name, ``[n, *outputs]``, or with separate
            copies ``[n, copies, *outputs]``.
        num_data: n.
        num_particles: K, the draws per datum of each estimate.
        copies: "shared" or "separate".
        steps: the most steps that a datum's optimum took.
        converged: whether all optimisations ended as no more was gained, not at the limit of steps.
    """

    log_likelihood: Estimate
    optimal_elbo: Estimate
    amortized_elbo: Estimate
    approximation_gap: Estimate
    amortization_gap: Estimate
    inference_gap: Estimate
    outputs: dict[str, Tensor] = field(repr=False)
    num_data: int
    num_particles: int
    copies: str
    steps: int
    converged: bool

    @property
    def table(self) -> "pd.DataFrame":
        """The values of each datum, a row each."""
        import pandas as pd

        columns = {name: getattr(self, name).values.numpy() for name, _ in _ROWS}
        return pd.DataFrame(columns, index=pd.RangeIndex(self.num_data, name="datum"))

    def summary(self) -> dict[str, Any]:
        """Return means, standard errors and Monte Carlo errors as plain numbers, for a file."""
        head = {
            "num_data": self.num_data,
            "num_particles": self.num_particles,
            "copies": self.copies,
            "steps": self.steps,
            "converged": self.converged,
        }
        return head | {
            name: {
                "mean": getattr(self, name).mean,
                "standard_error": getattr(self, name).standard_error,
                "monte_carlo_error": getattr(self, name).monte_carlo_error,
            }
            for name, _ in _ROWS
        }

    def __str__(self) -> str:
        lines = [
            f"nats per datum, mean, standard error over {self.num_data} data, and Monte Carlo error "
            f"of {self.num_particles} draws"
        ]
        for name, label in _ROWS:
            found: Estimate = getattr(self, name)
            error = found.monte_carlo_error
            lines.append(f"{label:<28} {found.mean:>10.3f} +- {found.standard_error:.3f}  ({error:.2g})")
        if not self.converged:
            lines.append(f"the optimum was still rising after {self.steps} steps; give more `steps`")
        return "\n".join(lines)


def inference_gaps(
    model: Program,
    guide: Program,
    data: Any,
    *,
    head: Head | Sequence[Head] | None = None,
    num_particles: int = 1000,
    steps: int = 2000,
    learning_rate: float = 0.03,
    step_particles: int = 16,
    tolerance: float = 0.01,
    copies: Literal["shared", "separate"] = "shared",
    log_likelihood: Tensor | Estimate | None = None,
    compile: bool = False,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> InferenceGaps:
    r"""Split log p(x) - ELBO of each datum into approximation gap and amortisation gap.

    .. math:: \log p(x) - L[q] = (\log p(x) - L[q^*]) + (L[q^*] - L[q])

    with the ELBO L and the best :math:`q^*` of the guide's family for this datum alone. To find it, the guide
    runs as it is, but what its head puts out is replaced by free parameters, one row per datum, which start
    at what the head gave. Adam takes them up the ELBO with fresh draws in each step; model, encoder and all
    else of the guide stay as they are. The rate is cut to a quarter when a window of 50 steps gains less
    than ``tolerance``, and after four such windows the search ends. Of the averages over these windows and
    the start, each datum keeps the one with the best ELBO on other draws. All estimates are then made with
    fresh draws, so that none is better for having been chosen.

    The head is the module whose output holds the parameters of q, free of constraints: ``guide.head`` or
    ``guide.heads`` of the library's guides. Of a guide of yours, name it: the last linear layer, before
    ``exp`` or ``softplus``, and all of them where mean and scale have one each. Its output is to be a
    function of the data alone; a hierarchical guide whose upper heads take lower draws has no such row and
    is refused. What of q is not in the head's output is part of the family: the weights of a ``FlowGuide``'s
    flow stay, while its base and context are free. The steps of a ``SemiAmortizedGuide`` follow the free row
    as they follow the head. A ``LocalGuide`` has rows already: its amortisation gap is zero, and what it was
    not trained for is approximation gap.

    log p(x) is importance-sampled with K draws of the guide or of :math:`q^*`. Which of the two is better for
    a datum is decided on each half of the draws for the other half, so that the choice adds no bias. Like any
    such estimate, it is low in expectation where q misses much of the posterior, and the approximation gap
    with it; give values of annealed importance sampling to be sure.

    With ``copies="separate"`` each of ``step_particles`` copies of a datum has a row of its own and one draw
    per step, as in the code of the paper. A copy's ELBO is at most that of the shared optimum; a mean over
    copies that are scattered by their noisier gradients, or end in different modes, is below it.

    Args:
        model: program over the latent sites and the data.
        guide: program over the latent sites, all reparameterised.
        data: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch ``Dataset`` or
            ``DataLoader``. Bits of a dynamic split are drawn once.
        head: the guide's module whose output holds the parameters of q, by its name in the guide or as the
            module itself, or several; None for ``guide.head`` or ``guide.heads``.
        num_particles: K, the draws per datum of all estimates, at least 2; with separate copies rounded up
            to a multiple of their number.
        steps: the most steps of Adam for each datum.
        learning_rate: of the first steps.
        step_particles: draws per datum in a step; with separate copies, their number.
        tolerance: the gain, in nats per datum over 50 steps, below which the rate is cut.
        copies: "shared": one row per datum for all draws; "separate": a row for each draw of a step.
        log_likelihood: values of log p(x) to use instead, ``[n]``, or an ``Estimate`` of them.
        compile: trace a step once and compile it (TorchInductor): seconds at the start, then faster steps.
            Where that fails, a warning says so.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show progress bars.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; if the guide has no head
            that is known, or one whose output is no tensor ``[n, ...]``, depends on draws, or is used twice;
            if a site is not reparameterised; if an ELBO is not finite on the way.

    References:
        Inference Suboptimality in Variational Autoencoders (Cremer, Li & Duvenaud, 2018), arXiv:1801.03558

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> x = model(None, size=10).detach()
        >>> result = inference_gaps(model, guide, x, num_particles=50, steps=100, progress=False)
        >>> result.approximation_gap.mean < result.inference_gap.mean
        True
    """
    num_particles = check_positive_int("num_particles", num_particles)
    if num_particles < 2:
        raise ValueError(f"num_particles: expected at least 2, got {num_particles}")
    steps = check_positive_int("steps", steps)
    learning_rate = check_positive("learning_rate", learning_rate)
    draws = check_positive_int("step_particles", step_particles)
    tolerance = check_at_least("tolerance", tolerance)
    check_choice("copies", copies, ("shared", "separate"))
    if not isinstance(compile, bool):
        raise TypeError(f"compile: expected True or False, got {compile!r}")
    check_positive("memory", memory)
    check_seed(seed)
    heads = find_heads(guide, head)
    where = place(device, model, guide)
    data = prepare_data(data, "data", where)
    given = _check_given(log_likelihood, len(data) if isinstance(data, Split) else None)
    count = draws if copies == "separate" and heads else 1
    per_copy = math.ceil(num_particles / count)
    search = _Search(model, guide, heads, 1 if count > 1 else draws, steps, learning_rate, tolerance, compile)
    parts: list[dict[str, Tensor]] = []
    found: list[list[Tensor]] = []
    with seeded(seed), evaluating(model, guide):
        first = first_batch(model, data, "data", 2, where)
        with running_on("data", first):
            traces = trace_pair(model, guide, *first)
            check_pair(*traces, first)
        _check_sites(latent_sites(traces[1]))
        del traces
        observed = check_all(model, guide, data, "data", where)
        check_heads(guide, heads, first)

        def run(n: int, k: int) -> Terms:
            return terms(model, guide, *(t[:n] for t in first), num_particles=k)

        rows = CPU_ROWS if where.type == "cpu" else sys.maxsize
        size, chunk = pass_size(memory, per_copy * count, rows, run)
        search.rows = size * chunk
        search.check(first)
        rows = sys.maxsize if compile else rows  # a compiled step goes through the caches row by row
        block = pass_size(memory, draws, rows, lambda n, k: search.count(first, n, k))[0]
        blocks = math.ceil(len(data) / block) if isinstance(data, Split) else None
        with (
            pyro.validation_enabled(False),
            tqdm(
                total=blocks and blocks * steps,
                unit="step",
                desc="optimum of each datum",
                disable=not progress or not heads,
                dynamic_ncols=True,
            ) as bar,
        ):
            number = done = 0
            for small in checked_batches(model, data, observed, block, where):
                if given is not None and len(given[0]) < done + len(small[0]):
                    raise ValueError(
                        f"log_likelihood: expected a value for each of {done + len(small[0])} data or "
                        f"more, got {len(given[0])}"
                    )
                with seeded(seed, 0, number):
                    best = search.optimum(small, count, bar, done)
                found.append(best)
                for j, start in enumerate(range(0, len(small[0]), size)):
                    piece = tuple(t[start : start + size] for t in small)
                    local = [r[start * count : (start + size) * count] for r in best]
                    key = (seed, 1, number, j)
                    amortised = search.weights(piece, None, 1, per_copy * count, chunk, key)
                    optimal = amortised
                    if heads:
                        other = key if count == 1 else (seed, 2, number, j)
                        optimal = search.weights(piece, local, count, per_copy, chunk, other)
                    known = None if given is None else given[0][done : done + len(piece[0])]
                    parts.append(_estimates(amortised, optimal, known))
                    done += len(piece[0])
                number += 1
    return _result(parts, found, search, heads, count, per_copy * count, copies, given)


def _result(
    parts: list[dict[str, Tensor]],
    found: list[list[Tensor]],
    search: "_Search",
    heads: Heads,
    count: int,
    num_particles: int,
    copies: str,
    given: tuple[Tensor, float] | None,
) -> InferenceGaps:
    """Return the result from the parts of all data."""
    values = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    n = len(values["elbo"])
    if given is not None and len(given[0]) != n:
        raise ValueError(f"log_likelihood: expected a value for each of {n} data, got {len(given[0])}")
    error_of_given = 0.0 if given is None else given[1]

    def estimate(name: str) -> Estimate:
        error = float(values[f"variance of {name}"].sum().sqrt() / n)
        if name in ("log_likelihood", "approximation_gap", "inference_gap"):
            error = math.hypot(error, error_of_given)
        return Estimate(values[name], num_particles, error)

    outputs = {
        name: torch.cat([rows[i] for rows in found]).cpu().unflatten(0, (n, count))
        for i, name in enumerate(heads)
    }
    return InferenceGaps(
        estimate("log_likelihood"),
        estimate("optimum"),
        estimate("elbo"),
        estimate("approximation_gap"),
        estimate("amortization_gap"),
        estimate("inference_gap"),
        outputs if copies == "separate" else {name: rows.squeeze(1) for name, rows in outputs.items()},
        n,
        num_particles,
        copies,
        search.taken,
        search.converged,
    )


# -- the guide's head ----------------------------------------------------------------------------------


def find_heads(guide: Program, head: Head | Sequence[Head] | None) -> Heads:
    """Return the modules whose outputs hold the parameters of q, by name; none of a ``LocalGuide``.

    Raises:
        TypeError, ValueError: if they are not known, or are no modules of the guide.
    """
    owner = guide if isinstance(guide, nn.Module) else getattr(guide, "__self__", None)
    if head is None:
        return _known_heads(owner)
    wanted = [head] if isinstance(head, (str, nn.Module)) and not isinstance(head, nn.ModuleList) else head
    if isinstance(wanted, nn.ModuleDict) or not isinstance(wanted, (Sequence, nn.ModuleList)) or not wanted:
        raise TypeError(f"head: expected a module of the guide, its name, or several, got {head!r}")
    found: Heads = {}
    for one in wanted:
        name, module = _head(owner, one)
        if any(module is other for other in found.values()):
            raise ValueError(f"head: expected different modules, got {name!r} twice")
        found[name] = module
    return found


def _known_heads(owner: Any) -> Heads:
    """Return the heads of a guide of the library, or of one with an attribute of the same name."""
    if isinstance(owner, LocalGuide):
        return {}
    prefix, part = "", owner
    while isinstance(part, nn.Module):
        if isinstance(head := getattr(part, "head", None), nn.Module):
            return {f"{prefix}head": head}
        if isinstance(heads := getattr(part, "heads", None), nn.ModuleList) and len(heads):
            return {f"{prefix}heads.{i}": head for i, head in enumerate(heads)}
        prefix, part = f"{prefix}guide.", getattr(part, "guide", None)
    what = "the module whose output holds the parameters of q, before any `exp` or `softplus`"
    if not isinstance(owner, nn.Module):
        raise ValueError(
            f"head: expected {what}, since the guide is a plain function; give the nn.Module that it calls, "
            "as in head=encoder, got None"
        )
    names = [name for name, _ in owner.named_modules() if name]
    raise ValueError(
        f"head: expected {what}, since {type(owner).__name__} has no `head`; give its name, one of {names}, "
        "or several, got None"
    )


def _head(owner: Any, head: Any) -> tuple[str, nn.Module]:
    """Return one head with its name."""
    if isinstance(head, nn.Module):
        if isinstance(owner, nn.Module):
            name = next((name for name, module in owner.named_modules() if module is head), None)
            if name is None:
                kind = type(owner).__name__
                raise ValueError(f"head: expected a module of the {kind}, got another {type(head).__name__}")
            return name or type(head).__name__, head
        return getattr(head, "_pyro_name", None) or type(head).__name__, head
    if not isinstance(head, str):
        raise TypeError(f"head: expected a module of the guide or its name, got {head!r}")
    if not isinstance(owner, nn.Module):
        raise TypeError(
            f"head: expected the module itself, since the guide is a plain function, got {head!r}"
        )
    modules = {name: module for name, module in owner.named_modules() if name}
    if head not in modules:
        kind, near = type(owner).__name__, did_you_mean(head, modules)
        raise ValueError(f"head: expected a module of the {kind}, one of {list(modules)}, got {head!r}{near}")
    return head, modules[head]


def with_rows(guide: Program, heads: Heads, rows: Sequence[Tensor]) -> Program:
    """Return the guide with these tensors in the place of its heads' outputs.

    That is so in runs of the guide alone: a model whose prior has the same heads, a ``VampPrior``, has them
    as they are.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        handles = []
        try:
            for module, row in zip(heads.values(), rows, strict=True):
                handles.append(module.register_forward_hook(lambda *_, row=row: row))
            return guide(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    return run


def outputs_of(
    guide: Program, heads: Heads, batch: tuple[Tensor, ...], num_particles: int | None = None
) -> list[list[Any]]:
    """Return what each head puts out in a run of the guide, a list of its calls."""
    calls: list[list[Any]] = [[] for _ in heads]
    handles = []
    program = in_own_store(guide)
    if num_particles is not None:
        program = pyro.plate("num_particles", num_particles, dim=PARTICLE_DIM)(program)
    try:
        for i, module in enumerate(heads.values()):
            handles.append(
                module.register_forward_hook(lambda module, args, output, i=i: calls[i].append(output))
            )
        poutine.trace(program).get_trace(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def check_heads(guide: Program, heads: Heads, batch: tuple[Tensor, ...]) -> None:
    """Raise unless each head gives one row per datum, once in a run, whatever the guide draws."""
    n, runs = len(batch[0]), []
    for run in range(2):
        with seeded(run):
            runs.append(outputs_of(guide, heads, batch, n + 3))
    for name, first, second in zip(heads, *runs, strict=True):
        if len(first) != 1:
            raise ValueError(
                f"head: expected a module that a run of the guide calls once, got {name!r}, "
                f"which it calls {len(first)} times"
            )
        (output,), (again,) = first, second
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise TypeError(
                f"head: expected a module that puts out one floating-point tensor, got {name!r}, which puts "
                f"out {type(output).__name__}; name the layers that make its parts instead"
            )
        with_draws = output.dim() > 1 and output.shape[0] == n + 3
        if with_draws or output.shape != again.shape or not torch.equal(output, again):
            raise ValueError(
                "head: expected an output that is a function of the data alone, so that a datum has one row, "
                f"got {name!r}, whose output depends on what the guide draws: shape {list(output.shape)} for "
                f"{n} data and {n + 3} draws. The optimum of each datum is not known for such a guide"
            )
        if output.dim() < 2 or output.shape[0] != n:
            raise ValueError(
                f"head: expected a module that puts out a row per datum, [{n}, ...], got {name!r}, "
                f"which puts out {list(output.shape)}"
            )


def _check_sites(sites: dict[str, Any]) -> None:
    """Raise if draws have no gradient to the parameters of their distribution."""
    for name, site in sites.items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"guide: expected reparameterised sites, since gradients go through draws, got site {name!r} "
                f"of {type(site['fn']).__name__}"
            )


def _check_given(given: Tensor | Estimate | None, n: int | None) -> tuple[Tensor, float] | None:
    """Return given values of log p(x), ``[n]``, and the Monte Carlo error of their mean."""
    if given is None:
        return None
    values, error = (given.values, given.monte_carlo_error) if isinstance(given, Estimate) else (given, 0.0)
    if not isinstance(values, Tensor):
        raise TypeError(f"log_likelihood: expected a tensor or an Estimate, got {type(given).__name__}")
    if values.dim() != 1 or (n is not None and len(values) != n):
        wanted = "[n]" if n is None else f"[{n}]"
        raise ValueError(f"log_likelihood: expected a value per datum, {wanted}, got {list(values.shape)}")
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"log_likelihood: expected finite values, got {float(values[row])} for datum {row}")
    return values.detach().double().cpu(), 0.0 if math.isnan(error) else error


# -- the optimum of each datum -------------------------------------------------------------------------


class _Search:
    """The search for the optimum of each datum, and draws with it.

    Args:
        model: program over the latent sites and the data.
        guide: program over the latent sites.
        heads: modules whose outputs are free.
        draws: per row and step.
        steps: the most steps.
        learning_rate: of the first steps.
        tolerance: the gain of a window below which the rate is cut.
        compile: whether steps are compiled.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        heads: Heads,
        draws: int,
        steps: int,
        learning_rate: float,
        tolerance: float,
        compile: bool,
    ) -> None:
        self.model, self.guide, self.heads = model, guide, heads
        self.draws, self.steps, self.learning_rate = draws, steps, learning_rate
        self.tolerance = tolerance
        self.compile = compile
        self.rows = 1  # draws of all data together that a pass without gradients may have
        self.taken = 0
        self.converged = True
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def start(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """Return what the heads put out, ``[n, *outputs]`` each."""
        return [calls[0].detach() for calls in outputs_of(self.guide, self.heads, batch)]

    def gradients(self, *inputs: Tensor, draws: int | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """Return the ELBO of each row, ``[n]``, and its gradients, from rows followed by the batch."""
        m = len(self.heads)
        with torch.enable_grad():
            rows = [row.detach().requires_grad_() for row in inputs[:m]]
            guide = with_rows(self.guide, self.heads, rows)
            found = terms(self.model, guide, *inputs[m:], num_particles=draws or self.draws)
            elbo = found.log_weights().mean(0)
            gradients = torch.autograd.grad(elbo.sum(), rows, allow_unused=True)
        return elbo.detach(), list(gradients)

    def check(self, batch: tuple[Tensor, ...]) -> None:
        """Raise if a head's output does not reach q."""
        if self.heads:
            try:
                _, gradients = self.gradients(*self.start(batch), *batch)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                gradients = [None] * len(self.heads)
            for name, gradient in zip(self.heads, gradients, strict=True):
                if gradient is None:
                    raise ValueError(
                        f"head: expected a module whose output reaches q with a gradient, got {name!r}"
                    )

    def count(self, batch: tuple[Tensor, ...], n: int, k: int) -> Terms:
        """Run a step on so many data and draws."""
        batch = tuple(t[:n] for t in batch)
        elbo, _ = self.gradients(*self.start(batch), *batch, draws=k) if self.heads else (batch[0], None)
        return Terms(elbo, {})

    def step(self, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """Return ``gradients``, compiled for inputs of these shapes if that is asked for."""
        if not self.compile:
            return self.gradients
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        if shapes not in self._compiled:

            def run(*inputs: Tensor) -> Any:
                with NoNumbers():
                    return self.gradients(*inputs)

            try:
                with torch.random.fork_rng(devices={x.device.index for x in inputs if x.is_cuda}):
                    step = trace(run, inputs, None).compile(inputs)  # type: ignore[arg-type]
                    step(*inputs)
            except Exception as error:  # whatever a program does
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                warn(f"inference_gaps: can't compile a step: {reason}; steps are plain")
                self.compile = False
                return self.gradients
            self._compiled[shapes] = step
        return self._compiled[shapes]

    def optimum(self, batch: tuple[Tensor, ...], copies: int, bar: Any, first: int) -> list[Tensor]:
        """Return rows of the heads' outputs at the optimum of each datum, ``[n * copies, *outputs]``.

        Args:
            batch: a block of data.
            copies: rows per datum.
            bar: to show the progress in.
            first: the number of the block's first datum, for errors.
        """
        if not self.heads:
            return []
        start = [row.repeat_interleave(copies, 0) for row in self.start(batch)]
        repeated = tuple(t.repeat_interleave(copies, 0) for t in batch)
        rows = [row.clone() for row in start]
        optimizer = torch.optim.Adam(rows, lr=self.learning_rate, betas=BETAS)
        step = self.step((*rows, *repeated))
        candidates, best, rates, taken = [start], -math.inf, 1, 0
        while taken < self.steps:
            window = min(WINDOW, self.steps - taken)
            sums = [torch.zeros_like(row) for row in rows]
            elbo = torch.zeros(len(repeated[0]), dtype=torch.float64, device=repeated[0].device)
            for _ in range(window):
                found, gradients = step(*rows, *repeated)
                elbo += found
                for row, gradient in zip(rows, gradients, strict=True):
                    row.grad = -gradient
                optimizer.step()
                torch._foreach_add_(sums, rows)
            taken += window
            mean = float(elbo.mean()) / window
            if not math.isfinite(mean):
                datum = first + int((~elbo.isfinite()).nonzero()[0]) // copies
                raise ValueError(
                    f"head: the ELBO of datum {datum} is not finite after {taken} steps; expected outputs "
                    f"that are free of constraints, before any `exp` or `softplus`, of {list(self.heads)}, "
                    "or give a smaller `learning_rate`"
                )
            bar.update(window)
            bar.set_postfix(elbo=f"{mean:.2f}", rate=f"{optimizer.param_groups[0]['lr']:.2g}")
            flat = mean - best < self.tolerance
            best = max(best, mean)
            if flat or taken == self.steps:
                candidates.append([total / window for total in sums])
            if flat:
                if rates == RATES:
                    break
                rates += 1
                optimizer.param_groups[0]["lr"] *= CUT
        else:
            self.converged = False
        bar.update(self.steps - taken)
        self.taken = max(self.taken, taken)
        return self._best(batch, candidates, copies)

    def _best(self, batch: tuple[Tensor, ...], candidates: list[list[Tensor]], copies: int) -> list[Tensor]:
        """Return the candidate of the best ELBO for each datum, by the same draws for all."""
        n, key = len(batch[0]), int(torch.randint(2**62, ()))
        draws = math.ceil(SELECTION / copies)
        chunk = max(1, self.rows // n)
        elbo = [self.weights(batch, rows, copies, draws, chunk, (key,)).mean(0) for rows in candidates]
        chosen = torch.stack(elbo).argmax(0)
        of_rows = chosen.repeat_interleave(copies)
        at = torch.arange(n * copies, device=of_rows.device)
        return [torch.stack(rows)[of_rows, at] for rows in zip(*candidates, strict=True)]

    def weights(
        self,
        batch: tuple[Tensor, ...],
        rows: list[Tensor] | None,
        copies: int,
        draws: int,
        chunk: int,
        key: tuple[int, ...],
    ) -> Tensor:
        """Return log weights of draws for each datum, ``[draws * copies, n]``, in double precision.

        Args:
            batch: data.
            rows: the heads' outputs, ``[n * copies, *outputs]``; None for those of the heads.
            copies: rows per datum.
            draws: per row.
            chunk: draws per datum in a pass.
            key: seeds the draws.
        """
        n = len(batch[0])
        if copies > 1:
            batch = tuple(t.repeat_interleave(copies, 0) for t in batch)
        chunk = max(1, chunk // copies)
        guide = self.guide if rows is None else with_rows(self.guide, self.heads, rows)
        found = []
        for i, start in enumerate(range(0, draws, chunk)):
            with seeded(*key, i):
                part = terms(self.model, guide, *batch, num_particles=min(chunk, draws - start))
            weights = part.log_weights().double()
            found.append(weights.unflatten(1, (n, copies)).transpose(1, 2).flatten(0, 1))
        return torch.cat(found)


# -- estimates -----------------------------------------------------------------------------------------


def _estimates(amortised: Tensor, optimal: Tensor, given: Tensor | None) -> dict[str, Tensor]:
    """Return the estimates of each datum, and the variance of each, from log weights ``[K, n]``.

    The variance of a gap is that of the difference of its ends, draw by draw.
    """
    k = len(amortised)
    elbo, optimum = amortised.mean(0), optimal.mean(0)
    influence = {"elbo": amortised - elbo, "optimum": optimal - optimum}
    if given is None:
        chosen = chosen_weights(amortised, optimal)
        log_p = chosen.logsumexp(0) - math.log(k)
        influence["log_likelihood"] = (chosen - log_p).exp() - 1  # the delta method
    else:
        log_p = given.to(elbo)
        influence["log_likelihood"] = torch.zeros_like(amortised)
    result = {
        "log_likelihood": log_p,
        "optimum": optimum,
        "elbo": elbo,
        "approximation_gap": log_p - optimum,
        "amortization_gap": optimum - elbo,
        "inference_gap": log_p - elbo,
    }
    influence["approximation_gap"] = influence["log_likelihood"] - influence["optimum"]
    influence["amortization_gap"] = influence["optimum"] - influence["elbo"]
    influence["inference_gap"] = influence["log_likelihood"] - influence["elbo"]
    for name, values in influence.items():
        result[f"variance of {name}"] = values.square().mean(0) / (k - 1)
    return result


def chosen_weights(amortised: Tensor, optimal: Tensor) -> Tensor:
    """Return the log weights of the better proposal, ``[K, n]``, chosen for each half by the other half.

    The better one has the higher lower confidence limit of log p(x): an estimate that is low since the
    proposal misses the posterior loses, and so does one that is high by a few large weights.
    """
    half = len(amortised) // 2
    better = [
        _lower_limit(optimal[rows]) >= _lower_limit(amortised[rows])
        for rows in (slice(half), slice(half, None))
    ]
    return torch.cat(
        [
            torch.where(better[1], optimal[:half], amortised[:half]),
            torch.where(better[0], optimal[half:], amortised[half:]),
        ]
    )


def _lower_limit(weights: Tensor) -> Tensor:
    """Return the estimate of log p(x) less three of its standard errors, from log weights ``[k, n]``."""
    k = len(weights)
    log_p = weights.logsumexp(0) - math.log(k)
    return log_p - 3 * ((weights - log_p).exp() - 1).square().mean(0).sqrt() / math.sqrt(k)
