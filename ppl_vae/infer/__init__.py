"""Inference: estimators of the ELBO and other bounds, the loss as a module, and the engine."""

from ppl_vae.infer.aggregate import DIP_ELBO as DIP_ELBO
from ppl_vae.infer.aggregate import BetaTC_ELBO as BetaTC_ELBO
from ppl_vae.infer.discrete import VIMCO as VIMCO
from ppl_vae.infer.discrete import EnumELBO as EnumELBO
from ppl_vae.infer.discrete import RelaxedELBO as RelaxedELBO
from ppl_vae.infer.discrete import ScoreFunctionELBO as ScoreFunctionELBO
from ppl_vae.infer.elbo import KL_ELBO as KL_ELBO
from ppl_vae.infer.elbo import STL_ELBO as STL_ELBO
from ppl_vae.infer.importance import CIWAE as CIWAE
from ppl_vae.infer.importance import CUBO as CUBO
from ppl_vae.infer.importance import IWAE as IWAE
from ppl_vae.infer.importance import MIWAE as MIWAE
from ppl_vae.infer.importance import PIWAE as PIWAE
from ppl_vae.infer.importance import TVO as TVO
from ppl_vae.infer.importance import DReG as DReG
from ppl_vae.infer.importance import Renyi as Renyi
from ppl_vae.infer.log_weights import log_weights as log_weights
from ppl_vae.infer.objective import Objective as Objective
from ppl_vae.infer.schedules import CyclicalWarmup as CyclicalWarmup
from ppl_vae.infer.schedules import LinearWarmup as LinearWarmup
from ppl_vae.infer.svi import SVI as SVI
from ppl_vae.infer.wake_sleep import WakeSleep as WakeSleep

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
    "CyclicalWarmup",
    "DReG",
    "EnumELBO",
    "LinearWarmup",
    "Objective",
    "RelaxedELBO",
    "Renyi",
    "ScoreFunctionELBO",
    "WakeSleep",
    "log_weights",
]
