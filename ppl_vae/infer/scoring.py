"""One vectorised run of model and guide as an estimator needs it: log-probabilities per draw and datum."""

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import is_validation_enabled, site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

from ppl_vae.infer.log_weights import PARTICLE_DIM, Terms, check_auxiliary, per_datum_log_prob
from ppl_vae.infer.running import (
    Program,
    Site,
    calls_of_modules,
    data_plate_size,
    latent_sites,
    observed_sites,
    without_table,
)

Gradient = Literal["full", "path", "score"]


@dataclass(frozen=True)
class Scores:
    r"""Log-probabilities of K draws per datum, unscaled by plates, nats, ``[K, n]``.

    Attributes:
        reconstruction: log p(x | z), weighted where the programs weigh the likelihood alone.
        log_likelihood: log p(x | z).
        prior: log p(z) of each latent site of the model.
        guide: log q(z | x) of each latent site of the guide.
        weights: the KL weight that the programs give each latent site with ``poutine.scale``; 1 without.
        scale: what the sum over the batch is multiplied by: N / B in a subsampled plate.
        draws: the draws that were scored, by the guide's latent sites.
        coupling: a module of the model that makes a datum's terms depend on other data, if it was looked for.
        model_sites: the model's latent sites.
        guide_sites: the guide's latent sites, in the order of its run.
    """

    reconstruction: Tensor
    log_likelihood: Tensor
    prior: dict[str, Tensor]
    guide: dict[str, Tensor]
    weights: dict[str, Any]
    scale: Any
    draws: dict[str, Tensor]
    model_sites: dict[str, Site]
    guide_sites: dict[str, Site]
    coupling: nn.Module | None

    def log_weights(self, kl_weight: Any = 1.0) -> Tensor:
        """Return log p(x | z) - sum of weight * (log q(z | x) - log p(z)), ``[K, n]``."""
        total = self.reconstruction
        if is_zero(kl_weight):  # whatever the KL is
            return total
        for name in self.guide:
            total = total - kl_weight * self.weights[name] * self.kl(name)
        return total

    def joint(self, kl_weight: Any = 1.0) -> Tensor:
        """Return log p(x | z) + sum of weight * log p(z), ``[K, n]``."""
        total = self.reconstruction
        for name, log_prob in self.prior.items():
            total = total + kl_weight * self.weights[name] * log_prob
        return total

    def kl(self, name: str) -> Tensor:
        """Return a site's log q(z | x) - log p(z), ``[K, n]``; its mean over draws is the KL divergence."""
        return self.guide[name] - self.prior[name] if name in self.prior else self.guide[name]

    def terms(self) -> Terms:
        """Return the parts of the ELBO, detached."""
        return Terms(self.log_likelihood.detach(), {name: self.kl(name).detach() for name in self.guide})


def score(
    model: Program,
    guide: Program,
    *batch: Tensor,
    num_particles: int = 1,
    gradient: Gradient = "full",
    drawing: Messenger | None = None,
    find_coupling: bool = False,
) -> Scores:
    """Run guide and model on K draws per datum in one pass, and score the draws.

    Args:
        model: program over the latent sites and the data.
        guide: program over the latent sites; its encoder runs once per datum.
        *batch: what both are called with, each ``[n, ...]``.
        num_particles: K.
        gradient: which way gradients reach the guide's parameters. ``"full"``: through the draws that
            are reparameterised, and through log q. ``"path"``: through the draws alone, log q is that of
            a guide whose parameters are constants. ``"score"``: through log q alone, the draws are
            constants. A hook on ``Scores.draws`` sees the gradient of the model's log-probabilities, with
            ``"path"`` that of log q too.
        drawing: makes the draws of the guide; None for its own, or constants of them for ``"score"``.
        find_coupling: look for modules of the model that couple data.

    Raises:
        ValueError: if a site is outside the data plate, model and guide have other latent sites or
            weigh one differently, or (``"path"``) the guide can't be scored apart from its draws.
    """
    particles = pyro.plate("num_particles", num_particles, dim=PARTICLE_DIM) if num_particles > 1 else None
    run_guide = guide if particles is None else particles(guide)
    run_model = model if particles is None else particles(model)
    if gradient == "score":
        drawing = _ConstantDraws()
    log_q: dict[str, Tensor] | None = None
    with _errors_without_table():
        # outside of the plates, which widen what is drawn
        guide_trace = poutine.trace(run_guide if drawing is None else drawing(run_guide)).get_trace(*batch)
        guide_sites = latent_sites(guide_trace)
        aliases = _with_aliases(guide_trace)
        if gradient == "path":
            log_q = _log_q_of_constants(guide, run_guide, aliases, batch)
        with _coupling(find_coupling) as coupled:
            model_trace = poutine.trace(poutine.replay(run_model, trace=aliases)).get_trace(*batch)
    for name in observed_sites(guide_trace):
        raise ValueError(
            f"site {name!r}: expected no observed site (`obs=`, `pyro.factor`) in the guide, which would not "
            "count"
        )
    draws = {name: site["value"] for name, site in latent_sites(aliases).items()}
    sites = latent_sites(model_trace), observed_sites(model_trace), guide_sites
    return _scores(*sites, draws, log_q, coupled[0] if coupled else None)


def is_zero(weight: Any) -> bool:
    """Return whether a weight is the number 0; a tensor's value is not looked at."""
    return isinstance(weight, (int, float)) and weight == 0


@contextmanager
def _coupling(look: bool) -> Iterator[list[nn.Module]]:
    """Give the modules that run inside and make one datum's output depend on the others."""
    found: list[nn.Module] = []
    if not look:
        yield found
        return

    def on_call(module: nn.Module) -> None:
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            found.append(module)

    with calls_of_modules(on_call):
        yield found


@contextmanager
def _errors_without_table() -> Iterator[None]:
    """Let errors of a program come as they are, without Pyro's table of all shapes."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if (cause := without_table(error)) is error:
            raise
        raise cause from None


def _scores(
    model_sites: dict[str, Site],
    observed: dict[str, Site],
    guide_sites: dict[str, Site],
    draws: dict[str, Tensor],
    log_q: dict[str, Tensor] | None,
    coupling: nn.Module | None,
) -> Scores:
    if not observed:
        raise ValueError("model: expected an observed site (`obs=x`), found none")
    if missing := sorted(model_sites.keys() - guide_sites.keys()):
        raise ValueError(f"guide: lacks the model's latent sites {missing}; it has {sorted(guide_sites)}")
    check_auxiliary(guide_sites, model_sites)
    plate = _plate_scale(*next(iter(observed.items())))
    for name, site in [*observed.items(), *model_sites.items(), *guide_sites.items()]:
        data_plate_size(name, site)
        if not math.isclose(_plate_scale(name, site), plate):
            raise ValueError(
                f"site {name!r}: expected the plate scale N / B = {plate:g} of the other sites, "
                f"got {_plate_scale(name, site):g}: model and guide disagree on the data's number"
            )
    own = {name: _own_scale(site, plate) for name, site in observed.items()}
    common = _common(list(own.values()))
    latents = [*model_sites.values(), *guide_sites.values()]
    if all(_same(_own_scale(site, plate), 1.0) for site in latents):
        common = 1.0  # a weight of the likelihood alone
    log_probs = {name: per_datum_log_prob(name, site) for name, site in observed.items()}
    weighted = [
        log_prob if _same(own[name], common) else log_prob * own[name] / common
        for name, log_prob in log_probs.items()
    ]
    likelihoods = list(log_probs.values())
    weights = {}
    for name, site in guide_sites.items():
        in_guide = _own_scale(site, plate)
        in_model = _own_scale(model_sites[name], plate) if name in model_sites else in_guide
        weights[name] = _weight(name, in_model, in_guide, common)
    return Scores(
        reconstruction=sum(weighted[1:], weighted[0]),
        log_likelihood=sum(likelihoods[1:], likelihoods[0]),
        prior={name: per_datum_log_prob(name, site) for name, site in model_sites.items()},
        guide=log_q
        if log_q is not None
        else {name: per_datum_log_prob(name, site) for name, site in guide_sites.items()},
        weights=weights,
        scale=plate * common,
        draws=draws,
        model_sites=model_sites,
        guide_sites=guide_sites,
        coupling=coupling,
    )


# -- scales ----------------------------------------------------------------------------------------


def _plate_scale(name: str, site: Site) -> float:
    """Return what the plates alone multiply a site's log-probability by: N / B of a subsampling plate."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    return math.prod((frame.full_size or frame.size) / frame.size for frame in frames if frame.size)


def _own_scale(site: Site, plate: float) -> Any:
    """Return the scale that the program itself gives a site, by ``poutine.scale``."""
    return site["scale"] / plate


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):  # values of tensors are not looked at
        return a is b
    return math.isclose(a, b, rel_tol=1e-9)


def _alike(scales: Sequence[Any]) -> list[Tensor] | None:
    """Return scales as tensors of one dtype and device, or None if all are numbers."""
    like = next((scale for scale in scales if isinstance(scale, Tensor)), None)
    if like is None:
        return None
    return [s.to(like) if isinstance(s, Tensor) else like.new_tensor(s) for s in scales]


def _common(scales: Sequence[Any]) -> Any:
    """Return the scale that all observed sites have, or 1 if they have several."""
    first, *others = scales
    if all(_same(scale, first) for scale in others):
        return first
    tensors = _alike(scales)
    if tensors is None:
        return 1.0
    for other in tensors[1:]:
        tensors[0] = torch.where(tensors[0].isclose(other), tensors[0], 1.0)
    return tensors[0]


def _weight(name: str, in_model: Any, in_guide: Any, common: Any) -> Any:
    """Return a latent site's KL weight, given by one of the programs or alike by both."""
    if (tensors := _alike([in_model, in_guide, common])) is not None:
        model, guide, data = tensors
        same, one = model.isclose(guide), torch.ones_like(data)
        single = data.isclose(one) & (model.isclose(one) | guide.isclose(one))
        if not is_validation_enabled() or bool((same | single).all()):  # Pyro, too, looks at scales then only
            return torch.where(same, model, torch.where(single, model * guide, math.nan)) / data
    elif _same(in_model, in_guide):
        return in_model / common
    elif _same(common, 1.0) and (_same(in_model, 1.0) or _same(in_guide, 1.0)):
        return in_model * in_guide
    raise ValueError(
        f"site {name!r}: expected one KL weight, got the scale {_shown(in_model)} in the model and "
        f"{_shown(in_guide)} in the guide beside {_shown(common)} of the data; set the estimator's "
        "`kl_weight` instead of `poutine.scale`"
    )


def _shown(scale: Any) -> str:
    return str(scale.tolist()) if isinstance(scale, Tensor) and scale.dim() else f"{float(scale):g}"


# -- which way gradients go ------------------------------------------------------------------------


def check_reparameterized(guide_sites: Mapping[str, Site], why: str) -> None:
    """Raise if a site of the guide can't be drawn with a gradient to its parameters."""
    for name, site in guide_sites.items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"site {name!r}: expected a reparameterised distribution (`has_rsample`) in the guide, since "
                f"{why}, got {name_of(site['fn'])}; use VIMCO (score function), EnumELBO or RelaxedELBO"
            )


def check_apart(scores: Scores, name: str) -> None:
    """Raise if a datum's terms depend on draws of others: the gradient through each draw is weighed."""
    if scores.coupling is not None:
        raise ValueError(
            f"model: expected networks that treat each datum apart, since {name} weighs the gradient of "
            f"each draw, got {type(scores.coupling).__name__} in training mode; use layer normalisation, "
            "KL_ELBO or IWAE"
        )


def check_baseline(scores: Scores, name: str, num_particles: int) -> None:
    """Raise if a site needs the score function and there is no second draw for a baseline."""
    discrete = [site for site, found in scores.guide_sites.items() if not found["fn"].has_rsample]
    if discrete:
        check_apart(scores, name)
    for site in discrete:
        if num_particles < 2:
            raise ValueError(
                f"num_particles: expected at least 2, since site {site!r} is not reparameterised and the "
                f"other draws are the baseline of its score function, got {num_particles}"
            )


class _ConstantDraws(Messenger):
    """Makes the draws of the guide constants: log q alone depends on its parameters."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or site_is_subsample(msg):
            return
        with torch.no_grad():
            value = msg["fn"](*msg["args"], **msg["kwargs"])
        # a new tensor, since a flow keeps what it has drawn, here without gradients, to score it by
        msg["value"], msg["done"] = value.detach(), True


def _with_aliases(trace: Trace) -> Trace:
    """Return the guide's trace with other names for the same draws: a hook on them sees the scores alone."""
    aliased = trace.copy()
    for name in latent_sites(trace):
        node: Any = dict(trace.nodes[name])
        node["value"] = node["value"].view_as(node["value"])
        aliased.nodes[name] = node
    return aliased


def _log_q_of_constants(
    guide: Program, run_guide: Program, trace: Trace, batch: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Return log q of each latent site, whose parameters are constants, as a function of the draws."""
    sites = latent_sites(trace)
    if len(sites) == 1:
        ((name, site),) = sites.items()
        constant = _detached(site["fn"])
        if constant is not None:
            return {name: per_datum_log_prob(name, {**site, "fn": constant})}
    # distributions that depend on other draws, or hold networks: run again
    program = inspect.unwrap(guide)
    parameters = list(program.parameters()) if isinstance(program, nn.Module) else []
    for node in trace.nodes.values():
        if node["type"] == "param":
            value: Any = node["value"]
            parameters.append(value.unconstrained() if hasattr(value, "unconstrained") else value)
    with _Constant(parameters), _repeatable(sites, batch):
        again = poutine.trace(poutine.replay(run_guide, trace=trace)).get_trace(*batch)
        try:
            log_q = {name: per_datum_log_prob(name, site) for name, site in latent_sites(again).items()}
        except (KeyError, NotImplementedError) as error:
            raise ValueError(
                f"sites {sorted(sites)}: expected distributions in the guide that can score a value which "
                f"they have not drawn, got {[name_of(s['fn']) for s in sites.values()]}; use KL_ELBO or IWAE"
            ) from error
    _check_constant(log_q, sites)
    return log_q


def _check_constant(log_q: Mapping[str, Tensor], sites: Mapping[str, Site]) -> None:
    """Raise if log q still depends on a parameter, by a way other than the draws."""
    ends = {site["value"].grad_fn for site in sites.values()}
    nodes = [value.grad_fn for value in log_q.values()]
    seen = set(ends)
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") or type(node).__name__ == "CheckpointFunctionBackward":
            raise ValueError(
                f"sites {sorted(sites)}: expected a guide whose parameters can be held constant, got one "
                "that computes with them out of reach (torch.jit, a torch.autograd.Function, reentrant "
                "checkpointing, a tensor that is no parameter); use KL_ELBO or IWAE"
            )
        nodes += [following for following, _ in node.next_functions]


def _detached(value: Any) -> Any:
    """Return a distribution with constant parameters, or None if it holds more than tensors."""
    constant = copy.copy(value)
    for key, item in vars(value).items():
        if isinstance(item, Tensor):
            vars(constant)[key] = item.detach()
        elif isinstance(item, Distribution):
            vars(constant)[key] = _detached(item)
            if vars(constant)[key] is None:
                return None
        elif not isinstance(item, _PLAIN):
            return None
    return constant


_PLAIN = (int, float, str, torch.Size, Constraint, torch.dtype, torch.device, type(None))


class _Constant(TorchFunctionMode):
    """Lets parameters be constants for what is computed from them, without changing them.

    Every ``nn.Parameter`` is one; ``others`` are those of ``torch.func`` and of Pyro's store.
    """

    def __init__(self, others: Sequence[Tensor]) -> None:
        super().__init__()
        self.others = {id(parameter) for parameter in others}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ABOUT_GRADIENTS:
            return func(*args, **(kwargs or {}))
        kwargs = {name: self._constant(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._constant, args), **kwargs)

    def _constant(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = value.requires_grad and (id(value) in self.others or isinstance(value, nn.Parameter))
            return value.detach() if known else value
        if type(value) in (list, tuple):  # of tensors, as in `torch.cat` or a recurrent network
            return type(value)(map(self._constant, value))
        return value


# what registers a parameter in Pyro asks for this
_ABOUT_GRADIENTS = {Tensor.requires_grad.__get__, Tensor.is_leaf.__get__}  # type: ignore[attr-defined]


@contextmanager
def _repeatable(sites: Mapping[str, Site], batch: tuple[Tensor, ...]) -> Iterator[None]:
    """Let a program's second run be as its first: no other draws, running means count a batch once."""
    quiet: list[Any] = []

    def on_call(module: nn.Module) -> None:
        if module.training and isinstance(module, _NormBase) and module.track_running_stats:
            module.track_running_stats = False
            quiet.append(module)

    before = _random_states(batch)
    try:
        with calls_of_modules(on_call):
            yield
    finally:
        for module in quiet:
            module.track_running_stats = True
    if not all(map(torch.equal, before, _random_states(batch))):
        raise ValueError(
            f"sites {sorted(sites)}: expected a guide that draws nothing but its sites, since it is run "
            "twice, got one with dropout or other noise; use KL_ELBO or IWAE, or call `.eval()` on it"
        )


def _random_states(batch: tuple[Tensor, ...]) -> list[Tensor]:
    cuda = {x.device for x in batch if x.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda)]


def name_of(fn: Any) -> str:
    """Return the name of a distribution's kind, for errors: that of the base of an Independent."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return type(fn).__name__
