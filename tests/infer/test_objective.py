"""Tests of the seam: a model, a guide and an estimator as one module whose forward is the loss."""

import copy
import re
import tempfile
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import Distribution

from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import Objective, log_weights
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

Program = Callable[..., Any]
ESTIMATORS = [
    Trace_ELBO(),
    Trace_ELBO(num_particles=3, vectorize_particles=True),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    TraceEnum_ELBO(strict_enumeration_warning=False),
    RenyiELBO(num_particles=3),
    ReweightedWakeSleep(num_particles=3),
]
DIFFERENTIABLE = [elbo for elbo in ESTIMATORS if hasattr(elbo, "differentiable_loss")]


def name_of(elbo: ELBO) -> str:
    return type(elbo).__name__ + ("-particles" if elbo.vectorize_particles else "")


def vae_pair(**options: Any) -> tuple[VAE, MeanFieldGuide]:
    model = VAE(StandardNormal(2), Normal(MLP(2, 3, hidden=5, **options), scale="learned"))
    return model.double(), MeanFieldGuide(MLP(3, hidden=5, **options), 2).double()


def functions(decoder: nn.Module, encoder: nn.Module, names: tuple[str, str] = ("decoder", "encoder")) -> Any:
    """Return a plain model and guide that register their networks under the names; None for not at all."""

    def model(x: Tensor) -> None:
        if names[0]:
            pyro.module(names[0], decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        if names[1]:
            pyro.module(names[1], encoder)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def networks() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(2, 3).double(), nn.Linear(3, 4).double()


def x_of(n: int = 5) -> Tensor:
    return torch.randn(n, 3).double()


# The loss


@pytest.mark.parametrize("elbo", DIFFERENTIABLE, ids=name_of)
def test_forward_is_the_estimators_loss(elbo: ELBO) -> None:
    model, guide = vae_pair()
    x = x_of()
    elbo.loss(model, guide, x)  # lets it guess how deep the plates nest
    objective = Objective(model, guide, elbo)
    torch.manual_seed(1)
    loss = objective(x)
    torch.manual_seed(1)
    assert loss.shape == ()
    assert float(loss.detach()) == pytest.approx(elbo.loss(model, guide, x), rel=1e-12)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in objective.parameters())


@pytest.mark.parametrize("elbo", ESTIMATORS, ids=name_of)
def test_loss_and_grads_are_those_of_pyro(elbo: ELBO) -> None:
    model, guide = vae_pair()
    x = x_of()
    elbo.loss(model, guide, x)  # lets it guess how deep the plates nest
    parameters = [*model.parameters(), *guide.parameters()]
    objective = Objective(model, guide, elbo)
    torch.manual_seed(1)
    loss = objective.loss_and_grads(x)
    ours = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    torch.manual_seed(1)
    expected = elbo.loss_and_grads(model, guide, x)
    expected = sum(expected) if isinstance(expected, tuple) else expected
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(expected, rel=1e-6)  # some are a Python number, made a float32
    for gradient, parameter in zip(ours, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-13)
        assert gradient.abs().max() > 0


def test_gradients_add_up() -> None:
    # As torch's do: the optimiser's owner sets them to None.
    model, guide = vae_pair()
    x = x_of()
    objective = Objective(model, guide, Trace_ELBO())
    for _ in range(2):
        torch.manual_seed(1)
        objective.loss_and_grads(x)
    twice = model.likelihood.log_scale.grad.clone()
    objective.zero_grad()
    torch.manual_seed(1)
    objective.loss_and_grads(x)
    torch.testing.assert_close(twice, 2 * model.likelihood.log_scale.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("elbo", ESTIMATORS, ids=name_of)
def test_evaluate_loss_leaves_gradients_and_modes_alone(elbo: ELBO) -> None:
    model, guide = vae_pair()
    guide.eval()
    objective = Objective(model, guide, elbo)
    loss = objective.evaluate_loss(x_of())
    assert loss.shape == ()
    assert loss.isfinite()
    assert not loss.requires_grad
    assert all(p.grad is None for p in objective.parameters())
    assert [model.training, guide.training] == [True, False]


# Any code that takes a module


def test_state_dict_is_that_of_both_programs() -> None:
    model, guide = vae_pair()
    objective = Objective(model, guide, Trace_ELBO())
    expected = {f"model.{k}": v for k, v in model.state_dict().items()}
    expected |= {f"guide.{k}": v for k, v in guide.state_dict().items()}
    state = objective.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], expected[k]) for k in state)
    other = Objective(*vae_pair(), Trace_ELBO())
    other.load_state_dict(state)
    assert torch.equal(other.model.likelihood.log_scale, model.likelihood.log_scale)


def test_torch_func() -> None:
    objective = Objective(*vae_pair(), Trace_ELBO())
    x = x_of()
    objective.setup(x)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(objective, parameters, (x,))

    parameters = {name: p.detach() for name, p in objective.named_parameters()}
    gradients = torch.func.grad(loss)({**parameters})
    torch.manual_seed(1)
    objective(x).backward()
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-13)


def test_distributed_data_parallel() -> None:
    model, guide = vae_pair()
    x = x_of()
    objective = Objective(model, guide, Trace_ELBO())
    torch.manual_seed(1)
    objective(x).backward()
    expected = [p.grad.clone() for p in objective.parameters()]
    objective.zero_grad()
    with tempfile.NamedTemporaryFile() as file:
        torch.distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(objective)
            torch.manual_seed(1)
            parallel(x).backward()
        finally:
            torch.distributed.destroy_process_group()
    for parameter, gradient in zip(objective.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_copy_is_independent() -> None:
    objective = Objective(*vae_pair(), Trace_ELBO())
    x = x_of()
    objective.setup(x)
    twin = copy.deepcopy(objective)
    twin.loss_and_grads(x)
    assert all(p.grad is None for p in objective.parameters())
    assert all(p.grad is not None for p in twin.parameters())
    held = {id(p) for group in twin.trainable.values() for p in group.values()}
    assert held == {id(p) for p in twin.parameters()}


# The dry run


def test_setup_changes_neither_stream_nor_mode_nor_buffers_nor_parameters() -> None:
    model, guide = vae_pair(normalization="batch", dropout=0.5)
    pyro.param("kept", torch.ones(3))
    state, stream = copy.deepcopy([model.state_dict(), guide.state_dict()]), torch.get_rng_state()
    objective = Objective(model, guide, Trace_ELBO())
    objective.setup(x_of())
    torch.random.set_rng_state(stream)
    for now, before in zip((model.state_dict(), guide.state_dict()), state, strict=True):
        assert all(torch.equal(now[k], before[k]) for k in before)
    assert all(module.training for module in objective.modules())
    assert torch.is_grad_enabled()
    assert list(pyro.get_param_store().keys()) == ["kept"]


def test_setup_does_not_move_the_random_stream() -> None:
    x = x_of()
    stream = torch.get_rng_state()
    Objective(*vae_pair(dropout=0.5), Trace_ELBO())
    made = torch.get_rng_state()
    torch.set_rng_state(stream)
    objective = Objective(*vae_pair(dropout=0.5), Trace_ELBO())
    objective.setup(x)
    assert torch.equal(torch.get_rng_state(), made)


def test_batch_normalisation_and_dropout_are_active_in_training_only() -> None:
    model, guide = vae_pair(normalization="batch", dropout=0.5)
    objective = Objective(model, guide, Trace_ELBO())
    x = x_of()
    objective(x).backward()
    means = {k: v for k, v in objective.state_dict().items() if k.endswith("running_mean")}
    assert len(means) == 2
    assert all(v.abs().max() > 0 for v in means.values())
    objective.eval()
    before = copy.deepcopy(objective.state_dict())
    torch.manual_seed(1)
    first = objective.evaluate_loss(x)
    torch.manual_seed(1)
    assert torch.equal(objective.evaluate_loss(x), first)
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())


def test_trap_11_lazy_layers_are_settled() -> None:
    decoder, encoder = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3)), nn.LazyLinear(4)
    model, guide = VAE(StandardNormal(2), Normal(decoder)), MeanFieldGuide(encoder, 2, features=4)
    objective = Objective(model.double(), guide.double(), Trace_ELBO())
    objective.setup(x_of())
    assert decoder[0].weight.shape == (4, 2)
    assert len(objective.trainable["model"]) == 4
    assert len(objective.trainable["guide"]) == 4
    objective.loss_and_grads(x_of())
    assert all(p.grad is not None for p in objective.parameters())


def test_trap_11_autoguide_is_settled() -> None:
    model = LinearGaussian(2, 3).double()
    guide = AutoNormal(model)
    assert list(guide.parameters()) == []
    objective = Objective(model, guide, Trace_ELBO())
    x = x_of()
    objective.setup(x)
    assert list(objective.trainable["guide"]) == ["locs.z_unconstrained", "scales.z_unconstrained"]
    held = [id(p) for p in objective.trainable["guide"].values()]
    objective.loss_and_grads(x)
    assert [id(p) for p in guide.parameters()] == held
    assert all(p.grad is not None for p in objective.parameters())


def test_trap_11_autoguide_within_a_function_is_settled() -> None:
    model = LinearGaussian(2, 3).double()
    auto = AutoNormal(model)
    objective = Objective(model, lambda x: auto(x), Trace_ELBO())
    objective.setup(x_of())
    assert {id(p) for p in objective.trainable["guide"].values()} == {id(p) for p in auto.parameters()}
    objective.loss_and_grads(x_of())
    assert all(p.grad is not None for p in auto.parameters())


def test_setup_runs_once() -> None:
    runs = []
    model, guide = vae_pair()
    guide.encoder.register_forward_hook(lambda *_: runs.append(None))
    objective = Objective(model, guide, Trace_ELBO())
    objective.setup(x_of())
    objective.setup(x_of())
    assert len(runs) == 1


def test_failed_setup_can_be_repeated() -> None:
    objective = Objective(*vae_pair(), Trace_ELBO())
    with pytest.raises(ValueError, match="shape"):
        objective.setup(torch.zeros(5, 4).double())
    assert objective.trainable is None
    objective.setup(x_of())
    assert objective.trainable is not None


@pytest.mark.parametrize("enabled", [True, False])
def test_trap_10_setup_restores_validation(enabled: bool) -> None:
    pyro.enable_validation(enabled)
    try:
        objective = Objective(*vae_pair(), Trace_ELBO())
        objective.loss_and_grads(x_of())
        with pytest.raises(ValueError, match="shape"):
            Objective(*vae_pair(), Trace_ELBO()).setup(torch.zeros(5, 4).double())
        now = (
            Distribution._validate_args,
            pyro.distributions.is_validation_enabled(),
            pyro.infer.util.is_validation_enabled(),
            pyro.poutine.util.is_validation_enabled(),
        )
    finally:
        pyro.enable_validation(True)
    assert now == (enabled,) * 4


# Parameters


def test_trainable_parameters_of_modules() -> None:
    model, guide = vae_pair()
    model.likelihood.decoder.layers[0].weight.requires_grad_(False)
    objective = Objective(model, guide, Trace_ELBO())
    assert objective.trainable is None
    objective.setup(x_of())
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    assert objective.trainable["model"].keys() == expected
    assert objective.trainable["guide"].keys() == {name for name, _ in guide.named_parameters()}


def test_trainable_parameters_of_functions() -> None:
    decoder, encoder = networks()
    objective = Objective(*functions(decoder, encoder), Trace_ELBO())
    objective.setup(x_of())
    model, guide = objective.trainable["model"], objective.trainable["guide"]
    assert {id(p) for p in model.values()} == {id(p) for p in decoder.parameters()}
    assert {id(p) for p in guide.values()} == {id(p) for p in encoder.parameters()}
    assert list(model) == ["decoder$$$weight", "decoder$$$bias"]


def test_names_of_programs_within_functions_are_those_of_another_process() -> None:
    # A program's name in Pyro's store counts the programs of the process; a saved name must not.
    names = []
    for _ in range(2):
        model, guide = vae_pair()
        objective = Objective(lambda x, model=model: model(x), lambda x, guide=guide: guide(x), Trace_ELBO())
        objective.setup(x_of())
        held = [p for group in objective.trainable.values() for p in group.values()]
        assert {id(p) for p in held} == {id(p) for p in (*model.parameters(), *guide.parameters())}
        names.append([list(group) for group in objective.trainable.values()])
    assert names[0] == names[1]


def test_parameters_that_both_use_are_the_models() -> None:
    shared = nn.Linear(3, 3).double()

    def model(x: Tensor) -> None:
        pyro.module("shared", shared)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(shared(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("shared", shared)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(shared(x), 1.0).to_event(1))

    objective = Objective(model, guide, Trace_ELBO())
    objective.setup(x_of())
    assert len(objective.trainable["model"]) == 2
    assert objective.trainable["guide"] == {}


def test_tensors_are_parameters_and_buffers_of_all() -> None:
    model, guide = vae_pair(normalization="batch")
    objective = Objective(model, guide, Trace_ELBO())
    objective.setup(x_of())
    state = objective.state_dict(keep_vars=True)
    assert objective.tensors().keys() == state.keys()
    assert all(objective.tensors()[k] is state[k] for k in state)
    decoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    encoder = nn.Linear(3, 4).double()
    objective = Objective(*functions(decoder, encoder), Trace_ELBO())
    objective.setup(x_of())
    held = {id(t) for t in objective.tensors().values()}
    assert held == {id(t) for m in (decoder, encoder) for t in (*m.parameters(), *m.buffers())}


def test_trap_1_networks_of_one_name_each_train() -> None:
    # In Pyro the second of one name takes the first one's parameters, and its own never train.
    decoder, encoder = networks()
    objective = Objective(*functions(decoder, encoder, ("net", "net")), Trace_ELBO())
    objective.loss_and_grads(x_of())
    assert all(p.grad is not None for p in (*decoder.parameters(), *encoder.parameters()))
    held = {id(p) for group in objective.trainable.values() for p in group.values()}
    assert held == {id(p) for p in (*decoder.parameters(), *encoder.parameters())}


class Prior(PyroModule):
    """A hand-written model whose attributes have the names of those of the guide below."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.ones(2).double())
        self.scale = PyroParam(2 * torch.ones(2).double(), dist.constraints.positive)
        self.net = nn.Linear(2, 3).double()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.loc, self.scale).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


class Posterior(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2).double())
        self.scale = PyroParam(torch.ones(2).double(), dist.constraints.positive)
        self.net = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc + self.net(x), self.scale).to_event(1))


@pytest.mark.parametrize("elbo", ESTIMATORS, ids=name_of)
def test_trap_1_attributes_of_one_name_in_model_and_guide(elbo: ELBO) -> None:
    model, guide = Prior(), Posterior()
    objective = Objective(model, guide, elbo)
    objective.loss_and_grads(x_of())
    assert all(p.grad is not None for p in (*model.parameters(), *guide.parameters()))
    assert model.loc.tolist() == [1.0, 1.0]
    assert model.scale.tolist() == pytest.approx([2.0, 2.0])
    assert guide.scale.tolist() == pytest.approx([1.0, 1.0])
    weights = log_weights(model, guide, x_of(), num_particles=2)
    assert weights.shape == (2, 5)


def test_trap_1_forgotten_registration_is_named() -> None:
    decoder, encoder = networks()
    message = r"^guide: runs Linear.weight, Linear.bias without `pyro.module`: they will not train$"
    with pytest.warns(UserWarning, match=message):
        Objective(*functions(decoder, encoder, ("decoder", "")), Trace_ELBO()).setup(x_of())
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    Objective(*functions(decoder, encoder, ("decoder", "")), Trace_ELBO()).setup(x_of())  # frozen: no warning


def test_trap_1_parameter_of_no_module_is_refused() -> None:
    model, _ = functions(*networks())

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2).double())
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    class Guide(nn.Module):
        def forward(self, x: Tensor) -> None:
            guide(x)

    for program in (guide, Guide()):
        with pytest.raises(ValueError, match=r"^parameter 'loc': expected a parameter of a module"):
            Objective(model, program, Trace_ELBO()).setup(x_of())
    assert list(pyro.get_param_store().keys()) == []


def test_trap_1_module_that_registers_a_stranger_is_refused() -> None:
    decoder, encoder = networks()
    model, _ = functions(decoder, encoder)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [encoder]

        def forward(self, x: Tensor) -> None:
            functions(decoder, self.hidden[0])[1](x)

    message = (
        r"^guide: registers encoder\$\$\$weight, encoder\$\$\$bias of a module that is no part of it, "
        r"which would not train; make that module an attribute$"
    )
    with pytest.raises(ValueError, match=message):
        Objective(model, Guide(), Trace_ELBO()).setup(x_of())


def test_trap_1_parameter_that_is_not_contiguous_trains() -> None:
    # Pyro's store would copy it, and the copy would train.
    decoder, encoder = networks()
    decoder.weight = nn.Parameter(torch.randn(2, 3).double().T)
    objective = Objective(*functions(decoder, encoder), Trace_ELBO())
    objective.loss_and_grads(x_of())
    assert decoder.weight.grad is not None
    model = LinearGaussian(2, 3).double()
    model.weight = nn.Parameter(torch.randn(2, 3).double().T)
    Objective(model, MeanFieldGuide(MLP(3), 2).double(), RenyiELBO(num_particles=2)).loss_and_grads(x_of())
    assert model.weight.grad is not None


def test_parameter_without_a_gradient_is_named() -> None:
    model, guide = vae_pair()
    model.likelihood.unused = nn.Parameter(torch.zeros(3))
    guide.encoder.idle = nn.Linear(2, 2)
    objective = Objective(model, guide, Trace_ELBO())
    objective.loss_and_grads(x_of())
    message = (
        r"^no gradient reaches model.likelihood.unused, guide.encoder.idle.weight, guide.encoder.idle.bias: "
        r"they will not train$"
    )
    with pytest.warns(UserWarning, match=message):
        objective.warn_of_missing_gradients()


# Pairs that disagree


def plain_guide(site: str = "z", latent: int = 2, plate: str = "data") -> Program:
    def guide(x: Tensor) -> None:
        with pyro.plate(plate, len(x), dim=-1):
            pyro.sample(site, dist.Normal(x.new_zeros(latent), 1.0).to_event(1))

    return guide


def global_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(2))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (plain_guide("w"), "guide: lacks the model's latent sites ['z']; it has ['w']"),
        (
            plain_guide(latent=3),
            "site 'z': model and guide disagree on shapes (batch, event): ((5,), (2,)) in the model, "
            "((5,), (3,)) in the guide",
        ),
        (plain_guide(plate="other"), "site 'z': model and guide disagree on plates"),
        (global_guide, "site 'z': model and guide disagree on plates"),
    ],
)
@pytest.mark.parametrize("kind", ["VAE", "LinearGaussian", "function"])
def test_disagreement_raises_at_the_first_call_and_names_the_site(
    kind: str, guide: Program, message: str
) -> None:
    # The networks of the first two can't run on a latent of another size.
    def function(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x.new_zeros(3), 1.0).to_event(1), obs=x)

    models = {"VAE": vae_pair()[0], "LinearGaussian": LinearGaussian(2, 3).double(), "function": function}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Objective(models[kind], guide, Trace_ELBO())(x_of())


def test_disagreement_raises_with_validation_off() -> None:
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="guide: lacks the model's latent sites"),
    ):
        Objective(LinearGaussian(2, 3).double(), plain_guide("w"), Trace_ELBO())(x_of())


def test_grey_pixels_under_bernoulli_raise_at_the_first_call() -> None:
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, 3)))
    objective = Objective(model, MeanFieldGuide(MLP(3), 2), Trace_ELBO())
    x = torch.ones(5, 3)
    x[2, 1] = 0.5
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="support"):
        objective(x)


# Arguments


@pytest.mark.parametrize("loss", [Trace_ELBO, Trace_ELBO().loss, "Trace_ELBO", None])
def test_wrong_estimator(loss: Any) -> None:
    message = r"^loss: expected an instance of pyro.infer.ELBO such as Trace_ELBO\(\), got "
    with pytest.raises(TypeError, match=message):
        Objective(*vae_pair(), loss)


def test_wrong_programs() -> None:
    model, guide = vae_pair()
    with pytest.raises(TypeError, match=r"^model: expected a module or a function, got 3$"):
        Objective(3, guide, Trace_ELBO())
    with pytest.raises(TypeError, match=r"^guide: expected a module or a function, got None$"):
        Objective(model, None, Trace_ELBO())


def test_masked_and_scaled_programs_are_programs() -> None:
    model, guide = vae_pair()
    mask = torch.tensor([True, False, True, True, True])
    objective = Objective(poutine.mask(model, mask=mask), poutine.mask(guide, mask=mask), Trace_ELBO())
    objective.loss_and_grads(x_of())
    assert all(p.grad is not None for p in (*model.parameters(), *guide.parameters()))


# Stores


@pytest.mark.parametrize("elbo", ESTIMATORS, ids=name_of)
def test_global_store_is_left_as_it_was(elbo: ELBO) -> None:
    kept = pyro.param("kept", torch.ones(3), constraint=dist.constraints.positive)
    for pair in (vae_pair(), functions(*networks())):
        objective = Objective(*pair, elbo)
        objective.loss_and_grads(x_of())
        objective.evaluate_loss(x_of())
    assert list(pyro.get_param_store().keys()) == ["kept"]
    assert torch.equal(pyro.param("kept"), kept)


def test_baselines_of_trace_graph_stay_out_of_the_global_store() -> None:
    # It keeps a running mean of the cost of each site; those of two pairs are not one.
    def pair() -> tuple[Program, Program]:
        logits = nn.Linear(3, 2).double()

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                y = pyro.sample("y", dist.Categorical(logits=x.new_zeros(2)))
                pyro.sample("x", dist.Normal(y[..., None].to(x).expand(*y.shape, 3), 1.0).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            pyro.module("logits", logits)
            with pyro.plate("data", len(x), dim=-1):
                infer = {"baseline": {"use_decaying_avg_baseline": True}}
                pyro.sample("y", dist.Categorical(logits=logits(x)), infer=infer)

        return model, guide

    objective = Objective(*pair(), TraceGraph_ELBO())
    averages = []
    for _ in range(3):
        objective.loss_and_grads(x_of())
        (average,) = objective._baselines["params"].values()
        averages.append(average.clone())
    assert not torch.equal(averages[0], averages[1])
    assert not torch.equal(averages[1], averages[2])
    assert list(pyro.get_param_store().keys()) == []
    assert Objective(*pair(), TraceGraph_ELBO())._baselines["params"] == {}


# Settings of Pyro


@pytest.mark.parametrize("elbo", [Trace_ELBO(), RenyiELBO(num_particles=3), TraceGraph_ELBO()], ids=name_of)
def test_trap_2_works_with_module_local_parameters(elbo: ELBO) -> None:
    # Under this setting Pyro's own SVI fails.
    x = x_of()
    gradients = []
    for local in (False, True):
        with pyro.settings.context(module_local_params=local):
            torch.manual_seed(0)
            model, guide = vae_pair()
            Objective(model, guide, elbo).loss_and_grads(x)
            gradients.append([p.grad for p in (*model.parameters(), *guide.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_trap_8_guess_of_the_plates_is_the_explicit_number() -> None:
    x = x_of()
    model, guide = vae_pair()
    guessing = Trace_ELBO(num_particles=4, vectorize_particles=True)
    objective = Objective(model, guide, guessing)
    objective(x)
    stated = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    assert guessing.max_plate_nesting == stated.max_plate_nesting  # one for the data, one for the particles
    explicit = Objective(model, guide, stated)
    explicit(x)
    losses = []
    for each in (objective, explicit):
        torch.manual_seed(1)
        losses.append(each(x).detach())
    assert torch.equal(*losses)


def test_estimators_of_torch_jit_are_refused() -> None:
    """Trap 9: they bake values of the first batch."""
    with pytest.raises(TypeError, match="JitTrace_ELBO; use Trace_ELBO"):
        Objective(LinearGaussian(2, 3), MeanFieldGuide(MLP(3), 2), pyro.infer.JitTrace_ELBO())
