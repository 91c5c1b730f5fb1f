"""Steps traced once into a graph of tensor operations, and compiled."""

import contextlib
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import torch
import torch._inductor
from pyro.infer import ELBO
from pyro.infer.util import Dice
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Traced:
    """A function as a graph of tensor operations, without the Python around them.

    Attributes:
        graph: from the held tensors and the inputs to the tensors of the result.
        held: the tensors that the function read besides its inputs, such as parameters and buffers, whose
            later values count.
        result: the result, with the places of its tensors among the graph's outputs for the tensors.
    """

    graph: GraphModule
    held: list[Tensor]
    result: Any

    def compile(self, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """Return the function compiled for inputs of these shapes; its draws are those of torch."""
        compiled = compile_graph(self.graph, [*self.held, *inputs])

        def run(*inputs: Tensor) -> Any:
            return _filled(self.result, compiled(*self.held, *inputs))

        return run


def trace(run: Callable[..., Any], inputs: Sequence[Tensor], elbo: ELBO) -> Traced:
    """Trace ``run(*inputs)``, which computes an estimate of an ELBO.

    Raises:
        RuntimeError: if a value is read in Python, in what runs under ``NoNumbers`` above all.
    """
    result: Any = None

    def flat(*inputs: Tensor) -> list[Tensor]:
        nonlocal result
        outputs: list[Tensor] = []

        def place(leaf: Tensor) -> int:
            outputs.append(leaf)
            return len(outputs) - 1

        result = tree_map_only(Tensor, place, run(*inputs))
        return outputs

    with pyro.validation_enabled(False), tensors_for_numbers(elbo), OneHot():
        graph, held = _lift(make_fx(flat, _SAME_DRAWS)(*inputs))
    return Traced(graph, held, result)


def _filled(result: Any, outputs: Sequence[Tensor]) -> Any:
    """Return a result with its tensors in their places; ``tree_map`` takes ten times as long."""
    if isinstance(result, int):
        return outputs[result]
    if isinstance(result, dict):
        return {name: _filled(part, outputs) for name, part in result.items()}
    if isinstance(result, (list, tuple)):
        return [_filled(part, outputs) for part in result]
    return result


def compile_graph(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Return the graph compiled by TorchInductor, without gradients."""
    before = Distribution._validate_args  # compiling switches it off
    extensions = logging.getLogger("torch.utils.cpp_extension")  # notes a toolkit of CUDA without a GPU
    level = extensions.level
    extensions.setLevel(max(level, logging.ERROR))
    try:
        with torch.no_grad():
            return torch._inductor.compile(graph, list(inputs), {"fallback_random": True})
    finally:
        extensions.setLevel(level)
        Distribution.set_default_validate_args(before)


def line_of(error: Exception, skip: Collection[str] = ()) -> str:
    """Return the line of the user's, or the library's, that an error came from; `cell:4` in a notebook.

    Args:
        error: one that was caught.
        skip: files that only run what went wrong; this one is always skipped.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if not any(f"{Path('/')}{name}{Path('/')}" in f.filename for name in ("torch", "pyro"))
    ]
    own = [f for f in own if f.filename not in (__file__, *skip)] or own
    frame = (own or frames)[-1]
    in_notebook = Path(frame.filename).parent.name.startswith("ipykernel_")
    return f"{'cell' if in_notebook else frame.filename}:{frame.lineno} ({frame.line})"


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


# TorchInductor has a way of its own to draw these, which gives others
_SAME_DRAWS: dict[Any, Any] = {
    torch.ops.aten.bernoulli.default: lambda p, generator=None: torch.empty_like(p).bernoulli_(p)
}


class OneHot(TorchFunctionMode):
    """Makes one-hot vectors without a look at the values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is one_hot and len(args) == 2 and args[1] > 0:
            return (args[0].unsqueeze(-1) == torch.arange(args[1], device=args[0].device)).long()
        return func(*args, **(kwargs or {}))


class NoNumbers(TorchDispatchMode):
    """Raises where a tensor's value becomes a number, also that of a tensor the tracer takes as constant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("a tensor's value is read in Python")
        return func(*args, **(kwargs or {}))


_PATCHING = threading.RLock()  # Pyro is changed for the whole process meanwhile


@contextlib.contextmanager
def tensors_for_numbers(estimator: Any) -> Iterator[None]:
    """Let Pyro's estimators keep the tensors that they turn into numbers, and not look for NaN."""
    with _PATCHING, contextlib.ExitStack() as stack:
        for cls in type(estimator).__mro__:
            module = sys.modules[cls.__module__]
            if cls.__module__.startswith("pyro.infer."):
                for name, instead in _WITHOUT_VALUES.items():
                    if hasattr(module, name):
                        stack.enter_context(mock.patch.object(module, name, instead))
        yield


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


class _AllTrue(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func is Tensor.all else func(*args, **(kwargs or {}))


class _WholeDice(Dice):
    """Pyro's sums over enumerated values: over all of them, without a look at which have probability 0."""

    def compute_expectation(self, costs: Any) -> Any:
        with _AllTrue(), mock.patch.object(pyro.infer.util, "_fulldot", _dot_of_possible):
            return super().compute_expectation(costs)


def _dot_of_possible(probability: Tensor, cost: Tensor) -> Tensor:
    return (probability * torch.where(probability > 0, cost, 0.0)).sum()


_WITHOUT_VALUES = {"torch_item": _detached, "warn_if_nan": lambda *_: None, "Dice": _WholeDice}
