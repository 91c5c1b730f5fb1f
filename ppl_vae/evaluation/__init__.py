"""Evaluation: how good a trained pair is, and what it generates."""

from ppl_vae.evaluation.evaluate import Estimate as Estimate
from ppl_vae.evaluation.evaluate import Evaluation as Evaluation
from ppl_vae.evaluation.evaluate import evaluate as evaluate
from ppl_vae.evaluation.generation import encode as encode
from ppl_vae.evaluation.generation import interpolate as interpolate
from ppl_vae.evaluation.generation import reconstruct as reconstruct
from ppl_vae.evaluation.generation import sample as sample
from ppl_vae.evaluation.generation import traverse as traverse

__all__ = [
    "Estimate",
    "Evaluation",
    "encode",
    "evaluate",
    "interpolate",
    "reconstruct",
    "sample",
    "traverse",
]
