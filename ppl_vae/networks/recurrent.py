"""Recurrent networks over sequences, and what all networks over sequences share."""

import math
from typing import Any

import torch
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ppl_vae._checks import check_choice, check_positive_int
from ppl_vae.networks._layers import check_options

CELLS: dict[str, type[nn.GRU] | type[nn.LSTM]] = {"gru": nn.GRU, "lstm": nn.LSTM}


def padding_mask(lengths: Tensor, size: int) -> Tensor:
    """Return which of ``size`` steps are data, ``[*batch, size]``, of ``lengths`` ``[*batch]``.

    Raises:
        TypeError: if the lengths are not integers.
        ValueError: with Pyro's validation on, if one is outside [0, size].
    """
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected whole numbers, an integer tensor, got {lengths.dtype}")
    if is_validation_enabled() and lengths.numel() and bool(((lengths < 0) | (lengths > size)).any()):
        low, high = int(lengths.min()), int(lengths.max())
        raise ValueError(f"lengths: expected lengths in [0, {size}], got {low} to {high}")
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)


def fill_padding(x: Tensor, mask: Tensor, events: int) -> Tensor:
    """Return ``x`` ``[*batch, T, *event]`` with zeros where ``mask`` ``[*batch, T]`` is False."""
    return torch.where(mask.reshape((*mask.shape, *(1 for _ in range(events)))), x, 0)


class SequenceInput(nn.Module):
    """A vector for each step: of a token by a table, of reals by a linear layer."""

    def __init__(self, vocabulary: int | None, data_dim: int | None, width: int) -> None:
        super().__init__()
        if (vocabulary is None) == (data_dim is None):
            raise ValueError(
                "vocabulary, data_dim: expected one of the two, the number of tokens or of reals per step, "
                f"got {vocabulary!r} and {data_dim!r}"
            )
        self.event: tuple[int, ...] = ()
        self.layer: nn.Module
        if vocabulary is not None:
            self.layer = nn.Embedding(check_positive_int("vocabulary", vocabulary), width)
        else:
            self.event = (check_positive_int("data_dim", data_dim),)
            self.layer = nn.Linear(self.event[0], width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*batch, T, *event]`` to ``[*batch, T, width]``."""
        self.check(x)
        out: Tensor = self.layer(x if self.event else x.long())
        return out

    def check(self, x: Tensor) -> None:
        """Raise if ``x`` has no time dim or another event shape."""
        if x.dim() <= len(self.event) or x.shape[x.dim() - len(self.event) :] != self.event:
            expected = ", ".join(map(str, ("*batch", "T", *self.event)))
            raise ValueError(f"x: expected shape [{expected}], got {list(x.shape)}")

    def flat(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """Return vectors ``[N, T, width]``, which steps are data, ``[N, T]``, and the batch shape."""
        self.check(x)
        split = x.dim() - len(self.event) - 1
        batch, mask = tuple(x.shape[:split]), None
        if lengths is not None:
            if lengths.shape != batch[len(batch) - lengths.dim() :]:
                raise ValueError(
                    f"lengths: expected one per sequence, {list(batch)}, got {list(lengths.shape)}"
                )
            mask = padding_mask(lengths, x.shape[split]).expand((*batch, x.shape[split]))
            x = fill_padding(x, mask, len(self.event))
            mask = mask.reshape((math.prod(batch), x.shape[split]))
        return self(x.reshape((math.prod(batch), *x.shape[split:]))), mask, batch


class RecurrentEncoder(nn.Module):
    """Recurrent network from sequences to features; padding has no effect.

    Called with ``x`` alone or with ``x`` and ``lengths``, the number of steps of each sequence that are
    data. Every guide with an encoder takes it: the lengths are the ``y`` of ``guide(x, y)``.

    ``direction="both"`` is two networks, one from the start, one from the end of each sequence. The
    features are the state at the end of each one's reading, or, with ``every_step``, the states at each
    step: what a step's features depend on is the steps before and at it ("forward"), at and after it
    ("backward"), or all.

    The recurrence is torch's ``nn.GRU`` or ``nn.LSTM`` over padded sequences, not packed ones, which look
    at the lengths' values: ``CompiledSVI`` traces it, with each step in the graph, so that long sequences
    take long to compile.

    References:
        Learning Phrase Representations using RNN Encoder-Decoder (Cho et al., 2014), arXiv:1406.1078
        Generating Sentences from a Continuous Space (Bowman et al., 2016), arXiv:1511.06349

    Args:
        vocabulary: the number of tokens; x is ``[*batch, T]``, whole numbers of any dtype from 0.
        data_dim: the number of reals per step, instead; x is ``[*batch, T, data_dim]``.
        embedding: the size of the vector of each step.
        hidden: the size of each direction's state.
        cell: "gru" or "lstm".
        layers: the number of layers of each direction.
        direction: "both", "forward" or "backward".
        every_step: give features of each step, ``[*batch, T, features]``, zero in the padding.

    Attributes:
        out_features: the number of features.

    Raises:
        TypeError, ValueError: if an argument is not of these, or not exactly one of vocabulary and data_dim
            is given.

    Example:
        >>> encoder = RecurrentEncoder(vocabulary=10, hidden=16)
        >>> encoder(torch.zeros(3, 7), torch.tensor([7, 2, 4])).shape, encoder.out_features
        (torch.Size([3, 32]), 32)
    """

    def __init__(
        self,
        *,
        vocabulary: int | None = None,
        data_dim: int | None = None,
        embedding: int = 64,
        hidden: int = 128,
        cell: str = "gru",
        layers: int = 1,
        direction: str = "both",
        every_step: bool = False,
    ) -> None:
        super().__init__()
        check_choice("cell", cell, CELLS)
        check_choice("direction", direction, ("both", "forward", "backward"))
        self.vocabulary = vocabulary
        self.data_dim = data_dim
        self.embedding = check_positive_int("embedding", embedding)
        self.hidden = check_positive_int("hidden", hidden)
        self.cell = cell
        self.layers = check_positive_int("layers", layers)
        self.direction = direction
        self.every_step = every_step
        self.inputs = SequenceInput(vocabulary, data_dim, embedding)
        names = ("forward", "backward") if direction == "both" else (direction,)
        self.out_features = hidden * len(names)
        self.networks = nn.ModuleDict(
            {name + "s": CELLS[cell](embedding, hidden, layers, batch_first=True) for name in names}
        )

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map sequences ``[*batch, T]`` or ``[*batch, T, data_dim]`` to ``[*batch, features]``.

        Args:
            x: the sequences.
            lengths: the number of steps of each that are data, integers ``[*batch]``; None for all.
        """
        steps, mask, batch = self.inputs.flat(x, lengths)
        size = steps.shape[1]
        time = torch.arange(size, device=steps.device).expand(steps.shape[:2])
        if mask is None:
            back, last = time.flip(1), time[:, -1:]
        else:
            total = mask.sum(1, keepdim=True)
            back, last = torch.where(mask, total - 1 - time, time), (total - 1).clamp(min=0)
        found = []
        for name, network in self.networks.items():
            if name == "forwards":
                states = run_network(network, steps)[0]
                found.append(states if self.every_step else _at(states, last).squeeze(1))
            else:
                states = _at(run_network(network, _at(steps, back))[0], back)
                found.append(states if self.every_step else states[:, 0])
        features = torch.cat(found, -1)
        if self.every_step and mask is not None:
            features = fill_padding(features, mask, 1)
        return features.reshape((*batch, *features.shape[1:]))


def run_network(network: nn.Module, steps: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Run a recurrent network on ``[N, T, width]``; return its states and the last one of all layers."""
    backend: Any = torch.backends.mkldnn
    before = backend.enabled
    if isinstance(network, nn.LSTM) and get_proxy_mode() is not None:
        backend.enabled = False  # when traced: it has an LSTM of its own, which TorchInductor can't compile
    try:
        out: tuple[Tensor, Any] = network(steps, state)
    finally:
        backend.enabled = before
    return out


def _at(states: Tensor, index: Tensor) -> Tensor:
    """Return the states ``[N, S, width]`` at the steps ``index`` ``[N, S]`` of ``[N, T, width]``."""
    return states.gather(1, index.unsqueeze(-1).expand(*index.shape, states.shape[-1]))


class AutoregressiveDecoder(nn.Module):
    """A network whose outputs at each step depend on z and on the steps before it alone.

    One of yours is a subclass with a method ``decode(z, steps)``, from z ``[*batch, latent]`` and the
    vectors of what came before each step, ``[*batch, T, width]``, to ``[*batch, T, out_features]``.

    Args:
        latent_dim: the number of latent dimensions.
        vocabulary: the number of tokens.
        data_dim: the number of reals per step, instead.
        width: the size of the vector of each step.
        out_features: the number of outputs per step; by default one per token or real.
        word_dropout: probability that what came before a step is hidden from it in training, in [0, 1).
    """

    def __init__(
        self,
        latent_dim: int,
        vocabulary: int | None,
        data_dim: int | None,
        width: int,
        out_features: int | None,
        word_dropout: float,
    ) -> None:
        super().__init__()
        try:
            check_options("relu", None, word_dropout, None)
        except (TypeError, ValueError) as error:
            raise type(error)(f"word_{error}") from None
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.vocabulary = vocabulary
        self.data_dim = data_dim
        self.word_dropout = word_dropout
        self.inputs = SequenceInput(vocabulary, data_dim, width)
        default = data_dim if vocabulary is None else vocabulary
        self.out_features = check_positive_int(
            "out_features", default if out_features is None else out_features
        )
        self.start = nn.Parameter(torch.randn(width))
        if word_dropout:
            self.unknown = nn.Parameter(torch.randn(width))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the outputs of each step, given the true steps before it (teacher forcing).

        Args:
            z: latents ``[*batch, latent]``.
            x: sequences ``[*batch, T]`` or ``[*batch, T, data_dim]``; their batch shape may be broadcast.

        Returns:
            Outputs ``[*batch, T, out_features]``; those at step t do not depend on x from step t on.
        """
        self.inputs.check(x)
        before = x.narrow(x.dim() - len(self.inputs.event) - 1, 0, self._size(x) - 1)
        return self.decode(z, self.previous(z, before, drop=self.training and self.word_dropout > 0))

    def _size(self, x: Tensor) -> int:
        return x.shape[x.dim() - len(self.inputs.event) - 1]

    def decode(self, z: Tensor, steps: Tensor) -> Tensor:
        """Map z and the vectors of what came before each step to the outputs, causally."""
        raise NotImplementedError

    def next(self, z: Tensor, before: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the outputs of the step after ``before``, and a state for the step after that.

        Args:
            z: latents ``[*batch, latent]``.
            before: the steps so far, ``[*batch, t, *event]``, none at first.
            state: what the last call returned; None at first.
        """
        return self.decode(z, self.previous(z, before, drop=False))[..., -1, :], None

    def previous(self, z: Tensor, before: Tensor, *, drop: bool) -> Tensor:
        """Return the vectors of the start and of the steps ``before``, ``[*batch, 1 + t, width]``."""
        steps = self.inputs(before)
        steps = steps.expand((*z.shape[:-1], *steps.shape[-2:]))
        if drop:
            hidden = torch.rand(steps.shape[:-1], dtype=z.dtype, device=z.device) < self.word_dropout
            steps = torch.where(hidden.unsqueeze(-1), self.unknown, steps)
        start = self.start.expand((*z.shape[:-1], 1, steps.shape[-1]))
        return torch.cat([start, steps], -2)


class RecurrentDecoder(AutoregressiveDecoder):
    """Recurrent network from z and the steps so far to the outputs of the next step.

    z is appended to each step's input. Word dropout hides the steps before from each step in training,
    so that z has to tell; without it a strong decoder leaves z unused (posterior collapse).

    References:
        Generating Sentences from a Continuous Space (Bowman et al., 2016), arXiv:1511.06349

    Args:
        latent_dim: the number of latent dimensions.
        vocabulary: the number of tokens; sequences are ``[*batch, T]``, whole numbers of any dtype from 0.
        data_dim: the number of reals per step, instead; sequences are ``[*batch, T, data_dim]``.
        embedding: the size of the vector of each step.
        hidden: the size of the state.
        cell: "gru" or "lstm".
        layers: the number of layers.
        out_features: the number of outputs per step; by default one per token or real.
        word_dropout: probability that a step before is replaced by a learned vector, in training, in [0, 1).

    Raises:
        TypeError, ValueError: if an argument is not of these, or not exactly one of vocabulary and data_dim
            is given.

    Example:
        >>> decoder = RecurrentDecoder(2, vocabulary=10, hidden=16)
        >>> decoder(torch.zeros(5, 3, 2), torch.zeros(3, 7)).shape
        torch.Size([5, 3, 7, 10])
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        vocabulary: int | None = None,
        data_dim: int | None = None,
        embedding: int = 64,
        hidden: int = 128,
        cell: str = "gru",
        layers: int = 1,
        out_features: int | None = None,
        word_dropout: float = 0.0,
    ) -> None:
        check_choice("cell", cell, CELLS)
        check_positive_int("embedding", embedding)
        super().__init__(latent_dim, vocabulary, data_dim, embedding, out_features, word_dropout)
        self.embedding = embedding
        self.hidden = check_positive_int("hidden", hidden)
        self.cell = cell
        self.layers = check_positive_int("layers", layers)
        self.network = CELLS[cell](embedding + latent_dim, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, self.out_features)

    def decode(self, z: Tensor, steps: Tensor) -> Tensor:
        """Map z and the vectors of what came before each step to the outputs, causally."""
        return self._run(z, steps, None)[0]

    def next(self, z: Tensor, before: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the outputs of the step after ``before``, and the network's state."""
        time = before.dim() - len(self.inputs.event) - 1
        last = before.narrow(time, max(self._size(before) - 1, 0), min(self._size(before), 1))
        outputs, state = self._run(z, self.previous(z, last, drop=False)[..., -1:, :], state)
        return outputs.squeeze(-2), state

    def _run(self, z: Tensor, steps: Tensor, state: Any) -> tuple[Tensor, Any]:
        batch, size = z.shape[:-1], steps.shape[-2]
        inputs = torch.cat([steps, z.unsqueeze(-2).expand((*batch, size, z.shape[-1]))], -1)
        states, state = run_network(
            self.network, inputs.reshape((math.prod(batch), *inputs.shape[-2:])), state
        )
        outputs: Tensor = self.head(states)
        return outputs.reshape((*batch, *outputs.shape[1:])), state


class GatedTransition(nn.Module):
    r"""The transition of a deep Markov model: from :math:`z_{t-1}` to the mean and log scale of :math:`z_t`.

    :math:`\mu = (1 - g) \odot (A z + b) + g \odot h(z)`, with a gate :math:`g` and a proposed mean :math:`h`
    of one hidden layer each, :math:`A` started at the identity; :math:`\log \sigma` is linear in
    :math:`\mathrm{relu}(h)`.

    References:
        Structured Inference Networks for Nonlinear State Space Models (Krishnan et al., 2017),
        arXiv:1609.09869

    Args:
        latent_dim: the number of latent dimensions.
        hidden: the width of the hidden layers.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0.

    Example:
        >>> GatedTransition(2)(torch.zeros(5, 3, 2)).shape
        torch.Size([5, 3, 4])
    """

    def __init__(self, latent_dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.hidden = check_positive_int("hidden", hidden)
        self.gate = nn.Sequential(
            nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, latent_dim), nn.Sigmoid()
        )
        self.proposed = nn.Sequential(nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, latent_dim))
        self.linear = nn.Linear(latent_dim, latent_dim)
        self.log_scale = nn.Linear(latent_dim, latent_dim)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Map ``[*batch, latent]`` to the mean and the log standard deviation, ``[*batch, 2 * latent]``."""
        gate, proposed = self.gate(z), self.proposed(z)
        loc = (1 - gate) * self.linear(z) + gate * proposed
        return torch.cat([loc, self.log_scale(proposed.relu())], -1)


def check_decoder(decoder: object) -> None:
    """Raise if the decoder is not autoregressive."""
    if not isinstance(decoder, AutoregressiveDecoder):
        raise TypeError(
            "decoder: expected a RecurrentDecoder, a TransformerDecoder or a subclass of "
            f"AutoregressiveDecoder, got {type(decoder).__name__}"
        )
