"""Tests of networks that take a context beside their input."""

import re
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import one_hot

from ppl_vae.networks import MLP, ConvDecoder, ConvEncoder

CLASSES = 4
# Float64 rounds at 1e-16; sums here have fewer than 100 terms of order 1.
CLOSE: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}

# made with a context, the input's event shape, and the same network of the joined input
Case = tuple[Callable[..., nn.Module], tuple[int, ...], Callable[..., nn.Module]]
CASES: dict[str, Case] = {
    "MLP": (
        lambda **options: MLP((2, 3), (2, 2), (5,), **options),
        (2, 3),
        lambda **options: MLP(6 + CLASSES, (2, 2), (5,), **options),
    ),
    "MLP-encoder": (
        lambda **options: MLP(3, None, (5, 4), **options),
        (3,),
        lambda **options: MLP(3 + CLASSES, None, (5, 4), **options),
    ),
    "MLP-linear": (
        lambda **options: MLP(3, 2, (), **options),
        (3,),
        lambda **options: MLP(3 + CLASSES, 2, (), **options),
    ),
    "ConvEncoder": (
        lambda **options: ConvEncoder((2, 5, 4), 6, (3, 2), **options),
        (2, 5, 4),
        lambda **options: ConvEncoder((2 + CLASSES, 5, 4), 6, (3, 2), **options),
    ),
    "ConvDecoder": (
        lambda **options: ConvDecoder((3,), (1, 5, 4), 6, (3,), **options),
        (3,),
        lambda **options: ConvDecoder(3 + CLASSES, (1, 5, 4), 6, (3,), **options),
    ),
}
cases = pytest.mark.parametrize("name", CASES)


def made(name: str, **options: Any) -> tuple[nn.Module, tuple[int, ...], nn.Module]:
    """Return a network, its event shape and the network of the joined input with the same weights."""
    make, event, make_joined = CASES[name]
    net, joined = make(context=CLASSES, **options).double(), make_joined(**options).double()
    joined.load_state_dict(net.state_dict())
    return net, event, joined


def joined_input(name: str, x: Tensor, context: Tensor) -> Tensor:
    if name == "ConvEncoder":
        channels = context[..., None, None].expand(*context.shape, *x.shape[-2:])
        return torch.cat([x, channels], -3)
    return torch.cat([x.flatten(context.dim() - 1), context], -1)


@cases
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_a_context_is_further_input_of_the_first_layer(name: str, normalization: str | None) -> None:
    torch.manual_seed(0)
    net, event, joined = made(name, normalization=normalization)
    x, y = torch.randn(7, *event).double(), torch.randint(CLASSES, (7,))
    expected = joined(joined_input(name, x, one_hot(y, CLASSES).double()))
    torch.testing.assert_close(net(x, y), expected, **CLOSE)
    numbers = torch.randn(7, 2, 2).double()
    expected = joined(joined_input(name, x, numbers.flatten(1)))
    torch.testing.assert_close(net(x, numbers), expected, **CLOSE)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    name=st.sampled_from(sorted(CASES)),
    particles=st.lists(st.integers(1, 3), max_size=2),
    n=st.integers(1, 4),
    labels=st.sampled_from(["one per datum", "one per particle and datum", "all for each datum"]),
)
def test_batch_shapes_of_input_and_context_broadcast(
    name: str, particles: list[int], n: int, labels: str
) -> None:
    torch.manual_seed(0)
    net, event, _ = made(name)
    x = torch.randn(*particles, n, *event).double()
    y = {
        "one per datum": torch.randint(CLASSES, (n,)),
        "one per particle and datum": torch.randint(CLASSES, (*particles, n)),
        "all for each datum": torch.arange(CLASSES).view(-1, *[1] * (len(particles) + 1)),
    }[labels]
    batch = torch.broadcast_shapes((*particles, n), y.shape)
    out = net(x, y)
    assert out.shape[: len(batch)] == batch
    rows, ys = x.expand(*batch, *event).reshape(-1, *event), y.expand(batch).reshape(-1)
    for i, row in enumerate(out.reshape(len(ys), *out.shape[len(batch) :])):
        torch.testing.assert_close(row, net(rows[i : i + 1], ys[i : i + 1])[0], **CLOSE)


@cases
def test_the_context_changes_the_output_and_gets_a_gradient(name: str) -> None:
    net, event, _ = made(name)
    x, context = torch.randn(3, *event).double(), torch.randn(3, CLASSES).double().requires_grad_()
    assert not torch.allclose(net(x, torch.tensor([0, 1, 2])), net(x, torch.tensor([1, 1, 2])))
    (gradient,) = torch.autograd.grad(net(x, context).sum(), context)
    assert (gradient.abs().sum(-1) > 0).all()


@cases
def test_a_missing_unexpected_or_misfit_context_is_refused(name: str) -> None:
    net, event, _ = made(name)
    make, _, _ = CASES[name]
    x = torch.randn(3, *event).double()
    for context, message in (
        (None, "context: expected labels in [0, 4) or 4 numbers per datum, got none"),
        (torch.tensor([0, 4, 1]), "context: expected labels in [0, 4), got 4"),
        (torch.tensor([0, -1, 1]), "context: expected labels in [0, 4), got -1"),
        (torch.ones(3), "got [3] of torch.float32"),
        (torch.ones(3, 5), "got [3, 5] of torch.float32"),
        (torch.tensor([0, 1]), "context: expected a batch shape like the input's [3], got [2]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            net(x, context)
    message = "context: expected none, since the network was made with context=None, got a tensor"
    with pytest.raises(ValueError, match=re.escape(message)):
        make().double()(x, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"^context: expected a whole number above 0, got 0"):
        make(context=0)


@cases
def test_is_traced_with_labels_as_input(name: str) -> None:
    net, event, _ = made(name)
    x, y = torch.randn(3, *event).double(), torch.tensor([0, 1, 2])
    with pyro.validation_enabled(False):
        graph = make_fx(lambda x, y: net(x, y))(x, y)
    other = torch.tensor([3, 1, 0])
    torch.testing.assert_close(graph(x, other), net(x, other), **CLOSE)
