"""Draws of the aggregate posterior."""

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_vae._checks import check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.infer.running import Program, evaluating, in_own_store


def sample_aggregate_posterior(
    guide: Program, *batch: Tensor, batch_size: int = 1000, seed: int = 0
) -> Tensor:
    """Return one draw of q(z | x) for each datum: together, draws of the aggregate posterior.

    Args:
        guide: a program over the site ``z``, run in evaluation mode.
        *batch: what it is called with, the data ``[n, *event]`` first.
        batch_size: how many data it is called with at a time.
        seed: of the draws; the random stream is left as it was.

    Returns:
        ``[n, latent]``, without gradients.

    Raises:
        TypeError: if the batch has no tensors.
        ValueError: if the guide has no site ``z``.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> sample_aggregate_posterior(MeanFieldGuide(MLP(4), 2), torch.randn(50, 4)).shape
        torch.Size([50, 2])
    """
    if not batch or not all(isinstance(part, Tensor) for part in batch):
        raise TypeError(f"batch: expected tensors, the data first, got {[type(b).__name__ for b in batch]}")
    size = check_positive_int("batch_size", batch_size)
    drawn = []
    with seeded(check_seed(seed)), evaluating(guide):
        for parts in zip(*(part.split(size) for part in batch), strict=True):
            site: Any = poutine.trace(in_own_store(guide)).get_trace(*parts).nodes.get("z")
            if site is None:
                raise ValueError("guide: expected a latent site 'z', found none")
            drawn.append(site["value"])
    return torch.cat(drawn)
