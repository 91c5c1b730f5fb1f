"""Tests of how model and guide are run: stores, modes, plates and checks."""

import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from ppl_vae import fit
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer.running import (
    batch_arguments,
    calls_of_modules,
    check_pair,
    check_support,
    data_plate_size,
    evaluating,
    in_own_store,
    latent_sites,
    observed_sites,
    trace_pair,
)
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP, ConvEncoder
from ppl_vae.priors import StandardNormal

Program = Callable[..., Any]


def normal(*shape: int) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(*shape), 1.0).to_event(1)


def draw(site: str, latent: int = 2, **plate: Any) -> Program:
    """Return a guide that draws one site of standard normals in the plate "data"."""

    def guide(x: Tensor) -> Tensor:
        with pyro.plate(**({"name": "data", "size": len(x), "dim": -1} | plate)):
            return pyro.sample(site, normal(latent))

    return guide


def model_of(*sites: str, latent: int = 2, **plate: Any) -> Program:
    """Return a model with standard normal latent sites and data around zero in the plate "data"."""

    def model(x: Tensor) -> Tensor:
        with pyro.plate(**({"name": "data", "size": len(x), "dim": -1} | plate)):
            for site in sites:
                pyro.sample(site, normal(latent))
            return pyro.sample("x", normal(x.shape[-1]), obs=x)

    return model


# Stores


def test_own_store_leaves_the_global_one_as_it_was() -> None:
    kept = pyro.param("kept", torch.ones(3))
    network = nn.Linear(2, 3)

    def program(x: Tensor) -> Tensor:
        assert "kept" not in pyro.get_param_store()
        return pyro.module("network", network)(x)

    assert in_own_store(program)(torch.zeros(4, 2)).shape == (4, 3)
    assert list(pyro.get_param_store().keys()) == ["kept"]
    assert pyro.param("kept") is kept


def test_own_store_is_left_after_an_error() -> None:
    pyro.param("kept", torch.ones(3))

    def program() -> None:
        pyro.module("network", nn.Linear(2, 3))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        in_own_store(program)()
    assert list(pyro.get_param_store().keys()) == ["kept"]


def test_trap_1_modules_of_one_name_keep_their_own_parameters() -> None:
    # In Pyro's store the second would read the first one's scale.
    class Scale(PyroModule):
        def __init__(self, start: float) -> None:
            super().__init__()
            self.scale = PyroParam(torch.tensor(start), dist.constraints.positive)

        def forward(self) -> Tensor:
            return self.scale

    modules = [Scale(1.0), Scale(2.0)]
    values = [in_own_store(module)().item() for module in modules]
    assert values == pytest.approx([1.0, 2.0])
    assert [float(module.scale.detach()) for module in modules] == pytest.approx([1.0, 2.0])


@pytest.mark.parametrize(
    ("start", "options"),
    [
        (torch.ones(3), {}),
        (torch.ones(3), {"constraint": dist.constraints.positive}),
        (lambda: torch.ones(3), {}),
        (nn.Parameter(torch.ones(3)), {"constraint": dist.constraints.positive}),
    ],
)
def test_parameter_of_no_module_is_refused(start: Any, options: dict[str, Any]) -> None:
    def program() -> Tensor:
        return pyro.param("scale", start, **options)

    message = (
        r"^parameter 'scale': expected a parameter of a module, registered with `pyro.module`, got a "
        r"`pyro.param` that no module owns; make it an attribute of a module "
        r"\(`nn.Parameter`, or `pyro.nn.PyroParam` with a constraint\)$"
    )
    with pytest.raises(ValueError, match=message):
        in_own_store(program)()
    assert list(pyro.get_param_store().keys()) == []


def test_parameter_that_is_not_contiguous_stands_for_itself() -> None:
    # Pyro's store makes a contiguous copy, and the copy would train.
    network = nn.Linear(2, 3)
    network.weight = nn.Parameter(torch.randn(2, 3).T)
    trace = poutine.trace(in_own_store(lambda: pyro.module("network", network))).get_trace()
    assert trace.nodes["network$$$weight"]["value"] is network.weight


# Modes


def test_calls_of_modules_sees_those_of_plain_functions_until_its_end() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    called: list[nn.Module] = []
    with calls_of_modules(called.append):
        network(torch.zeros(1, 2))
    assert called == [network, network[0], network[1]]
    network(torch.zeros(1, 2))
    assert len(called) == 3


def network_with_state() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


@pytest.mark.parametrize("kind", ["module", "function", "method"])
def test_evaluating_switches_every_module_and_puts_it_back(kind: str) -> None:
    network = network_with_state()
    network[3].eval()  # a module that was in eval mode stays so
    modes = [module.training for module in network.modules()]
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    seen: list[bool] = []
    network[2].register_forward_hook(lambda module, *_: seen.append(module.training))
    program = {"module": network, "function": lambda x: network(x), "method": network.forward}[kind]
    x = torch.randn(6, 2)
    with evaluating(program):
        assert not torch.is_grad_enabled()
        first, second = program(x), program(x)
    assert torch.equal(first, second)
    assert seen == [False, False]
    assert torch.is_grad_enabled()
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, buffers[name]) for name, value in network.named_buffers())


def test_evaluating_puts_modes_back_after_an_error() -> None:
    network = network_with_state()
    with pytest.raises(KeyError), evaluating(network):
        raise KeyError
    assert all(module.training for module in network.modules())
    called: list[nn.Module] = []
    network.register_forward_pre_hook(lambda module, _: called.append(module.training))
    network(torch.randn(6, 2))
    assert called == [True]


# Traces


def test_a_program_that_takes_fewer_tensors_than_the_other_is_named() -> None:
    x, y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)

    def with_labels(x: Tensor, y: Tensor) -> None:
        draw("z")(x)

    expected = r"guide: expected a program that takes the batch's 2 tensors.*got .*takes 1 positional"
    with pytest.raises(TypeError, match=expected):
        trace_pair(with_labels, draw("z"), x, y)
    with pytest.raises(TypeError, match=expected.replace("guide", "model", 1)):
        trace_pair(model_of("z"), with_labels, x, y)
    with pytest.raises(TypeError, match=expected):
        fit(with_labels, draw("z"), (x, y), epochs=1, progress=False)
    with pytest.raises(TypeError, match="unsupported operand"):  # of a program itself: as it is
        trace_pair(lambda x: x + "text", draw("z"), x)


def test_trace_pair_replays_the_draws_of_the_guide() -> None:
    model, guide = VAE(StandardNormal(2), Normal(MLP(2, 3))), MeanFieldGuide(MLP(3), 2)
    x = torch.randn(4, 3)
    model_trace, guide_trace = trace_pair(model, guide, x)
    assert model_trace.nodes["z"]["value"] is guide_trace.nodes["z"]["value"]
    assert list(latent_sites(model_trace)) == list(latent_sites(guide_trace)) == ["z"]
    assert list(observed_sites(model_trace)) == ["x"]
    assert list(observed_sites(guide_trace)) == []
    assert list(pyro.get_param_store().keys()) == []


def test_errors_of_a_program_come_without_pyros_table_of_shapes() -> None:
    model, guide = VAE(StandardNormal(2), Bernoulli(MLP(2, 3))), MeanFieldGuide(MLP(4), 2)
    with pytest.raises(
        ValueError, match=r"^x: expected data of the likelihood's event shape \(3,\), got \(4,\)$"
    ):
        trace_pair(model, guide, torch.zeros(5, 4))


def test_sites_of_subsampling_are_no_latent_sites() -> None:
    trace = poutine.trace(draw("z", size=100, subsample_size=5)).get_trace(torch.zeros(5, 3))
    assert list(latent_sites(trace)) == ["z"]
    assert data_plate_size("z", trace.nodes["z"]) == 5


def test_data_plate_size_needs_a_plate_at_the_last_dim() -> None:
    def program() -> None:
        with pyro.plate("left", 3, dim=-2):
            pyro.sample("z", normal(2))

    message = (
        "site 'z': expected per-datum randomness in `pyro.plate(\"data\", n, dim=-1)`, "
        "got plates [('left', -2)] (name, dim)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        data_plate_size("z", poutine.trace(program).get_trace().nodes["z"])


# Checks of a pair


def check(model: Program, guide: Program, n: int = 4) -> None:
    x = torch.zeros(n, 3)
    check_pair(*trace_pair(model, guide, x), (x,))


def auxiliary(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("u", normal(5), infer={"is_auxiliary": True})
        pyro.sample("z", normal(2))


def test_pairs_that_agree() -> None:
    check(model_of("z"), draw("z"))
    check(model_of("z"), auxiliary)
    check(LinearGaussian(2, 3), draw("z"))
    both = {"size": 100, "subsample_size": 4}
    check(model_of("z", **both), draw("z", **both))


def outside(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(2))


def outside_model(x: Tensor) -> None:
    outside(x)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("x", normal(3), obs=x)


def unobserved(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", normal(2))


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (model_of("z", "w"), draw("z"), "guide: lacks the model's latent sites ['w']; it has ['z']"),
        (
            model_of(),
            draw("z"),
            "guide: has sites ['z'] that are no latent sites of the model, which has []",
        ),
        (unobserved, draw("z"), "model: expected an observed site (`obs=x`), found none"),
        (
            model_of("z", latent=3),
            draw("z"),
            "site 'z': model and guide disagree on shapes (batch, event): ((4,), (3,)) in the model, "
            "((4,), (2,)) in the guide",
        ),
        (
            model_of("z"),
            outside,
            "site 'z': model and guide disagree on plates (name, size, subsample, dim): "
            "[('data', 4, 4, -1)] in the model, [] in the guide",
        ),
        (
            model_of("z"),
            draw("z", name="batch"),
            "[('data', 4, 4, -1)] in the model, [('batch', 4, 4, -1)] in the guide",
        ),
        (
            outside_model,
            outside,
            "site 'z': expected per-datum randomness in `pyro.plate(\"data\", n, dim=-1)`, "
            "got plates [] (name, dim)",
        ),
    ],
)
def test_pairs_that_disagree(model: Program, guide: Program, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(model, guide)


@pytest.mark.parametrize(
    ("model_plate", "guide_plate"),
    [
        ({"size": 1000, "subsample_size": 4}, {}),
        ({}, {"size": 1000, "subsample_size": 4}),
        ({"size": 1000, "subsample_size": 4}, {"size": 60, "subsample_size": 4}),
    ],
)
def test_trap_5_model_and_guide_of_different_numbers_of_data(
    model_plate: dict[str, int], guide_plate: dict[str, int]
) -> None:
    # Pyro says nothing and scales the two sides differently.
    sizes = [f"('data', {plate.get('size', 4)}, 4, -1)" for plate in (model_plate, guide_plate)]
    message = (
        "site 'z': model and guide disagree on plates (name, size, subsample, dim): "
        f"[{sizes[0]}] in the model, [{sizes[1]}] in the guide"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(model_of("z", **model_plate), draw("z", **guide_plate))


def test_trap_5_plate_of_another_size_than_the_batch() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", 1, dim=-1):
            pyro.sample("z", normal(2))

    def model(x: Tensor) -> None:
        with pyro.plate("data", 1, dim=-1):
            pyro.sample("z", normal(2))
            pyro.sample("x", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2), obs=x)

    with pytest.raises(ValueError, match="site 'z': expected a data plate of the batch's size 4, got 1"):
        check(model, guide)


# What a program is called with


def test_batch_arguments_are_those_that_the_program_takes() -> None:
    x, y = torch.zeros(4, 3), torch.zeros(4)
    assert batch_arguments(lambda x: x, (x, y)) == (x,)
    assert batch_arguments(lambda x, y: x, (x, y)) == (x, y)
    assert batch_arguments(lambda x, y=None: x, (x,)) == (x,)
    assert batch_arguments(lambda *batch: x, (x, y)) == (x, y)
    assert batch_arguments(lambda x, *, size=None: x, (x, y)) == (x,)
    assert batch_arguments(LinearGaussian(2, 3), (x, y)) == (x,)
    assert batch_arguments(MeanFieldGuide(MLP(3), 2), (x, y)) == (x, y)


def test_batch_arguments_lacks_labels() -> None:
    with pytest.raises(TypeError, match=r"^data: .*\['x', 'y'\].* got 1"):
        batch_arguments(lambda x, y: x, (torch.zeros(4, 3),))


# Support of the data


def test_check_support_names_the_datum_its_values_and_a_remedy() -> None:
    x = torch.zeros(5, 3)
    bernoulli = dist.Bernoulli(torch.full((3,), 0.5)).to_event(1)
    check_support("data", "x", bernoulli, x)
    x[3, 1] = 0.25
    message = (
        r"^data: datum 3 is outside the support of site 'x', .*0 to 0\.25; binarise it .*ContinuousBernoulli$"
    )
    with pytest.raises(ValueError, match=message):
        check_support("data", "x", bernoulli, x)
    check_support("data", "x", bernoulli, x, probabilities=True)
    x[3, 1] = 1.25
    with pytest.raises(ValueError, match=r"datum 3 .* from 0 to 1\.25$"):
        check_support("data", "x", bernoulli, x)
    with pytest.raises(ValueError, match="datum 3 "):
        check_support("data", "x", bernoulli, x, probabilities=True)


def test_check_support_looks_at_every_datum() -> None:
    x = torch.zeros(25_000, 2)
    x[24_999, 1] = 2
    with pytest.raises(ValueError, match="datum 24999 "):
        check_support("data", "x", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1), x)


def test_check_support_of_the_normal_refuses_nan() -> None:
    x = torch.zeros(3, 2)
    x[1, 0] = float("nan")
    with pytest.raises(ValueError, match="datum 1 "):
        check_support("data", "x", normal(2), x)


# Convolutions


def test_trap_7_programs_of_images_take_a_particle_dimension() -> None:
    guide = MeanFieldGuide(ConvEncoder((1, 4, 4), 6, (3,)), 2)
    with pyro.plate("particles", 3, dim=-2):
        assert guide(torch.zeros(5, 1, 4, 4)).shape == (3, 5, 2)
