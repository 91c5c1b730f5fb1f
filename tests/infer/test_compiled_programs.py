"""Compiled steps of unusual programs, and of programs that are changed between steps, are plain ones."""

import functools
import math
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import PAIRS
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import KL_ELBO, SVI, VIMCO, CompiledSVI, tracing
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP, ConvEncoder
from ppl_vae.priors import StandardNormal

Engine = type[SVI]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def plain_operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "inductor" not in request.keywords:
        monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    yield
    torch._dynamo.reset()


def bits(n: int = 6) -> Tensor:
    return torch.bernoulli(torch.full((n, 4), 0.5, dtype=torch.float64))


class Decoder(nn.Module):
    """A decoder with things to change; ``forward`` runs ``act`` and what a subclass adds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = (nn.Linear(2, 4).double() for _ in range(2))
        self.active: Any = self.linear
        self.act: Callable[[Tensor], Tensor] = torch.tanh
        self.flag: Any = 1
        self.register_buffer("n", torch.zeros((), dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return self.act(self.active(z)) * (0.5 if self.flag is True else 1.0) + 0.1 * self.other(z)


def engine_of(engine: Engine, decoder: nn.Module, **options: Any) -> SVI:
    model = VAE(StandardNormal(2), Bernoulli(decoder)).double()
    guide = MeanFieldGuide(MLP(4, hidden=3), 2).double()
    return engine(model, guide, functools.partial(torch.optim.Adam, lr=0.1), KL_ELBO(), **options)


def losses(
    engine: Engine, make: Callable[[], nn.Module], change: Any = None, sizes: Any = (6,) * 6
) -> Tensor:
    """Return the losses of steps, with a change of the decoder before the fourth."""
    torch.manual_seed(0)
    svi = engine_of(engine, make())
    found = []
    for i, n in enumerate(sizes):
        if change is not None and i == 3:
            change(svi.objective.model.likelihood.decoder)
        torch.manual_seed(10 + i)
        found.append(svi.step(bits(n)))
    return torch.stack(found)


def assert_alike(make: Callable[[], nn.Module], change: Any = None, sizes: Any = (6,) * 6) -> None:
    plain, compiled = (losses(engine, make, change, sizes) for engine in (SVI, CompiledSVI))
    torch.testing.assert_close(compiled, plain, rtol=1e-10, atol=1e-10)


class Einsum(nn.Module):
    """Its weight's gradient has other strides than the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", z, self.weight)


@pytest.mark.parametrize("optim", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_gradients_have_the_layout_of_their_parameters(optim: Any) -> None:
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        svi = engine_of(engine, Einsum())
        svi.optim = functools.partial(optim, lr=0.1)
        torch.manual_seed(1)
        found.append(torch.stack([svi.step(bits()) for _ in range(4)]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_channels_last_batches() -> None:
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        model = VAE(StandardNormal(2), Bernoulli(MLP(2, (1, 5, 4), 3)))
        guide = MeanFieldGuide(ConvEncoder((1, 5, 4), 6, (3, 2)), 2)
        svi = engine(model, guide, torch.optim.Adam, KL_ELBO())
        x = torch.rand(6, 1, 5, 4).round().contiguous(memory_format=torch.channels_last)
        found.append(torch.stack([svi.step(x) for _ in range(4)]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


class Counting(Decoder):
    def forward(self, z: Tensor) -> Tensor:
        self.flag += 1
        return super().forward(z) / self.flag


class Replacing(Decoder):
    def forward(self, z: Tensor) -> Tensor:
        self.n = self.n + 1
        return super().forward(z) / self.n


class Remembering(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.last = torch.ones((), dtype=torch.float64)

    def forward(self, z: Tensor) -> Tensor:
        logits = super().forward(z) * self.last
        self.last = 0.5 * self.last
        return logits


@pytest.mark.parametrize("kind", [Counting, Replacing, Remembering])
def test_state_that_a_run_sets_anew_is_not_frozen(kind: type[nn.Module]) -> None:
    name = {"Counting": "flag", "Replacing": "n", "Remembering": "last"}[kind.__name__]
    with pytest.warns(UserWarning, match=rf"a run sets {kind.__name__}\.{name} anew.*steps are those of SVI"):
        assert_alike(kind)


def test_the_warning_names_the_line_in_a_cell_and_leaves_out_what_pyro_adds() -> None:
    source = (
        "def model(x):\n"
        "    with pyro.plate('data', len(x), dim=-1):\n"
        "        z = pyro.sample('z', dist.Normal(0.0, 1.0))\n"
        "        scale = 1.0 if z.mean() > 0 else 2.0\n"
        "        pyro.sample('x', dist.Normal(z, scale), obs=x)\n"
    )
    names: dict[str, Any] = {"pyro": pyro, "dist": dist}
    exec(compile(source, "/tmp/ipykernel_12/34.py", "exec"), names)

    head = nn.Linear(1, 1)

    def guide(x: Tensor) -> None:
        pyro.module("head", head)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(head(x.unsqueeze(-1)).squeeze(-1), 1.0))

    svi = CompiledSVI(names["model"], guide, torch.optim.Adam, Trace_ELBO())
    with pytest.warns(UserWarning, match=r"can't trace cell:4 .*steps are those of SVI$") as warned:
        svi.step(torch.zeros(3))
    assert "Trace Shapes" not in str(warned[0].message)


class Noting(Decoder):
    def forward(self, z: Tensor) -> Tensor:
        self.flag = z.shape[-2]
        self.seen = {"z": z}
        return super().forward(z) / self.flag


@pytest.mark.filterwarnings("ignore:CompiledSVI. can't trace.*a run sets Noting.flag anew")
def test_what_a_run_notes_makes_no_endless_graphs() -> None:
    assert_alike(Noting, sizes=(6, 4) * 10)
    torch.manual_seed(0)
    svi: Any = engine_of(CompiledSVI, Noting())
    for _ in range(10):
        for n in (6, 4):
            svi.step(bits(n))
            svi.objective.evaluate_loss(bits(n))
    assert svi._compiled <= 6 and not svi.plain


def other_child(decoder: Any) -> None:
    decoder.active = decoder.other
    decoder.other = decoder.linear


def other_function(decoder: Any) -> None:
    decoder.act = torch.relu


def one_to_true(decoder: Any) -> None:
    decoder.flag = True


def a_hook(decoder: Any) -> None:
    decoder.linear.register_forward_hook(lambda module, args, out: 2 * out)


def a_gradient_hook(decoder: Any) -> None:
    decoder.linear.weight.register_hook(lambda gradient: -gradient)


def another_forward(decoder: Any) -> None:
    decoder.forward = lambda z: 3 * decoder.linear(z)


CHANGES = [other_child, other_function, one_to_true, a_hook, a_gradient_hook, another_forward]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps_count(change: Any) -> None:
    assert_alike(Decoder, change)


def test_a_hook_in_the_place_of_another() -> None:
    def make() -> Decoder:
        decoder = Decoder()
        decoder.handle = decoder.register_forward_hook(lambda module, args, out: 2 * out)
        return decoder

    def swap(decoder: Any) -> None:
        decoder.handle.remove()
        decoder.register_forward_hook(lambda module, args, out: -out)

    assert_alike(make, swap)


class Both(nn.Module):
    """Model and guide as methods of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4).double(), nn.Linear(2, 4).double()
        self.beta = 1.0

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), self.beta).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_methods_of_a_module_are_watched_with_it() -> None:
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        both, x = Both(), bits()
        svi = engine(both.model, both.guide, torch.optim.Adam, KL_ELBO())
        steps = [svi.step(x)]
        both.beta = 2.0
        steps += [svi.step(x) for _ in range(2)]
        found.append(torch.stack(steps))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_hooks_that_wait_for_gradients_run() -> None:
    torch.manual_seed(0)
    svi = engine_of(CompiledSVI, Decoder())
    called: list[Tensor] = []
    svi.objective.model.likelihood.decoder.linear.weight.register_post_accumulate_grad_hook(called.append)
    with pytest.warns(UserWarning, match="a parameter has a hook that waits for its gradient"):
        svi.step(bits())
    assert len(called) == 1


def test_autocast_counts() -> None:
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        model, guide = VAE(StandardNormal(2), Bernoulli(MLP(2, 4, 8))), MeanFieldGuide(MLP(4), 2)
        svi, x = engine(model, guide, lambda p: torch.optim.SGD(p, lr=0.0), KL_ELBO()), bits().float()
        steps = []
        for low in (False, True, False):
            pyro.set_rng_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                steps.append(svi.step(x))
        assert steps[0] == steps[2] != steps[1]
        found.append(torch.stack(steps))
    torch.testing.assert_close(*found, rtol=1e-4, atol=0.0)


def discrete_pair() -> Any:
    decoder, encoder = nn.Linear(2, 4).double(), nn.Linear(4, 2).double()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    return model, guide


@pytest.mark.inductor
@needs_compiler
@pytest.mark.filterwarnings("ignore")  # torch's own, on its way to a compiler
def test_inductor_makes_the_same_discrete_draws() -> None:
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        svi, x = engine(*discrete_pair(), torch.optim.Adam, VIMCO(3)), bits()
        found.append(torch.stack([svi.step(x) for _ in range(4)]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_a_guess_of_the_number_of_plates_draws_as_in_plain_steps(elbo: Any) -> None:
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        model, guide, _ = PAIRS["VAE"]()
        svi = engine(model, guide, torch.optim.Adam, elbo(num_particles=2, vectorize_particles=True))
        torch.manual_seed(1)
        found.append(torch.stack([svi.step(bits()) for _ in range(4)]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


class Table(nn.Module):
    """Rows of a table whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(6, 4, sparse=True).double()
        self.linear = nn.Linear(2, 4).double()

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z) + self.rows(torch.arange(z.shape[-2]))


@pytest.mark.filterwarnings("ignore:CompiledSVI")  # sparse gradients may not trace
def test_sparse_gradients_train() -> None:
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        svi = engine_of(engine, Table())
        svi.optim = functools.partial(torch.optim.SGD, lr=0.1)
        found.append(torch.stack([svi.step(bits()) for _ in range(4)]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_a_wrong_batch_raises_without_a_warning() -> None:
    svi = engine_of(CompiledSVI, Decoder())
    svi.step(bits())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="x: expected"):
            svi.step(torch.zeros(3, 5, dtype=torch.float64))


def test_timing_a_plain_step_changes_nothing() -> None:
    svi: Any = engine_of(CompiledSVI, Replacing())
    svi.setup(bits())
    before = {name: t.clone() for name, t in svi.objective.tensors().items()}
    x = bits()
    state = torch.get_rng_state()
    assert 0 < svi.time_plain_step(x) < math.inf
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in svi.objective.tensors().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in svi.objective.parameters())


def test_an_engine_is_pickled_without_its_graphs() -> None:
    model, guide, _ = PAIRS["VAE"]()
    svi, x = CompiledSVI(model, guide, torch.optim.Adam, KL_ELBO()), bits()
    svi.step(x)
    again = pickle.loads(pickle.dumps(svi))
    torch.manual_seed(1)
    loss = svi.step(x)
    torch.manual_seed(1)
    torch.testing.assert_close(again.step(x), loss, rtol=1e-10, atol=1e-10)


def test_losses_of_earlier_steps_stay_what_they_were() -> None:
    svi, x = engine_of(CompiledSVI, Decoder()), bits()
    held = [svi.step_with_parts(x) for _ in range(3)]
    before = [(loss.clone(), {k: v.clone() for k, v in parts.items()}) for loss, parts in held]
    svi.step_with_parts(x)
    assert held == before


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out_features = 4

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unsqueeze(1).expand(-1, 3, -1)
        return self.attention(rows, rows, rows)[0].mean(1)


def test_attention_runs_in_bfloat16() -> None:
    found = []
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        model, guide = VAE(StandardNormal(2), Bernoulli(MLP(2, 4))), MeanFieldGuide(Attending(), 2)
        svi = SVI(model, guide, torch.optim.Adam, KL_ELBO(), precision=precision)  # type: ignore[arg-type]
        pyro.set_rng_seed(1)
        x = bits().float()
        pyro.set_rng_seed(1)
        svi.step(x)
        found.append(guide.encoder.attention.in_proj_weight.grad.clone())
    assert (found[0] != found[1]).any()
    assert ((found[0] - found[1]).norm() / found[0].norm()) < 0.05
