"""Stochastic variational inference whose steps are traced once and compiled."""

import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.svi import SVI, Parts, with_parts

Step = Callable[..., tuple[Tensor, tuple[Tensor | None, ...], Parts]]


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
        optim: as in ``SVI``.
        loss: any ``pyro.infer.ELBO`` with a differentiable loss.
        clip_norm: as in ``SVI``.
        per_datum: as in ``SVI``.

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
        self._steps: dict[Any, Step | None] = {}
        self._warned = self._stopped = False
        self._modules: list[torch.nn.Module] = []

    def setup(self, *batch: Tensor) -> None:
        """Check the pair on a batch and build the optimiser; the first ``step`` does it if need be."""
        super().setup(*batch)
        if not self._modules:
            self._modules = self.objective.networks()

    def loss_and_grads(self, *batch: Tensor, parts: bool = False) -> tuple[Tensor, Parts]:
        """Set the parameters' gradients; return the loss and, if asked for, the parts of the true ELBO."""
        # a handler of the caller's is nothing that a graph knows of
        if _PYRO_STACK or self._stopped:
            return super().loss_and_grads(*batch, parts=parts)
        key = parts, self._key(batch)
        if key not in self._steps:
            if len(self._steps) == MOST_GRAPHS:
                changes = ValueError(f"{MOST_GRAPHS} graphs, since something changes from step to step")
                self._warn("has", changes)
                self._steps.clear()
                self._stopped = True
                return super().loss_and_grads(*batch, parts=parts)
            self._steps[key] = self._compile(batch, parts)
        step = self._steps[key]
        if step is None:
            return super().loss_and_grads(*batch, parts=parts)
        with torch.no_grad():
            loss, gradients, found = step(*batch)
        for parameter, gradient in zip(self._parameters(), gradients, strict=True):
            parameter.grad = gradient
        if isinstance(self.objective.estimator, Estimator):
            self.objective.estimator.terms = None  # a graph gives their sums alone
        return loss, found

    def _key(self, batch: tuple[Tensor, ...]) -> Any:
        """Return what a graph is made for."""
        modules = [
            (
                id(module),
                *[(name, value) for name, value in vars(module).items() if isinstance(value, _PLAIN)],
                *[(id(p), p is not None and p.requires_grad) for p in module._parameters.values()],
                *map(id, module._buffers.values()),
                *map(id, module._modules.values()),
            )
            for module in self._modules
        ]
        settings = [
            (name, value if isinstance(value, Hashable) and not isinstance(value, Tensor) else id(value))
            for name, value in vars(self.objective.estimator).items()
            if name not in _RESULTS
        ]
        shapes = [(x.shape, x.stride(), x.dtype, x.device) for x in batch]
        return tuple(shapes), tuple(modules), tuple(settings)

    def _compile(self, batch: tuple[Tensor, ...], parts: bool) -> Step | None:
        """Return the compiled step for batches like this one, or None, with a warning, if there is none."""
        try:
            graph, constants = self._trace(batch, parts)
        except Exception as error:  # whatever a program does
            self._warn(f"can't trace {_line(error)}", error)
            return None
        with _validation_kept():
            try:
                compiled = torch.compile(
                    graph, fullgraph=True, dynamic=False, backend=BACKEND, options=OPTIONS
                )
                with torch.no_grad(), self._undone(batch):
                    compiled(*constants, *batch)
            except Exception as error:
                self._warn("can't compile the traced step", error)
                return None
        return lambda *batch: compiled(*constants, *batch)

    def _trace(self, batch: tuple[Tensor, ...], parts: bool) -> tuple[GraphModule, list[Tensor]]:
        """Return the step as a graph, whose first inputs are the tensors of the programs, and those."""
        estimator = self.objective.estimator
        if not hasattr(estimator, "differentiable_loss"):
            raise NotImplementedError(f"{type(estimator).__name__} has no differentiable loss")
        parameters = self._parameters()

        def run(*batch: Tensor) -> Any:
            with _NoNumbers():
                loss, found = with_parts(self.objective, self.objective, batch, parts=parts)
            wanted = [p for p in parameters if p.requires_grad]
            gradients = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
            seen: set[int] = set()
            own = [_own(next(gradients), seen) if p.requires_grad else None for p in parameters]
            return loss.detach(), tuple(own), found

        with self._undone(batch), pyro.validation_enabled(False), _tensors_for_numbers(estimator):
            try:
                graph = make_fx(run)(*batch)
            finally:
                if isinstance(estimator, Estimator):
                    estimator.terms = None  # tensors of the trace
        return _lift(graph)

    @contextlib.contextmanager
    def _undone(self, batch: tuple[Tensor, ...]) -> Iterator[None]:
        """Let a run change no parameter, no buffer and no random stream."""
        estimator = self.objective.estimator
        held = dict(self.objective.tensors())
        held |= {
            f"{i}.{name}": b
            for i, m in enumerate(self._modules)
            for name, b in m.named_buffers(recurse=False)
        }
        if isinstance(estimator, Estimator):
            held["step"] = estimator.step
        before = {name: tensor.detach().clone() for name, tensor in held.items()}
        devices = {x.device.index for x in batch if x.device.type == "cuda"}
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            with torch.no_grad():
                for name, tensor in held.items():
                    if not torch.equal(tensor, before[name]):
                        tensor.copy_(before[name])

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            warnings.warn(f"CompiledSVI: {what}: {reason}; steps are those of SVI", UserWarning, stacklevel=6)
            self._warned = True


def _own(gradient: Tensor | None, seen: set[int]) -> Tensor | None:
    """Return a gradient that shares its memory with no other, since it will be changed in place."""
    if gradient is None:
        return None
    place = gradient.untyped_storage().data_ptr()
    if place in seen or 0 in gradient.stride():
        return gradient.clone(memory_format=torch.contiguous_format)
    seen.add(place)
    return gradient


class _NoNumbers(TorchDispatchMode):
    """Raises where a tensor's value becomes a number, also that of a tensor the tracer takes as constant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("a tensor's value is read in Python")
        return func(*args, **(kwargs or {}))


MOST_GRAPHS = 64
_RESULTS = {"terms", "analytic", "parts", "max_plate_nesting"}  # of an estimator, not settings
BACKEND = "inductor"
OPTIONS: Any = {"fallback_random": True}  # the draws of plain steps
_PLAIN = (bool, int, float, str, type(None))


def _lift(graph: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """Make inputs of the tensors that a graph holds, and return them."""
    constants: list[Tensor] = []
    first = next(iter(graph.graph.nodes))
    inputs: dict[str, Any] = {}
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        if name not in inputs:
            with graph.graph.inserting_before(first):
                inputs[name] = graph.graph.placeholder(f"held_{len(inputs)}")
            constants.append(getattr(graph, name))
        node.replace_all_uses_with(inputs[name])
        graph.graph.erase_node(node)
    for name in inputs:
        delattr(graph, name)
    graph.recompile()
    return graph, constants


@contextlib.contextmanager
def _tensors_for_numbers(estimator: Any) -> Iterator[None]:
    """Let Pyro's estimators keep the tensors that they turn into numbers, and not look for NaN."""
    with contextlib.ExitStack() as stack:
        for cls in type(estimator).__mro__:
            module = sys.modules[cls.__module__]
            if cls.__module__.startswith("pyro.infer."):
                for name, instead in (("torch_item", _detached), ("warn_if_nan", lambda *_: None)):
                    if hasattr(module, name):
                        stack.enter_context(mock.patch.object(module, name, instead))
        yield


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


@contextlib.contextmanager
def _validation_kept() -> Iterator[None]:
    """Let torch's validation of distributions be as before, which compiling switches off."""
    before = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _line(error: Exception) -> str:
    """Return the line of the user's, or the library's, that an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if not any(f"{Path('/')}{name}{Path('/')}" in f.filename for name in ("torch", "pyro"))
    ]
    own = [f for f in own if f.filename != __file__] or own
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line})"
