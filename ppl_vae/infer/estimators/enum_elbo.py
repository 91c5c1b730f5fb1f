"""The ELBO with discrete latents summed out."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae._checks import check_positive_int
from ppl_vae.infer.running import Program


class EnumELBO(TraceEnum_ELBO):
    """The ELBO summed over all values of the discrete latents: Pyro's, without marks on the programs.

    Every discrete site of finite support is enumerated in parallel, one of several dimensions
    (``.to_event``) too. S sites, or dimensions, of C values cost C^S runs of the decoder.

    Args:
        num_particles: the number of draws per datum of the other sites.
        max_plate_nesting: the number of plates, 1 for the plate of the data alone.
        max_values: the most combinations of values that are enumerated for a datum.

    Raises:
        ValueError: on a run, if there are more.

    Example:
        >>> EnumELBO().max_plate_nesting
        1
    """

    def __init__(
        self, num_particles: int = 1, *, max_plate_nesting: int = 1, max_values: int = 10_000
    ) -> None:
        super().__init__(
            num_particles=check_positive_int("num_particles", num_particles),
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=num_particles > 1,
            strict_enumeration_warning=False,
        )
        self.max_values = check_positive_int("max_values", max_values)

    def _get_traces(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        # what is entered last sees a site first
        counted, enumerable = _Counted(self.max_values), _Enumerable()
        marked = [counted(config_enumerate(enumerable(program))) for program in (model, guide)]
        return super()._get_traces(marked[0], marked[1], args, kwargs)


class _Enumerable(Messenger):
    """Lets sites of several dimensions, each of finite support, be enumerated."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or site_is_subsample(msg) or fn.has_enumerate_support:
            return
        if isinstance(fn, dist.Independent) and fn.base_dist.has_enumerate_support:
            msg["fn"] = _Product(fn.base_dist, fn.reinterpreted_batch_ndims)


class _Product(dist.Independent):
    """Independent dimensions whose support is all combinations of theirs."""

    has_enumerate_support = True

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all combinations, ``[C ** dimensions, *batch, *event]``; batch of ones unless expanded."""
        one = self.base_dist.enumerate_support(expand=False)  # [C, *1, *event of the base]
        one = one.reshape(len(one), *one.shape[1 + len(self.base_dist.batch_shape) :])
        dims = self.event_shape[: self.reinterpreted_batch_ndims]
        index = torch.cartesian_prod(*[torch.arange(len(one), device=one.device)] * dims.numel())
        values = one[index.view(-1, *dims)]
        values = values.view(len(values), *(1,) * len(self.batch_shape), *self.event_shape)
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values


class _Counted(Messenger):
    """Raises before a program enumerates more combinations of values than there is room for."""

    def __init__(self, max_values: int) -> None:
        super().__init__()
        self.max_values = max_values
        self.values: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or not msg["fn"].has_enumerate_support:
            return
        self.values[msg["name"]] = _number_of_values(msg["fn"])
        if (total := math.prod(self.values.values())) > self.max_values:
            raise ValueError(
                f"site {msg['name']!r}: expected at most max_values={self.max_values} combinations of values "
                f"to enumerate, got {total} of the sites {list(self.values)}; use VIMCO or ScoreFunctionELBO"
            )


def _number_of_values(fn: Any) -> int:
    if isinstance(fn, _Product):  # not all of which there may be room for
        return _number_of_values(fn.base_dist) ** fn.event_shape[: fn.reinterpreted_batch_ndims].numel()
    return len(fn.enumerate_support(expand=False))
