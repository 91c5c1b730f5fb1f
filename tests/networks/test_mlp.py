"""Tests of the multilayer perceptron."""

import inspect
import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.networks import MLP

ACTIVATIONS = ["relu", "elu", "gelu", "silu", "tanh", "softplus", "leaky_relu"]
NORMALIZATIONS = [None, "batch", "layer"]
SIZES = st.integers(1, 4)
# Float64 rounds at 1e-16; sums here have fewer than 100 terms of order 1, in another order per batch shape.
CLOSE: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}


def settle(net: nn.Module) -> nn.Module:
    """Give a network's normalisations moments, scales and shifts other than 0 and 1; evaluation mode."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
        if isinstance(layer, (nn.BatchNorm1d, nn.LayerNorm)):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return net.double().eval()


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    batch=st.lists(SIZES, max_size=3),
    in_shape=st.one_of(SIZES, st.lists(SIZES, max_size=3).map(tuple)),
    out_shape=st.one_of(st.none(), SIZES, st.lists(SIZES, max_size=3).map(tuple)),
    hidden=st.lists(SIZES, min_size=1, max_size=2),
    activation=st.sampled_from(ACTIVATIONS),
    normalization=st.sampled_from(NORMALIZATIONS),
    init=st.sampled_from([None, "xavier", "he"]),
)
def test_batch_equals_loop(
    batch: list[int],
    in_shape: Any,
    out_shape: Any,
    hidden: list[int],
    activation: str,
    normalization: str | None,
    init: str | None,
) -> None:
    torch.manual_seed(0)
    net = settle(
        MLP(
            in_shape,
            out_shape,
            hidden,
            activation=activation,
            normalization=normalization,
            dropout=0.5,
            init=init,
        )
    )
    event_in = (in_shape,) if isinstance(in_shape, int) else in_shape
    event_out = (out_shape,) if isinstance(out_shape, int) else out_shape
    event_out = (hidden[-1],) if out_shape is None else event_out
    x = torch.randn((*batch, *event_in), dtype=torch.float64)
    y = net(x)
    assert y.shape == (*batch, *event_out)
    assert net.out_features == math.prod(event_out)
    for index in itertools.product(*map(range, batch)):
        torch.testing.assert_close(y[index], net(x[index]), **CLOSE)


def test_empty_batch() -> None:
    for normalization in NORMALIZATIONS:
        assert MLP((2, 3), (4, 5), normalization=normalization).eval()(torch.zeros(3, 0, 2, 3)).shape == (
            3,
            0,
            4,
            5,
        )


def test_formula() -> None:
    torch.manual_seed(1)
    net = MLP((2, 3), 4, hidden=(5,), activation="tanh").double()
    first, _, last = net.layers
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    expected = torch.tanh(x.flatten(1) @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(net(x), expected, **CLOSE)
    encoder = MLP((2, 3), hidden=5, activation="tanh").double()
    first, _ = encoder.layers
    torch.testing.assert_close(encoder(x), torch.tanh(x.flatten(1) @ first.weight.T + first.bias), **CLOSE)


@pytest.mark.parametrize("batch", [(20,), (1, 20), (4, 5), (5, 4), (2, 2, 5)])
def test_batch_norm_takes_moments_over_all_batch_dims(batch: tuple[int, ...]) -> None:
    """Width 5 equals one of the batch dims, so that the wrong axis would go unnoticed by shapes."""
    torch.manual_seed(2)
    net = MLP(3, hidden=5, activation="tanh", normalization="batch").double()
    linear, norm, _ = net.layers
    x = torch.randn(*batch, 3, dtype=torch.float64)
    h = (x @ linear.weight.T).reshape(20, 5)
    z = (h - h.mean(0)) / (h.var(0, unbiased=False) + norm.eps).sqrt()
    torch.testing.assert_close(net(x), torch.tanh(z).reshape(*batch, 5), **CLOSE)
    torch.testing.assert_close(norm.running_mean, norm.momentum * h.mean(0), **CLOSE)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_equal_particles_give_equal_outputs(normalization: str | None) -> None:
    """In train mode four copies of a batch have the moments of one; n equals every width."""
    torch.manual_seed(3)
    net = MLP(6, 6, hidden=(6, 6), normalization=normalization).double()
    x = torch.randn(6, 6, dtype=torch.float64)
    one, four = net(x), net(x.expand(4, 6, 6))
    torch.testing.assert_close(four, one.expand(4, 6, 6), **CLOSE)


def test_layer_norm_does_not_mix_data() -> None:
    torch.manual_seed(4)
    net = MLP(3, 2, hidden=(5,), normalization="layer").double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(net(x)[1:2, 2:3], net(x[1:2, 2:3]), **CLOSE)
    assert not torch.equal(net(x), MLP(3, 2, hidden=(5,)).double()(x))


def test_dropout_in_train_mode_only() -> None:
    torch.manual_seed(5)
    net = MLP(3, hidden=1000, activation="softplus", dropout=0.3)
    x = torch.randn(50, 3)
    kept = net(x) != 0  # softplus is above 0: a 0 was dropped
    # 50 000 draws: the standard error of the kept share is sqrt(0.21 / 50 000) = 0.002; five of them.
    assert abs(kept.double().mean() - 0.7) < 0.0103
    scaled, full = net(x), net.eval()(x)
    kept = scaled != 0
    torch.testing.assert_close(scaled[kept], full[kept] / 0.7)
    assert torch.equal(net(x), full)


@pytest.mark.parametrize(("init", "variance"), [("xavier", 2 / 500), ("he", 2 / 200)])
def test_init(init: str, variance: float) -> None:
    torch.manual_seed(6)
    net = MLP(200, 3, hidden=(300,), normalization="layer", init=init)
    linear, norm, _, output = net.layers
    # 60 000 weights: relative standard error of the variance at most sqrt(2 / 60 000) = 0.006; five of them.
    assert linear.weight.var().item() == pytest.approx(variance, rel=0.03)
    assert not linear.bias.any()
    assert not output.bias.any()
    assert torch.equal(norm.weight, torch.ones(300))


def test_no_init_is_pytorchs() -> None:
    torch.manual_seed(7)
    net = MLP(3, 2, hidden=(4,), init=None)
    torch.manual_seed(7)
    first, last = nn.Linear(3, 4), nn.Linear(4, 2)
    assert torch.equal(net.layers[0].weight, first.weight)
    assert torch.equal(net.output_bias, last.bias)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradients_reach_every_parameter(normalization: str | None) -> None:
    torch.manual_seed(8)
    net = MLP((2, 3), 4, hidden=(5, 6), activation="tanh", normalization=normalization)
    net(torch.randn(3, 8, 2, 3)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-4, name


def test_output_bias() -> None:
    net = MLP(2, (3, 4), hidden=())
    with torch.no_grad():
        net.output_bias.copy_(torch.arange(12.0))
        y = net(torch.zeros(5, 2))
    assert isinstance(net.output_bias, nn.Parameter)
    assert torch.equal(y, torch.arange(12.0).reshape(3, 4).expand(5, 3, 4))
    assert not hasattr(MLP(2), "output_bias")


def test_constructor_arguments_are_attributes() -> None:
    arguments: dict[str, Any] = {
        "in_shape": (2, 3),
        "out_shape": [4],
        "hidden": [5, 6],
        "activation": "elu",
        "normalization": "batch",
        "dropout": 0.25,
        "init": "he",
        "context": None,
    }
    net = MLP(**arguments)
    assert list(inspect.signature(MLP).parameters) == list(arguments)
    assert all(getattr(net, name) is value for name, value in arguments.items())
    twin = MLP(**{name: getattr(net, name) for name in inspect.signature(MLP).parameters})
    twin.load_state_dict(net.state_dict())
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(9))
    assert torch.equal(twin.eval()(x), net.eval()(x))


@pytest.mark.parametrize("init", [None, "xavier", "he"])
def test_meta_device(init: str | None) -> None:
    with torch.device("meta"):
        net = MLP((2, 3), 4, normalization="batch", dropout=0.5, init=init)
        y = net(torch.empty(5, 6, 2, 3))
    assert all(tensor.is_meta for tensor in net.state_dict().values())
    assert y.is_meta
    assert y.shape == (5, 6, 4)


@pytest.mark.parametrize(
    ("normalization", "train"), [(None, False), ("batch", False), ("batch", True), ("layer", True)]
)
def test_make_fx(normalization: str | None, train: bool) -> None:
    """A symbolic trace serves other batch sizes: no shape is baked, no value is read."""
    torch.manual_seed(10)
    net = settle(MLP((2, 3), (4, 5), hidden=(11,), normalization=normalization)).train(train)

    def call(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, {name: value.clone() for name, value in state.items()}, (x,))

    state = dict(net.state_dict())
    # Symbolic tracing takes sizes that are equal for one: 17 and 19 are no size of the network.
    graph = make_fx(call, tracing_mode="symbolic")(state, torch.randn(17, 19, 2, 3, dtype=torch.float64))
    x = torch.randn(9, 13, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(graph(state, x), call(state, x), **CLOSE)


def test_plain_network_adds_no_reshape() -> None:
    graph = make_fx(MLP(3, 2, hidden=(4,), activation="relu").requires_grad_(False))(torch.zeros(5, 3))
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert names == {"aten.t.default", "aten.addmm.default", "aten.relu.default"}


@pytest.mark.parametrize("shape", [(), (3,), (2,), (5, 3, 2), (6,), (5, 6)])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_wrong_event_shape(shape: tuple[int, ...], normalization: str | None) -> None:
    message = re.escape(f"x: expected shape [*batch, 2, 3], got {list(shape)}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        MLP((2, 3), 1, normalization=normalization)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_shape": 0}, ValueError, "in_shape: expected a whole number above 0, got 0"),
        ({"in_shape": (2, -3)}, ValueError, "in_shape[1]: expected a whole number above 0, got -3"),
        ({"in_shape": 2.5}, TypeError, "in_shape: expected a size or a sequence of sizes, got 2.5"),
        ({"out_shape": (2, 0)}, ValueError, "out_shape[1]: expected a whole number above 0, got 0"),
        ({"out_shape": True}, TypeError, "out_shape: expected a whole number above 0, got True"),
        ({"hidden": (8, 0)}, ValueError, "hidden[1]: expected a whole number above 0, got 0"),
        ({"hidden": "64"}, TypeError, "hidden: expected a whole number above 0, got '64'"),
        ({"hidden": ()}, ValueError, "hidden: expected at least one width when out_shape is None, got ()"),
        (
            {"activation": "ReLu"},
            ValueError,
            "activation: unknown 'ReLu' (did you mean 'relu'?); expected one of 'relu', ",
        ),
        ({"activation": None}, ValueError, "activation: unknown None"),
        (
            {"normalization": "bath"},
            ValueError,
            "normalization: unknown 'bath' (did you mean 'batch'?); expected one of None",
        ),
        (
            {"init": "xaver"},
            ValueError,
            "init: unknown 'xaver' (did you mean 'xavier'?); expected one of None",
        ),
        ({"dropout": 1.0}, ValueError, "dropout: expected a number in [0, 1), got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout: expected a number in [0, 1), got -0.1"),
        ({"dropout": float("nan")}, ValueError, "dropout: expected a number in [0, 1), got nan"),
        ({"dropout": "0.1"}, TypeError, "dropout: expected a number in [0, 1), got '0.1'"),
        ({"dropout": True}, TypeError, "dropout: expected a number in [0, 1), got True"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}") as raised:
        MLP(**{"in_shape": 3, **arguments})
    assert "\n" not in str(raised.value)
