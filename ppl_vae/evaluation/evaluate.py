"""Evaluation of a model / guide pair: ELBO, its parts, and importance-sampled log p(x)."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from ppl_vae._checks import check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.data import Split
from ppl_vae.infer.checking import check_all, checked_batches, first_batch, running_on
from ppl_vae.infer.log_weights import Terms, terms
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.running import Program, check_pair, evaluating, trace_pair

# A pass over rows (a draw for a datum each) is quickest when its tensors stay in the processor's
# caches; a GPU wants as many as fit.
CPU_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Estimate:
    """A quantity estimated for each datum.

    Attributes:
        values: nats, ``[n]``.
        num_particles: the number of draws per datum.
        monte_carlo_error: the standard deviation of ``mean`` over new draws for the same data; NaN
            for one draw per datum.
    """

    values: Tensor = field(repr=False)
    num_particles: int
    monte_carlo_error: float

    @property
    def mean(self) -> float:
        """The mean over data, nats per datum."""
        return float(self.values.mean())

    @property
    def standard_error(self) -> float:
        """The standard error of the mean, over data: how far new data would move it."""
        return float(self.values.std() / math.sqrt(len(self.values))) if len(self.values) > 1 else math.nan

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference on the same data, whose standard error is that of paired values.

        Its ``num_particles`` is the smaller one of the two, and its ``monte_carlo_error`` that of independent
        draws: where the two share theirs, it is another.

        Raises:
            ValueError: if the numbers of data differ.

        Example:
            >>> values = torch.tensor([[2.0, 5.0, 9.0], [1.0, 3.0, 8.0]])
            >>> print(Estimate(values[0], 10, 0.0) - Estimate(values[1], 10, 0.0))
            1.33 +- 0.33
        """
        if not isinstance(other, Estimate):
            return NotImplemented
        if len(self.values) != len(other.values):
            expected = f"expected an estimate of the same {len(self.values)} data"
            raise ValueError(f"other: {expected}, got one of {len(other.values)}")
        return Estimate(
            self.values - other.values,
            min(self.num_particles, other.num_particles),
            math.hypot(self.monte_carlo_error, other.monte_carlo_error),
        )

    def __str__(self) -> str:
        return f"{self.mean:.2f} +- {self.standard_error:.2f}"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What ``evaluate`` measured; ``elbo.values = reconstruction.values - sum of kl values``.

    Attributes:
        elbo: the evidence lower bound.
        reconstruction: E[log p(x | z)] under the guide.
        kl: for each latent site E[log q(z | x) - log p(z)].
        log_likelihood: log of the mean importance weight, in expectation a lower bound on log p(x)
            that rises to it with the number of particles.
        num_data: n.
        num_particles: K.
    """

    elbo: Estimate
    reconstruction: Estimate
    kl: dict[str, Estimate]
    log_likelihood: Estimate
    num_data: int
    num_particles: int

    def summary(self) -> dict[str, Any]:
        """Return means, standard errors and Monte Carlo errors as plain numbers, for a file."""
        named = {"elbo": self.elbo, "reconstruction": self.reconstruction}
        named |= {f"kl_{site}": estimate for site, estimate in self.kl.items()}
        named |= {"log_likelihood": self.log_likelihood}
        return {"num_data": self.num_data, "num_particles": self.num_particles} | {
            name: {
                "mean": estimate.mean,
                "standard_error": estimate.standard_error,
                "monte_carlo_error": estimate.monte_carlo_error,
            }
            for name, estimate in named.items()
        }

    def __str__(self) -> str:
        rows = [("ELBO", self.elbo), ("reconstruction", self.reconstruction)]
        rows += [(f"KL of {site}", estimate) for site, estimate in self.kl.items()]
        rows += [(f"log p(x), K={self.num_particles}", self.log_likelihood)]
        lines = [
            f"{name:<20} {estimate.mean:>10.2f} +- {estimate.standard_error:.2f}" for name, estimate in rows
        ]
        head = f"nats per datum, mean and standard error over {self.num_data} data"
        return "\n".join([head, *lines])


def evaluate(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 1000,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Measure ELBO, reconstruction, KL of each latent site, and log p(x) by importance sampling.

    Runs both programs in evaluation mode; no parameter, buffer or random stream of the caller changes.
    All four come from the same K draws per datum.

    Args:
        model: program over the latent sites and the data.
        guide: program over the latent sites, the importance sampler's proposal.
        data: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch ``Dataset`` or
            ``DataLoader``.
        num_particles: K, the number of draws per datum.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> result = evaluate(model, guide, torch.randn(20, 5), num_particles=10, progress=False)
        >>> result.elbo.mean <= result.log_likelihood.mean
        True
    """
    num_particles = check_positive_int("num_particles", num_particles)
    check_positive("memory", memory)
    check_seed(seed)
    with passes(model, guide, data, num_particles, memory, device, seed, progress) as (size, chunk, batches):
        parts = [_evaluate_batch(model, guide, small, num_particles, chunk) for small in batches(size)]
    values = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    n = len(values["elbo"])

    def estimate(name: str) -> Estimate:
        variance = values[f"variance of {name}"].sum()
        return Estimate(values[name], num_particles, float(variance.sqrt() / n))

    sites = [name.removeprefix("kl_") for name in values if name.startswith("kl_")]
    return Evaluation(
        estimate("elbo"),
        estimate("reconstruction"),
        {site: estimate(f"kl_{site}") for site in sites},
        estimate("log_likelihood"),
        n,
        num_particles,
    )


def _evaluate_batch(
    model: Program, guide: Program, batch: tuple[Tensor, ...], num_particles: int, chunk: int
) -> dict[str, Tensor]:
    """Return each estimate for each datum, ``[n]``, and the variance of each, from chunks of draws."""
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    log_sum = log_sum_squares = torch.tensor(-math.inf, dtype=torch.float64)
    done = 0
    while done < num_particles:
        k = min(chunk, num_particles - done)
        part = terms(model, guide, *batch, num_particles=k)
        weights = part.log_weights().double()
        named = {"elbo": weights, "reconstruction": part.reconstruction.double()}
        named |= {f"kl_{site}": kl.double() for site, kl in part.kl.items()}
        for name, value in named.items():
            sums[name] = sums.get(name, torch.zeros(())).to(value) + value.sum(0)
            squares[name] = squares.get(name, torch.zeros(())).to(value) + value.square().sum(0)
        log_sum = torch.logaddexp(log_sum.to(weights), weights.logsumexp(0))
        log_sum_squares = torch.logaddexp(log_sum_squares.to(weights), (2 * weights).logsumexp(0))
        done += k
    result = {name: total / num_particles for name, total in sums.items()}
    for name, square in squares.items():
        spread = (square / num_particles - result[name].square()).clamp(min=0)
        result[f"variance of {name}"] = spread / (num_particles - 1 or math.nan)
    result["log_likelihood"] = log_sum - math.log(num_particles)
    # the delta method: the variance of log(mean w) is that of mean w over its square
    relative = (log_sum_squares - 2 * log_sum + math.log(num_particles)).exp() - 1
    result["variance of log_likelihood"] = relative.clamp(min=0) / (num_particles - 1 or math.nan)
    return result


@contextlib.contextmanager
def passes(
    model: Program,
    guide: Program,
    data: Any,
    num_particles: int,
    memory: float,
    device: str | torch.device | None,
    seed: int,
    progress: bool,
) -> Iterator[tuple[int, int, Callable[[int], Iterator[tuple[Tensor, ...]]]]]:
    """Check a pair and its data, and make ready to take the log weights of all data in passes.

    Yields:
        How many data, and how many draws for each, a pass may have; and what gives the batches of a size,
        on the device, while a bar counts them.
    """
    where = place(device, model, guide)
    data = prepare_data(data, "data", where)
    total = len(data) if isinstance(data, Split) else None
    with (
        seeded(seed),
        evaluating(model, guide),
        tqdm(total=total, unit="datum", desc="log p(x)", disable=not progress, dynamic_ncols=True) as bar,
    ):
        first = first_batch(model, data, "data", 2, where)
        with running_on("data", first):
            check_pair(*trace_pair(model, guide, *first), first)
        observed = check_all(model, guide, data, "data", where)

        def run(n: int, k: int) -> Terms:
            return terms(model, guide, *(t[:n] for t in first), num_particles=k)

        def batches(size: int) -> Iterator[tuple[Tensor, ...]]:
            for small in checked_batches(model, data, observed, size, where):
                yield small
                bar.update(len(small[0]))

        rows = CPU_ROWS if where.type == "cpu" else sys.maxsize
        size, chunk = pass_size(memory, num_particles, rows, run)
        with pyro.validation_enabled(False):
            yield size, chunk, batches


def pass_size(
    memory: float, num_particles: int, rows: int, run: Callable[[int, int], Terms]
) -> tuple[int, int]:
    """Return how many data, and how many draws for each, a pass may have to stay within ``memory`` bytes.

    Counts the bytes that a pass makes, as if none were freed before its end.

    Args:
        memory: bytes.
        num_particles: the most draws for a datum.
        rows: the most rows (a draw for a datum each).
        run: makes a pass of so many data, 1 or 2, with so many draws.
    """
    counts = []
    for n, k in ((1, 1), (1, 5), (2, 1)):
        with _CountBytes() as counter:
            run(n, k)
        counts.append(counter.bytes)
    per_draw = max(1, (counts[1] - counts[0]) // 4)
    per_datum = max(0, counts[2] - counts[0] - per_draw)  # the encoder's share
    left = memory - per_datum if per_datum < memory else memory
    most = max(1, min(num_particles, rows, int(left // per_draw)))
    particles = math.ceil(num_particles / math.ceil(num_particles / most))  # in equal parts
    size = max(1, min(rows // particles, int(memory // (per_datum + particles * per_draw))))
    return size, particles


class _CountBytes(TorchDispatchMode):
    """Adds up the sizes of all tensors made inside its context."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not tensor._is_view():
                self.bytes += tensor.untyped_storage().nbytes()
        return result
