"""Stochastic variational inference whose steps are traced once and compiled."""

import contextlib
import functools
import itertools
import operator
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Literal

import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.optim import Optimizer

from ppl_vae.infer.cuda_graphs import Replay, is_capturable, make_capturable, tensors_of
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.precision import network_precision
from ppl_vae.infer.svi import SVI, Parts, with_parts
from ppl_vae.infer.tracing import NoNumbers, Traced, line_of, trace

Result = Literal["loss", "loss and parts", "parts"]  # those of a loss come with the gradients

MOST_GRAPHS = 64
_RESULTS = {"terms", "analytic", "parts", "max_plate_nesting"}  # of an estimator, not settings
_PLAIN = (bool, int, float, str, type(None))


class CompiledSVI(SVI):
    """``SVI`` at the speed of hand-written steps: loss and gradients are one compiled graph.

    The first step on a batch of new shapes traces the programs and the estimator, with their backward pass,
    into a graph of tensor operations (``torch.fx``), which TorchInductor compiles: seconds, once. Later
    steps run no Python of the programs. They make the same draws as ``SVI`` does with the same seed, and give
    the same loss and gradients up to rounding.

    Whatever is a tensor of the programs or of the estimator (parameters, buffers, the step of a schedule)
    stays alive in the graph. Numbers are constants of it: a new graph is made when a module's mode
    (``train``, ``eval``) or another plain attribute of it, a setting of the estimator, or a parameter or
    buffer itself is replaced. Other things that a program reads, a global variable say, must not change.
    Values are validated in the first step alone. A program that looks at values in Python (``.item()``,
    ``if tensor:``), or an estimator without a differentiable loss, can't be traced: one warning names the
    line, and the steps are those of ``SVI``.

    Args:
        model: program over the latent sites and the data; a module or a plain Pyro function.
        guide: program over the latent sites.
        optim: as in ``SVI``. One that is made here uses torch's fused kernel, where it has one and was not
            told otherwise.
        loss: any ``pyro.infer.ELBO`` with a differentiable loss.
        clip_norm: as in ``SVI``.
        per_datum: as in ``SVI``.
        precision: as in ``SVI``.

    Attributes:
        plain: whether steps are those of ``SVI``, from now on.

    Raises:
        TypeError, RuntimeError: as ``SVI``.

    Example:
        >>> from ppl_vae.infer import IWAE
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> svi = CompiledSVI(model, guide, torch.optim.Adam, IWAE(3))
        >>> svi.optim
        <class 'torch.optim.adam.Adam'>
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._graphs: dict[Any, Callable[..., Any] | None] = {}
        self._keys: dict[Hashable, int] = {}
        self._held: dict[int, Tensor] = {}  # the tensors of all graphs
        self._state: _State | None = None
        self._replays: dict[Any, Replay] = {}
        self._warned = False
        self.plain = False

    def setup(self, *batch: Tensor) -> None:
        """Check the pair on a batch and build the optimiser; the first ``step`` does it if need be."""
        given = self.optim
        super().setup(*batch)
        if self.optim is not given and isinstance(self.optim, Optimizer):
            for group in self.optim.param_groups:
                if group.get("fused", False) is None and not (group["foreach"] or group["differentiable"]):
                    group["fused"] = True
            if batch[0].is_cuda:
                make_capturable(self.optim, batch[0].device)

    def step_with_parts(self, *batch: Tensor, parts: bool = True) -> tuple[Tensor, Parts]:
        """Take one gradient step; return its loss and the parts of the true ELBO, from the same draws.

        On CUDA the whole step, with the optimiser's, is one CUDA graph, if the optimiser allows it
        (``capturable``); the first steps on a new shape are taken without.
        """
        self.setup(*batch)
        take, optim = functools.partial(super().step_with_parts, parts=parts), self.optim
        whole = batch[0].is_cuda and isinstance(optim, Optimizer) and is_capturable(optim)
        if not whole or (graph := self._graph(batch, "loss and parts" if parts else "loss")) is None:
            return take(*batch)
        key = graph, self.clip_norm, *tensors_of(optim)
        if key not in self._replays:
            self._replays[key] = Replay(take)
        return self._replays[key](*batch)

    def loss_and_grads(self, *batch: Tensor, parts: bool = False) -> tuple[Tensor, Parts]:
        """Set the parameters' gradients; return the loss and, if asked for, the parts of the true ELBO."""
        graph = self._graph(batch, "loss and parts" if parts else "loss")
        if graph is None:
            return super().loss_and_grads(*batch, parts=parts)
        with torch.no_grad(), network_precision("tf32" if self.precision == "tf32" else "float32"):
            loss, gradients, found = graph(*batch)
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            parameter.grad = gradient
        if isinstance(self.objective.estimator, Estimator):
            self.objective.estimator.terms = None  # a graph gives their sums alone
        return loss, found

    def time_plain_step(self, *batch: Tensor) -> float:
        """Return the seconds that loss and gradients take without a graph; nothing is changed."""
        self.setup(*batch)
        seconds = []
        with self._undone(batch):
            for _ in range(4):  # the first one warms up
                start = time.perf_counter()
                float(super().loss_and_grads(*batch, parts=True)[0])
                seconds.append(time.perf_counter() - start)
        for parameter in self._parameters():
            parameter.grad = None
        return min(seconds)

    def parts(self, *batch: Tensor) -> dict[str, Tensor]:
        """Return the parts of the true ELBO of a draw per datum, summed over the batch."""
        self.setup(*batch)
        graph = self._graph(batch, "parts")
        if graph is None:
            return super().parts(*batch)
        with torch.no_grad():
            found: dict[str, Tensor] = graph(*batch)
        return found

    def _graph(self, batch: tuple[Tensor, ...], result: Result) -> Callable[..., Any] | None:
        """Return a graph for such a batch, compiled if need be; None if there is none."""
        if self.plain or _PYRO_STACK:  # a handler of the caller's is nothing that a graph knows of
            return None
        if self._state is None or not self._state.holds():
            self._look()
        shapes = [(x.shape, x.stride(), x.dtype, x.device) for x in batch]
        for_batch = result, self.precision, self.per_datum, *shapes
        if (self._key, for_batch) not in self._graphs:
            if len(self._graphs) == MOST_GRAPHS:
                changes = ValueError(f"{MOST_GRAPHS} graphs, since something changes from step to step")
                self._warn("has", changes)
                self._graphs.clear()
                self.plain = True
                return None
            graph = self._compile(batch, result)
            self._look()
            self._graphs[self._key, for_batch] = graph
        return self._graphs[self._key, for_batch]

    def _look(self) -> None:
        """Take note of what a graph depends on, besides its batch."""
        self._state = _State([*self.objective.networks(), self.objective.estimator])
        self._key = self._keys.setdefault(self._state.key(self._held), len(self._keys))

    def _compile(self, batch: tuple[Tensor, ...], result: Result) -> Callable[..., Any] | None:
        """Return what gives the result for batches like this one, or None, with a warning."""
        what = "can't trace"
        try:
            with self._undone(batch), network_precision("float32" if result == "parts" else self.precision):
                traced = self._trace(batch, result)
            what = "can't compile the traced step"
            with self._undone(batch), torch.no_grad():
                graph = traced.compile(batch)
                graph(*batch)
        except Exception as error:  # whatever a program does
            self._warn(f"{what} {line_of(error)}" if what == "can't trace" else what, error)
            return None
        self._held |= {id(tensor): tensor for tensor in traced.held}
        return graph

    def _trace(self, batch: tuple[Tensor, ...], result: Result) -> Traced:
        """Return the graph that gives a result."""
        estimator = self.objective.estimator
        if result != "parts" and not hasattr(estimator, "differentiable_loss"):
            raise NotImplementedError(f"{type(estimator).__name__} has no differentiable loss")
        parameters = self._parameters()

        def run(*batch: Tensor) -> Any:
            with NoNumbers():
                if result == "parts":
                    return SVI.parts(self, *batch)
                wants_parts = result == "loss and parts"
                loss, found = with_parts(self.objective, self.objective, batch, parts=wants_parts)
            wanted = [p for p in parameters if p.requires_grad]
            scale = torch.full_like(loss, 1 / len(batch[0])) if self.per_datum else None
            gradients = iter(torch.autograd.grad(loss, wanted, scale, allow_unused=True))
            seen: set[int] = set()
            own = [_own(next(gradients), seen) if p.requires_grad else None for p in parameters]
            return loss.detach(), own, found

        try:
            return trace(run, batch, estimator)
        finally:
            if isinstance(estimator, Estimator):
                estimator.terms = None  # tensors of the trace

    @contextlib.contextmanager
    def _undone(self, batch: tuple[Tensor, ...]) -> Iterator[None]:
        """Let a run change no parameter, no buffer and no random stream."""
        estimator = self.objective.estimator
        modules = self.objective.networks()
        held = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        if isinstance(estimator, Estimator):
            held.append(estimator.step)
        before = [tensor.detach().clone() for tensor in held]
        devices = {x.device.index for x in batch if x.device.type == "cuda"}
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(held, before, strict=True):
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            warnings.warn(f"CompiledSVI: {what}: {reason}; steps are those of SVI", UserWarning, stacklevel=6)
            self._warned = True


class _State:
    """The modules of the programs and their estimator as they are: what a graph depends on."""

    def __init__(self, owners: list[Any]) -> None:
        self.owners = owners
        self.dicts = [vars(owner) for owner in owners]
        for owner in owners:
            if isinstance(owner, nn.Module):
                hooks = owner._forward_hooks, owner._forward_pre_hooks
                self.dicts += [owner._parameters, owner._buffers, owner._modules, *hooks]
        self.values = list(self._values())
        self.tensors = [value for value in self.values if isinstance(value, Tensor)]
        self.marks = self._marks()

    def holds(self) -> bool:
        """Return whether nothing was replaced since; False is no proof that something was."""
        return (
            self.marks == self._marks()
            and sum(map(len, self.dicts)) == len(self.values)
            and all(map(operator.is_, self._values(), self.values))
        )

    def _values(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(dict.values, self.dicts))

    def _marks(self) -> list[Any]:
        """Return what changes where a tensor gets other memory, as by ``model.double()``, or is frozen."""
        return [*[t.data_ptr() for t in self.tensors], *[t.requires_grad for t in self.tensors]]

    def key(self, held: Mapping[int, Tensor]) -> Hashable:
        """Return what is different if another graph is needed; ``held`` are the tensors of the graphs."""
        found: list[Any] = []
        for owner in self.owners:
            found.append(type(owner))
            if not isinstance(owner, nn.Module):
                settings = [(name, value) for name, value in vars(owner).items() if name not in _RESULTS]
                found += [(name, v if isinstance(v, Hashable) else id(v)) for name, v in settings]
            else:
                for name, value in vars(owner).items():
                    if isinstance(value, _PLAIN):
                        found.append((name, value))
                    elif id(value) in held:
                        found.append((name, id(value)))
                found += [*owner._modules, len(owner._forward_hooks), len(owner._forward_pre_hooks)]
                for tensor in (*owner._parameters.values(), *owner._buffers.values()):
                    found.append(id(tensor))
                    if tensor is not None:
                        found += [tensor.shape, tensor.stride(), tensor.dtype, tensor.device]
                        found.append(tensor.requires_grad)
        return tuple(found)


def _own(gradient: Tensor | None, seen: set[int]) -> Tensor | None:
    """Return a gradient that shares its memory with no other, since it will be changed in place."""
    if gradient is None:
        return None
    place = gradient.untyped_storage().data_ptr()
    if place in seen or 0 in gradient.stride():
        return gradient.clone(memory_format=torch.contiguous_format)
    seen.add(place)
    return gradient
