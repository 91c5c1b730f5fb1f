"""A guide with a posterior of its own for each datum, and no encoder."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int
from ppl_vae.guides.amortized import AmortizedGuide
from ppl_vae.guides.mean_field import mean_field
from ppl_vae.program import Program, Referring

START = 0.01  # the standard deviation of the first values


class LocalGuide(Referring, Program):
    r"""The guide of free parameters for each datum, :math:`q_i(z) = N(z; \mu_i, \mathrm{diag}\, \sigma_i^2)`.

    A separate optimisation for each datum i: what an encoder loses against it on the same data is the
    amortisation gap. The data are known by their numbers, the batch's last tensor, which
    ``IndexedModel`` hides from the model:

    >>> import torch
    >>> from ppl_vae.models import LinearGaussian
    >>> from ppl_vae.models.indexed import IndexedModel
    >>> from ppl_vae.training import fit
    >>> model, guide, x = LinearGaussian(2, 5), LocalGuide(200, 2), torch.randn(200, 5)
    >>> run = fit(IndexedModel(model), guide, (x, torch.arange(200)), epochs=2, progress=False)

    It knows these data alone. For others, make a new one, and train it with the model frozen
    (``model.requires_grad_(False).eval()``). Validation data with the numbers of training data would be
    scored by the posteriors of those.

    A step of most optimisers costs as much as all rows do, 10 ms for 60,000 data of 40 dimensions. With
    ``sparse=True`` and ``optimizer=RowAdam`` it costs what the batch's rows do; ``CompiledSVI`` then takes
    plain steps.

    References:
        Amortisation gap: Inference Suboptimality in Variational Autoencoders (Cremer et al., 2018),
        arXiv:1801.03558

    Args:
        size: the number of data.
        latent_dim: the number of latent dimensions.
        like: an amortised guide whose family to take, with what its head gives as the free parameters;
            None for the mean-field one. The guide is a reference, no part of this one.
        sparse: have sparse gradients, which ``RowAdam`` and ``torch.optim.SparseAdam`` take.

    Attributes:
        rows: the table of the family's parameters, ``[size, outputs]``: means and log standard deviations,
            the latter clamped to [-7, 7].

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0, or ``like`` has no ``family``, one
            with parameters beside those of its encoder and head, or another ``latent_dim``. On a run: if
            the batch has no numbers, or one that is not from 0 to ``size`` - 1; while Pyro validates, also
            if two data have the same.
    """

    references = ("like",)

    def __init__(
        self, size: int, latent_dim: int, *, like: AmortizedGuide | None = None, sparse: bool = False
    ) -> None:
        super().__init__()
        self.size = check_positive_int("size", size)
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.sparse = sparse
        self.like = like
        if like is None:
            start = torch.zeros(2 * self.latent_dim)
        else:
            _check_like(like, self.latent_dim)
            start = like.head.bias.detach()
        self.rows = nn.Embedding(self.size, len(start), sparse=sparse)
        nn.init.normal_(self.rows.weight, std=START)
        with torch.no_grad():
            self.rows.weight += start

    @torch.no_grad()
    def start_at(self, outputs: Tensor, index: Tensor | None = None) -> None:
        """Set rows to parameters of the family, those of an amortised guide say: ``guide.encode(x)``.

        Args:
            outputs: ``[n, outputs]``.
            index: the data's numbers, ``[n]``; None for all data in their order.
        """
        every = torch.arange(self.size, device=outputs.device) if index is None else index
        self.rows.weight[self._check(outputs, (every,))] = outputs.to(self.rows.weight)

    def family(self, outputs: Tensor) -> dist.TorchDistribution:
        """Return the distribution of z that rows ``[n, outputs]`` are the parameters of."""
        return mean_field(outputs) if self.like is None else self.like.family(outputs)

    def posterior(self, x: Tensor, *others: Tensor) -> dist.TorchDistribution:
        """Return q(z) of the data: batch shape ``[n]``, event shape ``[latent]``.

        Args:
            x: data ``[n, *event]``, of which the number alone counts.
            *others: tensors of the batch, the data's numbers ``[n]`` last.
        """
        index = self._check(x, others)
        try:
            outputs = F.embedding(index, self.rows.weight, sparse=self.sparse)
        except IndexError:
            raise ValueError(self._expected(f"got {int(index.min())} to {int(index.max())}")) from None
        return self.family(outputs)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Run the program: site ``z`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``.
            *others: tensors of the batch, the data's numbers ``[n]`` last.

        Returns:
            z, ``[*particles, n, latent]``.
        """
        posterior = self.posterior(x, *others)
        with pyro.plate("data", x.shape[0], dim=-1):
            return pyro.sample("z", posterior)

    def _check(self, x: Tensor, others: tuple[Tensor, ...]) -> Tensor:
        """Return the data's numbers, or raise."""
        if not others:
            raise ValueError(
                self._expected("got none: give `(x, torch.arange(len(x)))`, and the model in `IndexedModel`")
            )
        index = others[-1]
        if index.is_floating_point() or index.dtype == torch.bool or index.shape != x.shape[:1]:
            raise ValueError(self._expected(f"got {index.dtype} of shape {list(index.shape)}"))
        if is_validation_enabled():
            if not math.prod(index.shape) or int(index.min()) < 0 or int(index.max()) >= self.size:
                raise ValueError(self._expected(f"got {int(index.min())} to {int(index.max())}"))
            if (different := len(index.unique())) < len(index):
                found = f"got {different} different numbers of {len(index)} data (labels?)"
                raise ValueError(self._expected(found))
        return index

    def _expected(self, got: str) -> str:
        numbers = f"the data's numbers, each from 0 to {self.size - 1}"
        return f"index: expected {numbers}, as the batch's last tensor, {got}"


def _check_like(like: Any, latent_dim: int) -> None:
    """Raise unless the guide's family is a function of its head's outputs alone."""
    if not isinstance(like, AmortizedGuide) or type(like).family is AmortizedGuide.family:
        raise TypeError(f"like: expected an amortised guide with a `family`, got {type(like).__name__}")
    if like.latent_dim != latent_dim:
        raise ValueError(f"like: expected a guide of {latent_dim} latent dimensions, got {like.latent_dim}")
    own = [name for name, _ in like.named_parameters() if name.split(".")[0] not in ("encoder", "head")]
    if own:
        raise TypeError(
            f"like: expected a family without parameters of its own, got a {type(like).__name__} with {own}"
        )
