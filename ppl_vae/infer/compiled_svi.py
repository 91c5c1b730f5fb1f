"""Stochastic variational inference whose steps are traced once and compiled."""

import functools
import operator
import time
from collections.abc import Callable, Hashable
from typing import Any, Literal

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.optim import Optimizer

from ppl_vae._warnings import warn
from ppl_vae.data import Split
from ppl_vae.infer.cuda_graphs import Replay, is_capturable, prepare, tensors_of
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.precision import network_precision
from ppl_vae.infer.program_state import ProgramState
from ppl_vae.infer.running import settle
from ppl_vae.infer.svi import SVI, Parts, with_parts
from ppl_vae.infer.tracing import NoNumbers, Traced, line_of, trace

Result = Literal["loss", "loss and parts", "parts"]  # those of a loss come with the gradients

MOST_GRAPHS = 16


class CompiledSVI(SVI):
    """``SVI`` at the speed of hand-written steps: loss and gradients are one compiled graph.

    The first step on a batch of new shapes traces the programs and the estimator, with their backward pass,
    into a graph of tensor operations (``torch.fx``), which TorchInductor compiles: seconds, once. Later
    steps run no Python of the programs. They make the same draws as ``SVI`` does with the same seed, and give
    the same loss and gradients up to rounding.

    Whatever is a tensor of the programs or of the estimator (parameters, buffers, the step of a schedule)
    stays alive in the graph. Everything else is a constant of it. A new graph is made when an attribute of
    a module is set anew (``train`` and ``eval`` do so, too), a setting of the estimator, a parameter or a
    buffer. Other things that a program reads must not change: a global variable, the inside of a list.
    Values are validated in the first step alone.

    A program that looks at values in Python (``.item()``, ``if tensor:``), or counts its runs, or an
    estimator without a differentiable loss, can't be traced: one warning names the line, and the steps are
    those of ``SVI``.

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
        self.plain = False
        self._forget()

    def _forget(self) -> None:
        self._graphs: dict[Any, Callable[..., Any] | None] = {}
        self._states: dict[Hashable, tuple[int, ProgramState]] = {}  # by what a graph depends on
        self._state: ProgramState | None = None
        self._held: dict[int, Tensor] = {}  # the tensors of all graphs
        self._written: set[tuple[int, str]] = set()  # attributes that runs leave behind
        self._replays: dict[Any, Replay] = {}
        self._source: tuple[Any, ...] = (None, None, None)  # the data that replays gather from
        self._examples: dict[int, tuple[Tensor, ...]] = {}  # batches of it by size, for their shapes
        self._compiled = 0
        self._failure: str | None = None
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        names = ("_graphs", "_states", "_held", "_written", "_replays", "_source", "_examples", "_state")
        return {name: value for name, value in self.__dict__.items() if name not in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        self.__dict__.update(state)

    def setup(self, *batch: Tensor) -> None:
        """Check the pair on a batch and build the optimiser; the first ``step`` does it if need be."""
        super().setup(*batch)
        settle(self.objective.estimator, self.objective.model, self.objective.guide, batch)

    def step_with_parts(self, *batch: Tensor, parts: bool = True) -> tuple[Tensor, Parts]:
        """Take one gradient step; return its loss and the parts of the true ELBO, from the same draws.

        On CUDA the whole step, with the optimiser's, is one CUDA graph, if the optimiser allows it
        (``capturable``); the first steps on a new shape are taken without.
        """
        take = functools.partial(self._take_step, parts=parts)
        return self._replayed(take, batch, batch, "loss and parts" if parts else "loss")

    def step_of(self, data: Split, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one gradient step on the rows ``index`` ``[n]`` of data, as in ``SVI``.

        On CUDA the rows are gathered in the graph of the step.
        """
        take = functools.partial(super().step_of, data)
        if not _on_cuda(index):
            return take(index)
        source = data.x, data.y, data.dynamic
        if any(map(operator.is_not, source, self._source)):
            self._source, self._examples = source, {}
            self._replays = {key: replay for key, replay in self._replays.items() if key[0] is None}
        if len(index) not in self._examples:
            with torch.random.fork_rng(devices=_devices((index,))):  # a dynamic split draws
                self._examples[len(index)] = self._rows(data, index)
        return self._replayed(take, (index,), self._examples[len(index)], "loss and parts", "gathered")

    def _replayed(
        self,
        take: Callable[..., tuple[Tensor, Any]],
        inputs: tuple[Tensor, ...],
        batch: tuple[Tensor, ...],
        result: Result,
        source: Hashable = None,
    ) -> tuple[Tensor, Any]:
        """Return ``take(*inputs)``, a step on such a batch, on CUDA replayed as one graph."""
        self.setup(*batch)
        optim = self.optim
        whole = _on_cuda(inputs[0]) and isinstance(optim, Optimizer) and is_capturable(optim)
        if not whole or (graph := self._graph(batch, result)) is None:
            return take(*inputs)
        key = source, graph, self.clip_norm, *tensors_of(optim)
        if key not in self._replays:
            self._replays[key] = Replay(take)
        return self._replays[key](*inputs)

    def loss_and_grads(self, *batch: Tensor, parts: bool = False) -> tuple[Tensor, Parts]:
        """Set the parameters' gradients; return the loss and, if asked for, the parts of the true ELBO."""
        graph = self._graph(batch, "loss and parts" if parts else "loss")
        if graph is None:
            result = super().loss_and_grads(*batch, parts=parts)
            self._warn()  # now that the batch is known to be right
            return result
        with torch.no_grad(), network_precision("tf32" if self.precision == "tf32" else "float32"):
            loss, gradients, found = graph(*batch)
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            parameter.grad = gradient
        if isinstance(self.objective.estimator, Estimator):
            self.objective.estimator.terms = None  # a graph gives their sums alone
        return loss, found

    def time_plain_step(self, *batch: Tensor) -> float:
        """Return the seconds that loss and gradients take without a graph; nothing is changed.

        Raises:
            NotImplementedError: if the estimator has no differentiable loss, so that no step is compiled.
        """
        self.setup(*batch)
        self._check_estimator()
        seconds = []
        with self._now().undone(_devices(batch)), pyro.validation_enabled(False):
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
            sums = super().parts(*batch)
            self._warn()
            return sums
        with torch.no_grad():
            found: dict[str, Tensor] = graph(*batch)
        return found

    def _graph(self, batch: tuple[Tensor, ...], result: Result) -> Callable[..., Any] | None:
        """Return a graph for such a batch, compiled if need be; None if there is none."""
        if self.plain or _PYRO_STACK:  # a handler of the caller's is nothing that a graph knows of
            return None
        if self._state is None or not self._state.holds():
            self._look()
        shapes = [(x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in batch]
        autocast = torch.is_autocast_enabled(batch[0].device.type)
        for_batch = result, self.precision, self.per_datum, autocast, *shapes
        if (self._key, for_batch) not in self._graphs:
            if self._compiled == MOST_GRAPHS:
                self._failure = (
                    f"has compiled {MOST_GRAPHS} graphs, since something changes from step to step"
                )
                self._graphs.clear()
                self.plain = True
                return None
            self._compiled += 1
            graph = self._compile(batch, result)
            self._look()
            self._graphs[self._key, for_batch] = graph
        return self._graphs[self._key, for_batch]

    def _now(self) -> ProgramState:
        return ProgramState([*self.objective.networks(), self.objective.estimator])

    def _look(self) -> None:
        """Take note of what a graph depends on, besides its batch."""
        self._state = self._now()
        key = self._state.key(self._held, self._written)
        self._key, _ = self._states.setdefault(key, (len(self._states), self._state))

    def _compile(self, batch: tuple[Tensor, ...], result: Result) -> Callable[..., Any] | None:
        """Return what gives the result for batches like this one, or None."""
        what = "can't trace"
        state, devices = self._now(), _devices(batch)
        try:
            with state.undone(devices):
                with network_precision("float32" if result == "parts" else self.precision):
                    traced = self._trace(batch, result)
                held = {id(tensor): tensor for tensor in traced.held}
                written = state.written(held)
            what = "can't compile the traced step"
            with state.undone(devices), torch.no_grad():
                graph = traced.compile(batch)
                graph(*batch)
        except Exception as error:  # whatever a program does
            where = f" {line_of(error)}" if what == "can't trace" else ""
            said = str(error).partition("Trace Shapes:")[0]  # what Pyro adds to an error
            reason = " ".join(said.split())[:200] or type(error).__name__
            self._failure = f"{what}{where}: {reason}"
            return None
        self._held |= held
        self._written |= written
        if result != "parts" and self._makes_optim and isinstance(self.optim, Optimizer):
            prepare(self.optim, batch[0].device, capture=_on_cuda(batch[0]))
        return graph

    def _check_estimator(self) -> None:
        estimator = self.objective.estimator
        if not hasattr(estimator, "differentiable_loss"):
            raise NotImplementedError(f"{type(estimator).__name__} has no differentiable loss")

    def _trace(self, batch: tuple[Tensor, ...], result: Result) -> Traced:
        """Return the graph that gives a result."""
        if result != "parts":
            self._check_estimator()
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
            own = [_own(next(gradients), p, seen) if p.requires_grad else None for p in parameters]
            return loss.detach(), own, found

        if any(p._post_accumulate_grad_hooks for p in parameters):
            raise NotImplementedError("a parameter has a hook that waits for its gradient")
        return trace(run, batch, self.objective.estimator)

    def _warn(self) -> None:
        """Say, once, why steps are plain."""
        if self._failure and not self._warned:
            warn(f"CompiledSVI: {self._failure}; steps are those of SVI")
            self._warned = True


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _devices(batch: tuple[Tensor, ...]) -> set[int]:
    return {x.device.index for x in batch if x.device.type == "cuda"}


def _own(gradient: Tensor | None, parameter: Tensor, seen: set[int]) -> Tensor | None:
    """Return a gradient of its parameter's layout that shares memory with no other, as optimisers expect."""
    if gradient is None:
        return None
    place = gradient.untyped_storage().data_ptr()
    if place in seen or gradient.stride() != parameter.stride():
        return torch.empty_like(parameter).copy_(gradient)
    seen.add(place)
    return gradient
