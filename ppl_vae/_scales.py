"""Standard deviations from the outputs of networks."""

from torch import Tensor

LOG_SCALE = 7.0  # log sigma is clamped to plus and minus this


def bounded_scale(log_scale: Tensor) -> Tensor:
    """Return sigma of log sigma, which is clamped to [-7, 7]."""
    return log_scale.clamp(-LOG_SCALE, LOG_SCALE).exp()
