"""What estimators are compared by: their names, the plain one of the same bound, a pair left as it was."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer import (
    ELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from torch import Tensor, nn

from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.estimators import (
    DIP_ELBO,
    IWAE,
    KL_ELBO,
    STL_ELBO,
    VIMCO,
    BetaTC_ELBO,
    DReG,
    EnumELBO,
    RelaxedELBO,
    Renyi,
    ScoreFunctionELBO,
)
from ppl_vae.infer.objective import Objective

_PARTICLES = 50  # of a gradient of the plain ELBO, to hold others against


def named_estimators(estimators: Any) -> dict[str, ELBO]:
    """Return the estimators by name."""
    if isinstance(estimators, Mapping):
        named = dict(estimators)
    elif isinstance(estimators, Sequence) and not isinstance(estimators, str):
        for i, estimator in enumerate(estimators):
            _check_estimator(f"estimators[{i}]", estimator)
        classes = [type(estimator).__name__ for estimator in estimators]
        named = {}
        for kind, estimator in zip(classes, estimators, strict=True):
            k = getattr(estimator, "num_particles", None)
            name = kind if classes.count(kind) == 1 else f"{kind} (K={k})"
            others = sum(other == name or other.startswith(f"{name} #") for other in named)
            named[f"{name} #{others + 1}" if others else name] = estimator
    else:
        raise TypeError(
            "estimators: expected a mapping of names to instances of pyro.infer.ELBO, or a sequence of them, "
            f"got {estimators!r}"
        )
    if not named:
        raise ValueError("estimators: expected at least one, got none")
    for name, estimator in named.items():
        if not isinstance(name, str):
            raise TypeError(f"estimators: expected names that are strings, got {name!r}")
        _check_estimator(f"estimators[{name!r}]", estimator)
    return named


def _check_estimator(name: str, estimator: object) -> None:
    if not isinstance(estimator, ELBO):
        raise TypeError(
            f"{name}: expected an instance of pyro.infer.ELBO such as Trace_ELBO(), got {estimator!r}"
        )


def is_bound(estimator: ELBO) -> bool:
    """Return whether an estimator's objective is a bound on log p(x), not a penalised or weighted one."""
    others = (BetaTC_ELBO, DIP_ELBO, ReweightedWakeSleep, Trace_MMD, TraceTailAdaptive_ELBO)
    return not isinstance(estimator, others) and not _is_constrained(estimator) and _kl_weight(estimator) == 1


def _is_constrained(estimator: ELBO) -> bool:
    return isinstance(estimator, KL_ELBO) and not (estimator.capacity is None and estimator.free_bits is None)


def _kl_weight(estimator: ELBO) -> float:
    """Return the weight of the KL at the estimator's present step."""
    return float(estimator.at_step(estimator.kl_weight)) if isinstance(estimator, Estimator) else 1.0


def plain_of(estimator: ELBO, reparameterized: bool) -> tuple[Any, ...] | None:
    """Return class and arguments of the plain estimator of the same bound, or None if there is no other."""
    kl_weight = _kl_weight(estimator)
    k = estimator.num_particles
    kind: Any = type(estimator)  # a subclass may be of another bound
    if _is_constrained(estimator):
        return None
    if kind is DReG:
        alpha = estimator.alpha  # type: ignore[attr-defined]
        return Renyi, (("num_particles", k), ("alpha", alpha), ("kl_weight", kl_weight))
    if kind is VIMCO or kind is IWAE:
        plain = kind is IWAE and not estimator.stick_the_landing  # type: ignore[attr-defined]
        if plain or not reparameterized:
            return None
        return IWAE, (("num_particles", k), ("kl_weight", kl_weight))
    pyros = (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)
    if kind not in (*pyros, STL_ELBO, KL_ELBO, RelaxedELBO, EnumELBO):
        return None
    if reparameterized:
        return KL_ELBO, (("num_particles", _PARTICLES), ("kl_weight", kl_weight), ("analytic_kl", False))
    return ScoreFunctionELBO, (("num_particles", _PARTICLES), ("kl_weight", kl_weight))


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Let what goes wrong with an estimator name it."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, KeyError, AssertionError, OverflowError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        reason = (str(error).splitlines() or [type(error).__name__])[0].removeprefix("loss: ")
        raise kind(f"estimators: {name}: {reason}") from error


@contextmanager
def as_before(objectives: Mapping[str, Objective], batch: tuple[Tensor, ...]) -> Iterator[None]:
    """Put gradients, buffers and the estimators' own state back at the end."""
    state = [
        (objective.estimator, {k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()})
        for objective in objectives.values()
        for own in [vars(objective.estimator)]
    ]
    parameters: list[nn.Parameter] = []
    buffers: list[tuple[Tensor, Tensor]] = []
    owners: list[tuple[nn.Module, str, Tensor]] = []
    gradients: list[Tensor | None] = []
    try:
        for i, (name, objective) in enumerate(objectives.items()):
            with naming(name):
                objective.setup(*batch)
            if i == 0:
                parameters = [p for group in (objective.trainable or {}).values() for p in group.values()]
                gradients = [p.grad for p in parameters]
                programs = [p for p in (objective.model, objective.guide) if isinstance(p, nn.Module)]
                modules = [module for program in programs for module in program.modules()]
                owners = [(m, name, b) for m in modules for name, b in m.named_buffers(recurse=False)]
                tensors = [*objective.tensors().values(), *(b for _, _, b in owners)]  # the latter: not saved
                buffers = [(t, t.clone()) for t in tensors if not isinstance(t, nn.Parameter)]
                for p in parameters:
                    p.grad = None
        yield
    finally:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        for owner, name, buffer in owners:
            setattr(owner, name, buffer)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for estimator, own in state:
            vars(estimator).clear()
            vars(estimator).update(own)
