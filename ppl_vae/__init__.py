"""Variational autoencoders as Pyro model / guide pairs."""

from importlib.metadata import version

from ppl_vae.evaluation import evaluate as evaluate
from ppl_vae.training import fit as fit
from ppl_vae.training import fit_many as fit_many
from ppl_vae.training import load_run as load_run

__version__ = version("ppl-vae")

__all__ = ["__version__", "evaluate", "fit", "fit_many", "load_run"]
