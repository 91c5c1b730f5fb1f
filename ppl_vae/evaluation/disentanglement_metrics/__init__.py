"""Disentanglement: scores of codes against known factors of the data."""

from ppl_vae.evaluation.disentanglement_metrics.dci import DCI as DCI
from ppl_vae.evaluation.disentanglement_metrics.dci import dci as dci
from ppl_vae.evaluation.disentanglement_metrics.fixed_factor import beta_vae_score as beta_vae_score
from ppl_vae.evaluation.disentanglement_metrics.fixed_factor import factor_vae_score as factor_vae_score
from ppl_vae.evaluation.disentanglement_metrics.mig import mutual_information_gap as mutual_information_gap
from ppl_vae.evaluation.disentanglement_metrics.modularity import explicitness as explicitness
from ppl_vae.evaluation.disentanglement_metrics.modularity import modularity as modularity
from ppl_vae.evaluation.disentanglement_metrics.report import Disentanglement as Disentanglement
from ppl_vae.evaluation.disentanglement_metrics.report import disentanglement as disentanglement
from ppl_vae.evaluation.disentanglement_metrics.sap import sap_score as sap_score
from ppl_vae.evaluation.disentanglement_metrics.score import Score as Score

__all__ = [
    "DCI",
    "Disentanglement",
    "Score",
    "beta_vae_score",
    "dci",
    "disentanglement",
    "explicitness",
    "factor_vae_score",
    "modularity",
    "mutual_information_gap",
    "sap_score",
]
