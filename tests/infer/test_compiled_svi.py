"""Compiled steps are plain ones. But for one, the tests compile to torch's plain operators."""

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from helpers import ESTIMATORS, PAIRS
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppl_vae import fit
from ppl_vae.data import Split
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import IWAE, KL_ELBO, STL_ELBO, SVI, CompiledSVI, LinearWarmup, compiled_svi, tracing
from ppl_vae.infer.cuda_graphs import is_capturable, prepare
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

PYROS = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "vectorised": lambda: Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
}
EVERY = ESTIMATORS | PYROS


@pytest.fixture(autouse=True)
def plain_operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "inductor" not in request.keywords:
        monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    yield
    torch._dynamo.reset()


def bits(n: int = 6) -> Tensor:
    return torch.bernoulli(torch.full((n, 4), 0.5, dtype=torch.float64))


def run(
    engine: type[SVI], pair: Any, elbo: ELBO, steps: int = 12, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the losses and the final tensors of a run, whose last two batches are smaller."""
    model, guide, modules = pair
    x = bits()
    svi = engine(model, guide, torch.optim.Adam, elbo, **options)
    torch.manual_seed(3)
    losses = [svi.step(x if i < steps - 2 else x[:4]) for i in range(steps)]
    return losses, [tensor for module in modules for tensor in module.state_dict().values()]


def assert_alike(pair: Any, make: Any, **options: Any) -> None:
    torch.manual_seed(0)
    plain = run(SVI, pair(), make(), **options)
    torch.manual_seed(0)
    compiled = run(CompiledSVI, pair(), make(), **options)
    for one, two in zip([*plain[0], *plain[1]], [*compiled[0], *compiled[1]], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_losses_and_parameters_are_those_of_plain_steps(name: str) -> None:
    assert_alike(PAIRS["VAE"], EVERY[name], per_datum=True, clip_norm=0.5)


@pytest.mark.parametrize("name", ["Trace_ELBO", "DReG", "VIMCO"])
def test_plain_functions_are_compiled_too(name: str) -> None:
    assert_alike(PAIRS["functions"], EVERY[name])


@pytest.mark.inductor
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own, on its way to a compiler
def test_inductor_makes_the_same_draws() -> None:
    assert_alike(PAIRS["VAE"], lambda: KL_ELBO(kl_weight=LinearWarmup(10)))


def test_batch_norm_and_dropout_keep_their_meaning() -> None:
    def pair() -> Any:
        decoder = MLP(2, 4, hidden=3, normalization="batch", dropout=0.5)
        encoder = MLP(4, hidden=3, normalization="batch")
        model, guide = VAE(StandardNormal(2), Bernoulli(decoder)), MeanFieldGuide(encoder, 2)
        return model.double(), guide.double(), [model, guide]

    assert_alike(pair, KL_ELBO)
    model, guide, _ = pair()
    svi = CompiledSVI(model, guide, torch.optim.SGD, STL_ELBO())
    svi.step(bits())
    model.eval()
    guide.eval()
    before = [b.clone() for b in [*model.buffers(), *guide.buffers()]]
    x = bits()
    pyro.set_rng_seed(1)
    expected = svi.objective.evaluate_loss(x)
    pyro.set_rng_seed(1)
    torch.testing.assert_close(svi.step(x), expected)
    assert all((b == c).all() for b, c in zip(before, [*model.buffers(), *guide.buffers()], strict=True))


def test_tracing_changes_nothing_but_what_a_step_changes() -> None:
    model, guide, modules = PAIRS["VAE"]()
    elbo = IWAE(3, kl_weight=LinearWarmup(10))
    svi = CompiledSVI(model, guide, lambda p: torch.optim.SGD(p, lr=0.0), elbo)
    x = bits()
    before = [p.clone() for module in modules for p in module.parameters()]
    validated = Distribution._validate_args
    plain = SVI(*PAIRS["VAE"]()[:2], torch.optim.SGD, IWAE(3))
    torch.manual_seed(5)
    svi.step(x)
    assert float(elbo.step) == 1
    state = torch.get_rng_state()
    torch.manual_seed(5)
    plain.step(x)
    assert torch.equal(state, torch.get_rng_state())
    after = [p for module in modules for p in module.parameters()]
    assert all((p == q).all() for p, q in zip(before, after, strict=True))
    assert Distribution._validate_args == validated


def test_settings_and_tensors_that_change_make_no_stale_graph() -> None:
    model, guide, _ = PAIRS["VAE"]()
    elbo = KL_ELBO()
    svi = CompiledSVI(model, guide, lambda p: torch.optim.SGD(p, lr=0.0), elbo)
    x = bits()

    def found() -> tuple[Tensor, Tensor]:
        pyro.set_rng_seed(1)
        compiled = svi.step(x)
        pyro.set_rng_seed(1)
        return compiled, svi.objective.evaluate_loss(x)

    torch.testing.assert_close(*found())
    elbo.kl_weight = 0.25
    torch.testing.assert_close(*found())
    with torch.no_grad():
        for p in [*model.parameters(), *guide.parameters()]:
            p.mul_(2.0)
    torch.testing.assert_close(*found())
    model.prior.loc = model.prior.loc + 0.5
    torch.testing.assert_close(*found())


def test_two_models_in_one_process_are_apart() -> None:
    x, alone = bits(), []
    for _ in range(2):
        torch.manual_seed(0)
        alone.append(run(CompiledSVI, PAIRS["VAE"](), STL_ELBO()))
    assert all(torch.equal(a, b) for a, b in zip(alone[0][0], alone[1][0], strict=True)), x


def test_a_program_that_reads_values_falls_back_and_the_line_is_named() -> None:
    _, guide, _ = PAIRS["VAE"]()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            scale = 1.0 if z.mean() > 0 else 2.0  # looks at a value
            pyro.sample("x", dist.Normal(z.repeat(*[1] * (z.dim() - 1), 2), scale).to_event(1), obs=x)

    svi = CompiledSVI(model, guide, torch.optim.Adam, KL_ELBO())
    with pytest.warns(UserWarning, match="CompiledSVI: can't trace .*test_compiled_svi.py.*looks at a value"):
        svi.step(bits())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert svi.step(bits(4)).isfinite()


def test_estimators_without_a_differentiable_loss_fall_back() -> None:
    model, guide, _ = PAIRS["VAE"]()
    svi = CompiledSVI(model, guide, torch.optim.Adam, RenyiELBO(num_particles=2))
    with pytest.warns(UserWarning, match="RenyiELBO has no differentiable loss; steps are those of SVI"):
        assert svi.step(bits()).isfinite()


def test_an_interrupt_while_tracing_leaves_everything_as_it_was() -> None:
    model, guide, _ = PAIRS["VAE"]()
    inner, calls = model.forward, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the first is the dry run
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    model.forward = interrupted
    svi = CompiledSVI(model, guide, torch.optim.Adam, KL_ELBO())
    with pytest.raises(KeyboardInterrupt):
        svi.step(bits())
    assert svi.step(bits()).isfinite()
    torch.manual_seed(0)
    assert_alike(PAIRS["VAE"], KL_ELBO)


@pytest.mark.parametrize("elbo", ["KL_ELBO", "Trace_ELBO"])
def test_fit_compiled_is_fit(elbo: str) -> None:
    histories = []
    x = bits(25)
    options: dict[str, Any] = {"epochs": 3, "batch_size": 10, "progress": False}
    for compiled in (False, True):
        torch.manual_seed(0)
        model, guide, _ = PAIRS["VAE"]()
        found = fit(model, guide, x, validation=x[:8], elbo=EVERY[elbo](), compile=compiled, **options)
        histories.append([record | {"seconds": 0} for record in found.history])
    for one, two in zip(*histories, strict=True):
        assert one == pytest.approx(two, rel=1e-6)


class Odd(nn.Module):
    """A decoder with much that a graph could miss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 4).double()
        self.a, self.b = (nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
        self.drop = nn.Dropout(0.5)
        self.k = 1.0
        self.register_buffer("n", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        self.n += 1
        return self.drop(self.k * (self.linear(z) + (self.a + self.b))) + 0.01 * self.n


def freeze(svi: SVI) -> None:
    svi.objective.guide.requires_grad_(False)


def other_schedule(svi: SVI) -> None:
    svi.objective.estimator.kl_weight = LinearWarmup(3)


def no_dropout(svi: SVI) -> None:
    svi.objective.model.likelihood.decoder.drop.p = 0.0


def other_number(svi: SVI) -> None:
    svi.objective.model.likelihood.decoder.k = 2.0


def other_network(svi: SVI) -> None:
    torch.manual_seed(9)
    svi.objective.model.likelihood.decoder.linear = nn.Linear(2, 4).double()
    torch.manual_seed(10)


@pytest.mark.filterwarnings("ignore:.* was not registered in the param store")  # Pyro's, of frozen ones
@pytest.mark.parametrize("change", [freeze, other_schedule, no_dropout, other_number, other_network])
def test_what_changes_between_steps_counts(change: Any) -> None:
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        model = VAE(StandardNormal(2), Bernoulli(Odd())).double()
        guide, x = MeanFieldGuide(MLP(4, hidden=3), 2).double(), bits()
        elbo = KL_ELBO(kl_weight=LinearWarmup(10))
        svi = engine(model, guide, lambda p: torch.optim.SGD(p, lr=0.1), elbo, per_datum=True, clip_norm=0.5)
        losses = [svi.step(x) for _ in range(2)]
        change(svi)
        losses += [svi.step(x) for _ in range(3)]
        found.append([*losses, *model.parameters(), *guide.parameters(), model.likelihood.decoder.n])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("where", ["schedule", "buffer"])
def test_numbers_read_from_tensors_fall_back(where: str) -> None:
    model, guide, _ = PAIRS["VAE"]()
    elbo = KL_ELBO(kl_weight=lambda step: min(1.0, float(step) / 4)) if where == "schedule" else KL_ELBO()
    if where == "buffer":
        model.prior.register_buffer("flag", torch.ones(()))
        inner = model.prior.forward
        model.prior.forward = lambda: dist.Normal(model.prior.flag.item() * inner().mean, 1.0).to_event(1)
    svi = CompiledSVI(model, guide, torch.optim.Adam, elbo)
    with pytest.warns(UserWarning, match="can't trace .*test_compiled_svi.py.* a tensor's value is read"):
        svi.step(bits())


def test_steps_inside_a_handler_are_plain_and_many_graphs_end_in_plain_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, guide, _ = PAIRS["VAE"]()
    svi, x = CompiledSVI(model, guide, lambda p: torch.optim.SGD(p, lr=0.0), KL_ELBO()), bits()
    pyro.set_rng_seed(1)
    loss = svi.step(x)
    pyro.set_rng_seed(1)
    with pyro.poutine.scale(scale=2.0):
        torch.testing.assert_close(svi.step(x), 2 * loss)
    monkeypatch.setattr(compiled_svi, "MOST_GRAPHS", 2)
    svi.step(bits(3))
    with pytest.warns(UserWarning, match="2 graphs, since something changes"):
        svi.step(bits(5))
    assert svi.step(bits(2)).isfinite()


def test_other_strides_are_another_graph() -> None:
    model, guide, _ = PAIRS["VAE"]()
    svi = CompiledSVI(model, guide, torch.optim.Adam, KL_ELBO())
    for x in (bits(), bits().mT.contiguous().mT):
        assert svi.step(x).isfinite()


class Scaled(nn.Module):
    """A decoder with a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 4).double()
        self.scale = torch.tensor(0.5, dtype=torch.float64)
        self.last: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        self.last = self.linear(z)
        return self.scale * self.last


def test_a_tensor_that_is_replaced_counts_and_one_that_a_run_leaves_does_not() -> None:
    torch.manual_seed(0)
    decoder = Scaled()
    model, guide = VAE(StandardNormal(2), Bernoulli(decoder)).double(), MeanFieldGuide(MLP(4), 2).double()
    svi = CompiledSVI(model, guide, lambda p: torch.optim.SGD(p, lr=0.0), KL_ELBO())
    x, compiled = bits(), []
    svi._compile = lambda *args, inner=svi._compile: compiled.append(1) or inner(*args)  # type: ignore[method-assign]

    def assert_as_plain() -> None:
        pyro.set_rng_seed(1)
        loss = svi.step(x)
        pyro.set_rng_seed(1)
        torch.testing.assert_close(loss, svi.objective.evaluate_loss(x))  # sets `last` anew

    for _ in range(3):
        assert_as_plain()
    assert len(compiled) == 1
    decoder.scale = torch.tensor(2.0, dtype=torch.float64)
    assert_as_plain()
    assert len(compiled) == 2
    decoder.scale.mul_(2.0)
    assert_as_plain()
    assert len(compiled) == 2


def test_a_pair_in_another_dtype_is_another_graph() -> None:
    model, guide, _ = PAIRS["VAE"]()
    svi = CompiledSVI(model, guide, lambda p: torch.optim.SGD(p, lr=0.0), KL_ELBO())
    assert svi.step(bits()).dtype == torch.float64
    model.float()
    guide.float()
    x = bits().float()
    pyro.set_rng_seed(1)
    loss = svi.step(x)
    assert loss.dtype == torch.float32
    pyro.set_rng_seed(1)
    torch.testing.assert_close(loss, svi.objective.evaluate_loss(x))


def test_500_steps_end_where_plain_ones_end() -> None:
    """The same draws, so that only rounding tells them apart: far less than the noise of one step."""
    found = []
    x = bits(64).float()
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        model = VAE(StandardNormal(2), Bernoulli(MLP(2, 4, hidden=8)))
        guide = MeanFieldGuide(MLP(4, hidden=8), 2)
        svi = engine(model, guide, lambda p: torch.optim.Adam(p, lr=1e-2), IWAE(5))
        torch.manual_seed(1)
        found.append(torch.stack([svi.step(x) for _ in range(500)]))
    plain, compiled = found
    noise = plain[-100:].std()
    assert plain[-100:].mean() < plain[:100].mean() - 10 * noise / 10  # it trains
    assert (plain - compiled).abs().max() < 0.1 * noise


def iaf_pair() -> Any:
    """Return a pair whose guide is an inverse autoregressive flow, by Pyro."""
    decoder, encoder = nn.Linear(2, 4).double(), nn.Linear(4, 4).double()
    flow = T.affine_autoregressive(2, hidden_dims=[5]).double()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("flow", flow)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = encoder(x).chunk(2, -1)
            base = dist.Normal(loc, log_scale.exp()).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    return model, guide, [decoder, encoder, flow]


@pytest.mark.parametrize("name", ["KL_ELBO", "IWAE", "Trace_ELBO"])
def test_flows_are_compiled(name: str) -> None:
    assert_alike(iaf_pair, EVERY[name])


def test_bfloat16_layers_change_little_and_are_the_same_compiled() -> None:
    x, found = bits(64).float(), {}
    for precision in ("float32", "bf16"):
        for engine in (SVI, CompiledSVI):
            torch.manual_seed(0)
            model = VAE(StandardNormal(2), Bernoulli(MLP(2, 4, hidden=64)))
            guide = MeanFieldGuide(MLP(4, hidden=64), 2)
            svi = engine(model, guide, torch.optim.Adam, KL_ELBO(), precision=precision)
            torch.manual_seed(1)
            found[precision, engine] = loss = torch.stack([svi.step(x) for _ in range(5)])
            assert loss.dtype == torch.float32
    rounding = 2.0**-8  # of bfloat16
    difference = (found["bf16", SVI] / found["float32", SVI] - 1).abs().max()
    assert 0 < difference < rounding
    torch.testing.assert_close(found["bf16", SVI], found["bf16", CompiledSVI], rtol=1e-4, atol=0.0)


def test_double_precision_stays_so() -> None:
    for precision in ("bf16", "tf32"):
        assert_alike(PAIRS["VAE"], KL_ELBO, precision=precision)
    with pytest.raises(ValueError, match=r"precision: unknown 'b16' \(did you mean 'bf16'\?\)"):
        SVI(*PAIRS["VAE"]()[:2], torch.optim.Adam, KL_ELBO(), precision="b16")


def test_learning_rates_of_captured_optimisers_are_tensors_that_schedulers_fill() -> None:
    p = nn.Parameter(torch.ones(2))
    optim = torch.optim.Adam([p], lr=0.5)
    prepare(optim, torch.device("cpu"), capture=True)
    assert is_capturable(optim) and isinstance(rate := optim.param_groups[0]["lr"], Tensor)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optim, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no step was taken
        scheduler.step()
    assert optim.param_groups[0]["lr"] is rate and float(rate) == 0.25
    others = torch.optim.SGD([p], lr=0.5)
    prepare(others, torch.device("cpu"), capture=True)
    assert not is_capturable(others) and others.param_groups[0]["lr"] == 0.5


@pytest.mark.inductor
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["KL_ELBO", "IWAE", "Trace_ELBO"])
def test_cuda_graphs_take_the_steps_of_plain_ones(name: str) -> None:
    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        model, guide, modules = PAIRS["VAE"]()
        model.cuda()
        guide.cuda()
        svi = engine(model, guide, lambda p: torch.optim.Adam(p, capturable=True), EVERY[name]())
        x = bits().cuda()
        torch.manual_seed(3)
        losses = [svi.step(x if i % 3 else x[:4]) for i in range(30)]
        found.append([*losses, *[t for module in modules for t in module.state_dict().values()]])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


class RecordedGraph(TorchDispatchMode):
    """Stands in for a CUDA graph: takes note of a step's operations, and repeats them in the same memory.

    A capture runs nothing on the device; this one runs the operations once, so that ``undo`` is called.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        super().__init__()
        self.undo = undo
        self.calls: list[Any] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.undo()

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old is not new:
                        old.copy_(new)


def replayed_steps(
    monkeypatch: pytest.MonkeyPatch, engine: type[SVI], graphs: list[RecordedGraph], take: Any
) -> list[Tensor]:
    """Return losses, parts and final parameters of ten steps whose CUDA graphs are such stand-ins."""
    torch.manual_seed(0)
    model, guide, modules = PAIRS["VAE"]()
    svi = engine(model, guide, torch.optim.Adam, Trace_ELBO())
    svi.setup(bits(1))

    def make() -> RecordedGraph:
        tensors = [p for module in modules for p in module.parameters()]
        tensors += [t for held in svi.optim.state.values() for t in held.values()]
        before, stream = [t.detach().clone() for t in tensors], torch.get_rng_state()

        def undo() -> None:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
            torch.set_rng_state(stream)

        graphs.append(RecordedGraph(undo))
        return graphs[-1]

    class Aside:
        def wait_stream(self, other: Any) -> None: ...

    monkeypatch.setattr(compiled_svi, "_on_cuda", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Aside())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Aside())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    torch.manual_seed(3)
    found = [leaf for i in range(20) for leaf in tree_leaves(take(svi, i))]
    return [*found, *[t for module in modules for t in module.state_dict().values()]]


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_replayed_steps_are_those_of_plain_ones(
    monkeypatch: pytest.MonkeyPatch, gathered: bool, dynamic: bool
) -> None:
    data = Split(0.8 * bits(30) + 0.1 if dynamic else bits(30), dynamic=dynamic)

    def take(svi: SVI, i: int) -> Any:
        index = torch.arange(i, i + (4 if i % 3 == 2 else 6))
        return svi.step_of(data, index) if gathered else svi.step_with_parts(*data.batch(index))

    graphs: list[RecordedGraph] = []
    with monkeypatch.context() as patch:
        compiled = replayed_steps(patch, CompiledSVI, graphs, take)
    assert [graph.replays for graph in graphs] == [
        10,
        3,
    ]  # of 14 and 6: the optimiser's first step and three more are plain
    plain = replayed_steps(monkeypatch, SVI, graphs, take)
    assert len(graphs) == 2
    for one, two in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)  # the captured rate is a float32


def test_a_step_that_cannot_be_captured_is_taken_without_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refuses(RecordedGraph):
        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            raise RuntimeError("operation not permitted when stream is capturing")

    data = Split(bits(30))

    def take(svi: SVI, i: int) -> Any:
        return svi.step_of(data, torch.arange(i, i + 6))

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "RecordedGraph", Refuses)
        with pytest.warns(
            UserWarning, match="can't capture the step as a CUDA graph: operation not"
        ) as caught:
            compiled = replayed_steps(patch, CompiledSVI, [], take)
    assert len(caught) == 1
    for one, two in zip(compiled, replayed_steps(monkeypatch, SVI, [], take), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)  # the captured rate is a float32


@pytest.mark.parametrize("engine", [SVI, CompiledSVI])
def test_steps_on_rows_take_the_labels_that_the_data_have(engine: type[SVI]) -> None:
    given: list[bool] = []

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out_features = 4
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            given.append(y is not None)
            return self.layer(x)

    class Labelled(VAE):
        def forward(self, x: Any = None, y: Any = None, *, size: Any = None) -> Tensor:
            return super().forward(x, size=size)

    model, guide = Labelled(StandardNormal(2), Bernoulli(MLP(2, 4))), MeanFieldGuide(Encoder(), 2)
    svi, index = engine(model.double(), guide.double(), torch.optim.Adam, Trace_ELBO()), torch.arange(3)
    svi.step_of(Split(bits()), index)
    assert given and not any(given)
    given.clear()
    svi.step_of(Split(bits(), torch.arange(6)), index)
    assert given and all(given)


def test_steps_on_other_data_forget_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    data = [Split(bits(30)) for _ in range(3)]
    graphs: list[RecordedGraph] = []

    def take(svi: SVI, i: int) -> Any:
        result = svi.step_of(data[i // 7], torch.arange(i, i + 6))
        if isinstance(svi, CompiledSVI):
            assert len(svi._examples) == 1 and len(svi._replays) <= 2
        return result

    with monkeypatch.context() as patch:
        compiled = replayed_steps(patch, CompiledSVI, graphs, take)
    assert [graph.replays for graph in graphs] == [3, 4, 3]
    for one, two in zip(compiled, replayed_steps(monkeypatch, SVI, [], take), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)  # the captured rate is a float32
