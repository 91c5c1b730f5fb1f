"""Tests of the convolutional encoder and decoder."""

import inspect
import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.networks import ConvDecoder, ConvEncoder

NORMALIZATIONS = [None, "batch", "layer"]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
SIZES = st.integers(1, 3)
IMAGES = st.tuples(SIZES, st.integers(1, 9), st.integers(1, 9))
# Float64 rounds at 1e-16; sums here have fewer than 200 terms of order 1, in another order per batch shape.
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def settle(net: nn.Module) -> nn.Module:
    """Give a network's normalisations moments, scales and shifts other than 0 and 1; evaluation mode."""
    for layer in net.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
        if isinstance(layer, NORMS):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return net.double().eval()


def build(kind: type[nn.Module], **options: Any) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    """Return a small network, its input's event shape and its output's."""
    if kind is ConvEncoder:
        return ConvEncoder((2, 5, 4), 6, (3, 4), **options), (2, 5, 4), (6,)
    return ConvDecoder(3, (2, 5, 4), 6, (4, 3), **options), (3,), (2, 5, 4)


both = pytest.mark.parametrize("kind", [ConvEncoder, ConvDecoder])
normalizations = pytest.mark.parametrize("normalization", NORMALIZATIONS)


def check_batch_equals_loop(net: nn.Module, batch: list[int], event: Any, event_out: Any) -> None:
    x = torch.randn((*batch, *event), dtype=torch.float64)
    y = net(x)
    assert y.shape == (*batch, *event_out)
    for index in itertools.product(*map(range, batch)):
        torch.testing.assert_close(y[index], net(x[index]), **CLOSE)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    batch=st.lists(SIZES, max_size=3),
    image=IMAGES,
    channels=st.lists(SIZES, min_size=1, max_size=3),
    normalization=st.sampled_from(NORMALIZATIONS),
    init=st.sampled_from([None, "xavier", "he"]),
)
def test_encoder_batch_equals_loop(
    batch: list[int], image: tuple[int, ...], channels: list[int], normalization: str | None, init: str | None
) -> None:
    torch.manual_seed(0)
    # PyTorch refuses group normalisation of a single value.
    channels = [c + 1 for c in channels] if normalization == "layer" else channels
    net = settle(ConvEncoder(image, 4, channels, normalization=normalization, dropout=0.5, init=init))
    check_batch_equals_loop(net, batch, image, (4,))
    assert net.out_features == 4


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    batch=st.lists(SIZES, max_size=3),
    in_shape=st.one_of(SIZES, st.lists(SIZES, max_size=2).map(tuple)),
    image=IMAGES,
    channels=st.lists(SIZES, min_size=1, max_size=3),
    normalization=st.sampled_from(NORMALIZATIONS),
    init=st.sampled_from([None, "xavier", "he"]),
)
def test_decoder_batch_equals_loop(
    batch: list[int],
    in_shape: Any,
    image: tuple[int, ...],
    channels: list[int],
    normalization: str | None,
    init: str | None,
) -> None:
    torch.manual_seed(1)
    channels = [c + 1 for c in channels] if normalization == "layer" else channels
    net = settle(
        ConvDecoder(in_shape, image, 4, channels, normalization=normalization, dropout=0.5, init=init)
    )
    event = (in_shape,) if isinstance(in_shape, int) else in_shape
    check_batch_equals_loop(net, batch, event, image)


@both
@normalizations
def test_empty_batch(kind: type[nn.Module], normalization: str | None) -> None:
    net, event, event_out = build(kind, normalization=normalization)
    assert net.eval()(torch.zeros(3, 0, *event)).shape == (3, 0, *event_out)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (7, 9), (32, 33), (1, 1)])
def test_decoder_mirrors_encoder(size: tuple[int, int]) -> None:
    image = (3, *size)
    encoder, decoder = ConvEncoder(image, 16, (4, 8)), ConvDecoder(5, image, 16, (8, 4))
    shapes: list[Any] = []
    for net, x in ((encoder, torch.zeros(2, *image)), (decoder, torch.zeros(2, 5))):
        shapes.append([])
        for layer in net.layers:
            x = layer(x)
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Unflatten)):
                shapes[-1].append(tuple(x.shape[1:]))
    assert shapes[1] == [*reversed(shapes[0]), image]


@both
def test_particles_share_batch_norm_moments(kind: type[nn.Module]) -> None:
    """Moments are over [P, n] together: any split of 20 data gives the same outputs in train mode."""
    torch.manual_seed(2)
    net, event, event_out = build(kind, normalization="batch")
    net.double()
    x = torch.randn(20, *event, dtype=torch.float64)
    y = net(x)
    for batch in ((1, 20), (4, 5), (5, 4), (2, 2, 5)):
        torch.testing.assert_close(net(x.reshape(*batch, *event)).reshape(20, *event_out), y, **CLOSE)
    state = net.state_dict()
    counts = [state[name].item() for name in state if name.endswith("num_batches_tracked")]
    assert counts == [5] * 3
    assert not torch.allclose(net(x[:10]), y[:10])


def test_batch_norm_takes_moments_per_channel() -> None:
    torch.manual_seed(3)
    net = ConvEncoder((2, 4, 4), 6, channels=4, normalization="batch").double()
    x = torch.randn(4, 4, 2, 4, 4, dtype=torch.float64)
    conv, norm = net.layers[:2]
    h = conv(x.flatten(0, 1))
    z = norm(h)
    moments = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
    expected = (h - moments[0].reshape(-1, 1, 1)) / (moments[1].reshape(-1, 1, 1) + norm.eps).sqrt()
    torch.testing.assert_close(z, expected, **CLOSE)
    assert conv.bias is None


@both
@normalizations
def test_equal_particles_give_equal_outputs(kind: type[nn.Module], normalization: str | None) -> None:
    """In train mode four copies of a batch have the moments of one; n = 6 equals the width."""
    torch.manual_seed(4)
    net, event, _ = build(kind, normalization=normalization)
    net.double()
    x = torch.randn(6, *event, dtype=torch.float64)
    one, four = net(x), net(x.expand(4, 6, *event))
    torch.testing.assert_close(four, one.expand_as(four), **CLOSE)


@both
def test_layer_norm_does_not_mix_data(kind: type[nn.Module]) -> None:
    torch.manual_seed(5)
    net, event, _ = build(kind, normalization="layer")
    net.double()
    x = torch.randn(4, 5, *event, dtype=torch.float64)
    torch.testing.assert_close(net(x)[1:2, 2:3], net(x[1:2, 2:3]), **CLOSE)


def test_layer_norm_of_images_takes_channels_and_pixels_together() -> None:
    torch.manual_seed(6)
    conv, norm = ConvEncoder((2, 5, 4), normalization="layer").double().layers[:2]
    h = conv(torch.randn(3, 2, 5, 4, dtype=torch.float64))
    mean, variance = h.mean((1, 2, 3), keepdim=True), h.var((1, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(norm(h), (h - mean) / (variance + norm.eps).sqrt(), **CLOSE)
    assert norm.weight.shape == (32,)


@both
def test_dropout_in_train_mode_only(kind: type[nn.Module]) -> None:
    torch.manual_seed(7)
    net, event, _ = build(kind, dropout=0.5, activation="tanh")
    x = torch.randn(8, *event)
    # 8 data, at least 6 units each: equal masks have probability below 2 ** -48.
    assert not torch.equal(net(x), net(x))
    assert sum(isinstance(layer, nn.Dropout) for layer in net.layers) == 3
    assert not isinstance(net.layers[-1], nn.Dropout) or kind is ConvEncoder
    net.eval()
    assert torch.equal(net(x), net(x))


def test_he_keeps_the_second_moment() -> None:
    """He's rule: with relu the mean square of what enters a layer's relu is the same in each layer."""
    torch.manual_seed(8)
    net = ConvDecoder(100, (64, 32, 32), 400, (128, 64), activation="relu", init="he")
    squares, x = [], torch.randn(64, 100)
    with torch.no_grad():
        for layer in net.layers:
            x = layer(x)
            if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):
                squares.append(x.square().mean().item())
    # The input has mean square 1, so 2 enters the first relu. The last row and column of s -> 2 s pixels miss
    # a tap each, 1 / (3 s) of the sum: -8 % for s = 8, -4 % for s = 16. Random weights of width w add about
    # sqrt(5 / w): 0.11 for w = 400. A wrong fan of the transposed convolutions is off by 2 or more.
    assert squares == pytest.approx([2.0] * 4, rel=0.3)
    assert all(not layer.bias.any() for layer in net.layers if hasattr(layer, "bias"))


def test_xavier() -> None:
    torch.manual_seed(9)
    conv = ConvEncoder((32, 8, 8), init="xavier", channels=96).layers[0]
    # 27 648 weights: relative standard error of the variance at most sqrt(2 / 27 648) = 0.0085; five of them.
    assert conv.weight.var().item() == pytest.approx(2 / (9 * (32 + 96)), rel=0.043)
    assert not conv.bias.any()


@both
@normalizations
def test_gradients_reach_every_parameter(kind: type[nn.Module], normalization: str | None) -> None:
    torch.manual_seed(10)
    net, event, _ = build(kind, normalization=normalization, activation="tanh")
    net(torch.randn(3, 8, *event)).square().sum().backward()
    for name, parameter in net.named_parameters():
        # Rounding leaves 1e-6 or so where a normalisation takes a bias out again.
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-4, name


@normalizations
def test_output_bias(normalization: str | None) -> None:
    torch.manual_seed(11)
    net, _, _ = build(ConvDecoder, normalization=normalization)
    net.eval()
    x = torch.randn(5, 3)
    assert isinstance(net.output_bias, nn.Parameter)
    assert net.output_bias.shape == (2,)
    with torch.no_grad():
        before = net(x)
        net.output_bias.add_(torch.tensor([1.0, -2.0]))
        step = (net(x) - before).mean((0, 2, 3))
    # Float32, outputs of order 1: rounding below 1e-6.
    torch.testing.assert_close(step, torch.tensor([1.0, -2.0]), rtol=0, atol=1e-5)
    assert not hasattr(ConvEncoder((1, 2, 2)), "output_bias")


@both
def test_constructor_arguments_are_attributes(kind: type[nn.Module]) -> None:
    shapes: dict[str, Any] = {"in_shape": [1, 5, 6]}
    if kind is ConvDecoder:
        shapes = {"in_shape": (2, 3), "out_shape": (1, 5, 6)}
    options = {"activation": "elu", "normalization": "batch", "dropout": 0.25, "init": "he"}
    arguments = {**shapes, "hidden": 7, "channels": [3], **options, "context": None}
    net = kind(**arguments)
    assert list(inspect.signature(kind).parameters) == list(arguments)
    assert all(getattr(net, name) is value for name, value in arguments.items())
    twin = kind(**{name: getattr(net, name) for name in inspect.signature(kind).parameters})
    twin.load_state_dict(net.state_dict())
    x = torch.randn(4, *shapes["in_shape"], generator=torch.Generator().manual_seed(12))
    assert torch.equal(twin.eval()(x), net.eval()(x))


@both
@pytest.mark.parametrize("init", [None, "xavier", "he"])
def test_meta_device(kind: type[nn.Module], init: str | None) -> None:
    with torch.device("meta"):
        net, event, event_out = build(kind, normalization="batch", dropout=0.5, init=init)
        y = net(torch.empty(5, 6, *event))
    assert all(tensor.is_meta for tensor in net.state_dict().values())
    assert y.is_meta
    assert y.shape == (5, 6, *event_out)


@both
@pytest.mark.parametrize(
    ("normalization", "train"), [(None, False), ("batch", False), ("batch", True), ("layer", True)]
)
def test_make_fx(kind: type[nn.Module], normalization: str | None, train: bool) -> None:
    """A symbolic trace serves other batch sizes: no shape is baked, no value is read."""
    torch.manual_seed(13)
    net, event, _ = build(kind, normalization=normalization)
    settle(net).train(train)

    def call(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, {name: value.clone() for name, value in state.items()}, (x,))

    state = dict(net.state_dict())
    # Symbolic tracing takes sizes that are equal for one: 17 and 19 are no size of the network.
    graph = make_fx(call, tracing_mode="symbolic")(state, torch.randn(17, 19, *event, dtype=torch.float64))
    x = torch.randn(9, 13, *event, dtype=torch.float64)
    torch.testing.assert_close(graph(state, x), call(state, x), **CLOSE)


@both
@pytest.mark.parametrize("shape", [(), (2,), (40,), (2, 4, 5), (5, 2, 4, 5), (3, 1)])
def test_wrong_event_shape(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    net, event, _ = build(kind)
    message = re.escape(f"x: expected shape [*batch, {', '.join(map(str, event))}], got {list(shape)}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        net(torch.zeros(shape))


ENCODER, DECODER = {"in_shape": (1, 4, 4)}, {"in_shape": 2, "out_shape": (1, 4, 4)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {**ENCODER, "in_shape": 784},
            ValueError,
            "in_shape: expected the shape (C, H, W) of an image, got 784",
        ),
        (
            {**ENCODER, "in_shape": (1, 0, 4)},
            ValueError,
            "in_shape[1]: expected a whole number above 0, got 0",
        ),
        ({**DECODER, "in_shape": -2}, ValueError, "in_shape: expected a whole number above 0, got -2"),
        (
            {**DECODER, "out_shape": (4, 4)},
            ValueError,
            "out_shape: expected the shape (C, H, W) of an image, got (4, 4)",
        ),
        (
            {**DECODER, "out_shape": None},
            TypeError,
            "out_shape: expected a size or a sequence of sizes, got None",
        ),
        ({"hidden": 0}, ValueError, "hidden: expected a whole number above 0, got 0"),
        ({"hidden": (4, 4)}, TypeError, "hidden: expected a whole number above 0, got (4, 4)"),
        ({"channels": ()}, ValueError, "channels: expected at least one size, got ()"),
        ({"channels": (4, -1)}, ValueError, "channels[1]: expected a whole number above 0, got -1"),
        (
            {"activation": "rely"},
            ValueError,
            "activation: unknown 'rely' (did you mean 'relu'?); expected one of 'relu', ",
        ),
        ({"normalization": "layers"}, ValueError, "normalization: unknown 'layers' (did you mean 'layer'?)"),
        ({"init": "xaver"}, ValueError, "init: unknown 'xaver' (did you mean 'xavier'?)"),
        ({"dropout": 1}, ValueError, "dropout: expected a number in [0, 1), got 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    kinds = [(ConvEncoder, ENCODER), (ConvDecoder, DECODER)]
    if "in_shape" in arguments:
        kinds = [(ConvDecoder, DECODER)] if "out_shape" in arguments else [(ConvEncoder, ENCODER)]
    for kind, needed in kinds:
        with pytest.raises(error, match=f"^{re.escape(message)}") as raised:
            kind(**{**needed, **arguments})
        assert "\n" not in str(raised.value)
