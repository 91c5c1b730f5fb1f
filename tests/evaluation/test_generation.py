"""Generation against programs whose means are known: linear decoders, written by hand."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from ppl_vae.evaluation.generation import encode, interpolate, reconstruct, sample, traverse
from ppl_vae.likelihoods import Normal
from ppl_vae.models import CVAE, VAE, GaussianMixtureVAE, SemiSupervisedVAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal, UniformSphere

SCALE = 0.1
GUIDE_SCALE = 1e-6

# What each function is called with, for programs of latents [2] and data [4].
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "sample": lambda model, guide: sample(model, 3),
    "reconstruct": lambda model, guide: reconstruct(model, guide, torch.ones(3, 4)),
    "encode": lambda model, guide: encode(guide, torch.ones(3, 4)),
    "traverse": lambda model, guide: traverse(model, torch.zeros(2)),
    "interpolate": lambda model, guide: interpolate(model, torch.zeros(2), torch.ones(2)),
}


def raises(kind: Any, match: str, call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    """Check that a call raises an error of one line."""
    with pytest.raises(kind, match=match) as info:
        call(*args, **kwargs)
    assert "\n" not in str(info.value)


def prior(latent_dim: int = 2, dtype: torch.dtype = torch.float32) -> dist.Distribution:
    return dist.Normal(torch.zeros(latent_dim, dtype=dtype), 1.0).to_event(1)


def plain_model(decoder: nn.Module, latent_dim: int = 2, dtype: torch.dtype = torch.float32) -> Callable:
    def model(x: Tensor | None, size: int | None = None) -> Tensor:
        pyro.module("decoder", decoder)
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", prior(latent_dim, dtype))
            mean = decoder(z)
            return pyro.sample("x", dist.Normal(mean, SCALE).to_event(mean.ndim - 1), obs=x)

    return model


def plain_guide(encoder: nn.Module) -> Callable:
    def guide(x: Tensor) -> Tensor:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Normal(encoder(x), GUIDE_SCALE).to_event(1))

    return guide


class ModuleModel(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.scale = PyroParam(torch.tensor(SCALE), dist.constraints.positive)

    def forward(self, x: Tensor | None, size: int | None = None) -> Tensor:
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", prior())
            return pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)


class ModuleGuide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
        self.scale = PyroParam(torch.tensor(GUIDE_SCALE), dist.constraints.positive)

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Normal(self.encoder(x), self.scale).to_event(1))


class Methods(nn.Module):
    """Model and guide as methods of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5))
        self.encoder = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))

    def model(self, x: Tensor | None, size: int | None = None) -> Tensor:
        return plain_model(self.decoder)(x, size)

    def guide(self, x: Tensor) -> Tensor:
        return plain_guide(self.encoder)(x)


def module_pair() -> tuple[Any, Any, nn.Module]:
    model, guide = ModuleModel(), ModuleGuide()
    return model, guide, nn.ModuleList([model, guide])


def method_pair() -> tuple[Any, Any, nn.Module]:
    both = Methods()
    return both.model, both.guide, both


def plain_pair() -> tuple[Any, Any, nn.Module]:
    both = Methods()
    return plain_model(both.decoder), plain_guide(both.encoder), both


# Values


def test_samples_are_draws_around_the_likelihoods_mean() -> None:
    decoder = nn.Linear(2, 4)
    result = sample(plain_model(decoder), 2000)
    assert result.x.shape == result.mean.shape == (2000, 4)
    # 8000 residuals of standard deviation 0.1: its estimate has standard error 0.1 / sqrt(16000) = 0.0008.
    assert (result.x - result.mean).std().item() == pytest.approx(SCALE, abs=5 * 0.0008)
    # The means lie in the plane that the decoder spans: the nearest points of the plane are themselves.
    centred = (result.mean - decoder.bias.detach()).T
    weight = decoder.weight.detach()
    inside = weight @ torch.linalg.lstsq(weight, centred).solution
    torch.testing.assert_close(inside, centred, atol=1e-5, rtol=0.0)
    # z is standard normal: the means' covariance is W W', each entry with a standard error below
    # 2 |w|^2 / sqrt(2000).
    expected = weight @ weight.T
    tolerance = 5 * 2 * expected.diagonal().max().item() / 2000**0.5
    torch.testing.assert_close(centred.cov(), expected, atol=tolerance, rtol=0.0)


def test_what_is_given_is_held_fixed() -> None:
    means = 100.0 * torch.eye(3)

    def model(x: Tensor | None, y: Tensor, size: int | None = None) -> Tensor:
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(means[y], 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 1e-3).to_event(1))
            return pyro.sample("x", dist.Normal(z1, 1e-3).to_event(1), obs=x)

    y, z2 = torch.tensor([2, 0, 2, 1]), torch.tensor([[7.0, 8.0, 9.0]]).expand(4, 3)
    torch.testing.assert_close(sample(model, given={"y": y}).x, means[y], atol=6.0, rtol=0.0)
    torch.testing.assert_close(sample(model, 4, given={"y": y, "z2": z2}).mean, z2, atol=6e-3, rtol=0.0)


def test_labels_and_clusters_of_the_librarys_models_are_held_fixed() -> None:
    class Read(nn.Module):
        def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
            return z if y is None else 50.0 * nn.functional.one_hot(y, 3)[..., :2] + 0 * z

    y = torch.arange(3).repeat_interleave(4)
    conditional = CVAE(StandardNormal(2), Normal(Read(), scale=0.1))
    clusters = GaussianMixtureVAE(3, 2, Normal(Read(), scale=0.1))
    with torch.no_grad():
        clusters.loc.copy_(50 * torch.eye(3)[:, :2])
    for model in (conditional, clusters):
        found = sample(model, given={"y": y})
        torch.testing.assert_close(found.mean, 50 * torch.eye(3)[y, :2], atol=6.0, rtol=0.0)
        assert found.x.shape == (12, 2)


def test_what_is_given_takes_the_models_dtype_and_goes_through_handlers() -> None:
    model = CVAE(StandardNormal(2), Normal(MLP(2, 4, context=3), scale=0.1))
    y, z = torch.tensor([2, 0]), torch.tensor([[1, 2], [3, 4]])
    results = []
    for program in (model, pyro.poutine.scale(model, scale=2.0)):
        results.append(sample(program, given={"y": y, "z": z}).mean)
        torch.testing.assert_close(results[-1], results[0])
    torch.testing.assert_close(results[0], model.likelihood(z.float(), y).mean.detach())


def test_values_that_a_site_cannot_have_are_named() -> None:
    labels = SemiSupervisedVAE(StandardNormal(2), Normal(MLP(2, 4, context=3)), 3)
    clusters = GaussianMixtureVAE(3, 2, Normal(MLP(2, 4)))
    sphere = VAE(UniformSphere(3), Normal(MLP(3, 4)))
    for model, given_, message in (
        (labels, {"y": torch.tensor([1, 5])}, "^given: datum 1 is outside the support of site 'label'"),
        (labels, {"y": torch.tensor([0.0, 1.0])}, "^y: expected whole numbers as labels"),
        (clusters, {"y": torch.tensor([0, 9])}, r"^given\['y'\]: datum 1 is outside the support of site 'y'"),
        (clusters, {"y": torch.tensor([0, -1])}, r"^given\['y'\]: datum 1 is outside"),
        (clusters, {"z": torch.full((2, 2), torch.nan)}, r"^given\['z'\]: datum 0 is outside"),
        (sphere, {"z": torch.full((2, 3), 5.0)}, r"^given\['z'\]: datum 0 is outside"),
    ):
        raises((TypeError, ValueError), message, sample, model, given=given_)

    def with_a_global(x: Tensor | None, size: int | None = None) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size, dim=-1):
            pyro.sample("x", dist.Normal(theta, torch.ones(3)).to_event(1))

    message = "^site 'theta': expected per-datum randomness"
    raises(ValueError, message, sample, with_a_global, given={"theta": torch.zeros(3)})


def test_wrong_things_given_are_named() -> None:
    model, z = plain_model(nn.Linear(2, 4)), torch.tensor([1, 0])
    raises(ValueError, "^size: expected a number of data where nothing is given, got None", sample, model)
    for fixed, kind, message in (
        ({"z": [1.0]}, TypeError, r"^given\['z'\]: expected a tensor, got list"),
        ({"z": torch.zeros(())}, ValueError, r"^given\['z'\]: expected a value for each datum.*scalar"),
        ({"z": torch.zeros(3, 5)}, ValueError, r"^given\['z'\]: expected \[n, 2\], got \[3, 5\]"),
        ({"zz": torch.zeros(3, 2)}, ValueError, r"^given: unknown 'zz' \(did you mean 'z'\?\)"),
        ({"x": torch.zeros(3, 4)}, ValueError, "^given: "),
    ):
        raises(kind, message, sample, model, given=fixed)
    wrong = "^given: expected a dictionary of tensors by name, got Tensor"
    raises(TypeError, wrong, sample, model, given=z)
    raises(
        ValueError, r"^given\['z'\]: expected 4 data, got 3", sample, model, 4, given={"z": torch.zeros(3, 2)}
    )


def test_reconstruction_decodes_the_guides_draw() -> None:
    decoder, encoder, x = nn.Linear(2, 4), nn.Linear(4, 2), torch.randn(6, 4)
    result = reconstruct(plain_model(decoder), plain_guide(encoder), x)
    assert torch.equal(result.x, x)
    # The guide's standard deviation is 1e-6, weights are below 1: 2 * 6 sigma, and float32's rounding.
    torch.testing.assert_close(result.mean, decoder(encoder(x)).detach(), atol=2e-5, rtol=0.0)


def test_batches_of_several_tensors_reach_both_programs() -> None:
    def model(x: Tensor, y: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior())
            return pyro.sample("x", dist.Normal(10.0 * y[:, None] + 0.0 * z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Normal(x + y[:, None], 1.0).to_event(1))

    x, y = torch.zeros(3, 2), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(reconstruct(model, guide, x, y).mean, 10.0 * y[:, None].expand(3, 2))
    assert torch.equal(encode(guide, x, y).z, y[:, None].expand(3, 2))


def test_encode_gives_the_guides_mean_and_labels() -> None:
    encoder, x, y = nn.Linear(4, 2), torch.randn(6, 4), torch.arange(6)
    result = encode(plain_guide(encoder), x, y=y)
    assert torch.equal(result.z, encoder(x).detach())
    assert result.y is not None
    assert torch.equal(result.y, y)
    assert encode(plain_guide(encoder), x).y is None


def test_encode_draws_where_there_is_no_mean() -> None:
    def guide(x: Tensor) -> Tensor:
        squashed = dist.TransformedDistribution(dist.Normal(x, 1.0), [dist.transforms.SigmoidTransform()])
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", squashed.to_event(1))

    x = torch.zeros(50, 2)
    first, second = encode(guide, x).z, encode(guide, x).z
    assert first.shape == (50, 2)
    assert ((first > 0) & (first < 1)).all()
    assert not torch.equal(first, second)


@given(latent_dim=st.integers(1, 4), steps=st.integers(1, 5), data=st.data())
def test_traversal_decodes_a_grid(latent_dim: int, steps: int, data: st.DataObject) -> None:
    dims = data.draw(st.none() | st.lists(st.integers(0, latent_dim - 1), min_size=1, max_size=4))
    decoder = nn.Sequential(nn.Linear(latent_dim, 6), nn.Unflatten(-1, (1, 2, 3)))
    z, values = torch.randn(latent_dim), torch.randn(steps)
    result = traverse(plain_model(decoder, latent_dim), z, dims=dims, values=values)
    expected_dims = list(range(latent_dim)) if dims is None else dims
    assert result.x.shape == (len(expected_dims), steps, 1, 2, 3)
    assert result.dims.tolist() == expected_dims
    assert torch.equal(result.values, values)
    for row, dim in enumerate(expected_dims):
        for column in range(steps):
            moved = z.clone()
            moved[dim] = values[column]
            expected = decoder(moved[None])[0].detach()
            torch.testing.assert_close(result.x[row, column], expected, atol=1e-5, rtol=1e-5)


@given(latent_dim=st.integers(1, 4), pairs=st.integers(1, 3), steps=st.integers(2, 6))
def test_interpolation_of_a_linear_decoder_is_a_line(latent_dim: int, pairs: int, steps: int) -> None:
    decoder = nn.Linear(latent_dim, 5)
    start, end = torch.randn(2, pairs, latent_dim)
    result = interpolate(plain_model(decoder, latent_dim), start, end, steps=steps)
    assert result.x.shape == (pairs, steps, 5)
    assert result.weights[0] == 0
    assert result.weights[-1] == 1
    expected = torch.lerp(
        decoder(start).detach()[:, None], decoder(end).detach()[:, None], result.weights[:, None]
    )
    torch.testing.assert_close(result.x, expected, atol=1e-5, rtol=1e-5)


def test_one_pair_needs_no_batch_axis() -> None:
    model = plain_model(nn.Linear(2, 4))
    assert interpolate(model, torch.zeros(2), torch.ones(2), steps=3).x.shape == (1, 3, 4)


def test_latents_follow_the_models_dtype() -> None:
    model = plain_model(nn.Linear(2, 4).double(), dtype=torch.float64)
    assert traverse(model, torch.zeros(2)).x.dtype == torch.float64


# What the programs are left with


@pytest.mark.parametrize("pair", [plain_pair, method_pair, module_pair])
@pytest.mark.parametrize("name", CALLS)
def test_programs_and_store_are_left_as_they_were(
    name: str, pair: Callable[[], tuple[Any, Any, nn.Module]]
) -> None:
    model, guide, owner = pair()
    owner.train()
    next(owner.children()).eval()  # a mixed mode comes back as it was
    store = pyro.get_param_store()
    # Entries under the programs' own names, of other programs with other values.
    for key in ("decoder$$$0.weight", "encoder$$$1.weight", "scale"):
        pyro.param(key, torch.full((3, 3), 7.0))
    modes = [module.training for module in owner.modules()]
    state = {key: value.clone() for key, value in owner.state_dict().items()}
    stored = {key: (value, value.detach().clone()) for key, value in store.named_parameters()}

    result = CALLS[name](model, guide)

    assert not any(value.requires_grad for value in vars(result).values() if value is not None)
    assert [module.training for module in owner.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in owner.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in owner.parameters())
    assert list(store.keys()) == list(stored)
    for key, (value, copy) in stored.items():
        assert store._params[key] is value
        assert torch.equal(value, copy)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("pair", [plain_pair, method_pair, module_pair])
@pytest.mark.parametrize("name", ["encode", "traverse", "interpolate"])
def test_programs_run_in_eval_mode(name: str, pair: Callable[[], tuple[Any, Any, nn.Module]]) -> None:
    model, guide, owner = pair()
    owner.train()
    first, second = (next(iter(vars(CALLS[name](model, guide)).values())) for _ in range(2))
    assert torch.equal(first, second)  # no dropout


def test_mode_comes_back_after_an_error() -> None:
    model = ModuleModel()
    raises(ValueError, "^z: expected", traverse, model, torch.zeros(3))
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert not list(pyro.get_param_store().keys())


# Errors


@pytest.mark.parametrize("call", [lambda m: sample(m, 2), lambda m: traverse(m, torch.zeros(2))])
def test_a_model_that_draws_nothing_is_told_what_to_add(call: Callable[[Any], object]) -> None:
    def without_size(x: Tensor) -> Tensor:
        return x

    def reads_the_batch(x: Tensor, size: int | None = None) -> Tensor:
        return torch.zeros(x.shape)

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    raises(TypeError, r"can't be called as model\(None, size=\d\); give it a keyword", call, without_size)
    raises(TypeError, r"can't be called as model\(None, size=\d\); give it a keyword", call, Module())
    raises(TypeError, r"failed \(AttributeError: .*\); give it a keyword", call, reads_the_batch)
    raises(TypeError, r"can't be called as model\(None, size=\d\)", call, 3)


def test_wrong_models_are_named() -> None:
    def no_x(x: Tensor | None, size: int | None = None) -> None:
        with pyro.plate("data", size, dim=-1):
            pyro.sample("z", prior())

    def ignores_size(x: Tensor | None, size: int | None = None) -> None:
        with pyro.plate("data", 5, dim=-1):
            pyro.sample("x", prior())

    def hierarchy(x: Tensor | None, size: int | None = None) -> None:
        with pyro.plate("data", size, dim=-1):
            pyro.sample("x", dist.Normal(pyro.sample("z1", prior()), 1.0).to_event(1))

    def no_mean(x: Tensor | None, size: int | None = None) -> None:
        squashed = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform()])
        with pyro.plate("data", size, dim=-1):
            pyro.sample("x", squashed)

    raises(ValueError, r"^model: expected a site 'x', got sites \['z'\]$", sample, no_x, 2)
    raises(ValueError, r"^model: expected .* to draw 2 data, got \(5, 2\)$", sample, ignores_size, 2)
    raises(ValueError, r"^model: expected a site 'z', got sites", traverse, hierarchy, torch.zeros(2))
    assert sample(no_mean, 2).mean is None


def test_wrong_arguments_are_named() -> None:
    decoder, encoder = nn.Linear(2, 4), nn.Linear(4, 2)
    model, guide = plain_model(decoder), plain_guide(encoder)
    x, z = torch.zeros(3, 4), torch.zeros(2)
    raises(ValueError, "^size: expected a whole number above 0, got 0$", sample, model, 0)
    raises(TypeError, "^size: ", sample, model, 1.5)
    raises(TypeError, "^batch: expected data .* got nothing$", encode, guide)
    raises(TypeError, "^batch: expected data .* got list", reconstruct, model, guide, [1.0])
    raises(ValueError, r"^y: expected one label for each of 3 data, got shape \(2,\)$", encode, guide, x, y=z)
    raises(ValueError, r"^guide: expected a site 'z', got sites \['x'\]$", encode, model_of_x, x)
    raises(ValueError, r"^z: expected one latent .* got shape \(1, 2\)$", traverse, model, z[None])
    raises(ValueError, "^z: expected one latent .* got list", traverse, model, [0.0])
    raises(ValueError, "^z: expected floats, got torch.int64$", traverse, model, z.long())
    raises(ValueError, r"^z: expected the model's shape \(2,\), got \(3,\)$", traverse, model, torch.zeros(3))
    raises(ValueError, r"^dims: expected latent .* 0 to 1, got \[2\]$", traverse, model, z, dims=[2])
    raises(ValueError, r"^dims: expected latent .* 0 to 1, got \[-1\]$", traverse, model, z, dims=[-1])
    raises(ValueError, r"^dims: expected latent .* got \[\]$", traverse, model, z, dims=[])
    raises(ValueError, "^values: expected a sequence of numbers", traverse, model, z, values=[])
    raises(ValueError, "^values: expected a sequence of numbers", traverse, model, z, values=1.0)
    raises(ValueError, "^steps: expected at least 2", interpolate, model, z, z, steps=1)
    raises(ValueError, r"^z_end: expected z_start's shape \(2,\)", interpolate, model, z, z[None])
    raises(ValueError, "^z_start: expected latents", interpolate, model, torch.zeros(0, 2), z)
    raises(ValueError, "^z_end: expected floats", interpolate, model, z, z.long())


def model_of_x(x: Tensor) -> Tensor:
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("x", dist.Normal(0.0, 1.0).expand([4]).to_event(1), obs=x)
