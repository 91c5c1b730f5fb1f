"""Training: ``fit`` and the runs that it saves."""

from ppl_vae.training.fit import fit as fit
from ppl_vae.training.saving import Run as Run
from ppl_vae.training.saving import load_run as load_run

__all__ = ["Run", "fit", "load_run"]
