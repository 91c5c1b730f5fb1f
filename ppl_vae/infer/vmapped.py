"""One step of several models at once, by ``torch.func.vmap``."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ppl_vae._random import seeded
from ppl_vae._warnings import warn
from ppl_vae.infer import tracing
from ppl_vae.infer.checking import running_on
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.log_weights import terms
from ppl_vae.infer.objective import Objective
from ppl_vae.infer.recording import term_sums
from ppl_vae.infer.running import evaluating, settle
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.svi import with_parts
from ppl_vae.infer.tracing import NoNumbers, OneHot, line_of, tensors_for_numbers

Tensors = dict[str, Tensor]


class VmappedStep:
    """Loss and gradients of all members at once, over one template of the pair.

    Whatever runs it does so within ``running``. Errors name ``make``, the argument of ``fit_many`` that the
    pairs come from.

    Args:
        objectives: those of the members, which have run once (``Objective.setup``).
        elbo: the estimator, as the members share it.
        batch: one to try the step on, ``[n, ...]`` each.
        kl_weights: of each member, in the place of the estimator's; none to leave that alone.
        compile: trace the step once for each shape of a batch and compile it.

    Attributes:
        trained: the parameters that a gradient reaches, ``[members, ...]`` each, by name.
        rest: the other parameters and the buffers, likewise.
        count: the number of steps taken, a scalar tensor.
        elbo: a copy of the estimator, the one that runs.

    Raises:
        ValueError: if the members have no common structure, if nothing trains, or if the programs can't run
            under ``torch.func.vmap``.

    Example:
        >>> from ppl_vae.infer import KL_ELBO
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> x = torch.randn(20, 5)
        >>> pairs = [(LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)) for _ in range(3)]
        >>> objectives = [Objective(model, guide, KL_ELBO()) for model, guide in pairs]
        >>> for objective in objectives:
        ...     objective.setup(x)
        >>> step = VmappedStep(objectives, KL_ELBO(), (x,))
        >>> with step.running():
        ...     loss, parts = step.take((x,), torch.optim.Adam(step.trained.values()))
        >>> loss.shape
        torch.Size([3])
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        elbo: ELBO,
        batch: tuple[Tensor, ...],
        *,
        kl_weights: Sequence[float | Schedule] = (),
        compile: bool = False,
    ) -> None:
        _check_alike(objectives)
        # copies, so that nothing that a program or an estimator keeps of a run comes to the caller
        self.template: Any = copy.deepcopy(objectives[0])
        self.elbo: Any = copy.deepcopy(elbo)
        self.template.estimator = self.template._estimator = self.elbo
        self.parts = _Parts(self.template)
        settle(self.elbo, self.template.model, self.template.guide, batch)
        changed, reached = self._checked_run(batch)
        held = [named_tensors(objective) for objective in objectives]
        stacked = {name: torch.stack([one[name].detach() for one in held]) for name in held[0]}
        self.trained = {name: nn.Parameter(t) for name, t in stacked.items() if name in reached}
        self.rest = {name: t for name, t in stacked.items() if name not in reached}
        self.schedules = kl_weights
        self.count = torch.zeros((), dtype=torch.int64, device=batch[0].device)
        self.index = torch.zeros(len(objectives), device=batch[0].device)
        gradients = grad_and_value(self._loss, has_aux=True)
        self._gradients = vmap(gradients, (0, 0, 0, 0, None, None), randomness="different")
        self._sums = vmap(self._validation, (0, 0, 0, None), randomness="different")
        self._graphs: dict[Any, Callable[..., Any]] = {}
        self.compiles = False
        rest = self._trial(batch)
        self.compiles = compile
        if kept := [name for name in changed if torch.equal(rest[name], self.rest[name])]:
            raise ValueError(
                "make: expected programs that change their buffers in place, got a pair that puts another "
                f"tensor in the place of {kept[0]}; use `fit` in a loop"
            )

    def _checked_run(self, batch: tuple[Tensor, ...]) -> tuple[list[str], set[str]]:
        """Run the template as ``fit`` would; return what buffers change and what parameters it trains."""
        buffers = dict(self.template.named_buffers())
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        with running_on("data", batch):
            self.template.loss_and_grads(*batch)
        self.template.warn_of_missing_gradients()
        reached = {name for name, p in self.template.named_parameters() if p.grad is not None}
        if not reached:
            raise ValueError("make: expected a pair with a trainable parameter, found none")
        for parameter in self.template.parameters():
            parameter.grad = None
        after = dict(self.template.named_buffers())
        return [name for name in before if not torch.equal(after[name], before[name])], reached

    def _trial(self, batch: tuple[Tensor, ...]) -> Tensors:
        """Run once without a step; return the buffers after it."""
        try:
            with self.running():
                self.validate(*batch)
                return self.gradients(batch)[3]
        except Exception as error:
            at = line_of(error, skip=(__file__,))
            raise ValueError(
                "make: expected a pair that torch.func.vmap can run for all members at once, with "
                f"elbo={type(self.elbo).__name__}; at {at}: {_reason(error)}; use `fit` in a loop"
            ) from error

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let nothing look at values, and the estimator be as before afterwards."""
        before = dict(vars(self.elbo))
        try:
            with pyro.validation_enabled(False), tensors_for_numbers(self.elbo):
                yield
        finally:
            vars(self.elbo).clear()
            vars(self.elbo).update(before)

    def tensors(self) -> Tensors:
        """Return copies of all parameters and buffers, ``[members, ...]`` each, by name."""
        return {name: t.detach().clone() for name, t in (self.trained | self.rest).items()}

    def take(
        self, batch: tuple[Tensor, ...], optimizer: Optimizer, clip_norm: float | None = None
    ) -> tuple[Tensor, Tensors]:
        """Take one step of each member; return losses and the parts of the ELBO, ``[members]`` each.

        Args:
            batch: tensors, ``[n, ...]`` each.
            optimizer: one over ``trained``; it gets the gradients of the loss per datum.
            clip_norm: the largest norm of each member's gradient.
        """
        gradients, loss, parts, self.rest = self.gradients(batch)
        own = list(torch._foreach_div([gradients[name] for name in self.trained], len(batch[0])))
        if clip_norm is not None:
            norm = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in own]).sum(0).sqrt()
            factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
            own = [g * spread(factor, g) for g in own]
        for parameter, gradient in zip(self.trained.values(), own, strict=True):
            parameter.grad = gradient.contiguous()  # which fused optimisers take for granted
        optimizer.step()
        self.count += 1
        return loss, parts

    def gradients(self, batch: tuple[Tensor, ...]) -> tuple[Tensors, Tensor, Tensors, Tensors]:
        """Return gradients, losses ``[members]``, the parts of the ELBO likewise, and the new ``rest``."""
        args = self._detached(), self.rest, self.index, self.kl_weights(self.count), self.count, batch
        run = self._compiled(args) if self.compiles else self._gradients
        with torch.no_grad():  # outside of torch.func
            gradients, (loss, (parts, rest)) = run(*args)
        return gradients, loss, parts, rest

    def _compiled(self, args: Any) -> Callable[..., Any]:
        """Return the compiled step for batches like this one, or the plain one, with a warning."""
        flat, spec = pytree.tree_flatten(args)
        key = tuple((x.shape, x.stride(), x.dtype) for x in args[-1])
        if key in self._graphs:
            return self._graphs[key]

        def run(*flat: Tensor) -> Any:
            with NoNumbers():
                return self._gradients(*pytree.tree_unflatten(flat, spec))

        try:
            with seeded(0):  # no draw of the trace counts
                compiled = tracing.trace(run, flat, self.elbo).compile(flat)
        except Exception as error:
            at = line_of(error, skip=(__file__,))
            what = f"compile: can't compile the step, at {at}: {_reason(error)}; it runs as it is"
            warn(what)
            self.compiles = False
            return self._gradients
        self._graphs[key] = lambda *args: compiled(*pytree.tree_leaves(args))
        return self._graphs[key]

    def validate(self, *batch: Tensor) -> Tensors:
        """Return the parts of the true ELBO, summed over the batch, ``[members]``."""
        return self._sums(self._detached(), self.rest, self.index, batch)

    def kl_weights(self, step: Tensor) -> Tensors:
        """Return the members' KL weights at a step, if they have weights of their own."""
        if not self.schedules:
            return {}
        like = next(iter(self.trained.values()))
        values = [torch.as_tensor(w(step) if callable(w) else w).to(like) for w in self.schedules]
        return {"kl_weight": torch.stack(values)}

    def _detached(self) -> Tensors:
        return {name: p.detach() for name, p in self.trained.items()}

    def _loss(
        self, trained: Tensors, rest: Tensors, index: Tensor, weights: Tensors, count: Tensor, batch: Any
    ) -> tuple[Tensor, tuple[Tensors, Tensors]]:
        rest = {name: tensor.clone() for name, tensor in rest.items()}  # which the programs may change
        held = trained | rest
        if isinstance(self.elbo, Estimator):
            vars(self.elbo).update(weights, step=count.clone())
        with OneHot(), _PerMember(index):
            loss, parts = with_parts(
                self.template, lambda *batch: functional_call(self.template, held, batch), batch, parts=True
            )
            if parts is None:
                with evaluating(self.template.model, self.template.guide):
                    parts = functional_call(self.parts, held, batch)
        return loss, (parts, rest)

    def _validation(self, trained: Tensors, rest: Tensors, index: Tensor, batch: Any) -> Tensors:
        with OneHot(), _PerMember(index), evaluating(self.template.model, self.template.guide):
            return functional_call(self.parts, trained | rest, batch)


class _Parts(nn.Module):
    """The parts of the true ELBO as a module whose parameters have the names of an objective's."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.model, self.guide = objective.model, objective.guide

    def forward(self, *batch: Tensor) -> Tensors:
        return term_sums(terms(self.model, self.guide, *batch))


class _PerMember(TorchFunctionMode):
    """Runs in another way what distributions do when they draw and ``torch.func.vmap`` can't run as it is.

    An empty tensor, to be filled with noise, is one of each member.
    """

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.index = index

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _EMPTY or (func is Tensor.new and isinstance(args[-1], (int, torch.Size))):
            return self.index.new_empty(made.shape, dtype=made.dtype, device=made.device)
        return made


_EMPTY = {torch.empty, torch.empty_like, Tensor.new_empty}


def named_tensors(objective: Objective) -> Tensors:
    """Return the parameters and buffers of a pair of modules by name, each once."""
    return dict(objective.named_parameters()) | dict(objective.named_buffers())


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per member so that it broadcasts over a tensor of the members."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _check_alike(objectives: Sequence[Objective]) -> None:
    """Raise unless all members have tensors of their own, of the same names, shapes and kinds."""
    first, *others = [
        {
            name: (list(t.shape), t.dtype, t.requires_grad)
            for name, t in objective.state_dict(keep_vars=True).items()
        }
        | {name: (type(module).__name__, module.training) for name, module in objective.named_modules()}
        for objective in objectives
    ]
    for i, other in enumerate(others, 2):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"make: expected pairs of one structure, got {name} {first.get(name)} in the first pair "
                    f"and {other.get(name)} in pair {i}; use `fit` in a loop"
                )
    modules = [id(module) for objective in objectives for module in objective.modules()]
    if len(modules) != len(set(modules)):
        raise ValueError("make: expected a fresh pair from each call, got a module that several pairs share")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
