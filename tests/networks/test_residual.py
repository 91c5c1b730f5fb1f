"""Tests of the residual networks."""

import pytest
import torch
from torch import nn

from ppl_vae.networks.pixel_head import PixelHead
from ppl_vae.networks.residual import ResidualConv, ResidualMLP


@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (5, 0)])
def test_any_batch_shape_is_the_loop_over_rows(normalization: str | None, batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = ResidualMLP((2, 3), (3, 2), hidden=5, normalization=normalization).double().eval()
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(*batch, 2, 3).double()
    y = network(x)
    assert y.shape == (*batch, 3, 2)
    rows = [network(row) for row in x.reshape(-1, 2, 3)]
    for found, expected in zip(y.reshape(-1, 3, 2), rows, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_blocks_start_as_the_identity_whatever_their_number() -> None:
    torch.manual_seed(0)
    shallow, deep = ResidualMLP(4, 2, hidden=6, blocks=1), ResidualMLP(4, 2, hidden=6, blocks=9)
    deep.layers[0].load_state_dict(shallow.layers[0].state_dict())
    deep.layers[-1].load_state_dict(shallow.layers[-1].state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(shallow(x), deep(x))
    assert torch.equal(shallow(x), shallow.layers[-1](shallow.layers[0](x).relu()))


def test_gradients_reach_every_layer_of_a_deep_network() -> None:
    torch.manual_seed(0)
    network = ResidualMLP(4, 1, hidden=6, blocks=30)
    x = torch.randn(64, 4)
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(2):  # the first step leaves the zeros
        adam.zero_grad()
        (network(x) - x.prod(-1, keepdim=True)).square().mean().backward()
        adam.step()
    assert [name for name, p in network.named_parameters() if not p.grad.any()] == []


def test_batch_normalisation_mixes_data_in_training_alone() -> None:
    torch.manual_seed(0)
    network = ResidualMLP(4, hidden=6, normalization="batch")
    x = torch.randn(5, 4)
    assert not torch.allclose(network(x)[:2], network(x[:2]))
    network.eval()
    torch.testing.assert_close(network(x)[:2], network(x[:2]))


def test_an_encoder_has_features_and_no_output_bias() -> None:
    encoder = ResidualMLP((1, 4, 4), hidden=6)
    assert encoder.out_features == 6 and not hasattr(encoder, "output_bias")
    assert ResidualMLP(4, (2, 3), hidden=6).output_bias.shape == (6,)


def test_convolutions_take_any_batch_shape_and_add_their_input() -> None:
    torch.manual_seed(0)
    same, other = ResidualConv(3, 3, 5, last_scale=0.0), ResidualConv(3, 4, 5).double()
    x = torch.randn(2, 3, 3, 4, 4)
    assert torch.equal(same(x), x)
    y = other(x.double())
    assert y.shape == (2, 3, 4, 4, 4)
    torch.testing.assert_close(y[1, 2], other(x[1, 2].double()))


def test_pixel_head_is_linear_in_each_pixel() -> None:
    torch.manual_seed(0)
    head, x = PixelHead((3, 4, 5), 2).double(), torch.randn(2, 6, 3, 4, 5).double()
    expected = torch.einsum("oc,knchw->knohw", head.layer.weight[..., 0, 0], x)
    torch.testing.assert_close(head(x.flatten(-3)), expected + head.output_bias[:, None, None])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="blocks: expected a whole number above 0, got 0"):
        ResidualMLP(4, 2, blocks=0)
    with pytest.raises(ValueError, match="activation: unknown 'rellu'"):
        ResidualMLP(4, 2, activation="rellu")
    with pytest.raises(ValueError, match=r"x: expected shape \[\*batch, 4\], got \[5, 3\]"):
        ResidualMLP(4, 2)(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="last_scale: expected a finite number from 0, got -1"):
        ResidualConv(3, 3, 5, last_scale=-1)
    assert isinstance(ResidualConv(3, 3, 5, activation="tanh").layers[0], nn.Tanh)
