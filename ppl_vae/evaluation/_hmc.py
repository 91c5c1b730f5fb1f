"""Hamiltonian Monte Carlo of many chains for many data at once."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.infer.tracing import NoNumbers, OneHot

LogDensity = Callable[[Tensor], Tensor]
# from z ``[chains, n, D]`` to log p ``[chains, n]``, its gradient ``[chains, n, D]``, and whatever else of z
# is to be kept for the points that chains are at, ``[chains, n, ...]`` each
Evaluate = Callable[[Tensor], Sequence[Tensor]]


def value_and_gradient(log_density: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p ``[chains, n]`` and its gradient ``[chains, n, D]`` at z; rows don't touch each other."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_p = log_density(z)
        grad = gradient(log_p, z)
    return log_p.detach(), grad


def gradient(log_p: Tensor, z: Tensor, *, retain_graph: bool = False) -> Tensor:
    """Return the gradient of each row's log density, zero where it does not depend on z."""
    if not log_p.requires_grad:
        return torch.zeros_like(z)
    (found,) = torch.autograd.grad(log_p.sum(), z, retain_graph=retain_graph, allow_unused=True)
    return torch.zeros_like(z) if found is None else found


class Traced:
    """A function of z as a graph of tensor operations: Pyro's handlers run once, not at each step.

    What does not depend on z, such as the encoder of a guide, is computed once, too. A function that can't be
    traced runs as it is.

    Args:
        evaluate: without draws of its own; parameters and buffers that it reads must not change any more.
        z: an example; the graph is for its shape.

    Attributes:
        graph: what runs; ``evaluate`` itself if it can't be traced.
    """

    def __init__(self, evaluate: Evaluate, z: Tensor) -> None:
        self.shape = z.shape
        self.graph: Evaluate = evaluate
        state = torch.get_rng_state()

        def run(z: Tensor) -> list[Tensor]:
            with NoNumbers():
                return list(evaluate(z))

        try:
            with torch.no_grad(), pyro.validation_enabled(False), OneHot():
                graph = make_fx(run)(z.detach().contiguous())  # views in the graph rely on it
            _fold(graph)
            self.graph = graph
        except Exception:  # whatever a program does; as it is it works, or says itself what is wrong
            torch.set_rng_state(state)

    def __call__(self, z: Tensor) -> Sequence[Tensor]:
        """Return what ``evaluate`` does."""
        if z.shape != self.shape:
            raise ValueError(f"z: expected the traced shape {list(self.shape)}, got {list(z.shape)}")
        with torch.no_grad():
            found: Sequence[Tensor] = self.graph(z.contiguous())
        return found


def traced(log_density: LogDensity, z: Tensor) -> Traced:
    """Return log density and gradient as one graph, for ``transition``, for z of this shape."""
    return Traced(lambda z: value_and_gradient(log_density, z), z)


def _fold(graph: GraphModule) -> None:
    """Make constants of what does not depend on the inputs' values, and drop views that change nothing.

    Raises:
        RuntimeError: if there is a random draw, or a constant is changed in place.
    """
    nodes = list(graph.graph.nodes)
    written = {start for node in nodes if _is_mutable(node) for start in _first_arguments(node)}
    values: dict[Any, Any] = {}
    for node in nodes:
        if node.op == "get_attr":
            values[node] = getattr(graph, str(node.target))
        elif node.op == "call_function":
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise RuntimeError(f"a random draw, {node.target}")
            if _is_mutable(node) and node.args[0] in values:
                raise RuntimeError(f"a constant is changed in place, {node.target}")
            if all(argument in values for argument in node.all_input_nodes):
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                with torch.no_grad():
                    values[node] = node.target(*args, **kwargs)
            elif node.target in _FILLED and node not in written:
                like = node.meta["val"]
                values[node] = torch.full(
                    like.shape, _FILLED[node.target], dtype=like.dtype, device=like.device
                )
            elif node.target in _VIEWS and _layout(node) == _layout(node.args[0]):
                node.replace_all_uses_with(node.args[0])
    for i, (node, value) in enumerate(values.items()):
        if node.op != "get_attr" and isinstance(value, Tensor) and any(u not in values for u in node.users):
            graph.register_buffer(f"_folded_{i}", value.detach(), persistent=False)
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(f"_folded_{i}")
            node.replace_all_uses_with(constant)
    graph.graph.eliminate_dead_code()
    graph.recompile()


_ATEN = torch.ops.aten
_FILLED: dict[Any, float] = {  # of a shape that is known
    _ATEN.ones_like.default: 1.0,
    _ATEN.zeros_like.default: 0.0,
    _ATEN.new_ones.default: 1.0,
    _ATEN.new_zeros.default: 0.0,
}
_VIEWS = {_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.expand.default, _ATEN.alias.default}


def _is_mutable(node: Any) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _first_arguments(node: Any) -> Iterator[Any]:
    """Give what a node may be a view of."""
    while isinstance(node, torch.fx.Node):
        yield node
        node = node.args[0] if node.args else None


def _layout(node: Any) -> Any:
    meta = node.meta.get("tensor_meta")
    return node if meta is None else (meta.shape, meta.stride, meta.dtype)


def transition(
    evaluate: Evaluate, point: Sequence[Tensor], step_size: Tensor, leapfrog: int
) -> tuple[list[Tensor], Tensor]:
    r"""Take one step of Hamiltonian Monte Carlo, with :math:`\rho \sim N(0, I)`, in every chain.

    Costs ``leapfrog`` gradients: those at the chains' points come with them. A proposal that is not finite is
    rejected.

    Args:
        evaluate: the log density with its gradient; what ``traced`` makes is quicker than a plain function.
        point: where the chains are: z ``[chains, n, D]`` and what ``evaluate(z)`` gives.
        step_size: ``[chains or 1, n or 1]``.
        leapfrog: the number of leapfrog steps.

    Returns:
        Where the chains are then, and the probabilities of acceptance ``[chains, n]``.

    References:
        MCMC using Hamiltonian dynamics (Neal, 2011), arXiv:1206.1901
    """
    z, log_p, grad = point[:3]
    step = step_size.unsqueeze(-1).to(z)
    momentum = torch.randn_like(z)
    before = log_p - momentum.square().sum(-1) / 2
    moved, momentum, found = integrate(evaluate, z, momentum, grad, step, leapfrog)
    difference = found[0] - momentum.square().sum(-1) / 2 - before
    finite = difference.isfinite() & found[1].isfinite().all(-1) & moved.isfinite().all(-1)
    accept = torch.where(finite, difference.clamp(max=0.0).exp(), 0.0)
    chosen = torch.rand_like(accept) < accept
    new = [
        torch.where(chosen.reshape(chosen.shape + (1,) * (after.dim() - chosen.dim())), after, was)
        for after, was in zip((moved, *found), point, strict=True)
    ]
    return new, accept


def integrate(
    evaluate: Evaluate, z: Tensor, momentum: Tensor, grad: Tensor, step: Tensor, leapfrog: int
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Take leapfrog steps; return z, momentum and ``evaluate(z)``.

    Two half steps of the momentum on end make a whole one. ``step`` is ``[chains or 1, n or 1, 1]``.
    """
    momentum = momentum + step / 2 * grad
    for i in range(leapfrog):
        z = z + step * momentum
        found = evaluate(z)
        momentum = momentum + (step if i < leapfrog - 1 else step / 2) * found[1]
    return z, momentum, found


class MultiplicativeAdaptation:
    r"""Step sizes that follow a density which changes slowly: one for each datum.

    A step that is accepted for sure multiplies the step size by ``rate``, one that is rejected for sure
    divides it by ``rate ** (target / (1 - target))``, and in between in proportion, so that sizes rest where
    the mean acceptance, over the chains of a datum, is the target.

    References:
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2017), arXiv:1611.04273:
        1.02 on acceptance, 0.98 on rejection, towards 65 %.

    Args:
        start: step sizes ``[1, n]``.
        target: the acceptance to reach.
        rate: above 1.
    """

    def __init__(self, start: Tensor, target: float = 0.65, rate: float = 1.02) -> None:
        self.step_size = start
        self.target = target
        self.rate = rate

    def update(self, accept: Tensor) -> None:
        """Adapt to the probabilities of acceptance ``[chains, n]`` of a transition."""
        error = (accept.mean(0, keepdim=True) - self.target) / (1 - self.target)
        self.step_size = self.step_size * (math.log(self.rate) * error).exp()


class DualAveraging:
    r"""Step sizes of a fixed density that converge in the warm-up, one for each datum.

    References:
        The No-U-Turn Sampler (Hoffman & Gelman, 2014), arXiv:1111.4246, section 3.2

    Args:
        start: step sizes ``[1, n]``.
        target: the acceptance to reach.
        gamma: how strongly sizes are drawn to ten times the start.
        t0: how many steps the first ones are damped by.
        kappa: how fast early steps are forgotten.

    Attributes:
        step_size: to explore with, ``[1, n]``.
        average: to sample with after the warm-up, ``[1, n]``.
    """

    def __init__(
        self,
        start: Tensor,
        target: float = 0.8,
        *,
        gamma: float = 0.05,
        t0: float = 10.0,
        kappa: float = 0.75,
    ) -> None:
        self.step_size = self.average = start
        self.target, self.gamma, self.t0, self.kappa = target, gamma, t0, kappa
        self._centre = (10 * start).log()
        self._error = torch.zeros_like(start)
        self._log_average = torch.zeros_like(start)
        self._count = 0

    def update(self, accept: Tensor) -> None:
        """Adapt to the probabilities of acceptance ``[chains, n]`` of a transition."""
        self._count += 1
        weight = 1 / (self._count + self.t0)
        error = self.target - accept.mean(0, keepdim=True)
        self._error = (1 - weight) * self._error + weight * error
        log_step = self._centre - math.sqrt(self._count) / self.gamma * self._error
        weight = self._count**-self.kappa
        self._log_average = weight * log_step + (1 - weight) * self._log_average
        self.step_size, self.average = log_step.exp(), self._log_average.exp()
