"""Adam for embeddings of which a step needs a few rows alone."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class RowAdam(torch.optim.Adam):
    """Adam that, for a sparse gradient, changes the rows that it has and no others.

    A row's moments and number of steps are its own, so that each row is trained as by an ``Adam`` that
    sees its gradients alone; a step costs what its rows cost. Parameters with a dense gradient are trained
    by ``torch.optim.Adam``. ``torch.optim.SparseAdam`` takes no dense gradients, and corrects the bias of a
    row's moments by the number of steps of all rows.

    References:
        Adam (Kingma & Ba, 2015), arXiv:1412.6980

    Args:
        params: parameters, or parameter groups.
        lr: the step size.
        betas: the decay of the two moments.
        eps: added to the root of the second moment.
        fused: as in ``torch.optim.Adam``, for the dense gradients.

    Example:
        >>> table = torch.nn.Embedding(1000, 2, sparse=True)
        >>> optimizer = RowAdam(table.parameters())
        >>> table(torch.tensor([3, 5])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[table.weight]["step"].sum()
        tensor(2.)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=fused)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on the parameters' gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:
                    sparse.append((p, p.grad, group))
                    p.grad = None  # Adam passes those without a gradient
        try:
            _step_of_adam()(self)
            with torch.no_grad():
                for p, gradient, group in sparse:
                    self._step_rows(p, gradient.coalesce(), group)
        finally:
            for p, gradient, _ in sparse:
                p.grad = gradient
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; raise for options of Adam that steps of rows don't have."""
        for name in ("weight_decay", "amsgrad", "maximize", "differentiable"):
            if param_group.get(name):
                raise ValueError(f"{name}: expected a group of RowAdam without it, got {param_group[name]!r}")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, on the parameters' devices."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if "step" in state and state["step"].dim():  # of rows; Adam's own number may stay on the CPU
                state["step"] = state["step"].to(p.device)

    def _step_rows(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(len(p), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        (rows,), g, (beta1, beta2) = gradient.indices(), gradient.values(), group["betas"]
        step = state["step"][rows] + 1
        first = torch.lerp(state["exp_avg"][rows], g, 1 - beta1)
        second = torch.lerp(state["exp_avg_sq"][rows], g.square(), 1 - beta2)
        state["step"][rows] = step
        state["exp_avg"][rows] = first
        state["exp_avg_sq"][rows] = second
        step = step.to(torch.float64).reshape(-1, *[1] * (g.dim() - 1))
        correction1, correction2 = ((1 - beta**step).to(g.dtype) for beta in (beta1, beta2))
        change = first / correction1 / ((second / correction2).sqrt() + group["eps"])
        p.index_add_(0, rows, -group["lr"] * change)


def _step_of_adam() -> Callable[..., Any]:
    """Return ``torch.optim.Adam.step`` without the hooks of steps, which a step of ``RowAdam`` runs itself.

    Torch puts them around the ``step`` of a class when the first instance of it is made.
    """
    step: Any = torch.optim.Adam.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step
