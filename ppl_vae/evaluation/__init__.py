"""Evaluation: how good a trained pair is, and what it generates."""

from ppl_vae.evaluation.evaluate import Estimate as Estimate
from ppl_vae.evaluation.evaluate import Evaluation as Evaluation
from ppl_vae.evaluation.evaluate import evaluate as evaluate

__all__ = ["Estimate", "Evaluation", "evaluate"]
