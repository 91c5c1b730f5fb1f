"""How the library runs a model or a guide: any Pyro program that keeps the contract.

A program is a callable of the batch: one of the library's, a module of the user's, or a plain
function that registers its networks with ``pyro.module``.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO, TraceTMC_ELBO
from pyro.params.param_store import module_from_param_with_module_name
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

Program = Callable[..., Any]
Site = Any  # Pyro's message: a dictionary of name, fn, value, is_observed, ...


def in_own_store(program: Program) -> Program:
    """Return the program, made to run in a parameter store of its own.

    Pyro shares parameters of one name between all programs of the process, those of a model and its
    guide too; here each program has its module's parameters and leaves the global store as it was.

    Args:
        program: a module or a plain function.

    Raises:
        ValueError: on a run that makes a parameter which no module owns.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        own = _ModuleParameters()
        with pyro.get_param_store().scope() as store, own:
            result = program(*args, **kwargs)
        for name in own.others:  # those that a PyroModule has just made are in the store as parameters
            if not isinstance(store["params"].get(name), nn.Parameter):
                raise ValueError(
                    f"parameter {name!r}: expected a parameter of a module, registered with `pyro.module`, "
                    "got a `pyro.param` that no module owns; make it an attribute of a module "
                    "(`nn.Parameter`, or `pyro.nn.PyroParam` with a constraint)"
                )
        return result

    run.__wrapped__ = program  # type: ignore[attr-defined]  # for `inspect.unwrap`
    return run


class _ModuleParameters(Messenger):
    """Lets each parameter of a module stand for itself, and notes the others.

    Pyro's store would copy those that are not contiguous in memory, so that the copies train, and
    refuse those of lazy layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.others: list[str] = []

    def _pyro_param(self, msg: Any) -> None:
        start = msg["args"][1] if len(msg["args"]) > 1 else None
        by_module = module_from_param_with_module_name(msg["name"]) != msg["name"]  # `pyro.module` did it
        if (by_module or isinstance(start, nn.Parameter)) and msg["kwargs"]["constraint"] is constraints.real:
            msg["value"], msg["done"] = start, True
        elif start is not None:
            self.others.append(msg["name"])


@contextmanager
def calls_of_modules(on_call: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call ``on_call(module)`` just before any module runs, also those that a plain function uses."""
    handle = register_module_forward_pre_hook(lambda module, args: on_call(module))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluating(*programs: Program) -> Iterator[None]:
    """Run programs in evaluation mode: no gradient, no dropout, no change of any parameter or buffer.

    Every module that runs, one of a plain function too, is in ``eval`` mode and put back at the end.
    """
    switched: list[nn.Module] = []

    def to_eval(module: nn.Module) -> None:
        if module.training:
            switched.append(module)
            module.training = False

    for program in programs:
        for owner in (program, getattr(program, "__self__", None)):
            if isinstance(owner, nn.Module):
                for module in owner.modules():
                    to_eval(module)
    try:
        with torch.no_grad(), pyro.get_param_store().scope(), calls_of_modules(to_eval):
            yield
    finally:
        for module in switched:
            module.training = True


def settle(elbo: Any, model: Program, guide: Program, batch: tuple[Tensor, ...]) -> None:
    """Let an estimator that guesses the number of plates do so now: its first step would draw for it."""
    vectorized = elbo.vectorize_particles or isinstance(elbo, (TraceEnum_ELBO, TraceTMC_ELBO))
    if vectorized and elbo.max_plate_nesting == math.inf:
        with evaluating(model, guide):
            elbo._guess_max_plate_nesting(in_own_store(model), in_own_store(guide), batch, {})


def trace_pair(model: Program, guide: Program, *batch: Tensor) -> tuple[Trace, Trace]:
    """Run the guide, then the model on the guide's draws; return the model's and the guide's trace.

    Raises:
        ValueError: naming the site, if the model can't run on the guide's draws because the two
            disagree on it; or if the guide computes with another model.
        TypeError: if one of them takes another number of tensors.
    """
    check_model_of(guide, model)
    guide_trace: Trace | None = None
    try:
        guide_trace = poutine.trace(in_own_store(guide)).get_trace(*batch)
        model_trace = poutine.trace(poutine.replay(in_own_store(model), trace=guide_trace)).get_trace(*batch)
    except (ValueError, RuntimeError) as error:
        cause = without_table(error)
        if guide_trace is not None:
            try:
                alone = poutine.trace(in_own_store(model)).get_trace(*batch)
            except (ValueError, RuntimeError):
                raise cause from None
            check_latents(alone, guide_trace)
        raise cause from None
    except TypeError as error:
        _check_takes("guide", guide, batch, error)
        _check_takes("model", model, batch, error)
        raise
    return model_trace, guide_trace


def _check_takes(name: str, program: Program, batch: tuple[Tensor, ...], cause: TypeError) -> None:
    """Raise from an error of a run if the program can't be called with so many tensors."""
    program = inspect.unwrap(program)
    try:
        inspect.signature(program.forward if isinstance(program, nn.Module) else program).bind(*batch)
    except TypeError:
        raise TypeError(
            f"{name}: expected a program that takes the batch's {len(batch)} tensors, as `(x, y)`: model and "
            f"guide take the same arguments; got {cause}"
        ) from None


def check_model_of(guide: Program, model: Program) -> None:
    """Raise if a guide computes with another model than it is run with, or a model with another classifier.

    Both are to be modules. Such a guide holds its model as the attribute ``model``, which it does not
    register, and such a model the guide's ``classifier``.
    """
    if not (isinstance(guide, nn.Module) and isinstance(model, nn.Module)):
        return
    for part in guide.modules():
        held = vars(part).get("model")
        if isinstance(held, nn.Module) and all(held is not known for known in model.modules()):
            raise ValueError(
                f"guide: expected a {type(part).__name__} of the model that it is run with, "
                f"got one of another {type(held).__name__}; set its `model`"
            )
    for part in model.modules():
        held = vars(part).get("classifier")
        if isinstance(held, nn.Module) and all(held is not known for known in guide.modules()):
            raise ValueError(
                f"model: expected the guide's classifier in the {type(part).__name__}, got another "
                f"{type(held).__name__}; set its `classifier`"
            )


def without_table(error: BaseException) -> BaseException:
    """Return what ``error`` was raised from if it only adds Pyro's table of all shapes, else ``error``."""
    if error.__cause__ is not None and "Trace Shapes" in str(error):
        return error.__cause__
    return error


def batch_arguments(program: Program, batch: tuple[Tensor, ...], name: str = "data") -> tuple[Tensor, ...]:
    """Return as many of a batch's tensors as the program takes: ``(x,)`` or ``(x, y)``.

    Args:
        program: a model or a guide.
        batch: tensors, ``[n, ...]`` each.
        name: the argument that the batch came in, for errors.

    Raises:
        TypeError: if the program takes more than the batch has.
    """
    call = program.forward if isinstance(program, nn.Module) else program
    parameters = list(inspect.signature(call).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return batch
    positional = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "size"  # of prior draws
    ]
    required = [p.name for p in positional if p.default is p.empty]
    if len(required) > len(batch):
        raise TypeError(
            f"{name}: expected tensors for the model's arguments {required}, got {len(batch)}: "
            "labels are missing, say"
        )
    return batch[: len(positional)]


def latent_sites(trace: Trace) -> dict[str, Site]:
    """Return the sites that are drawn, by name; not those of subsampling."""
    return {name: site for name, site in _sample_sites(trace) if not site["is_observed"]}


def observed_sites(trace: Trace) -> dict[str, Site]:
    """Return the observed sites, by name."""
    return {name: site for name, site in _sample_sites(trace) if site["is_observed"]}


def _sample_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site):
            yield name, site


def check_pair(model_trace: Trace, guide_trace: Trace, batch: tuple[Any, ...]) -> None:
    """Raise unless model and guide are programs over the same latent sites, plates and shapes.

    Raises:
        ValueError: naming the site, what the model has and what the guide has.
    """
    observed = observed_sites(model_trace)
    if not observed:
        raise ValueError("model: expected an observed site (`obs=x`), found none")
    check_latents(model_trace, guide_trace)
    n = len(batch[0])
    for name, site in (latent_sites(model_trace) | latent_sites(guide_trace) | observed).items():
        size = data_plate_size(name, site)
        if size != n:
            raise ValueError(f"site {name!r}: expected a data plate of the batch's size {n}, got {size}")


def check_latents(model_trace: Trace, guide_trace: Trace) -> None:
    """Raise unless model and guide have the same latent sites with the same plates and shapes."""
    in_model, in_guide = latent_sites(model_trace), latent_sites(guide_trace)
    enumerated = {name for name, site in in_model.items() if site["infer"].get("enumerate")}
    auxiliary = {name for name, site in in_guide.items() if site["infer"].get("is_auxiliary")}
    if missing := sorted(in_model.keys() - in_guide.keys() - enumerated):
        raise ValueError(f"guide: lacks the model's latent sites {missing}; it has {sorted(in_guide)}")
    if extra := sorted(in_guide.keys() - in_model.keys() - auxiliary):
        raise ValueError(
            f"guide: has sites {extra} that are no latent sites of the model, which has {sorted(in_model)}"
        )
    for name in in_guide.keys() & in_model.keys():
        plates = [
            sorted((f.name, f.full_size, f.size, f.dim) for f in site["cond_indep_stack"] if f.vectorized)
            for site in (in_model[name], in_guide[name])
        ]
        if plates[0] != plates[1]:
            raise ValueError(
                f"site {name!r}: model and guide disagree on plates (name, size, subsample, dim): "
                f"{plates[0]} in the model, {plates[1]} in the guide"
            )
        shapes = [
            (tuple(site["fn"].batch_shape), tuple(site["fn"].event_shape))
            for site in (in_model[name], in_guide[name])
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"site {name!r}: model and guide disagree on shapes (batch, event): "
                f"{shapes[0]} in the model, {shapes[1]} in the guide"
            )
        on_sphere = [site["fn"].support is constraints.sphere for site in (in_model[name], in_guide[name])]
        if on_sphere[0] != on_sphere[1]:  # densities of areas and of volumes
            where = ["on the sphere" if on else "in all of space" for on in on_sphere]
            raise ValueError(
                f"site {name!r}: model and guide disagree on where it is: {where[0]} in the model, "
                f"{where[1]} in the guide"
            )


def data_plate_size(name: str, site: Site) -> int:
    """Return the size of the plate at dim -1 that ``site`` is in: the number of data in the batch."""
    return data_plate(name, site).size


def data_plate(name: str, site: Site) -> CondIndepStackFrame:
    """Return the plate at dim -1 that ``site`` is in.

    Raises:
        ValueError: if the site is in no such plate, so that it has no value per datum.
    """
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and frame.dim == -1:
            return frame
    raise ValueError(
        f'site {name!r}: expected per-datum randomness in `pyro.plate("data", n, dim=-1)`, '
        f"got plates {[(frame.name, frame.dim) for frame in site['cond_indep_stack']]} (name, dim)"
    )


def check_support(name: str, site: str, fn: Any, x: Tensor, *, probabilities: bool = False) -> None:
    """Raise if a datum is outside the support of the distribution that observes it.

    Args:
        name: the argument that the data came in.
        site: the observed site.
        fn: its distribution.
        x: data ``[n, *event]``.
        probabilities: ``x`` are probabilities of bits that will be drawn.

    Raises:
        ValueError: naming the site, the values found and what to do.
    """
    try:
        support = torch.distributions.constraints.unit_interval if probabilities else fn.support
    except NotImplementedError:  # a distribution without a stated support
        return
    for start in range(0, len(x), 10_000):
        chunk = x[start : start + 10_000]
        inside = support.check(chunk).reshape(len(chunk), -1).all(1)
        if inside.all():
            continue
        row = int((~inside).nonzero()[0])
        low, high = float(chunk[row].min()), float(chunk[row].max())
        boolean = "oolean" in repr(support) and low >= 0 and high <= 1
        advice = "; binarise it (`binarization='dynamic'`) or use ContinuousBernoulli" if boolean else ""
        raise ValueError(
            f"{name}: datum {start + row} is outside the support of site {site!r}, {support}: "
            f"its values reach from {low:.6g} to {high:.6g}{advice}"
        )
