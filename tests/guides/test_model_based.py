"""Tests of what guides share that compute with the model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppl_vae.guides import AnnealedGuide, HamiltonianGuide, MeanFieldGuide, SemiAmortizedGuide
from ppl_vae.infer import KL_ELBO, SVI, log_weights
from ppl_vae.likelihoods import Normal
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

Make = Callable[..., Any]


@pytest.mark.parametrize("first", ["model", "guide"])
def test_a_pair_that_is_copied_together_stays_together(first: str) -> None:
    model, x = LinearGaussian(2, 4), torch.zeros(6, 4)
    guide = HamiltonianGuide(MeanFieldGuide(MLP(4), 2), model)
    copied = copy.deepcopy({first: {"model": model, "guide": guide}[first], "model": model, "guide": guide})
    assert copied["guide"].model is copied["model"] is not model
    assert log_weights(copied["model"], copied["guide"], x).shape == (1, 6)
    alone = copy.deepcopy(guide)
    assert alone.model is not model
    with pytest.raises(
        ValueError, match=r"^guide: expected a HamiltonianGuide of the model .* set its `model`$"
    ):
        SVI(model, alone, torch.optim.Adam, KL_ELBO()).step(x)


@pytest.mark.parametrize("make", [HamiltonianGuide, AnnealedGuide, SemiAmortizedGuide])
@pytest.mark.parametrize("latent", [1, 3])
def test_another_latent_dim_than_the_models(make: Make, latent: int) -> None:
    model = LinearGaussian(2, 4)
    guide = make(MeanFieldGuide(MLP(4), latent), model)
    message = rf"^guide: expected the latent_dim of the model, whose z has event shape \(2,\), got {latent}$"
    with pytest.raises(ValueError, match=message):
        guide(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=message):
        SVI(model, guide, torch.optim.Adam, KL_ELBO()).step(torch.zeros(3, 4))


class RowNorm(nn.BatchNorm1d):
    """Batch normalisation of particles and data together."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).reshape(x.shape)


@pytest.mark.parametrize("make", [HamiltonianGuide, AnnealedGuide, SemiAmortizedGuide])
@pytest.mark.parametrize("kept", [True, False])
def test_batch_normalisation_in_the_model_is_refused_in_training(make: Make, kept: bool) -> None:
    decoder = nn.Sequential(nn.Linear(2, 5), RowNorm(5, track_running_stats=kept), nn.Linear(5, 4))
    model = VAE(StandardNormal(2), Normal(decoder))
    guide = make(MeanFieldGuide(MLP(4), 2), model, steps=1)
    before = copy.deepcopy(decoder[1].state_dict())
    message = r"^model: expected modules that .*, got RowNorm 'likelihood.decoder.1' in training mode; "
    with pytest.raises(ValueError, match=message):
        SVI(model, guide, torch.optim.Adam, KL_ELBO()).step(torch.zeros(3, 4))
    assert all(map(torch.equal, before.values(), decoder[1].state_dict().values()))
    model.requires_grad_(False).eval()
    if kept:
        assert guide(torch.zeros(3, 4)).shape == (3, 2)


def test_normalisation_of_each_datum_is_not_refused() -> None:
    decoder = nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    model = VAE(StandardNormal(2), Normal(decoder))
    guide = HamiltonianGuide(MeanFieldGuide(MLP(4), 2), model, steps=1)
    assert SVI(model, guide, torch.optim.Adam, KL_ELBO()).step(torch.zeros(3, 4)).isfinite()
