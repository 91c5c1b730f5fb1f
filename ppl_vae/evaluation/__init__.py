"""Evaluation: how good a trained pair is, and what it generates."""

from ppl_vae.evaluation.aggregate_posterior import (
    sample_aggregate_posterior as sample_aggregate_posterior,
)
from ppl_vae.evaluation.clustering import clustering_accuracy as clustering_accuracy
from ppl_vae.evaluation.clustering import (
    normalized_mutual_information as normalized_mutual_information,
)
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
    "clustering_accuracy",
    "compare_estimators",
    "encode",
    "evaluate",
    "interpolate",
    "normalized_mutual_information",
    "reconstruct",
    "sample",
    "sample_aggregate_posterior",
    "traverse",
]
