"""Inference: estimators of the ELBO and other bounds, the loss as a module, and the engine."""

from ppl_vae.infer.compiled_svi import CompiledSVI as CompiledSVI
from ppl_vae.infer.estimator import Estimator as Estimator
from ppl_vae.infer.estimators import CIWAE as CIWAE
from ppl_vae.infer.estimators import CUBO as CUBO
from ppl_vae.infer.estimators import DIP_ELBO as DIP_ELBO
from ppl_vae.infer.estimators import IWAE as IWAE
from ppl_vae.infer.estimators import KL_ELBO as KL_ELBO
from ppl_vae.infer.estimators import MIWAE as MIWAE
from ppl_vae.infer.estimators import PIWAE as PIWAE
from ppl_vae.infer.estimators import STL_ELBO as STL_ELBO
from ppl_vae.infer.estimators import TVO as TVO
from ppl_vae.infer.estimators import VIMCO as VIMCO
from ppl_vae.infer.estimators import BetaTC_ELBO as BetaTC_ELBO
from ppl_vae.infer.estimators import DReG as DReG
from ppl_vae.infer.estimators import EnumELBO as EnumELBO
from ppl_vae.infer.estimators import RelaxedELBO as RelaxedELBO
from ppl_vae.infer.estimators import Renyi as Renyi
from ppl_vae.infer.estimators import ScoreFunctionELBO as ScoreFunctionELBO
from ppl_vae.infer.estimators import WakeSleep as WakeSleep
from ppl_vae.infer.log_weights import log_weights as log_weights
from ppl_vae.infer.objective import Objective as Objective
from ppl_vae.infer.row_adam import RowAdam as RowAdam
from ppl_vae.infer.schedules import CyclicalWarmup as CyclicalWarmup
from ppl_vae.infer.schedules import LinearWarmup as LinearWarmup
from ppl_vae.infer.svi import SVI as SVI

__all__ = [
    "CIWAE",
    "CUBO",
    "DIP_ELBO",
    "IWAE",
    "KL_ELBO",
    "MIWAE",
    "PIWAE",
    "STL_ELBO",
    "SVI",
    "TVO",
    "VIMCO",
    "BetaTC_ELBO",
    "CompiledSVI",
    "CyclicalWarmup",
    "DReG",
    "EnumELBO",
    "Estimator",
    "LinearWarmup",
    "Objective",
    "RelaxedELBO",
    "Renyi",
    "RowAdam",
    "ScoreFunctionELBO",
    "WakeSleep",
    "log_weights",
]
