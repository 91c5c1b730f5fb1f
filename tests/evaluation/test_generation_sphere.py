"""Generation with latents on a sphere: the decoder sees unit vectors alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ppl_vae.evaluation.generation import encode, interpolate, traverse
from ppl_vae.guides import HypersphericalGuide
from ppl_vae.likelihoods import Normal
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal, UniformSphere


def model(latent: int = 3, prior: Callable[[int], nn.Module] = UniformSphere) -> VAE:
    """Return a model whose mean of x is z."""
    return VAE(prior(latent), Normal(nn.Identity(), scale=0.1)).double()


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape).double(), dim=-1)


@settings(deadline=None, max_examples=10)
@given(latent=st.integers(2, 5), pairs=st.integers(1, 3), steps=st.integers(2, 6))
def test_interpolation_follows_the_great_circle_at_constant_speed(
    latent: int, pairs: int, steps: int
) -> None:
    start, end = unit(pairs, latent), unit(pairs, latent)
    z = interpolate(model(latent), 3 * start, 0.5 * end, steps=steps).x
    torch.testing.assert_close(z[:, 0], start)
    torch.testing.assert_close(z[:, -1], end)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(pairs, steps).double())
    angle = (start * end).sum(-1).clamp(-1, 1).acos()
    for i, weight in enumerate(torch.linspace(0, 1, steps).double()):
        cosine = (z[:, i] * start).sum(-1)
        torch.testing.assert_close(cosine, (weight * angle).cos(), atol=1e-7, rtol=0)
        cosine = (z[:, i] * end).sum(-1)
        torch.testing.assert_close(cosine, ((1 - weight) * angle).cos(), atol=1e-7, rtol=0)


def test_interpolation_between_equal_points_stays() -> None:
    z = unit(2, 3)
    found = interpolate(model(), z, z, steps=4).x
    torch.testing.assert_close(found, z[:, None].expand(2, 4, 3))


def test_ends_without_one_way_between_them_are_refused() -> None:
    z = unit(2, 3)
    with pytest.raises(ValueError, match=r"^z_end: expected points of the sphere that are not opposite"):
        interpolate(model(), z, -2 * z)
    with pytest.raises(
        ValueError, match=r"^z_start: expected directions on the model's sphere, got a vector"
    ):
        interpolate(model(), torch.zeros(3).double(), z[0])


def test_traversal_sets_a_dimension_and_divides_by_the_length() -> None:
    z, values = unit(3), torch.tensor([-2.0, 0.0, 0.5]).double()
    for length in (1.0, 7.0):
        result = traverse(model(), length * z, values=values)
        for dim in range(3):
            for step in range(3):
                moved = z.clone()
                moved[dim] = values[step]
                torch.testing.assert_close(result.x[dim, step], moved / moved.norm())


def test_traversal_from_zeros_starts_where_coordinates_are_equal() -> None:
    result = traverse(model(4), torch.zeros(4))
    torch.testing.assert_close(result.x, traverse(model(4), torch.ones(4)).x)
    torch.testing.assert_close(result.x.norm(dim=-1), torch.ones(4, 7).double())
    assert (result.x.diagonal(dim1=0, dim2=2).diff(dim=0) > 0).all()  # the dimension that moves rises


def test_latents_of_data_are_directions() -> None:
    guide = HypersphericalGuide(MLP(4, hidden=5), 3).double()
    x = torch.randn(6, 4).double()
    torch.testing.assert_close(encode(guide, x).z, guide.posterior(x).loc.detach())


def test_without_a_sphere_nothing_is_divided() -> None:
    flat = model(3, StandardNormal)
    z = torch.randn(2, 3).double()
    result = traverse(flat, z[0])
    assert result.x[0, 0, 0] == -3
    assert torch.equal(result.x[0, :, 1:], z[0, 1:].expand(7, 2))
    torch.testing.assert_close(interpolate(flat, z[0], z[1], steps=3).x[0, 1], z.mean(0))


def test_traversal_through_the_middle_of_the_sphere_is_refused() -> None:
    model = VAE(UniformSphere(3), Normal(MLP(3, 4)))
    with pytest.raises(ValueError, match=r"^values: .* dimension 0 is 0\.0"):
        traverse(model, torch.tensor([1.0, 0.0, 0.0]), dims=[0], values=[-1.0, 0.0, 1.0])
