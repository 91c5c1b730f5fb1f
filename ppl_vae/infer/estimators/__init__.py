"""ELBO estimators: each a ``pyro.infer.ELBO`` made of per-datum log weights."""

from ppl_vae.infer.estimators.beta_tc_elbo import BetaTC_ELBO as BetaTC_ELBO
from ppl_vae.infer.estimators.ciwae import CIWAE as CIWAE
from ppl_vae.infer.estimators.cubo import CUBO as CUBO
from ppl_vae.infer.estimators.dip_elbo import DIP_ELBO as DIP_ELBO
from ppl_vae.infer.estimators.dreg import DReG as DReG
from ppl_vae.infer.estimators.enum_elbo import EnumELBO as EnumELBO
from ppl_vae.infer.estimators.iwae import IWAE as IWAE
from ppl_vae.infer.estimators.kl_elbo import KL_ELBO as KL_ELBO
from ppl_vae.infer.estimators.miwae import MIWAE as MIWAE
from ppl_vae.infer.estimators.piwae import PIWAE as PIWAE
from ppl_vae.infer.estimators.relaxed_elbo import RelaxedELBO as RelaxedELBO
from ppl_vae.infer.estimators.renyi import Renyi as Renyi
from ppl_vae.infer.estimators.score_function_elbo import ScoreFunctionELBO as ScoreFunctionELBO
from ppl_vae.infer.estimators.stl_elbo import STL_ELBO as STL_ELBO
from ppl_vae.infer.estimators.tvo import TVO as TVO
from ppl_vae.infer.estimators.vimco import VIMCO as VIMCO
from ppl_vae.infer.estimators.wake_sleep import WakeSleep as WakeSleep

__all__ = [
    "CIWAE",
    "CUBO",
    "DIP_ELBO",
    "IWAE",
    "KL_ELBO",
    "MIWAE",
    "PIWAE",
    "STL_ELBO",
    "TVO",
    "VIMCO",
    "BetaTC_ELBO",
    "DReG",
    "EnumELBO",
    "RelaxedELBO",
    "Renyi",
    "ScoreFunctionELBO",
    "WakeSleep",
]
