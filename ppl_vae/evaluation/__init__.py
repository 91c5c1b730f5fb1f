"""Evaluation: how good a trained pair is, and what it generates."""

from ppl_vae.evaluation.active_units import ActiveUnits as ActiveUnits
from ppl_vae.evaluation.active_units import CollapseReport as CollapseReport
from ppl_vae.evaluation.active_units import active_units as active_units
from ppl_vae.evaluation.active_units import collapse_report as collapse_report
from ppl_vae.evaluation.aggregate_posterior import (
    sample_aggregate_posterior as sample_aggregate_posterior,
)
from ppl_vae.evaluation.annealed_importance_sampling import (
    AnnealedImportanceSampling as AnnealedImportanceSampling,
)
from ppl_vae.evaluation.annealed_importance_sampling import (
    annealed_importance_sampling as annealed_importance_sampling,
)
from ppl_vae.evaluation.bidirectional_monte_carlo import BidirectionalMonteCarlo as BidirectionalMonteCarlo
from ppl_vae.evaluation.bidirectional_monte_carlo import (
    bidirectional_monte_carlo as bidirectional_monte_carlo,
)
from ppl_vae.evaluation.calibration import Calibration as Calibration
from ppl_vae.evaluation.calibration import simulation_based_calibration as simulation_based_calibration
from ppl_vae.evaluation.classifier import Classifier as Classifier
from ppl_vae.evaluation.classifier import train_classifier as train_classifier
from ppl_vae.evaluation.clustering import clustering_accuracy as clustering_accuracy
from ppl_vae.evaluation.clustering import (
    normalized_mutual_information as normalized_mutual_information,
)
from ppl_vae.evaluation.disentanglement_metrics import DCI as DCI
from ppl_vae.evaluation.disentanglement_metrics import Disentanglement as Disentanglement
from ppl_vae.evaluation.disentanglement_metrics import Score as Score
from ppl_vae.evaluation.disentanglement_metrics import beta_vae_score as beta_vae_score
from ppl_vae.evaluation.disentanglement_metrics import dci as dci
from ppl_vae.evaluation.disentanglement_metrics import disentanglement as disentanglement
from ppl_vae.evaluation.disentanglement_metrics import explicitness as explicitness
from ppl_vae.evaluation.disentanglement_metrics import factor_vae_score as factor_vae_score
from ppl_vae.evaluation.disentanglement_metrics import modularity as modularity
from ppl_vae.evaluation.disentanglement_metrics import mutual_information_gap as mutual_information_gap
from ppl_vae.evaluation.disentanglement_metrics import sap_score as sap_score
from ppl_vae.evaluation.distances import median_distance as median_distance
from ppl_vae.evaluation.distances import sliced_wasserstein as sliced_wasserstein
from ppl_vae.evaluation.distances import squared_mmd as squared_mmd
from ppl_vae.evaluation.elbo_decomposition import ElboDecomposition as ElboDecomposition
from ppl_vae.evaluation.elbo_decomposition import elbo_decomposition as elbo_decomposition
from ppl_vae.evaluation.estimators import EstimatorComparison as EstimatorComparison
from ppl_vae.evaluation.estimators import compare_estimators as compare_estimators
from ppl_vae.evaluation.evaluate import Estimate as Estimate
from ppl_vae.evaluation.evaluate import Evaluation as Evaluation
from ppl_vae.evaluation.evaluate import evaluate as evaluate
from ppl_vae.evaluation.generation import Interpolation as Interpolation
from ppl_vae.evaluation.generation import Latents as Latents
from ppl_vae.evaluation.generation import Reconstructions as Reconstructions
from ppl_vae.evaluation.generation import Samples as Samples
from ppl_vae.evaluation.generation import Traversal as Traversal
from ppl_vae.evaluation.generation import encode as encode
from ppl_vae.evaluation.generation import interpolate as interpolate
from ppl_vae.evaluation.generation import reconstruct as reconstruct
from ppl_vae.evaluation.generation import sample as sample
from ppl_vae.evaluation.generation import traverse as traverse
from ppl_vae.evaluation.guides import GuideComparison as GuideComparison
from ppl_vae.evaluation.guides import PosteriorDensity as PosteriorDensity
from ppl_vae.evaluation.guides import compare_guides as compare_guides
from ppl_vae.evaluation.guides import posterior_density as posterior_density
from ppl_vae.evaluation.inference_data import to_inference_data as to_inference_data
from ppl_vae.evaluation.inference_gaps import InferenceGaps as InferenceGaps
from ppl_vae.evaluation.inference_gaps import inference_gaps as inference_gaps
from ppl_vae.evaluation.log_likelihood import LogLikelihood as LogLikelihood
from ppl_vae.evaluation.log_likelihood import log_likelihood as log_likelihood
from ppl_vae.evaluation.pareto import pareto_k_hat as pareto_k_hat
from ppl_vae.evaluation.pareto import pareto_smooth as pareto_smooth
from ppl_vae.evaluation.rate_distortion import RateDistortion as RateDistortion
from ppl_vae.evaluation.rate_distortion import rate_distortion as rate_distortion
from ppl_vae.evaluation.reference_posterior import ReferencePosterior as ReferencePosterior
from ppl_vae.evaluation.reference_posterior import reference_posterior as reference_posterior
from ppl_vae.evaluation.sample_quality import SampleQuality as SampleQuality
from ppl_vae.evaluation.sample_quality import frechet_distance as frechet_distance
from ppl_vae.evaluation.sample_quality import sample_quality as sample_quality

__all__ = [
    "DCI",
    "ActiveUnits",
    "AnnealedImportanceSampling",
    "BidirectionalMonteCarlo",
    "Calibration",
    "Classifier",
    "CollapseReport",
    "Disentanglement",
    "ElboDecomposition",
    "Estimate",
    "EstimatorComparison",
    "Evaluation",
    "GuideComparison",
    "InferenceGaps",
    "Interpolation",
    "Latents",
    "LogLikelihood",
    "PosteriorDensity",
    "RateDistortion",
    "Reconstructions",
    "ReferencePosterior",
    "SampleQuality",
    "Samples",
    "Score",
    "Traversal",
    "active_units",
    "annealed_importance_sampling",
    "beta_vae_score",
    "bidirectional_monte_carlo",
    "clustering_accuracy",
    "collapse_report",
    "compare_estimators",
    "compare_guides",
    "dci",
    "disentanglement",
    "elbo_decomposition",
    "encode",
    "evaluate",
    "explicitness",
    "factor_vae_score",
    "frechet_distance",
    "inference_gaps",
    "interpolate",
    "log_likelihood",
    "median_distance",
    "modularity",
    "mutual_information_gap",
    "normalized_mutual_information",
    "pareto_k_hat",
    "pareto_smooth",
    "posterior_density",
    "rate_distortion",
    "reconstruct",
    "reference_posterior",
    "sample",
    "sample_aggregate_posterior",
    "sample_quality",
    "sap_score",
    "simulation_based_calibration",
    "sliced_wasserstein",
    "squared_mmd",
    "to_inference_data",
    "train_classifier",
    "traverse",
]
