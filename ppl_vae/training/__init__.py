"""Training: ``fit``, ``fit_many`` and the runs that they save."""

from ppl_vae.training.fit import fit as fit
from ppl_vae.training.fit_many import fit_many as fit_many
from ppl_vae.training.fit_prior import fit_prior as fit_prior
from ppl_vae.training.saving import Run as Run
from ppl_vae.training.saving import load_run as load_run
from ppl_vae.training.start_clusters import start_clusters as start_clusters

__all__ = ["Run", "fit", "fit_many", "fit_prior", "load_run", "start_clusters"]
