"""What every test and doctest starts from, and must leave as it was."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pyro
import pytest
import torch
from torch.distributions import Distribution

ROOT = Path(__file__).resolve().parent

os.environ.setdefault("MPLBACKEND", "Agg")  # figures need no screen

# The root links to folders of ppl_vae, which refuse to be imported through them.
collect_ignore = ["models", "guides"]


class TorchRandom:
    """Torch's generator as hypothesis wants it, so that a failing example fails again when it is replayed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()  # hypothesis keeps a weak reference
hypothesis.register_random(torch_random)
hypothesis.settings.register_profile("ppl_vae", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("ppl_vae")


@pytest.fixture(autouse=True)
def clean_start() -> Iterator[None]:
    """Start at seed 0, parameter store empty, validation on; fail a test that changes a default of torch."""
    with torch.random.fork_rng(devices=[]):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        pyro.enable_validation(True)
        dtype, validation = torch.get_default_dtype(), Distribution._validate_args
        yield
        changed = []
        if Distribution._validate_args != validation:
            changed.append(f"argument validation from {validation} to {Distribution._validate_args}")
            Distribution.set_default_validate_args(validation)
        if torch.get_default_dtype() != dtype:
            changed.append(f"the default dtype from {dtype} to {torch.get_default_dtype()}")
            torch.set_default_dtype(dtype)
    if changed:
        pytest.fail(f"the test changed {' and '.join(changed)} for the whole process", pytrace=False)


@pytest.fixture
def mnist_root() -> Path:
    """Return the folder that holds MNIST/raw: ``$PPL_VAE_DATA``, or a data folder beside the checkout."""
    root = Path(os.environ.get("PPL_VAE_DATA") or ROOT.parent / "shared" / "data")
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST/raw in {root}: set PPL_VAE_DATA to the folder that holds it")
    return root
