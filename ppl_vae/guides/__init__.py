"""Guides: Pyro programs over a model's latent sites."""

if __name__ != "ppl_vae.guides":
    raise ImportError(f"import ppl_vae.guides instead: {__name__!r} is a link in the checkout, not a package")

from ppl_vae.guides.mean_field import MeanFieldGuide as MeanFieldGuide

__all__ = ["MeanFieldGuide"]
