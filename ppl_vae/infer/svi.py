"""Stochastic variational inference: the engine that takes gradient steps."""

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from ppl_vae._checks import check_choice, check_positive
from ppl_vae.data import Split
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.log_weights import terms
from ppl_vae.infer.objective import Objective
from ppl_vae.infer.precision import PRECISIONS, Precision, network_precision
from ppl_vae.infer.recording import SiteRecorder, term_sums
from ppl_vae.infer.running import Program, batch_arguments, evaluating

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
Parts = dict[str, Tensor] | None  # of the true ELBO, summed over the batch: elbo, reconstruction, kl_<site>


class SVI:
    """Takes gradient steps on an ELBO estimator; the call of ``pyro.infer.SVI``.

    Two models in one process never share a parameter, whatever their names: the programs run in a
    parameter store of their own. A trainable parameter that the first gradient does not reach is
    named in a warning.

    References:
        Stochastic Variational Inference (Hoffman et al., 2013), arXiv:1206.7051

    Args:
        model: program over the latent sites and the data; a module or a plain Pyro function.
        guide: program over the latent sites.
        optim: a torch optimiser over the parameters of both, a function of parameters (or parameter
            groups) that makes one (``torch.optim.Adam``, or a ``functools.partial`` of it), or one of
            ``pyro.optim``.
        loss: any ``pyro.infer.ELBO``.
        clip_norm: the largest norm of the gradient of all parameters together; None for no limit.
        per_datum: divide the gradient by the batch size, so that step size and ``clip_norm`` mean
            the same for every batch size. ``pyro.infer.SVI`` doesn't.
        precision: that of linear layers, convolutions and attention: ``"float32"``; ``"tf32"``, which CUDA
            has hardware for; or ``"bf16"``. All else is never in low precision.

    Raises:
        TypeError: if ``optim`` or ``loss`` is none of these.
        ValueError: if ``precision`` is unknown.
        RuntimeError: if several processes of torch.distributed would each train a copy.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> svi = SVI(model, guide, torch.optim.Adam, Trace_ELBO())
        >>> svi.step(model(None, size=3).detach()).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: Optimizer | OptimizerFactory | PyroOptim,
        loss: ELBO,
        *,
        clip_norm: float | None = None,
        per_datum: bool = False,
        precision: Precision = "float32",
    ) -> None:
        if not callable(optim) and not isinstance(optim, Optimizer):
            raise TypeError(
                "optim: expected a torch optimiser, a function that makes one from parameters, "
                f"or one of pyro.optim, got {optim!r}"
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if (ranks := torch.distributed.get_world_size()) > 1:
                raise RuntimeError(
                    f"SVI: expected one process, got {ranks}: each would go its own way; wrap "
                    "`Objective(model, guide, loss)` in torch's DistributedDataParallel instead"
                )
        self.objective = Objective(model, guide, loss)
        self.optim = optim
        self.clip_norm = None if clip_norm is None else check_positive("clip_norm", clip_norm)
        self.per_datum = per_datum
        check_choice("precision", precision, PRECISIONS)
        self.precision = precision
        self._ready = self._stepped = False
        self._taken: dict[int, int] = {}  # of so many tensors of a batch
        self._makes_optim = not isinstance(optim, (Optimizer, PyroOptim))

    def setup(self, *batch: Tensor) -> None:
        """Check the pair on a batch and build the optimiser; the first ``step`` does it if need be."""
        if self._ready:
            return
        self.objective.setup(*batch)
        parameters = self._parameters()
        if not parameters:
            raise ValueError("model, guide: expected a trainable parameter, found none")
        if not isinstance(self.optim, (Optimizer, PyroOptim)):
            made = self.optim(parameters)
            if not isinstance(made, (Optimizer, PyroOptim)):
                raise TypeError(f"optim: expected it to make a torch optimiser, it made {made!r}")
            self.optim = made
        if isinstance(self.optim, Optimizer):
            held = {id(p) for group in self.optim.param_groups for p in group["params"]}
            if all(id(p) not in held for p in parameters):
                raise ValueError("optim: expected the parameters of model or guide, holds none of them")
        self._ready = True

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in (self.objective.trainable or {}).values() for p in group.values()]

    def step(self, *batch: Tensor) -> Tensor:
        """Take one gradient step.

        Args:
            *batch: what model and guide are called with, each ``[n, ...]``.

        Returns:
            The loss before the step, a detached scalar tensor, summed over the batch. Unlike Pyro's
            it stays on the device, so that a step need not wait for it.
        """
        return self.step_with_parts(*batch, parts=False)[0]

    def step_with_parts(self, *batch: Tensor, parts: bool = True) -> tuple[Tensor, Parts]:
        """Take one gradient step; return its loss and the parts of the true ELBO, from the same draws.

        Args:
            *batch: what model and guide are called with, each ``[n, ...]``.
            parts: whether they are asked for.

        Returns:
            The loss, and scalars by name (``elbo``, ``reconstruction``, ``kl_<site>``), summed over the
            batch; None if the estimator makes no plain draws.
        """
        return self._take_step(*batch, parts=parts)

    def step_of(self, data: Split, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one gradient step on some rows of data.

        Args:
            data: of which the programs take x alone, or x and y.
            index: the rows, ``[n]``, on the device of the data.

        Returns:
            The loss, and the parts of the true ELBO as in ``step_with_parts``, of draws of their own if the
            estimator makes no plain ones.
        """
        batch = self._rows(data, index)
        loss, found = self._take_step(*batch, parts=True)
        return loss, self.parts(*batch) if found is None else found

    def _take_step(self, *batch: Tensor, parts: bool) -> tuple[Tensor, Parts]:
        self.setup(*batch)
        loss, found = self.loss_and_grads(*batch, parts=parts)
        if not self._stepped:
            self.objective.warn_of_missing_gradients()
            self._stepped = True
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters(), self.clip_norm)
        if isinstance(self.optim, PyroOptim):
            named: dict[str, Tensor] = {
                f"{role}.{name}": p
                for role, group in (self.objective.trainable or {}).items()
                for name, p in group.items()
                if p.grad is not None
            }
            real = torch.distributions.constraints.real
            with pyro.get_param_store().scope({"params": named, "constraints": dict.fromkeys(named, real)}):
                self.optim(named.values())
        elif isinstance(self.optim, Optimizer):
            self.optim.step()
        return loss, found

    def _rows(self, data: Split, index: Tensor) -> tuple[Tensor, ...]:
        """Return the batch of some rows: as many tensors as the programs take."""
        batch = data.batch(index)
        if len(batch) not in self._taken:
            self._taken[len(batch)] = len(batch_arguments(self.objective.model, batch))
        return batch[: self._taken[len(batch)]]

    def loss_and_grads(self, *batch: Tensor, parts: bool) -> tuple[Tensor, Parts]:
        """Set the parameters' gradients; return the loss and, if asked for, the parts of the true ELBO."""
        for parameter in self._parameters():
            parameter.grad = None
        with network_precision(self.precision):
            result = with_parts(self.objective, self.objective.loss_and_grads, batch, parts=parts)
        if self.per_datum:
            torch._foreach_div_([p.grad for p in self._parameters() if p.grad is not None], len(batch[0]))
        return result

    def parts(self, *batch: Tensor) -> dict[str, Tensor]:
        """Return the parts of the true ELBO of a draw per datum, summed over the batch.

        Programs run in evaluation mode, in full precision.

        Args:
            *batch: what model and guide are called with, each ``[n, ...]``.

        Returns:
            Scalars ``elbo``, ``reconstruction`` and ``kl_<site>`` of each latent site.
        """
        self.setup(*batch)
        with evaluating(self.objective.model, self.objective.guide):
            return term_sums(terms(self.objective.model, self.objective.guide, *batch))

    def evaluate_loss(self, *batch: Tensor) -> Tensor:
        """Return the loss, a scalar tensor, without taking a step: one noisy estimate."""
        with network_precision(self.precision):
            return self.objective.evaluate_loss(*batch)


def with_parts(
    objective: Objective, loss: Callable[..., Tensor], batch: tuple[Tensor, ...], *, parts: bool
) -> tuple[Tensor, Parts]:
    """Return ``loss(*batch)`` of an objective and, if asked for, the parts of the true ELBO of its draws."""
    if not parts:
        return loss(*batch), None
    if isinstance(objective.estimator, Estimator):
        value = loss(*batch)
        terms = objective.estimator.terms
        return value, None if terms is None else term_sums(terms)
    with SiteRecorder() as recorder:
        value = loss(*batch)
    return value, recorder.sums()
