"""Random streams that don't touch the caller's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from pyro.util import get_rng_state, set_rng_state


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Run with the streams of torch, CUDA, NumPy and Python seeded by ``key``; put them back at the end."""
    state = get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, the stream that programs of others draw from
    if cuda is not None:
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
