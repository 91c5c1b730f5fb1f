"""The variational autoencoder of sequences."""

import pyro
from torch import Tensor, nn

from ppl_vae.program import Program, batch_size


class SequenceVAE(Program):
    r"""The model :math:`p(z) \, p(x \mid z)` of one latent vector per sequence.

    The batch is ``(x, lengths)``: sequences padded to one size, and how many steps of each are data.
    Padding adds nothing to log p(x), whatever is there.

    References:
        Generating Sentences from a Continuous Space (Bowman et al., 2016), arXiv:1511.06349

    Args:
        prior: module whose ``forward()`` returns a Distribution over ``z``, event shape ``[latent]``.
        likelihood: module whose ``forward(z, lengths)`` returns a Distribution over ``x``:
            ``AutoregressiveCategorical``, ``AutoregressiveNormal``.

    Example:
        >>> from ppl_vae.likelihoods.autoregressive_categorical import AutoregressiveCategorical
        >>> from ppl_vae.networks.recurrent import RecurrentDecoder
        >>> from ppl_vae.priors import StandardNormal
        >>> likelihood = AutoregressiveCategorical(RecurrentDecoder(2, vocabulary=10), max_length=7)
        >>> SequenceVAE(StandardNormal(2), likelihood)(None, size=3).shape
        torch.Size([3, 7])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    def forward(
        self, x: Tensor | None = None, lengths: Tensor | None = None, *, size: int | None = None
    ) -> Tensor:
        """Run the program: sites ``z`` and ``x`` in the plate ``data``.

        Args:
            x: sequences ``[n, T]`` or ``[n, T, data_dim]``, or None to draw from the prior.
            lengths: the number of steps of each that are data, integers ``[n]``; None for all.
            size: the number of sequences to draw when ``x`` and ``lengths`` are None.

        Returns:
            x, given or drawn, ``[*particles, n, T, *event]``.

        Raises:
            ValueError: if ``x`` has another event shape than the likelihood, or all are None.
        """
        with pyro.plate("data", sequences(x, lengths, size), dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z, lengths), obs=x)


def sequences(x: Tensor | None, lengths: Tensor | None, size: int | None) -> int:
    """Return the number of sequences.

    Raises:
        ValueError: if there is not one length for each, or nothing is given.
    """
    n = batch_size(lengths if x is None and size is None else x, size)
    if lengths is not None and lengths.shape != (n,):
        raise ValueError(f"lengths: expected one per sequence, [{n}], got {list(lengths.shape)}")
    return n
