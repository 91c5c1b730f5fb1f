"""Plots of results: each function takes a result and an axes, draws, and returns the axes."""

from ppl_vae.plots.calibration import plot_calibration as plot_calibration
from ppl_vae.plots.calibration import plot_coverage as plot_coverage
from ppl_vae.plots.collapse import plot_collapse as plot_collapse
from ppl_vae.plots.disentanglement import plot_disentanglement as plot_disentanglement
from ppl_vae.plots.estimators import plot_estimators as plot_estimators
from ppl_vae.plots.gaps import plot_gaps as plot_gaps
from ppl_vae.plots.history import plot_history as plot_history
from ppl_vae.plots.images import plot_images as plot_images
from ppl_vae.plots.interpolation import plot_interpolation as plot_interpolation
from ppl_vae.plots.latents import plot_latents as plot_latents
from ppl_vae.plots.posterior import plot_posterior as plot_posterior
from ppl_vae.plots.rate_distortion import plot_rate_distortion as plot_rate_distortion
from ppl_vae.plots.reconstructions import plot_reconstructions as plot_reconstructions
from ppl_vae.plots.samples import plot_samples as plot_samples
from ppl_vae.plots.tasks import plot_anomaly_scores as plot_anomaly_scores
from ppl_vae.plots.tasks import plot_augmentation as plot_augmentation
from ppl_vae.plots.tasks import plot_denoising as plot_denoising
from ppl_vae.plots.tasks import plot_edits as plot_edits
from ppl_vae.plots.tasks import plot_imputation as plot_imputation
from ppl_vae.plots.tasks import plot_latent_arithmetic as plot_latent_arithmetic
from ppl_vae.plots.tasks import plot_roc_curves as plot_roc_curves
from ppl_vae.plots.traversal import plot_traversal as plot_traversal

__all__ = [
    "plot_anomaly_scores",
    "plot_augmentation",
    "plot_calibration",
    "plot_collapse",
    "plot_coverage",
    "plot_denoising",
    "plot_disentanglement",
    "plot_edits",
    "plot_estimators",
    "plot_gaps",
    "plot_history",
    "plot_images",
    "plot_imputation",
    "plot_interpolation",
    "plot_latent_arithmetic",
    "plot_latents",
    "plot_posterior",
    "plot_rate_distortion",
    "plot_reconstructions",
    "plot_roc_curves",
    "plot_samples",
    "plot_traversal",
]
