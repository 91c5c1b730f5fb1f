"""Plots of results: each function takes a result and an axes, draws, and returns the axes."""

from ppl_vae.plots.estimators import plot_estimators as plot_estimators
from ppl_vae.plots.history import plot_history as plot_history
from ppl_vae.plots.interpolation import plot_interpolation as plot_interpolation
from ppl_vae.plots.latents import plot_latents as plot_latents
from ppl_vae.plots.reconstructions import plot_reconstructions as plot_reconstructions
from ppl_vae.plots.samples import plot_samples as plot_samples
from ppl_vae.plots.traversal import plot_traversal as plot_traversal

__all__ = [
    "plot_estimators",
    "plot_history",
    "plot_interpolation",
    "plot_latents",
    "plot_reconstructions",
    "plot_samples",
    "plot_traversal",
]
