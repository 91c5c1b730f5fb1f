"""Gradients of an estimator, taken many times: their mean, noise and bias, and what one costs."""

import math
import statistics
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.objective import Objective

_BLOCKS = 20  # of repeats, whose means tell the standard error of the gradient's bias


class Gradients:
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
            with standing(self.objective.estimator):
                _synchronize(batch)
                start = time.perf_counter()
                losses.append(self.objective.loss_and_grads(*batch))
                _synchronize(batch)
                seconds.append(time.perf_counter() - start)
            for role, gradients in take_gradients(self.objective).items():
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


def take_gradients(objective: Objective) -> dict[str, list[Tensor | None]]:
    """Return the gradients of each group's parameters, and forget them there."""
    found: dict[str, list[Tensor | None]] = {}
    for role, parameters in (objective.trainable or {}).items():
        found[role] = [p.grad for p in parameters.values()]
        for p in parameters.values():
            p.grad = None
    return found


@contextmanager
def standing(estimator: ELBO) -> Iterator[None]:
    """Let an estimator's schedules stand where they are."""
    step = estimator.step.clone() if isinstance(estimator, Estimator) else None
    yield
    if isinstance(estimator, Estimator) and step is not None:
        estimator.step = step


def relative_bias(blocks: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the norm of the difference of two mean gradients over that of the reference, and its error.

    Bias over error tests whether there is a bias. Both are NaN unless the reference is told from zero, the
    error if there are fewer than three blocks.

    Args:
        blocks: the means of independent blocks of the one, ``[blocks, coordinates]``.
        reference: of the other.
    """
    scale, scale_error = _squared_norm(reference)
    if not scale > 3 * scale_error:
        return math.nan, math.nan
    count = min(len(blocks), len(reference))
    square, error = (t / scale for t in _squared_norm(_merge(blocks, count) - _merge(reference, count)))
    bias = math.sqrt(max(0.0, square))
    return bias, error / max(bias, math.sqrt(error)) if error > 0 else error


def _squared_norm(blocks: Tensor) -> tuple[float, float]:
    """Return the U-statistic of the squared norm of the mean of blocks, and its jackknife error.

    Products of different blocks have no share of the noise.
    """
    count, products = len(blocks), blocks @ blocks.mT
    off = products - products.diagonal().diag()
    square = float(off.sum()) / (count * (count - 1))
    if count < 3:
        return square, math.nan
    without = (off.sum() - 2 * off.sum(1)) / ((count - 1) * (count - 2))  # each block left out
    return square, math.sqrt((count - 1) / count * float((without - without.mean()).square().sum()))


def _merge(blocks: Tensor, count: int) -> Tensor:
    """Return the means of ``count`` groups of blocks."""
    return torch.stack([part.mean(0) for part in blocks.tensor_split(count)])


def _synchronize(batch: tuple[Tensor, ...]) -> None:
    if batch[0].device.type == "cuda":
        torch.cuda.synchronize(batch[0].device)


def peak_memory(objective: Objective, batch: tuple[Tensor, ...]) -> float:
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
    take_gradients(objective)
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
