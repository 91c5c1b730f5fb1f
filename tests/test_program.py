"""Tests of the base of models and guides: names of their own in Pyro's store."""

import copy
import io
import pickle
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from ppl_vae.guides import MeanFieldGuide
from ppl_vae.likelihoods import Normal
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.program import Program, batch_size


class Own(Program):
    """A program with a constrained parameter, a PyroModule and a program inside."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.scale = PyroParam(torch.tensor(start), torch.distributions.constraints.positive)
        self.linear = PyroModule[torch.nn.Linear](2, 3)
        self.inner = LinearGaussian(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.scale * self.linear(x))


def vae() -> VAE:
    return VAE(StandardNormal(2), Normal(MLP(2, 3, hidden=4), scale="learned"))


PROGRAMS = [vae, lambda: MeanFieldGuide(MLP(3, hidden=4), 2), lambda: LinearGaussian(2, 3), Own]
programs = pytest.mark.parametrize("make", PROGRAMS, ids=["VAE", "MeanFieldGuide", "LinearGaussian", "Own"])


def by_pickle(program: Program) -> Program:
    return pickle.loads(pickle.dumps(program))


def by_torch(program: Program) -> Program:
    buffer = io.BytesIO()
    torch.save(program, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def parameter_names(program: Program) -> set[str]:
    """Return the names under which a run registers the program's parameters in Pyro."""
    x = torch.zeros(4, 2 if isinstance(program, Own) else 3)
    trace = poutine.trace(program).get_trace(x)
    names = {name for name, site in trace.nodes.items() if site["type"] == "param"}
    assert len(names) == len(list(program.parameters()))
    return names


@programs
def test_trap_1_no_two_programs_share_a_name(make: Any) -> None:
    first = make()
    others = [
        make(),
        copy.deepcopy(first),
        by_pickle(first),
        by_torch(first),
        copy.deepcopy(copy.deepcopy(first)),
    ]
    every = [parameter_names(program) for program in (first, *others)]
    assert len(set().union(*every)) == sum(map(len, every))


@programs
@pytest.mark.parametrize("way", [copy.deepcopy, by_pickle, by_torch])
def test_copies_equal_the_original_and_are_independent(make: Any, way: Any) -> None:
    original = make()
    parameter_names(original)  # a run before the copy, which fills Pyro's store
    twin = way(original)
    assert type(twin) is type(original)
    assert twin.state_dict().keys() == original.state_dict().keys()
    for one, other in zip(original.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
        with torch.no_grad():
            other.add_(1)
        assert not torch.equal(one, other)
    before = [p.clone() for p in original.parameters()]
    parameter_names(twin)
    parameter_names(original)
    assert all(torch.equal(p, b) for p, b in zip(original.parameters(), before, strict=True))


@programs
def test_names_in_the_state_dict_have_no_number(make: Any) -> None:
    assert make().state_dict().keys() == make().state_dict().keys()
    assert not any(type(make()).__name__ in name for name in make().state_dict())


def test_state_of_one_loads_into_another() -> None:
    first, second = vae(), vae()
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, 3)
    torch.manual_seed(1)
    one = Trace_ELBO().loss(first, MeanFieldGuide(MLP(3), 2), x)
    torch.manual_seed(1)
    assert Trace_ELBO().loss(second, MeanFieldGuide(MLP(3), 2), x) == one


def test_constrained_parameter_of_each_copy_is_read_from_it() -> None:
    first, second = Own(1.0), Own(2.0)
    twin = copy.deepcopy(second)
    with torch.no_grad():
        twin.scale_unconstrained.fill_(torch.tensor(3.0).log())

    def scale(program: Own) -> float:
        trace = poutine.trace(program).get_trace(torch.zeros(4, 2))
        return float(trace.nodes[f"{program._pyro_name}.scale"]["value"].detach())

    assert [scale(program) for program in (first, second, twin, first)] == pytest.approx([1.0, 2.0, 3.0, 1.0])


def test_program_inside_another_keeps_its_parameters() -> None:
    outer = Own()
    names = parameter_names(outer)
    assert len({name.split(".")[0] for name in names}) == 1
    assert parameter_names(copy.deepcopy(outer)).isdisjoint(names)


def test_stock_svi_trains_the_parameters_themselves() -> None:
    model, guide = vae(), MeanFieldGuide(MLP(3, hidden=4), 2)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = [p.clone() for p in (*model.parameters(), *guide.parameters())]
    svi.step(torch.randn(4, 3))
    after = [*model.parameters(), *guide.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert len(pyro.get_param_store()) == len(before)


def test_batch_size() -> None:
    assert batch_size(torch.zeros(4, 3), None) == 4
    assert batch_size(torch.zeros(4, 3), 7) == 4
    assert batch_size(None, 7) == 7
    with pytest.raises(
        ValueError, match=r"^size: expected the number of data to draw when x is None, got None$"
    ):
        batch_size(None, None)
