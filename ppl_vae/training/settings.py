"""What ``fit`` and ``fit_many`` are given: the checks of it, and what is kept of it in a run's settings."""

import functools
import inspect
import platform
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.optim import Optimizer

from ppl_vae._checks import check_positive, check_positive_int
from ppl_vae.data import Split
from ppl_vae.description import describe
from ppl_vae.infer.running import Program
from ppl_vae.infer.svi import OptimizerFactory

Adam: OptimizerFactory = functools.partial(torch.optim.Adam, fused=True)


def settings_of_run(
    model: Program,
    guide: Program,
    elbo: ELBO,
    options: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    validation: Mapping[str, Any] | None,
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the settings of a run as plain data.

    Args:
        model: the model.
        guide: the guide.
        elbo: the estimator.
        options: the other arguments of ``fit``, checked.
        data: what ``describe_data`` says of the training data.
        validation: likewise.
        notes: those of the user.
    """
    return {
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("ppl-vae", "torch", "pyro-ppl")},
        "model": describe(model),
        "guide": describe(guide),
        "elbo": {k: v for k, v in describe(elbo).items() if k != "max_plate_nesting"},
        **{name: describe(value) for name, value in options.items()},
        "data": dict(data),
        "validation": validation,
        "notes": describe(notes),
    }


def describe_data(data: Any) -> dict[str, Any]:
    """Return what is kept of data in a run's settings: where it came from, and checksums."""
    if not isinstance(data, Split):
        return {"loader": f"{type(data).__module__}.{type(data).__qualname__}"}
    return {
        "source": describe(data.source),
        "size": len(data),
        "checksum": _checksum(data.x),
        "dynamic": data.dynamic,
        "labels": None if data.y is None else _checksum(data.y),
    }


def describe_batch(batch: Sequence[Tensor]) -> list[list[Any]]:
    """Return shape and kind of each tensor of a batch of one datum."""
    return [[[1, *x.shape[1:]], str(x.dtype).removeprefix("torch.")] for x in batch]


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes()):08x}"


def check_elbo(elbo: Any, example: str) -> None:
    """Raise unless ``elbo`` is an estimator with a whole number of particles."""
    if not isinstance(elbo, ELBO):
        raise TypeError(f"elbo: expected an instance of pyro.infer.ELBO such as {example}, got {elbo!r}")
    check_positive_int("elbo.num_particles", elbo.num_particles)


def check_rate_is_free(optimizer: Any) -> None:
    """Raise if the optimiser has a rate already."""
    if "lr" in getattr(optimizer, "keywords", {}):
        raise ValueError("optimizer: expected its rate as `learning_rate`, got `lr` in the partial")


def learning_rates(learning_rate: float | Mapping[str, float]) -> dict[str, float]:
    """Return the rates of model and guide.

    Raises:
        TypeError, ValueError: unless they are positive numbers, one for both or one for each.
    """
    if not isinstance(learning_rate, Mapping):
        return dict.fromkeys(("model", "guide"), check_positive("learning_rate", learning_rate))
    if learning_rate.keys() != {"model", "guide"}:
        raise ValueError(
            f"learning_rate: expected a number or {{'model': ..., 'guide': ...}}, got {dict(learning_rate)!r}"
        )
    return {role: check_positive(f"learning_rate[{role!r}]", rate) for role, rate in learning_rate.items()}


def make_optimizer(optimizer: OptimizerFactory, groups: list[dict[str, Any]]) -> Optimizer:
    """Return the optimiser of these parameter groups.

    Raises:
        ValueError: if it can't be made for them, or needs a closure.
        TypeError: if it is no torch optimiser.
    """
    name = getattr(getattr(optimizer, "func", optimizer), "__name__", repr(optimizer))
    try:
        made = optimizer(groups)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"optimizer: {name} can't be made for these parameters: {reason}") from error
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer: expected it to make a torch optimiser, it made {made!r}")
    closure = inspect.signature(type(made).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"optimizer: expected one that steps on given gradients, got {name}, which needs a closure"
        )
    return made


def check_elementwise(optimizer: Any) -> None:
    """Raise unless the optimiser's step on several members at once is its step on each."""
    check_rate_is_free(optimizer)
    start = torch.linspace(0.1, 1.0, 12).view(2, 2, 3) * torch.tensor([1.0, -50.0]).view(2, 1, 1)
    found = []
    for values in (start, start[:1], start[1:]):
        parameter = nn.Parameter(values.clone())
        made = make_optimizer(optimizer, [{"params": [parameter], "lr": 0.1}])
        for i in range(3):
            parameter.grad = (values * (i + 1)).sin() * values
            made.step()
        found.append(parameter.detach())
    if not torch.allclose(found[0], torch.cat(found[1:]), rtol=1e-4, atol=1e-6):
        raise ValueError(
            "optimizer: expected one whose step on a number depends on that number's gradients alone, as "
            f"torch.optim.Adam's does, got {type(made).__name__}"
        )
