"""Steps replayed as one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ppl_vae._warnings import warn


def prepare(optim: Optimizer, device: torch.device, *, capture: bool) -> None:
    """Let an optimiser that took no step use torch's fused kernel and be captured, where it can.

    What it was told otherwise stays. For a capture its learning rates become tensors, which schedulers
    change in place, so that a graph sees it.
    """
    parameters = [p for group in optim.param_groups for p in group["params"]]
    if optim.state or not all(p.is_floating_point() for p in parameters):
        return
    for group in optim.param_groups:
        fusible = type(optim) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
        if fusible and group["fused"] is None and not (group["foreach"] or group["differentiable"]):
            group["fused"] = True
        if capture and "capturable" in group and not isinstance(group["lr"], Tensor):
            group["capturable"] = True
            group["lr"] = torch.tensor(float(group["lr"]), device=device)


def is_capturable(optim: Optimizer) -> bool:
    """Return whether an optimiser's steps can be captured."""
    return all(group.get("capturable") for group in optim.param_groups)


def tensors_of(optim: Any) -> tuple[Any, ...]:
    """Return what is different when an optimiser's settings or the tensors of its state are replaced."""
    settings = [
        value if isinstance(value, Tensor) else repr(value)
        for group in optim.param_groups
        for name, value in group.items()
        if name != "params"
    ]
    return *settings, *(value for held in optim.state.values() for value in held.values())


class Replay:
    """A step that becomes a CUDA graph after a few calls; its results are copies, which a later call leaves.

    Args:
        step: takes a batch and gives tensors, nested as they like. Each call has a batch of the same shapes.
    """

    WARM_UP = 3  # calls, for libraries to set themselves up

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step
        self.calls = 0
        self.fails = False  # to be captured
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.results: Any = None

    def __call__(self, *batch: Tensor) -> Any:
        """Take the step."""
        if self.calls < self.WARM_UP:
            self.calls += 1
            return self._aside(*batch)
        if self.graph is None and not self.fails:
            self._capture(*batch)
        if self.graph is None:
            return self.step(*batch)
        for own, x in zip(self.inputs, batch, strict=True):
            own.copy_(x)
        self.graph.replay()
        return tree_map_only(Tensor, torch.clone, self.results)

    def _capture(self, *batch: Tensor) -> None:
        self.inputs = [x.clone() for x in batch]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.results = self.step(*self.inputs)
        except RuntimeError as error:
            self.fails = True
            reason = " ".join(str(error).split())[:200]
            warn(f"CompiledSVI: can't capture the step as a CUDA graph: {reason}")
            return
        self.graph = graph

    def _aside(self, *batch: Tensor) -> Any:
        """Take the step on a stream of its own, as those before a capture are to be."""
        stream = torch.cuda.Stream(batch[0].device)
        stream.wait_stream(torch.cuda.current_stream(batch[0].device))
        with torch.cuda.stream(stream):
            result = self.step(*batch)
        torch.cuda.current_stream(batch[0].device).wait_stream(stream)
        return result
