"""Networks over sequences: padding has no effect, outputs look at the past alone."""

from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.networks.recurrent import GatedTransition, RecurrentDecoder, RecurrentEncoder
from ppl_vae.networks.transformer import TransformerDecoder, TransformerEncoder

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
VOCABULARY, DIM, SIZE = 5, 2, 4
LENGTHS = torch.tensor([4, 1, 3, 0])

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "gru": lambda **kw: RecurrentEncoder(embedding=4, hidden=7, layers=2, **kw),
    "gru-forward": lambda **kw: RecurrentEncoder(embedding=4, hidden=7, direction="forward", **kw),
    "gru-backward": lambda **kw: RecurrentEncoder(embedding=4, hidden=7, direction="backward", **kw),
    "lstm": lambda **kw: RecurrentEncoder(embedding=4, hidden=7, cell="lstm", **kw),
    "transformer": lambda **kw: TransformerEncoder(width=8, heads=2, layers=2, **kw),
}
DECODERS: dict[str, Callable[..., nn.Module]] = {
    "gru": lambda **kw: RecurrentDecoder(2, embedding=4, hidden=7, layers=2, **kw),
    "lstm": lambda **kw: RecurrentDecoder(2, embedding=4, hidden=7, cell="lstm", **kw),
    "transformer": lambda **kw: TransformerDecoder(2, width=8, heads=2, layers=2, **kw),
}
KINDS = {"tokens": {"vocabulary": VOCABULARY}, "reals": {"data_dim": DIM}}

encoders = pytest.mark.parametrize("name", ENCODERS)
decoders = pytest.mark.parametrize("name", DECODERS)
kinds = pytest.mark.parametrize("kind", KINDS)


def data(kind: str, n: int = 4, size: int = SIZE) -> Tensor:
    if kind == "tokens":
        return torch.randint(VOCABULARY, (n, size))
    return torch.randn(n, size, DIM, dtype=torch.float64)


def other_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the data with padding of other values, some of which no data have."""
    x = x.clone()
    for i, length in enumerate(lengths):
        x[i, length:] = 10 * x[i, length:] - 77
    return x


# Encoders


@encoders
@kinds
@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_padding_has_no_effect_and_lengths_are_as_cutting(
    name: str, kind: str, every_step: bool, training: bool
) -> None:
    encoder = ENCODERS[name](**KINDS[kind], every_step=every_step).double().train(training)
    x = data(kind)
    with torch.set_grad_enabled(training):  # torch has a path of its own without
        features = encoder(x, LENGTHS)
        torch.testing.assert_close(encoder(other_padding(x, LENGTHS), LENGTHS), features, rtol=0, atol=0)
        for i in range(3):
            cut = encoder(x[i : i + 1, : LENGTHS[i]])[0]
            found = features[i, : LENGTHS[i]] if every_step else features[i]
            torch.testing.assert_close(found, cut, **CLOSE)
        if every_step:
            assert features.shape == (4, SIZE, encoder.out_features)
            assert (features[1, 1:] == 0).all()
            assert (features[3] == 0).all()
        else:
            assert features.shape == (4, encoder.out_features)
            assert features.isfinite().all()


@encoders
@kinds
def test_no_lengths_are_full_lengths_and_any_batch_shape_is_its_loop(name: str, kind: str) -> None:
    encoder = ENCODERS[name](**KINDS[kind]).double()
    x = data(kind, 6)
    features = encoder(x, torch.full((6,), SIZE))
    torch.testing.assert_close(encoder(x), features, **CLOSE)
    lengths = torch.tensor([4, 3, 2])
    many = encoder(x.reshape(2, 3, *x.shape[1:]), lengths)
    torch.testing.assert_close(many, encoder(x, lengths.repeat(2)).reshape(2, 3, -1), **CLOSE)
    torch.testing.assert_close(encoder(x[0]), features[0], **CLOSE)
    if kind == "tokens":
        torch.testing.assert_close(encoder(x.double()), features, **CLOSE)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_recurrent_encoder_is_torchs_packed_bidirectional_network(cell: str) -> None:
    encoder = RecurrentEncoder(data_dim=DIM, embedding=4, hidden=7, cell=cell).double()
    steps = RecurrentEncoder(data_dim=DIM, embedding=4, hidden=7, cell=cell, every_step=True).double()
    steps.load_state_dict(encoder.state_dict())
    network = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](4, 7, batch_first=True, bidirectional=True).double()
    for name, parameter in encoder.networks["forwards"].named_parameters():
        getattr(network, name).data.copy_(parameter)
    for name, parameter in encoder.networks["backwards"].named_parameters():
        getattr(network, name + "_reverse").data.copy_(parameter)
    x, lengths = data("reals"), torch.tensor([4, 1, 3, 2])
    packed = nn.utils.rnn.pack_padded_sequence(
        encoder.inputs(x), lengths, batch_first=True, enforce_sorted=False
    )
    states, last = network(packed)
    last = last if cell == "gru" else last[0]
    torch.testing.assert_close(encoder(x, lengths), torch.cat([last[0], last[1]], -1), **CLOSE)
    unpacked = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)[0]
    torch.testing.assert_close(steps(x, lengths), unpacked, **CLOSE)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_features_of_each_step_depend_on_the_side_that_the_network_reads(direction: str) -> None:
    encoder = RecurrentEncoder(
        data_dim=DIM, embedding=4, hidden=7, direction=direction, every_step=True
    ).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: encoder(x), data("reals", 1))
    found = jacobian[0, :, :, 0].abs().amax((1, 3)) > 0  # feature's time, data's time
    every = torch.ones(SIZE, SIZE, dtype=torch.bool)
    expected = {"forward": every.tril(), "backward": every.triu(), "both": every}[direction]
    assert torch.equal(found, expected)


def test_transformer_encoder_knows_the_order_and_the_place_of_steps() -> None:
    encoder = ENCODERS["transformer"](vocabulary=VOCABULARY).double()
    x = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]])
    features = encoder(x)
    assert (features[0] - features[1]).abs().max() > 1e-3


# Decoders


@decoders
def test_outputs_depend_on_the_steps_before_and_on_z_alone(name: str) -> None:
    decoder = DECODERS[name](data_dim=DIM).double()
    z, x = torch.randn(1, 2).double(), data("reals", 1)
    by_z, by_x = torch.autograd.functional.jacobian(decoder, (z, x))
    found = by_x[0, :, :, 0].abs().amax((1, 3)) > 0  # output's time, data's time
    assert torch.equal(found, torch.ones(SIZE, SIZE, dtype=torch.bool).tril(-1))
    assert (by_z[0].abs().amax((1, 2, 3)) > 0).all()


@decoders
def test_a_token_changes_the_outputs_after_it_alone(name: str) -> None:
    decoder = DECODERS[name](vocabulary=VOCABULARY).double()
    z, x = torch.randn(1, 2).double(), data("tokens", 1)
    for t in range(SIZE):
        changed = x.clone()
        changed[0, t] = (x[0, t] + 1) % VOCABULARY
        difference = (decoder(z, x) - decoder(z, changed))[0].abs().amax(-1)
        assert (difference[: t + 1] == 0).all()
        assert (difference[t + 1 :] > 0).all()


@decoders
@kinds
def test_particles_are_their_loop(name: str, kind: str) -> None:
    decoder = DECODERS[name](**KINDS[kind]).double()
    z, x = torch.randn(5, 4, 2).double(), data(kind)
    outputs = decoder(z, x)
    assert outputs.shape == (5, 4, SIZE, decoder.out_features)
    for k in range(5):
        for i in range(4):
            torch.testing.assert_close(outputs[k, i], decoder(z[k, i], x[i]), **CLOSE)


@decoders
@kinds
def test_next_is_the_forward_pass_step_by_step(name: str, kind: str) -> None:
    decoder = DECODERS[name](**KINDS[kind]).double()
    z, x = torch.randn(5, 4, 2).double(), data(kind)
    outputs, state = decoder(z, x), None
    for t in range(SIZE):
        found, state = decoder.next(z, x[:, :t].expand(5, *x[:, :t].shape), state)
        torch.testing.assert_close(found, outputs[:, :, t], **CLOSE)


@decoders
def test_word_dropout_hides_steps_in_training_alone_as_often_as_it_says(name: str) -> None:
    decoder = DECODERS[name](vocabulary=VOCABULARY, word_dropout=0.3).double()
    plain = DECODERS[name](vocabulary=VOCABULARY).double()
    plain.load_state_dict(decoder.state_dict(), strict=False)
    z, x = torch.randn(4, 2).double(), data("tokens")
    torch.testing.assert_close(decoder.eval()(z, x), plain(z, x), rtol=0, atol=0)
    first = decoder.train()(z, x)
    assert not torch.equal(first, decoder(z, x))
    torch.testing.assert_close(first[:, 0], plain(z, x)[:, 0], **CLOSE)  # the start is never hidden
    draws = 10_000
    steps = decoder.previous(torch.zeros(draws, 2).double(), x[:1, :1].expand(draws, 1), drop=True)
    hidden = (steps[:, 1] == decoder.unknown).all(-1).double().mean()
    assert abs(hidden - 0.3) < 4 * (0.3 * 0.7 / draws) ** 0.5


def test_gated_transition_is_linear_where_the_gate_is_shut_and_the_proposal_where_it_is_open() -> None:
    transition, z = GatedTransition(2, 5).double(), torch.randn(4, 3, 2).double()
    for bias, expected in ((-1e3, transition.linear(z)), (1e3, transition.proposed(z))):
        transition.gate[2].bias.data.fill_(bias)
        torch.testing.assert_close(transition(z)[..., :2], expected, **CLOSE)
    torch.testing.assert_close(transition.linear(z), z)
    log_scale = transition.log_scale(transition.proposed(z).clamp(min=0))
    torch.testing.assert_close(transition(z)[..., 2:], log_scale, **CLOSE)


# All


@pytest.mark.parametrize("name", [*(f"encoder-{n}" for n in ENCODERS), *(f"decoder-{n}" for n in DECODERS)])
@kinds
def test_gradients_reach_every_parameter(name: str, kind: str) -> None:
    role, _, name = name.partition("-")
    if role == "encoder":
        network = ENCODERS[name](**KINDS[kind]).double()
        out = network(data(kind, 40), torch.full((40,), 3))
    else:
        network = DECODERS[name](**KINDS[kind], word_dropout=0.3).double()
        out = network(torch.randn(40, 2).double(), data(kind, 40))
    (out * torch.randn_like(out)).sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", ["gru", "lstm", "transformer"])
def test_encoders_are_traced_with_other_lengths(name: str) -> None:
    encoder, kind = ENCODERS[name](vocabulary=VOCABULARY), "tokens"
    with pyro.validation_enabled(False):
        graph = make_fx(encoder)(data(kind), LENGTHS)
        x, lengths = data(kind), torch.tensor([2, 4, 3, 1])
        torch.testing.assert_close(graph(x, lengths), encoder(x, lengths))
    assert "mkldnn" not in graph.code  # TorchInductor can't compile its LSTM
    assert torch.backends.mkldnn.enabled


@decoders
def test_decoders_are_traced(name: str) -> None:
    decoder = DECODERS[name](vocabulary=VOCABULARY)
    z, x = torch.randn(4, 2), data("tokens")
    graph = make_fx(decoder)(torch.randn(4, 2), data("tokens"))
    torch.testing.assert_close(graph(z, x), decoder(z, x))
    assert "mkldnn" not in graph.code


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecurrentEncoder(), "vocabulary, data_dim: expected one of the two"),
        (
            lambda: RecurrentDecoder(2, vocabulary=3, data_dim=3),
            "vocabulary, data_dim: expected one of the two",
        ),
        (
            lambda: TransformerEncoder(vocabulary=3, width=10, heads=3),
            "width: expected a multiple of the 3 heads",
        ),
        (lambda: RecurrentEncoder(vocabulary=3, cell="gr"), "did you mean 'gru'"),
        (lambda: RecurrentEncoder(vocabulary=3, direction="left"), "direction: unknown 'left'"),
        (lambda: TransformerDecoder(2, vocabulary=3, word_dropout=1.0), "word_dropout: expected a number"),
        (lambda: TransformerDecoder(2, vocabulary=0), "vocabulary: expected a whole number above 0"),
    ],
)
def test_arguments_that_are_not_allowed(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([1, 7, 2, 3]), ValueError, r"lengths: expected lengths in \[0, 4\], got 1 to 7"),
        (torch.tensor([1, -1, 2, 3]), ValueError, r"lengths: expected lengths in \[0, 4\], got -1 to 3"),
        (torch.ones(4), TypeError, "lengths: expected whole numbers, an integer tensor, got torch.float32"),
        (torch.ones(3).long(), ValueError, r"lengths: expected one per sequence, \[4\], got \[3\]"),
    ],
)
def test_lengths_that_do_not_fit(lengths: Tensor, error: type[Exception], message: str) -> None:
    for make in (ENCODERS["gru"], ENCODERS["transformer"]):
        with pytest.raises(error, match=message):
            make(vocabulary=VOCABULARY)(data("tokens"), lengths)


def test_data_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[\*batch, T, 2\], got \[4, 6, 3\]"):
        ENCODERS["gru"](data_dim=DIM)(torch.zeros(4, 6, 3))
    with pytest.raises(ValueError, match=r"x: expected shape \[\*batch, T, 2\], got \[4, 6\]"):
        DECODERS["transformer"](data_dim=DIM)(torch.zeros(4, 2), torch.zeros(4, 6))
