"""The seam: a model, a guide and an ELBO estimator as one module whose forward is the loss."""

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.nn import PyroModule
from pyro.params.param_store import StateDict
from torch import Tensor, nn

from ppl_vae._warnings import warn
from ppl_vae.infer.running import (
    Program,
    calls_of_modules,
    check_model_of,
    check_pair,
    check_support,
    evaluating,
    in_own_store,
    observed_sites,
    trace_pair,
)
from ppl_vae.program import Program as LibraryProgram


class Objective(nn.Module):
    """A model and a guide under an ELBO estimator: ``forward(*batch)`` is the differentiable loss.

    For two modules, torch optimisers, ``state_dict``, ``torch.func`` and DDP work on it as on any module;
    the parameters of plain functions are in ``trainable``. Estimators of Pyro without a differentiable
    loss have ``loss_and_grads`` alone. The first
    call makes one dry run, without gradients and without touching the random stream, that checks
    the pair and settles parameters that only a run creates (autoguides, lazy layers, the networks
    that a plain function registers with ``pyro.module``).

    Args:
        model: program over the latent sites and the data; a module or a plain Pyro function.
        guide: program over the latent sites.
        estimator: any ``pyro.infer.ELBO``.

    Attributes:
        trainable: the parameters with a gradient, ``{"model": {name: parameter}, "guide": {...}}``,
            known after ``setup``; one that both use is the model's.

    Raises:
        TypeError: if ``estimator`` is no ELBO, or a program is not callable.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> loss = Objective(model, guide, Trace_ELBO())(model(None, size=3).detach())
        >>> loss.backward()
        >>> model.weight.grad.shape
        torch.Size([5, 2])
    """

    def __init__(self, model: Program, guide: Program, estimator: ELBO) -> None:
        super().__init__()
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise TypeError(f"{name}: expected a module or a function, got {program!r}")
        if not isinstance(estimator, ELBO):
            raise TypeError(
                f"loss: expected an instance of pyro.infer.ELBO such as Trace_ELBO(), got {estimator!r}"
            )
        if type(estimator).__name__.startswith("Jit"):
            raise TypeError(
                f"loss: expected an estimator that is not traced by torch.jit, which freezes the batch size "
                f"and is deprecated, got {type(estimator).__name__}; use {type(estimator).__name__[3:]}"
            )
        self.model = model
        self.guide = guide
        self.estimator = estimator
        self._estimator: Any = estimator  # Pyro's base class declares none of the methods
        self.trainable: dict[str, dict[str, nn.Parameter]] | None = None
        self._baselines: StateDict = {"params": {}, "constraints": {}}  # TraceGraph_ELBO's
        self._modules_of_functions: dict[str, list[nn.Module]] = {"model": [], "guide": []}

    def setup(self, *batch: Tensor, check_values: bool = True) -> None:
        """Check the pair on a batch and find its parameters; a no-op after the first call.

        Args:
            *batch: what both are called with, each ``[n, ...]``.
            check_values: whether the batch's values, too, are to be ones that the model can observe.

        Raises:
            ValueError: if model and guide disagree on sites, plates or shapes, or a parameter that
                one of them runs with is no module's (``pyro.param``) or not its own module's.
        """
        if self.trainable is not None:
            return
        check_model_of(self.guide, self.model)
        called: list[nn.Module] = []
        ran: dict[str, list[nn.Module]] = {}
        constrained: dict[str, Mapping[str, Any]] = {}

        def noting(role: str, program: Program) -> Program:
            def run(*args: Any) -> Any:
                called.clear()
                result = program(*args)
                ran[role] = list(dict.fromkeys(called))
                constrained[role] = pyro.get_param_store().get_state()["params"]
                return result

            run.__wrapped__ = program  # type: ignore[attr-defined]  # for `inspect.unwrap`
            return run

        devices = {x.device.index for x in batch if x.device.type == "cuda"}
        with (
            torch.random.fork_rng(devices=devices),
            evaluating(self.model, self.guide),
            calls_of_modules(called.append),
            pyro.validation_enabled(check_values),
        ):
            traces = trace_pair(noting("model", self.model), noting("guide", self.guide), *batch)
            check_pair(*traces, batch)
            for name, site in observed_sites(traces[0]).items() if check_values else ():
                if len(site["value"]) == len(batch[0]):
                    check_support("data", name, site["fn"], site["value"])
            for trace in traces:
                trace.compute_log_prob()
        trainable: dict[str, dict[str, nn.Parameter]] = {}
        registered: dict[str, dict[str, nn.Parameter]] = {}
        seen: set[int] = set()
        for role, program, trace in zip(("model", "guide"), (self.model, self.guide), traces, strict=True):
            registered[role] = _registered_parameters(trace, constrained[role])
            if isinstance(program, nn.Module):
                found = dict(program.named_parameters())
            else:
                found = _lasting_names(registered[role], ran[role])
                self._modules_of_functions[role] = ran[role]
            trainable[role] = {}
            for name, parameter in found.items():  # one that has two names is taken once
                if parameter.requires_grad and id(parameter) not in seen:
                    trainable[role][name] = parameter
                seen.add(id(parameter))
        for role in trainable:
            _check_reach(role, registered[role], ran[role], seen)
        self.trainable = trainable

    def forward(self, *batch: Tensor) -> Tensor:
        """Return the estimator's loss, a scalar: summed over the batch as in ``pyro.infer.SVI``."""
        self.setup(*batch)
        return self._estimator.differentiable_loss(*self._programs(), *batch)

    def _programs(self) -> tuple[Program, Program]:
        """Return model and guide, each running in its own parameter store."""
        return in_own_store(self.model), in_own_store(self.guide)

    def loss_and_grads(self, *batch: Tensor) -> Tensor:
        """Add the loss's gradients to ``grad`` of the parameters; return the loss, detached.

        Estimators of Pyro without a differentiable loss (``RenyiELBO``, ``TraceGraph_ELBO``,
        ``ReweightedWakeSleep``) take their own way.
        """
        if hasattr(self.estimator, "differentiable_loss"):
            loss = self(*batch)
            loss.backward()
            return loss.detach()
        self.setup(*batch)
        programs = zip(("model", "guide"), (self.model, self.guide), strict=True)
        model, guide = (in_own_store(_registering(role, program)) for role, program in programs)
        with pyro.get_param_store().scope(self._baselines):
            loss = self._estimator.loss_and_grads(model, guide, *batch)
        return _scalar(loss, batch[0]).detach()

    def evaluate_loss(self, *batch: Tensor) -> Tensor:
        """Return the estimator's loss without gradients; modes stay as they are."""
        self.setup(*batch)
        with torch.no_grad():
            loss = self._estimator.loss(*self._programs(), *batch)
        return _scalar(loss, batch[0])

    def tensors(self) -> dict[str, Tensor]:
        """Return every parameter and buffer by name, those of plain functions' networks too.

        Names start with ``model.`` or ``guide.``. Call after ``setup``.
        """
        found: dict[str, Tensor] = {}
        for role, program in (("model", self.model), ("guide", self.guide)):
            if isinstance(program, nn.Module):
                held: dict[str, Tensor] = program.state_dict(keep_vars=True)
            else:
                held = dict((self.trainable or {})[role])
                for i, module in enumerate(self._modules_of_functions[role]):
                    held |= {f"buffers.{i}.{k}": b for k, b in module.named_buffers(recurse=False)}
                    held |= {
                        f"frozen.{i}.{k}": p
                        for k, p in module.named_parameters(recurse=False)
                        if not p.requires_grad
                    }
            found |= {f"{role}.{name}": tensor for name, tensor in held.items()}
        return found

    def networks(self) -> list[nn.Module]:
        """Return every module of the programs, those that plain functions ran too. Call after ``setup``."""
        found = [
            m
            for modules in self._modules_of_functions.values()
            for module in modules
            for m in module.modules()
        ]
        owners = [getattr(program, "__self__", None) for program in (self.model, self.guide)]
        found += [m for owner in owners if isinstance(owner, nn.Module) for m in owner.modules()]
        return list(dict.fromkeys([*self.modules(), *found]))

    def warn_of_missing_gradients(self) -> None:
        """Warn, by name, of trainable parameters that the last backward pass did not reach."""
        missing = [
            f"{role}.{name}"
            for role, parameters in (self.trainable or {}).items()
            for name, parameter in parameters.items()
            if parameter.grad is None
        ]
        if missing:
            warn(f"no gradient reaches {', '.join(missing)}: they will not train")


def _registered_parameters(trace: poutine.Trace, constrained: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Return the parameters that a program registered in Pyro: those with a constraint are in its store."""
    sites: dict[str, Any] = {name: site for name, site in trace.nodes.items() if site["type"] == "param"}
    return {name: constrained.get(name, site["value"]) for name, site in sites.items()}


def _lasting_names(registered: dict[str, nn.Parameter], ran: list[nn.Module]) -> dict[str, nn.Parameter]:
    """Return parameters by names that another process gives too: without the numbers of ``Program`` names."""
    programs = [module for module in ran if isinstance(module, LibraryProgram)]
    names = {}
    for i, program in enumerate(programs):
        earlier = sum(type(other) is type(program) for other in programs[:i])
        names[program._pyro_name] = type(program).__name__ + (f"_{earlier}" if earlier else "")
    found = {}
    for name, parameter in registered.items():
        owner, dot, rest = name.partition(".")
        found[names.get(owner, owner) + dot + rest] = parameter
    return found


def _check_reach(
    role: str, registered: dict[str, nn.Parameter], ran: list[nn.Module], reached: set[int]
) -> None:
    """Raise or warn of parameters that a program runs with and that the optimiser will not see."""
    strangers = [name for name, p in registered.items() if p.requires_grad and id(p) not in reached]
    if strangers:
        raise ValueError(
            f"{role}: registers {', '.join(strangers)} of a module that is no part of it, which would not "
            "train; make that module an attribute"
        )
    forgotten = [
        f"{type(module).__name__}.{name}"
        for module in ran
        for name, p in module.named_parameters(recurse=False)
        if p.requires_grad and id(p) not in reached
    ]
    if forgotten:
        warn(f"{role}: runs {', '.join(forgotten)} without `pyro.module`: they will not train")


def _scalar(loss: Any, x: Tensor) -> Tensor:
    """Return a loss of Pyro's (a number, or the two of wake and sleep) as a scalar of the data's dtype."""
    total = sum(loss) if isinstance(loss, tuple) else loss
    return torch.as_tensor(total, dtype=x.dtype if x.is_floating_point() else None, device=x.device)


def _registering(name: str, program: Program) -> Program:
    """Return the program, made to register its parameters as Pyro's older estimators need it."""
    if not isinstance(program, nn.Module) or isinstance(program, PyroModule):
        return program

    def run(*batch: Tensor) -> Any:
        pyro.module(name, program)
        return program(*batch)

    return run
