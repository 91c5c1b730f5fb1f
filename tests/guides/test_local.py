"""Tests of the guide with free parameters per datum, its optimiser and the model beside it."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ppl_vae.evaluation import evaluate
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.guides.full_rank import FullRankGuide
from ppl_vae.guides.local import LocalGuide
from ppl_vae.infer import IWAE, KL_ELBO, STL_ELBO, SVI, CompiledSVI, DReG, log_weights, tracing
from ppl_vae.infer.row_adam import RowAdam
from ppl_vae.likelihoods import Normal
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.models.indexed import IndexedModel
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.training import fit, load_run

N = 30


def pair(**options: Any) -> tuple[LinearGaussian, LocalGuide, Tensor]:
    torch.manual_seed(0)
    model = LinearGaussian(2, 4, scale=0.7).double()
    return model, LocalGuide(N, 2, **options).double(), model(None, size=N).detach()


def train(model: torch.nn.Module, guide: LocalGuide, x: Tensor, **options: Any) -> None:
    """Train the guide on all data in each step, at a rate that goes to zero."""
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=options["epochs"])
    data = x, torch.arange(len(x))
    fit(IndexedModel(model), guide, data, batch_size=len(x), scheduler=schedule, progress=False, **options)


# The posterior


def test_posterior_is_the_normal_of_the_rows_that_the_numbers_name() -> None:
    _, guide, x = pair()
    index = torch.tensor([7, 0, 29])
    posterior = guide.posterior(x[index], index)
    rows = guide.rows.weight[index]
    assert (posterior.batch_shape, posterior.event_shape) == ((3,), (2,))
    assert torch.equal(posterior.mean, rows[:, :2])
    assert torch.equal(posterior.stddev, rows[:, 2:].exp())


def test_density_integrates_to_one() -> None:
    _, guide, x = pair()
    torch.nn.init.normal_(guide.rows.weight, std=0.3)
    posterior = guide.posterior(x[:3], torch.arange(3))
    axis = torch.linspace(-10, 10, 401).double()
    grid = torch.cartesian_prod(axis, axis).unsqueeze(1)
    total = posterior.log_prob(grid).exp().sum(0) * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(total, torch.ones(3).double(), rtol=0, atol=1e-3)


def test_log_scale_is_clamped() -> None:
    _, guide, x = pair()
    torch.nn.init.constant_(guide.rows.weight, -100.0)
    stddev = guide.posterior(x, torch.arange(N)).stddev
    torch.testing.assert_close(stddev.log(), torch.full_like(stddev, -7.0))


def test_numbers_are_the_last_tensor_of_the_batch() -> None:
    _, guide, x = pair()
    index = torch.randperm(N)
    mean = guide.posterior(x, torch.zeros(N), index).mean
    assert torch.equal(mean, guide.posterior(x, index).mean)


def test_start_at_the_outputs_of_an_encoder() -> None:
    _, guide, x = pair()
    amortised = MeanFieldGuide(MLP(4), 2).double()
    guide.start_at(amortised.encode(x))
    every = torch.arange(N)
    assert torch.equal(guide.posterior(x, every).mean, amortised.posterior(x).mean)
    assert torch.equal(guide.posterior(x, every).stddev, amortised.posterior(x).stddev)
    some = torch.tensor([4, 2])
    before = guide.rows.weight.detach().clone()
    guide.start_at(torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.0]]), some)
    assert guide.posterior(x[some], some).mean.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    others = torch.ones(N, dtype=torch.bool)
    others[some] = False
    assert torch.equal(guide.rows.weight[others], before[others])


def test_family_of_another_guide() -> None:
    model, _, x = pair()
    amortised = FullRankGuide(MLP(4), 2).double()
    nn.init.normal_(amortised.head.bias)
    guide = LocalGuide(N, 2, like=amortised).double()
    index = torch.arange(N)
    at_bias = amortised.family(amortised.head.bias.expand(N, -1))
    assert (guide.posterior(x, index).mean - at_bias.mean).abs().max() < 0.1
    assert type(guide.posterior(x, index)) is type(amortised.posterior(x))
    guide.start_at(amortised.encode(x))
    z = torch.randn(5, N, 2).double()
    assert torch.equal(guide.posterior(x, index).log_prob(z), amortised.posterior(x).log_prob(z))
    assert [name for name, _ in guide.named_parameters()] == ["rows.weight"]
    KL_ELBO().loss_and_grads(IndexedModel(model), guide, x, index)
    assert all(p.grad is None for p in amortised.parameters())


class WithParameters(MeanFieldGuide):
    """A family that has a parameter of its own, as flows do."""

    def __init__(self) -> None:
        super().__init__(MLP(4), 2)
        self.shift = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (MeanFieldGuide(MLP(4), 3), "expected a guide of 2 latent dimensions, got 3"),
        (WithParameters(), r"expected a family without parameters of its own, got a WithParameters with \["),
        (MLP(4), "expected an amortised guide with a `family`, got MLP"),
    ],
)
def test_wrong_family(like: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^like: {message}"):
        LocalGuide(N, 2, like=like)


# The program


def test_particles_and_plates() -> None:
    model, guide, x = pair()
    index = torch.arange(N)
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(guide).get_trace(x, index)
    assert trace.nodes["z"]["value"].shape == (4, N, 2)
    assert [f.name for f in trace.nodes["z"]["cond_indep_stack"]] == ["particles", "data"]
    assert log_weights(IndexedModel(model), guide, x, index, num_particles=3).shape == (3, N)


@pytest.mark.parametrize(
    "elbo", [Trace_ELBO(), KL_ELBO(), IWAE(3), STL_ELBO(), DReG(3)], ids=lambda elbo: type(elbo).__name__
)
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_reach_the_rows_of_the_batch_alone(elbo: Any, sparse: bool) -> None:
    model, guide, x = pair(sparse=sparse)
    index = torch.tensor([5, 1, 17])
    elbo.loss_and_grads(IndexedModel(model), guide, x[index], index)
    gradient = guide.rows.weight.grad
    assert gradient is not None
    assert gradient.is_sparse is sparse
    dense = gradient.to_dense() if sparse else gradient
    assert dense.any(1).nonzero().flatten().tolist() == [1, 5, 17]


def test_stock_pyro_trains_it() -> None:
    model, guide, x = pair()
    before = guide.rows.weight.detach().clone()
    optim = pyro.optim.Adam({"lr": 0.1})
    pyro.infer.SVI(IndexedModel(model), guide, optim, Trace_ELBO()).step(x, torch.arange(N))
    assert (guide.rows.weight != before).all()


def test_compiled_steps_are_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    found = []
    for engine in (SVI, CompiledSVI):
        model, guide, x = pair()
        svi = engine(IndexedModel(model), guide, torch.optim.Adam, KL_ELBO())
        torch.manual_seed(1)
        losses = [svi.step(x[i : i + 5], torch.arange(i, i + 5)) for i in (0, 10, 20)]
        found.append([torch.stack(losses), guide.rows.weight.detach(), model.weight.detach()])
    torch.testing.assert_close(*found)


def test_sparse_gradients_are_not_compiled() -> None:
    model, guide, x = pair(sparse=True)
    svi = CompiledSVI(IndexedModel(model), guide, RowAdam, KL_ELBO())
    before = guide.rows.weight.detach().clone()
    with pytest.warns(UserWarning, match="^CompiledSVI: can't trace .*; steps are those of SVI$"):
        svi.step(x, torch.arange(N))
    assert (guide.rows.weight != before).all()


# The optimiser


def test_rows_train_as_by_an_adam_each() -> None:
    torch.manual_seed(0)
    steps = [torch.randperm(6)[:3] for _ in range(20)]
    targets = torch.randn(20, 6, 2).double()
    start = torch.randn(6, 2).double()

    table = torch.nn.Embedding(6, 2, sparse=True, _weight=start.clone())
    dense = torch.nn.Parameter(torch.ones(2).double())
    optimizer = RowAdam([{"params": [table.weight, dense], "lr": 0.1}], betas=(0.8, 0.9))
    rows = [torch.nn.Parameter(row.clone()) for row in start]
    beside = torch.nn.Parameter(torch.ones(2).double())
    reference = [torch.optim.Adam([p], lr=0.1, betas=(0.8, 0.9)) for p in (*rows, beside)]
    for index, target in zip(steps, targets, strict=True):
        optimizer.zero_grad()
        ((table(index) - target[index]).square().sum() + dense.pow(4).sum()).backward()
        optimizer.step()
        for adam in reference:
            adam.zero_grad()
        sum([(rows[i] - target[i]).square().sum() for i in index], beside.pow(4).sum()).backward()
        for adam in reference:
            adam.step()
        torch.testing.assert_close(table.weight.detach(), torch.stack(rows).detach())
        torch.testing.assert_close(dense.detach(), beside.detach())
    assert table.weight.grad is not None  # a step leaves the gradients


def test_optimiser_state_round_trip() -> None:
    def run(steps: int, table: torch.nn.Embedding, optimizer: RowAdam) -> None:
        for i in range(steps):
            optimizer.zero_grad()
            table(torch.tensor([i % 4, 4])).square().sum().backward()
            optimizer.step()

    def make() -> tuple[torch.nn.Embedding, RowAdam]:
        table = torch.nn.Embedding(5, 2, sparse=True, _weight=torch.ones(5, 2))
        return table, RowAdam(table.parameters(), lr=0.1)

    one, two = make(), make()
    run(3, *one)
    two[0].load_state_dict(one[0].state_dict())
    two[1].load_state_dict(copy.deepcopy(one[1].state_dict()))
    for table, optimizer in (one, two):
        run(3, table, optimizer)
    assert torch.equal(one[0].weight, two[0].weight)


def test_loaded_steps_of_rows_are_where_the_rows_are() -> None:
    # Adam's own number of steps stays on the CPU unless `capturable` or `fused`; meta is another device
    def make(device: str) -> RowAdam:
        table = torch.nn.Embedding(5, 2, sparse=True, device=device)
        dense = torch.nn.Parameter(torch.ones(2, device=device))
        optimizer = RowAdam([table.weight, dense], lr=0.1)
        (table(torch.tensor([1, 4], device=device)).sum() + dense.sum()).backward()
        return optimizer

    saved = make("cpu")
    saved.step()
    loaded = make("meta")
    loaded.load_state_dict(saved.state_dict())
    rows, dense = (loaded.state[p] for p in loaded.param_groups[0]["params"])
    assert rows["step"].shape == (5,)
    assert rows["step"].dtype == torch.float32
    assert {t.device.type for t in rows.values()} == {"meta"}
    assert dense["step"].device.type == "cpu"


@pytest.mark.parametrize("way", ["made", "loaded", "copied", "pickled"])
def test_hooks_of_a_step_run_once(way: str) -> None:
    torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # puts hooks around Adam's own step
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = RowAdam(table.parameters(), lr=0.1)
    if way == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    elif way == "copied":
        optimizer = copy.deepcopy(optimizer)
    elif way == "pickled":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    (p,) = optimizer.param_groups[0]["params"]
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("own, before"))
    optimizer.register_step_post_hook(lambda *args: calls.append("own, after"))
    handle = register_optimizer_step_post_hook(lambda *args: calls.append("global, after"))
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (5, 2), check_invariants=False)
    optimizer.step()
    handle.remove()
    assert sorted(calls) == ["global, after", "own, after", "own, before"]


def test_optimiser_takes_a_closure() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = RowAdam([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.9))


# Training


@pytest.mark.parametrize("options", [{}, {"sparse": True}], ids=["dense", "sparse"])
def test_fit_saves_resumes_and_loads(tmp_path: Path, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"batch_size": 7, "progress": False, "clip_norm": 5.0, "learning_rate": 0.05}
    settings["optimizer"] = RowAdam if options else torch.optim.Adam
    rows = []
    for folder, epochs in (("whole", (4,)), ("parts", (2, 4))):
        for end in epochs:
            model, guide, x = pair(**options)
            data = x, torch.arange(N)
            settings |= {"output": tmp_path / folder, "epochs": end, "resume": True}
            run = fit(IndexedModel(model), guide, data, **settings)
        rows.append(run.guide.rows.weight.detach())
    assert torch.equal(*rows)
    programs = {"model": IndexedModel(LinearGaussian(2, 4).double()), "guide": LocalGuide(N, 2).double()}
    loaded = load_run(tmp_path / "whole", **programs)
    assert torch.equal(loaded.guide.rows.weight, rows[0])
    assert torch.equal(loaded.model.model.weight, run.model.model.weight)


def test_reaches_the_best_mean_field_posterior_of_every_datum() -> None:
    # The best one has the posterior's mean and, for its variances, the inverse diagonal of the precision.
    model, guide, x = pair()
    model.requires_grad_(False)
    exact = model.posterior(x)
    best = dist.Normal(exact.mean, exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()).to_event(1)
    train(model, guide, x, epochs=300, learning_rate=0.05, elbo=KL_ELBO(200))
    kl = torch.distributions.kl_divergence(guide.posterior(x, torch.arange(N)), best)
    assert kl.max() < 1e-3


def test_no_amortisation_gap_is_below_zero() -> None:
    # A decoder that bends: the amortised guide of the same family is at best as good, datum by datum.
    torch.manual_seed(0)
    truth = VAE(StandardNormal(2), Normal(MLP(2, 6, hidden=8), scale=0.3))
    torch.nn.init.normal_(list(truth.likelihood.decoder.parameters())[-2])
    x = truth(None, size=200).detach()
    model = VAE(StandardNormal(2), Normal(MLP(2, 6, hidden=8), scale=0.3))
    amortised = MeanFieldGuide(MLP(6, hidden=4), 2)
    fit(model, amortised, x, elbo=KL_ELBO(2), epochs=150, learning_rate=1e-2, progress=False)
    model.requires_grad_(False).eval()
    local = LocalGuide(200, 2)
    local.start_at(amortised.encode(x))
    before = [p.clone() for p in model.parameters()]
    train(model, local, x, epochs=200, learning_rate=0.03, elbo=KL_ELBO(8))
    assert all(map(torch.equal, before, model.parameters()))
    one = evaluate(model, amortised, x, num_particles=500, progress=False)
    two = evaluate(IndexedModel(model), local, (x, torch.arange(200)), num_particles=500, progress=False)
    error = (one.elbo.monte_carlo_error**2 + two.elbo.monte_carlo_error**2) ** 0.5
    gap = two.elbo.mean - one.elbo.mean
    assert gap > 4 * error
    assert two.elbo.mean < two.log_likelihood.mean


# Errors


@pytest.mark.parametrize(
    ("index", "got"),
    [
        (None, r"got none: give `\(x, torch.arange\(len\(x\)\)\)`, and the model in `IndexedModel`"),
        (torch.rand(N), "got torch.float32 of shape \\[30\\]"),
        (torch.ones(N, dtype=torch.bool), "got torch.bool of shape \\[30\\]"),
        (torch.arange(N - 1), "got torch.int64 of shape \\[29\\]"),
        (torch.arange(N) + 1, "got 1 to 30"),
        (torch.arange(N) - 1, "got -1 to 28"),
        (torch.arange(N) % 10, r"got 10 different numbers of 30 data \(labels\?\)"),
    ],
)
def test_wrong_numbers(index: Tensor | None, got: str) -> None:
    _, guide, x = pair()
    message = "^index: expected the data's numbers, each from 0 to 29, as the batch's last tensor, "
    with pytest.raises(ValueError, match=message + got):
        guide(x, *([] if index is None else [index]))


@pytest.mark.parametrize("shift", [1, -1])
def test_wrong_numbers_without_validation(shift: int) -> None:
    _, guide, x = pair()
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"^index: expected .*, got "):
        guide(x, torch.arange(N) + shift)


@pytest.mark.parametrize("indexed", [True, False])
def test_fit_on_data_without_numbers(indexed: bool) -> None:
    model, guide, x = pair()
    program = IndexedModel(model) if indexed else model
    with pytest.raises(ValueError, match=r"^index: expected .* the model in `IndexedModel`$"):
        fit(program, guide, x if indexed else (x, torch.arange(N)), progress=False)


@pytest.mark.parametrize(
    ("size", "latent_dim", "name"), [(0, 2, "size"), (1.5, 2, "size"), (3, 0, "latent_dim")]
)
def test_wrong_sizes(size: Any, latent_dim: Any, name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected a whole number above 0, got "):
        LocalGuide(size, latent_dim)


# The model beside it


def test_indexed_model_is_the_model() -> None:
    model, _, x = pair()
    indexed = IndexedModel(model)
    assert indexed(None, size=3).shape == (3, 4)
    assert indexed(x, torch.arange(N)) is x
    assert indexed(x) is x
    with pytest.raises(ValueError, match=r"^size: expected"):
        indexed(None)
    z = torch.randn(N, 2).double()
    traces = [
        poutine.trace(poutine.condition(program, {"z": z})).get_trace(*batch)
        for program, batch in ((model, (x,)), (indexed, (x, torch.arange(N))))
    ]
    assert torch.equal(*[trace.log_prob_sum() for trace in traces])


def test_indexed_model_passes_labels_on() -> None:
    seen = []

    class Labelled(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> None:
            seen.append(y)

    y = torch.zeros(3)
    IndexedModel(Labelled())(torch.zeros(3, 2), y, torch.arange(3))
    assert seen[0] is y


@pytest.mark.parametrize("option", [{"weight_decay": 1.0}, {"maximize": True}, {"amsgrad": True}])
def test_options_that_steps_of_rows_lack_are_refused_in_groups(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(option))}: expected a group of RowAdam without it"):
        RowAdam([{"params": [nn.Parameter(torch.zeros(3, 2))], **option}], lr=0.1)
