"""Guides: Pyro programs over a model's latent sites."""

from ppl_vae.guides.mean_field import MeanFieldGuide as MeanFieldGuide

__all__ = ["MeanFieldGuide"]
