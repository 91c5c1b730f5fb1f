"""Tests of the VampPrior."""

import copy
import re
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae.description import build, describe
from ppl_vae.distributions import SharedMixture, SharedNormalMixture
from ppl_vae.flows import AffineCoupling, Planar
from ppl_vae.guides import (
    FlowGuide,
    FullRankGuide,
    HypersphericalGuide,
    LowRankGuide,
    MeanFieldGuide,
    MixtureGuide,
    SemiAmortizedGuide,
)
from ppl_vae.infer import IWAE, STL_ELBO, SVI, DReG, log_weights
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors.vamp_prior import VampPrior
from ppl_vae.training import fit, fit_many, load_run

COMPONENTS = 4
GUIDES = {
    "mean-field": lambda: MeanFieldGuide(MLP(5, hidden=6), 3),
    "full-rank": lambda: FullRankGuide(MLP(5, hidden=6), 3),
    "low-rank": lambda: LowRankGuide(MLP(5, hidden=6), 3, rank=1),
    "mixture": lambda: MixtureGuide(MLP(5, hidden=6), 3, 2),
    "flow": lambda: FlowGuide(MLP(5, hidden=6), AffineCoupling(3, 4, depth=2, hidden=5)),
    "sphere": lambda: HypersphericalGuide(MLP(5, hidden=6), 3),
}


class OwnGuide(nn.Module):
    """A guide that is none of the library's: uniform around its features."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 3)

    def posterior(self, x: Tensor) -> Any:
        loc = self.encoder(x)
        return dist.Laplace(loc, torch.ones_like(loc)).to_event(1)


@pytest.fixture(params=[*GUIDES, "own"])
def guide(request: pytest.FixtureRequest) -> nn.Module:
    return GUIDES.get(request.param, OwnGuide)().double()


def vae(guide: nn.Module, **options: Any) -> VAE:
    return VAE(VampPrior(guide, 5, COMPONENTS, **options), Bernoulli(MLP(3, 5, hidden=4)))


def bits(n: int = 12) -> Tensor:
    return torch.bernoulli(torch.full((n, 5), 0.5))


def values(n: int, guide: nn.Module) -> Tensor:
    z = torch.randn(n, 3).double()
    return nn.functional.normalize(z, dim=-1) if isinstance(guide, HypersphericalGuide) else z


@pytest.mark.parametrize("learn_weights", [False, True])
def test_density_is_the_mixture_of_the_guides_posteriors(guide: nn.Module, learn_weights: bool) -> None:
    prior = VampPrior(guide, 5, COMPONENTS, learn_weights=learn_weights).double()
    with torch.no_grad():
        prior.pseudo_inputs += torch.randn(COMPONENTS, 5).double()
    weights = torch.full((COMPONENTS,), 1 / COMPONENTS).double()
    if learn_weights:
        prior.logits.data.copy_(torch.randn(COMPONENTS))
        weights = prior.logits.softmax(-1)
    z = values(7, guide)
    density = sum(
        weights[c] * guide.posterior(prior.pseudo_inputs[c : c + 1].clamp(0, 1)).log_prob(z).exp()
        for c in range(COMPONENTS)
    )
    torch.testing.assert_close(prior().log_prob(z), density.log(), rtol=1e-10, atol=1e-10)


def test_draws_have_the_mean_of_the_components(guide: nn.Module) -> None:
    prior = VampPrior(guide, 5, COMPONENTS, bounds=None).double()
    z = prior().sample((20_000,))
    own = guide.posterior(prior.pseudo_inputs).sample((20_000,))  # [draws, components, latent]
    expected, error = own.mean((0, 1)), (own.var(0).mean(0) / own[..., 0].numel()).sqrt()
    assert ((z.mean(0) - expected).abs() < 4 * (z.var(0) / 20_000 + error**2).sqrt()).all()
    within = own.reshape(-1, 3)
    for moment in (lambda z: z**2, lambda z: z.prod(-1, keepdim=True)):
        one, two = moment(z), moment(within)
        error = (one.var(0) / len(one) + two.var(0) / len(two)).sqrt()
        assert ((one.mean(0) - two.mean(0)).abs() < 4 * error).all()


def test_mean_and_variance_are_those_of_the_mixture() -> None:
    for name in ("mean-field", "full-rank"):
        guide = GUIDES[name]().double()
        prior = VampPrior(guide, 5, COMPONENTS, bounds=None).double()
        q = guide.posterior(prior.pseudo_inputs)
        torch.testing.assert_close(prior().mean, q.mean.mean(0))
        variance = (q.variance + q.mean**2).mean(0) - q.mean.mean(0) ** 2
        torch.testing.assert_close(prior().variance, variance)
        assert prior().expand([3]).mean.shape == prior().expand([3]).variance.shape == (3, 3)


def test_mean_field_guides_take_matrix_products_and_others_do_not() -> None:
    kinds = {name: type(VampPrior(make(), 5, 2)()) for name, make in GUIDES.items()}
    assert kinds.pop("mean-field") is SharedNormalMixture
    assert set(kinds.values()) == {SharedMixture}


def test_density_of_a_mean_field_guide_makes_no_tensor_of_all_components_and_dimensions() -> None:
    prior = VampPrior(GUIDES["mean-field"](), 5, 50)()
    z = torch.randn(20, 3)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)
            )
            return out

    with Sizes():
        prior.log_prob(z).sum().backward()
    assert max(sizes) == 20 * 50


def test_the_encoder_sees_the_pseudo_inputs_once_per_step() -> None:
    guide = GUIDES["mean-field"]()
    model = vae(guide)
    svi = SVI(model, guide, torch.optim.Adam, IWAE(6))
    svi.step(bits())
    rows: list[int] = []
    guide.encoder.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    svi.step(bits())
    assert sorted(rows) == [COMPONENTS, 12]


def test_trained_with_its_guide_both_ways() -> None:
    # The guide's parameters are the guide's alone, and the prior's gradient is part of theirs.
    guide = GUIDES["mean-field"]()
    model = vae(guide)
    assert {name for name, _ in model.named_parameters()} == {
        "prior.pseudo_inputs",
        *[f"likelihood.{name}" for name, _ in model.likelihood.named_parameters()],
    }
    assert not any("guide" in name for name in model.state_dict())
    model.double().eval()
    assert guide.training and guide.head.weight.dtype == torch.float32
    model.float()
    svi = SVI(model, guide, torch.optim.Adam, Trace_ELBO())
    before = copy.deepcopy(guide.state_dict())
    svi.step(bits())
    assert all(not torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert model.prior.guide is guide


@pytest.mark.parametrize(("plain", "reduced"), [(IWAE, DReG), (None, STL_ELBO)])
def test_estimators_of_less_variance_have_the_same_mean_gradient(plain: Any, reduced: Any) -> None:
    # They leave out the score of log q, which has mean 0; the prior's gradient by the same parameters stays.
    guide = MeanFieldGuide(MLP(3, hidden=3), 2).double()
    prior = VampPrior(guide, 3, 2, bounds=None).double()
    model = VAE(prior, Normal(MLP(2, 3, hidden=3), scale=0.5)).double()
    x = torch.randn(1, 3).double().expand(4000, 3)
    parameters = [*guide.parameters(), prior.pseudo_inputs]
    rows = []
    for elbo in (plain(3) if plain else Trace_ELBO(), reduced(3) if plain else reduced()):
        objective = SVI(model, guide, torch.optim.Adam, elbo).objective
        rows.append(
            torch.stack(
                [
                    torch.cat([g.flatten() for g in torch.autograd.grad(objective(x) / 4000, parameters)])
                    for _ in range(12)
                ]
            )
        )
    difference = rows[0].mean(0) - rows[1].mean(0)
    error = ((rows[0].var(0) + rows[1].var(0)) / 12).sqrt()
    assert (difference.abs() < 5 * error + 1e-12).all()  # of 12 draws: t, not normal
    assert error.norm() < 0.05 * rows[0].mean(0).norm()


def test_pseudo_inputs_stay_in_their_bounds() -> None:
    guide = GUIDES["mean-field"]()
    prior = VampPrior(guide, 5, COMPONENTS, bounds=(-1, 2))
    assert ((prior.pseudo_inputs >= -1) & (prior.pseudo_inputs <= 2)).all()
    with torch.no_grad():
        prior.pseudo_inputs.fill_(5.0)
    expected = guide.posterior(torch.full((COMPONENTS, 5), 2.0)).mean
    torch.testing.assert_close(prior().loc, expected)
    prior().log_prob(torch.zeros(3)).backward()
    assert not prior.pseudo_inputs.grad.any()
    free = VampPrior(guide, 5, COMPONENTS, bounds=None)
    with torch.no_grad():
        free.pseudo_inputs.fill_(5.0)
    torch.testing.assert_close(free().loc, guide.posterior(torch.full((COMPONENTS, 5), 5.0)).mean)


def test_pseudo_inputs_start_at_different_data() -> None:
    prior = VampPrior(MeanFieldGuide(MLP((1, 2, 3), hidden=4), 2), (1, 2, 3), 6)
    x = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, 1, 2, 3) / 10
    prior.init_pseudo_inputs(x)
    chosen = prior.pseudo_inputs[:, 0, 0, 0]
    assert len(chosen.unique()) == 6 and torch.isin(chosen, x).all()
    assert prior.pseudo_inputs.requires_grad
    first = chosen.clone()
    prior.init_pseudo_inputs(x)
    assert not torch.equal(first, prior.pseudo_inputs[:, 0, 0, 0])


@pytest.mark.parametrize("shape", [(3, 1, 2, 3), (6, 6), (8, 1, 3, 2)])
def test_data_that_pseudo_inputs_can_not_start_at(shape: tuple[int, ...]) -> None:
    prior = VampPrior(MeanFieldGuide(MLP((1, 2, 3), hidden=4), 2), (1, 2, 3), 6)
    message = f"x: expected data of shape [6, 1, 2, 3] or more of them, got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        prior.init_pseudo_inputs(torch.zeros(shape))


def test_float32_density_keeps_its_digits_where_posteriors_are_narrow() -> None:
    # sigma = 0.01: multiplied out in float32, the squares would leave an error of 0.04 nats.
    guide = MeanFieldGuide(MLP(5, hidden=20), 10)
    prior = VampPrior(guide, 5, 100, bounds=None)
    with torch.no_grad():
        guide.head.weight[:10] *= 8
        guide.head.bias[10:] = -4.6
        guide.head.weight[10:] *= 0.3
    z = prior().sample((300,))
    q = prior()
    exact = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=q.log_weights.double()),
        torch.distributions.Independent(torch.distributions.Normal(q.loc.double(), q.scale.double()), 1),
    ).log_prob(z.double())
    assert ((q.log_prob(z) - exact).abs() < 1e-5 * (1 + exact.abs())).all()


def test_a_guide_that_scores_its_own_draws_alone_says_so() -> None:
    guide = FlowGuide(MLP(5, hidden=6), Planar(3))
    with pytest.raises(
        (NotImplementedError, ValueError), match="Planar: expected the last value that this distribution drew"
    ):
        VampPrior(guide, 5, 2)().log_prob(torch.zeros(4, 3))


@pytest.mark.parametrize("name", ["mean-field", "full-rank"])
def test_a_saved_pair_is_loaded_with_the_loaded_guide_in_the_prior(name: str, tmp_path: Path) -> None:
    guide = GUIDES[name]()
    model, x = vae(guide, learn_weights=True), bits()
    fit(model, guide, x, epochs=2, batch_size=6, output=tmp_path / "run", progress=False)
    loaded = load_run(tmp_path / "run", classes=(VampPrior,))
    assert loaded.model.prior.guide is loaded.guide
    assert describe(loaded.model) == describe(model)
    z = torch.randn(6, 3)
    assert torch.equal(loaded.model.prior().log_prob(z), model.prior().log_prob(z))
    weights = []
    for pair in ((model, guide), (loaded.model, loaded.guide)):
        torch.manual_seed(1)
        weights.append(log_weights(*pair, x, num_particles=3))
    assert torch.equal(*weights)


def test_a_prior_of_a_part_of_the_guide_is_loaded(tmp_path: Path) -> None:
    start = GUIDES["mean-field"]()
    model, x = vae(start), bits()
    guide = SemiAmortizedGuide(start, model, steps=2)
    fit(model, guide, x, epochs=1, batch_size=6, output=tmp_path / "run", progress=False)
    loaded = load_run(tmp_path / "run", classes=(VampPrior,))
    assert loaded.model.prior.guide is loaded.guide.guide
    assert loaded.guide.model is loaded.model
    z = torch.randn(6, 3)
    assert torch.equal(loaded.model.prior().log_prob(z), model.prior().log_prob(z))


def test_parameters_are_loaded_into_a_pair_that_is_given(tmp_path: Path) -> None:
    guide = GUIDES["mean-field"]()
    model = vae(guide)
    fit(model, guide, bits(), epochs=1, batch_size=6, output=tmp_path / "run", progress=False)
    other = GUIDES["mean-field"]()
    own = vae(other)
    loaded = load_run(tmp_path / "run", model=own, guide=other)
    assert loaded.model is own and own.prior.guide is other
    z = torch.randn(6, 3)
    assert torch.equal(own.prior().log_prob(z), model.prior().log_prob(z))
    again = load_run(tmp_path / "run", model=vae(GUIDES["mean-field"]()))
    assert again.model.prior.guide is again.guide


def test_resumed_training_is_uninterrupted_training(tmp_path: Path) -> None:
    x, found = bits(), []
    for name, epochs in (("whole", (4,)), ("parts", (2, 4))):
        for last in epochs:
            torch.manual_seed(0)
            guide = GUIDES["mean-field"]()
            model = vae(guide)
            options: dict[str, Any] = {"output": tmp_path / name, "resume": last == 4 and name == "parts"}
            fit(model, guide, x, epochs=last, batch_size=6, progress=False, **options)
        found.append([*model.state_dict().values(), *guide.state_dict().values()])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_a_pair_with_another_guide_in_the_prior_is_not_saved(tmp_path: Path) -> None:
    model = vae(GUIDES["mean-field"]().requires_grad_(False))
    guide = GUIDES["mean-field"]()
    with pytest.raises(ValueError, match="expected a VampPrior of the guide that is saved with the model"):
        fit(model, guide, bits(), epochs=1, output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    fit(model, guide, bits(), epochs=1, progress=False)


def test_members_of_fit_many_have_their_own_guides_in_their_priors() -> None:
    # At a rate of almost 0, the epoch's ELBO is one draw per datum of the pair as it was made.
    def make() -> tuple[VAE, MeanFieldGuide]:
        guide = GUIDES["mean-field"]()
        with torch.no_grad():
            guide.head.bias += 2 * torch.randn_like(guide.head.bias)
        return vae(guide), guide

    n = 2000
    x = bits(n)
    runs = fit_many(make, x, seeds=(0, 1), epochs=1, learning_rate=1e-9, batch_size=n, progress=False)
    for run in runs:
        assert run.model.prior.guide is run.guide
        with torch.no_grad():
            weights = log_weights(run.model, run.guide, x)
        error = weights.std().item() * (2 / n) ** 0.5  # of the difference of two estimates
        assert abs(weights.mean().item() - run.history[0]["train_elbo"]) < 4 * error


def test_a_copy_of_the_pair_is_a_pair() -> None:
    guide = GUIDES["mean-field"]()
    both = copy.deepcopy((vae(guide), guide))
    assert both[0].prior.guide is both[1]


def test_is_built_from_its_description() -> None:
    prior = VampPrior(GUIDES["mean-field"](), 5, 7, bounds=(-1, 1), learn_weights=True)
    description = describe(prior)
    assert description["bounds"] == [-1.0, 1.0]
    built = build(description, "prior", (VampPrior,))
    assert describe(built) == description
    assert isinstance(built.guide, MeanFieldGuide)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guide": nn.Linear(2, 2)}, TypeError, "guide: expected a guide with a `posterior`, got Linear"),
        ({"components": 0}, ValueError, "components: expected a whole number above 0"),
        ({"x_shape": (3, 0)}, ValueError, "x_shape[1]: expected a whole number above 0"),
        ({"bounds": (1, 0)}, ValueError, "bounds: expected a least and a larger value, both finite"),
        ({"bounds": (0, float("inf"))}, ValueError, "bounds: expected a least and a larger value"),
        ({"bounds": 1.0}, TypeError, "bounds: expected a least and a largest value, or None, got 1.0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"guide": GUIDES["mean-field"](), "x_shape": 5, "components": 3} | options
    with pytest.raises(error, match=re.escape(message)):
        VampPrior(**arguments)


def test_a_posterior_of_another_batch_shape_raises() -> None:
    guide = GUIDES["mean-field"]()
    guide.posterior = lambda x: dist.Normal(torch.zeros(3), 1.0).to_event(1)
    guide.family = lambda outputs: dist.Normal(torch.zeros(3), 1.0).to_event(1)
    message = r"guide: expected a posterior of batch shape \[2\] for as many pseudo-inputs, got \[\]"
    with pytest.raises(ValueError, match=message):
        VampPrior(guide, 5, 2)()


def test_compiled_and_stock_runs_leave_the_global_store_alone() -> None:
    guide = GUIDES["mean-field"]()
    SVI(vae(guide), guide, torch.optim.Adam, Trace_ELBO()).step(bits())
    assert list(pyro.get_param_store().keys()) == []
