"""Inference: per-datum weights, the loss as a module, and the engine that takes gradient steps."""

from ppl_vae.infer.log_weights import log_weights as log_weights
from ppl_vae.infer.objective import Objective as Objective
from ppl_vae.infer.svi import SVI as SVI

__all__ = ["SVI", "Objective", "log_weights"]
