"""Tests of masked convolutions: who sees whom."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppl_vae.networks.masked_conv import GatedPixelCNN, HorizontalConv2d, VerticalConv2d


def dependence(function: object, x: Tensor) -> Tensor:
    """Return whether each output depends on each input, both in order of rows, columns, channels."""
    jacobian = torch.autograd.functional.jacobian(function, x)  # [1, outputs, H, W, 1, C, H, W]
    outputs, inputs = jacobian.shape[1], jacobian.shape[5]
    pixels = x[0, 0].numel()
    jacobian = jacobian[0, :, :, :, 0].permute(1, 2, 0, 4, 5, 3)
    return jacobian.reshape(pixels * outputs, pixels * inputs) != 0


@pytest.mark.parametrize("strict", [True, False])
def test_vertical_convolution_sees_the_rows_above_within_its_reach(strict: bool) -> None:
    layer = VerticalConv2d(1, 1, 1, strict=strict).double()
    seen = dependence(layer, torch.randn(1, 1, 4, 5).double()).reshape(4, 5, 4, 5)
    for i in range(4):
        for j in range(5):
            rows = range(i - 1, i if strict else i + 1)
            expected = {(k, m) for k in rows if k >= 0 for m in range(j - 1, j + 2) if 0 <= m < 5}
            assert {tuple(index) for index in seen[i, j].nonzero().tolist()} == expected


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("halves", [True, False])
def test_horizontal_convolution_sees_the_left_and_channels_of_earlier_groups(
    strict: bool, halves: bool
) -> None:
    layer = HorizontalConv2d(5, 6, 2, 3, strict=strict, halves=halves).double()
    seen = dependence(layer, torch.randn(1, 5, 1, 4).double()).reshape(4, 6, 4, 5)
    for j in range(4):
        for o in range(6):
            own = (o % 3 if halves else o) % 3
            here = {(j, c) for c in range(5) if (c % 3 < own if strict else c % 3 <= own)}
            left = {(k, c) for k in range(max(0, j - 2), j) for c in range(5)}
            assert {tuple(index) for index in seen[j, o].nonzero().tolist()} == here | left


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("hidden", [6, 7])
def test_each_value_sees_all_values_before_it_and_no_other(channels: int, hidden: int) -> None:
    # Three layers of reach 1 cover an image of 3 x 4, but for a blind spot, were there one.
    network = GatedPixelCNN(channels, 1, 2, hidden, layers=3, kernel_size=3).double()
    with torch.no_grad():  # so that no rectifier hides a dependence at these values
        for layer in (network.mix[-1], network.head):
            layer.bias.fill_(3.0)
    features = torch.randn(1, 2, 3, 4).double()
    seen = dependence(lambda x: network(x, features), torch.rand(1, channels, 3, 4).double())
    size = 12 * channels
    assert torch.equal(seen, torch.ones(size, size, dtype=torch.bool).tril(-1))


def test_every_pixel_depends_on_its_features() -> None:
    network = GatedPixelCNN(1, 1, 2, 6, layers=1, kernel_size=3).double()
    x, features = torch.rand(1, 1, 3, 4).double(), torch.randn(1, 2, 3, 4).double()
    seen = dependence(lambda f: network(x, f), features).reshape(12, 12, 2)
    assert seen[torch.arange(12), torch.arange(12)].any(-1).all()


@given(outputs=st.integers(1, 3), height=st.integers(1, 5), width=st.integers(1, 5))
def test_images_of_any_size(outputs: int, height: int, width: int) -> None:
    network = GatedPixelCNN(2, outputs, 3, 4, layers=2)
    found = network(torch.rand(2, 2, height, width), torch.rand(2, 3, height, width))
    assert found.shape == (2, 2 * outputs, height, width)
