"""The deep Markov model."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int
from ppl_vae._scales import bounded_scale
from ppl_vae.models.sequence import sequences
from ppl_vae.networks.recurrent import fill_padding, padding_mask
from ppl_vae.program import Program


class DeepMarkovModel(Program):
    r"""The model :math:`p(z_1) \prod_t p(z_t \mid z_{t-1}) \, p(x_t \mid z_t)` of sequences.

    The latents are a site for each time, ``z_1`` to ``z_T``, the data the one site ``x``. After a sequence's
    end neither adds anything to the log-probabilities. A step is a loop over time: its cost, and that of
    ``CompiledSVI``'s compiling, is proportional to T.

    References:
        Structured Inference Networks for Nonlinear State Space Models (Krishnan et al., 2017),
        arXiv:1609.09869

    Args:
        prior: module whose ``forward()`` returns a Distribution over ``z_1``, event shape ``[latent]``.
        transition: network from ``[*batch, latent]`` to the mean and the log standard deviation of the
            next latent, ``[*batch, 2 * latent]``; the latter is clamped to [-7, 7]. ``GatedTransition``, say.
        likelihood: module whose ``forward(z)`` returns a Distribution over the data of one step.
        max_length: the number of steps of draws.

    Raises:
        TypeError, ValueError: if ``max_length`` is not a whole number above 0.

    Example:
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> from ppl_vae.networks import MLP
        >>> from ppl_vae.networks.recurrent import GatedTransition
        >>> from ppl_vae.priors import StandardNormal
        >>> step = Bernoulli(MLP(2, 88))
        >>> model = DeepMarkovModel(StandardNormal(2), GatedTransition(2), step, max_length=5)
        >>> model(None, size=3).shape
        torch.Size([3, 5, 88])
    """

    def __init__(
        self, prior: nn.Module, transition: nn.Module, likelihood: nn.Module, max_length: int
    ) -> None:
        super().__init__()
        self.prior = prior
        self.transition = transition
        self.likelihood = likelihood
        self.max_length = check_positive_int("max_length", max_length)

    def forward(
        self, x: Tensor | None = None, lengths: Tensor | None = None, *, size: int | None = None
    ) -> Tensor:
        """Run the program: sites ``z_1`` to ``z_T`` and ``x`` in the plate ``data``.

        Args:
            x: sequences ``[n, T, *event]``, of any T, or None to draw ``max_length`` steps from the prior.
            lengths: the number of steps of each that are data, integers ``[n]``; None for all. Draws after
                a sequence's end mean nothing.
            size: the number of sequences to draw when ``x`` and ``lengths`` are None.

        Returns:
            x, given or drawn, ``[*particles, n, T, *event]``.

        Raises:
            ValueError: if ``x`` has another event shape than the likelihood, or all are None.
        """
        n = sequences(x, lengths, size)
        if x is not None and x.dim() < 2:
            raise ValueError(f"x: expected sequences [n, T, *event], got shape {list(x.shape)}")
        steps = self.max_length if x is None else x.shape[1]
        mask = None if lengths is None else padding_mask(lengths, steps)
        with pyro.plate("data", n, dim=-1):
            z: list[Tensor] = []
            for t in pyro.markov(range(steps)):
                p = self._next(z[-1]) if t else self.prior()
                z.append(pyro.sample(f"z_{t + 1}", p if mask is None else p.mask(mask[:, t])))
            step = self.likelihood(torch.stack(z, -2))
            if x is not None and x.shape[2:] != step.event_shape:
                raise ValueError(
                    f"x: expected steps of the likelihood's event shape {tuple(step.event_shape)}, "
                    f"got {tuple(x.shape[2:])}"
                )
            if mask is None:
                return pyro.sample("x", step.to_event(1), obs=x)
            obs = (
                None if x is None else fill_padding(x, mask, x.dim() - 2)
            )  # whatever is there has no gradient
            return pyro.sample("x", step.mask(mask).to_event(1), obs=obs)

    def _next(self, z: Tensor) -> dist.TorchDistribution:
        outputs = self.transition(z)
        if outputs.shape[-1] != 2 * z.shape[-1]:
            raise ValueError(
                f"transition: expected {2 * z.shape[-1]} outputs, mean and log-scale of each latent "
                f"dimension, got {outputs.shape[-1]}"
            )
        loc, log_scale = outputs.chunk(2, -1)
        return dist.Normal(loc, bounded_scale(log_scale)).to_event(1)
