"""Sequences whose steps depend on those before."""

from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from ppl_vae.networks.recurrent import AutoregressiveDecoder, fill_padding, padding_mask


class AutoregressiveSequence(dist.TorchDistribution):
    r"""The Distribution :math:`\prod_{t \le l} p(x_t \mid x_{<t}, z)` of sequences of given lengths.

    ``log_prob`` takes one pass of the decoder, ``sample`` a loop over time. Both leave padding out: it adds
    nothing to the log-probability, whatever is there, and draws are zero there. Sequences that are scored may
    have fewer than ``max_length`` steps. There is no closed form of the mean.

    Args:
        decoder: maps z ``[*batch, latent]`` and x ``[*batch, T, *event]`` to outputs of each step.
        emission: makes the Distribution of a step, event shape ``[*event]``, of its outputs.
        z: latents ``[*batch, latent]``.
        lengths: integers ``[n]``, or None for ``max_length``.
        max_length: the number of steps of draws.
        step: the support of a step, ``[*event]``.

    Example:
        >>> from ppl_vae.networks import RecurrentDecoder
        >>> decoder, tokens = RecurrentDecoder(2, vocabulary=5, hidden=8), constraints.integer_interval(0, 4)
        >>> lengths = torch.tensor([4, 2, 3])
        >>> sequences = AutoregressiveSequence(
        ...     decoder, lambda logits: dist.Categorical(logits=logits), torch.zeros(3, 2), lengths, 4, tokens
        ... )
        >>> x = sequences.sample()
        >>> x.shape, sequences.log_prob(x).shape
        (torch.Size([3, 4]), torch.Size([3]))
    """

    arg_constraints: ClassVar = {"z": constraints.real_vector}
    has_rsample = False

    def __init__(
        self,
        decoder: AutoregressiveDecoder,
        emission: Callable[[Tensor], dist.TorchDistribution],
        z: Tensor,
        lengths: Tensor | None,
        max_length: int,
        step: constraints.Constraint,
        validate_args: bool | None = None,
    ) -> None:
        self.decoder = decoder
        self.emission = emission
        self.z = z
        self.lengths = lengths
        self.max_length = max_length
        self.step = step
        self._event = decoder.inputs.event
        batch = z.shape[:-1]
        if lengths is not None:
            batch = torch.broadcast_shapes(batch, lengths.shape)
        super().__init__(batch, torch.Size((max_length, *self._event)), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """The support of whole sequences."""
        return constraints.independent(self.step, 1)

    @property
    def mean(self) -> Tensor:
        """Not known."""
        raise NotImplementedError("the mean of an autoregressive sequence has no closed form: draw samples")

    def expand(self, batch_shape: Any, _instance: Any = None) -> "AutoregressiveSequence":
        """Return the Distribution of a larger batch shape."""
        z = self.z.expand((*batch_shape, self.z.shape[-1]))
        return type(self)(
            self.decoder, self.emission, z, self.lengths, self.max_length, self.step, self._validate_args
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probability of sequences ``[*batch, T, *event]``, nats, ``[*batch]``.

        Raises:
            ValueError: if they have more than ``max_length`` steps, another event shape, or, with validation
                on, values outside the support before their end.
        """
        split = value.dim() - 1 - len(self._event)
        if split < 0 or value.shape[split + 1 :] != self._event or value.shape[split] > self.max_length:
            expected = ", ".join(map(str, ("*batch", f"T <= {self.max_length}", *self._event)))
            raise ValueError(f"x: expected shape [{expected}], got {list(value.shape)}")
        mask = None
        if self.lengths is not None:
            mask = padding_mask(self.lengths, value.shape[split])
            value = fill_padding(value, mask, len(self._event))
        if self._validate_args and not bool(self.support.check(value).all()):
            raise ValueError(f"x: expected values in the support, {self.step}, got others before the end")
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[: value.dim() - 1 - len(self._event)])
        z = self.z.expand((*batch, self.z.shape[-1]))
        log_prob = self.emission(self.decoder(z, value)).log_prob(value)
        if mask is not None:
            log_prob = fill_padding(log_prob, mask, 0)
        return log_prob.sum(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw sequences ``[*sample_shape, *batch, max_length, *event]``, step by step."""
        with torch.no_grad():
            shape = (*sample_shape, *self.batch_shape)
            z = self.z.expand((*shape, self.z.shape[-1]))
            x, state = z.new_zeros((*shape, 0, *self._event)), None
            for _ in range(self.max_length):
                outputs, state = self.decoder.next(z, x, state)
                drawn = self.emission(outputs).sample().to(z.dtype)
                x = torch.cat([x, drawn.unsqueeze(len(shape))], len(shape))
            if self.lengths is not None:
                x = fill_padding(x, padding_mask(self.lengths, self.max_length), len(self._event))
        return x
