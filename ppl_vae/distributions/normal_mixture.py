"""A mixture of diagonal normal distributions with reparameterised draws."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor


class NormalMixture(dist.MixtureSameFamily):
    r"""A mixture of diagonal normal distributions whose draws have gradients.

    A draw's derivative by a parameter :math:`\theta` is a field :math:`v_\theta(z)` that carries the density
    along, :math:`\partial_\theta q = -\nabla \cdot (q v_\theta)`, so that
    :math:`\nabla_\theta E_q f(z) = E_q [v_\theta(z) \cdot \nabla f(z)]` has no bias. There are many such
    fields. For the locations and scales, this one moves the draw with each component as far as the draw
    belongs to it, :math:`\partial z / \partial \mu_c = r_c(z)` and :math:`\partial z / \partial \sigma_c =
    r_c(z) (z - \mu_c) / \sigma_c`, with :math:`r_c(z) = w_c q_c(z) / q(z)`: the mean, given the draw, of the
    derivative through the component that made it. For the weights, the distribution functions :math:`F_i(z_i
    \mid z_{<i})` of each coordinate given those before are held constant. First derivatives alone are right.

    Torch's and Pyro's own mixtures do not serve: ``MixtureSameFamily`` has no such gradient, and those of
    ``MixtureOfDiagNormals`` for the logits are biased unless every scale is 1.

    Args:
        mixture_distribution: ``Categorical`` of the weights, ``[*batch, components]``.
        component_distribution: ``Normal(...).to_event(1)``, ``[*batch, components, latent]``.

    Example:
        >>> loc = torch.tensor([[-1.0, 0.0], [3.0, 0.0]], requires_grad=True)
        >>> weights = dist.Categorical(torch.tensor([0.5, 0.5]))
        >>> mixture = NormalMixture(weights, dist.Normal(loc, 1.0).to_event(1))
        >>> mixture.rsample((100,)).sum().backward()
        >>> mixture.mean.tolist(), loc.grad.shape
        ([1.0, 0.0], torch.Size([2, 2]))
    """

    has_rsample = True

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws without gradients, ``[*sample_shape, *batch, latent]``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws, ``[*sample_shape, *batch, latent]``."""
        normals, logits = self.component_distribution.base_dist, self.mixture_distribution.logits
        loc, scale = normals.loc, normals.scale
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            below = self.mixture_distribution.probs.cumsum(-1)[..., :-1]
            uniform = torch.rand(shape[:-1], dtype=loc.dtype, device=loc.device)
            which = (uniform.unsqueeze(-1) > below).sum(-1)
            index = which[..., None, None].expand(*shape[:-1], 1, shape[-1])
            loc_of, scale_of = (
                t.expand(*shape[:-1], *t.shape[-2:]).gather(-2, index).squeeze(-2) for t in (loc, scale)
            )
            z = loc_of + scale_of * torch.randn(shape, dtype=loc.dtype, device=loc.device)
        if not torch.is_grad_enabled():
            return z
        with torch.no_grad():
            deviations = (z.unsqueeze(-2) - loc) / scale
            log_density = -0.5 * deviations.square() - scale.log() - 0.5 * math.log(2 * math.pi)
            responsibilities = (logits + log_density.sum(-1)).softmax(-1)
        moved = (responsibilities.unsqueeze(-1) * (loc + scale * deviations)).sum(-2)
        if logits.requires_grad:
            field = self._field_of_logits(deviations, log_density)
            moved = moved + (field @ logits.unsqueeze(-1)).squeeze(-1)
        return z + (moved - moved.detach())

    @torch.no_grad()
    def _field_of_logits(self, deviations: Tensor, log_density: Tensor) -> Tensor:
        """Return dz / dlogits, ``[*, latent, components]``.

        Args:
            deviations: (z - loc) / scale, ``[*, components, latent]``.
            log_density: of each component and coordinate, likewise.
        """
        before = self.mixture_distribution.logits.unsqueeze(-1) + log_density.cumsum(-1) - log_density
        weights = before.softmax(-2)  # of the components, given the coordinates before
        # F_i = sum_c weights_ci cdf_ci is constant: with dlog w_ci = dlogit_c + sum over l < i of
        # (dlog q_cl / dz_l) dz_l up to normalisation, this is a triangular system in dz
        density = (weights * log_density.exp()).sum(-2, keepdim=True)
        cdf = 0.5 * torch.erf(deviations / math.sqrt(2))  # less 1/2, which cancels
        excess = weights * (cdf - (weights * cdf).sum(-2, keepdim=True)) / density
        slopes = -deviations / self.component_distribution.base_dist.scale
        return torch.linalg.solve_triangular(excess.mT @ slopes, -excess.mT, upper=False, unitriangular=True)
