"""Evaluation: how good a trained pair is, and what it generates."""

from ppl_vae.evaluation.estimators import EstimatorComparison as EstimatorComparison
from ppl_vae.evaluation.estimators import compare_estimators as compare_estimators
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
    "EstimatorComparison",
    "Evaluation",
    "compare_estimators",
    "encode",
    "evaluate",
    "interpolate",
    "reconstruct",
    "sample",
    "traverse",
]
