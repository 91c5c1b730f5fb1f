"""Maximum likelihood of a prior, on draws of the aggregate posterior say."""

import contextlib

import torch
from torch import Tensor, nn
from tqdm import trange

from ppl_vae._checks import check_positive, check_positive_int, check_seed
from ppl_vae.priors.gaussian_mixture import check_samples


def fit_prior(
    prior: nn.Module,
    z: Tensor,
    steps: int = 2000,
    *,
    context: Tensor | None = None,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Fit a prior to draws by maximum likelihood: steps of Adam, whose rate falls to zero.

    With draws of the aggregate posterior, the prior that this tends to is the one of the best mean ELBO for
    the guide and the likelihood as they are. Parameters that are not the prior's, those of a VampPrior's
    guide say, stay.

    Args:
        prior: a prior with parameters.
        z: draws ``[n, latent]``.
        steps: the number of steps.
        context: of each draw, ``[n, ...]``, for a conditional prior.
        batch_size: draws per step, chosen at random.
        learning_rate: of the first step.
        seed: of the choice; the random stream is left alone.
        progress: show a bar.

    Returns:
        The loss of each step, the negative log-likelihood in nats per draw.

    Raises:
        TypeError, ValueError: if ``z`` are no draws, the prior has no trainable parameter, or an argument is
            not above 0.
        FloatingPointError: if the loss is not finite.

    Example:
        >>> from ppl_vae.priors.gaussian_mixture import GaussianMixture
        >>> prior = GaussianMixture(2, components=3)
        >>> losses = fit_prior(prior, 5 + torch.randn(500, 2), steps=200, learning_rate=0.1, progress=False)
        >>> losses[-1] < losses[0] - 5
        True
    """
    check_samples(z)
    if context is not None and len(context) != len(z):
        raise ValueError(f"context: expected one for each of {len(z)} draws, got {len(context)}")
    parameters = [p for p in prior.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"prior: expected a prior with trainable parameters, got {type(prior).__name__}")
    check_positive_int("steps", steps)
    size = min(check_positive_int("batch_size", batch_size), len(z))
    optimizer = torch.optim.Adam(parameters, lr=check_positive("learning_rate", learning_rate))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(check_seed(seed))
    losses = []
    z = z.detach()
    with contextlib.ExitStack() as stack:
        for module in _held(prior):
            stack.callback(setattr, module, "training", module.training)
            module.training = False
        for _ in trange(steps, desc=type(prior).__name__, disable=not progress):
            chosen = torch.randint(len(z), (size,), generator=generator).to(z.device)
            loss = -prior(None if context is None else context[chosen]).log_prob(z[chosen]).mean()
            losses.append(float(loss.detach()))
            if not loss.isfinite():
                raise FloatingPointError(
                    f"the loss of step {len(losses)} is {losses[-1]}; lower learning_rate"
                )
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    return losses


def _held(prior: nn.Module) -> list[nn.Module]:
    """Return the modules of the guide that a VampPrior refers to, whose batch norms are not to change."""
    guide = vars(prior).get("guide")
    return list(guide.modules()) if isinstance(guide, nn.Module) else []
