"""Tests of modules as plain data: describe and build."""

import functools
import importlib
import inspect
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from ppl_vae.description import PACKAGES, build, describe, library_classes
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP, ConvDecoder
from ppl_vae.priors import StandardNormal


class Mine(nn.Module):
    """A user's network."""

    def __init__(self, width: int, inner: nn.Module | None = None, sizes: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.width = width
        self.inner = inner
        self.sizes = sizes
        self.out_features = width
        self.linear = nn.Linear(3, width)


class Refusing(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        if size > 1:
            raise ValueError("size: too large\nand a second line")


def some_function() -> None:
    pass


# describe


def test_describes_a_module_by_its_constructor() -> None:
    decoder = MLP(2, (1, 4, 4), hidden=(8, 6), activation="elu", dropout=0.5, init=None)
    model = VAE(StandardNormal(2), Bernoulli(decoder))
    assert describe(model) == {
        "class": "VAE",
        "prior": {"class": "StandardNormal", "latent_dim": 2},
        "likelihood": {
            "class": "Bernoulli",
            "decoder": {
                "class": "MLP",
                "in_shape": 2,
                "out_shape": [1, 4, 4],
                "hidden": [8, 6],
                "activation": "elu",
                "normalization": None,
                "dropout": 0.5,
                "init": None,
                "context": None,
            },
        },
    }


def test_description_is_plain_data_of_yaml() -> None:
    guide = MeanFieldGuide(MLP(np.int64(3), hidden=(np.int32(4),), dropout=np.float32(0.5)), 2)
    description = describe(guide)
    assert yaml.safe_load(yaml.safe_dump(description)) == description
    assert type(description["encoder"]["in_shape"]) is int
    assert type(description["encoder"]["dropout"]) is float


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (0.1, 0.1),
        (math.inf, math.inf),
        ("text", "text"),
        ((1, (2.0, "x")), [1, [2.0, "x"]]),
        ({"a": (1, 2), 3: None}, {"a": [1, 2], "3": None}),
        (some_function, {"function": f"{__name__}.some_function"}),
        (torch.optim.Adam, {"class": "torch.optim.adam.Adam"}),
        (
            functools.partial(torch.optim.Adam, lr=0.1, betas=(0.9, 0.99)),
            {"class": "torch.optim.adam.Adam", "lr": 0.1, "betas": [0.9, 0.99]},
        ),
        (functools.partial(some_function), {"function": f"{__name__}.some_function"}),
        (VAE, {"class": "VAE"}),
        (nn.Sequential(nn.Tanh()), {"class": "torch.nn.modules.container.Sequential"}),
        (torch.zeros(3), {"class": "torch.Tensor"}),
    ],
)
def test_describes(value: Any, expected: Any) -> None:
    assert describe(value) == expected


def test_describes_users_classes_by_their_import_path() -> None:
    description = describe(Mine(4, inner=Mine(2)))
    inner = {"class": f"{__name__}.Mine", "width": 2, "inner": None, "sizes": [1, 2]}
    assert description == {"class": f"{__name__}.Mine", "width": 4, "inner": inner, "sizes": [1, 2]}


def test_describes_modules_of_torch() -> None:
    # nn.Linear keeps its argument `bias` as a parameter: of that the class alone.
    assert describe(nn.Linear(2, 3))["in_features"] == 2


def test_users_class_with_a_librarys_name_is_another() -> None:
    class VAE(nn.Module):
        pass

    assert describe(VAE())["class"] == f"{__name__}.{VAE.__qualname__}"


def test_library_classes_are_the_public_names() -> None:
    classes = library_classes()
    names = [name for package in PACKAGES for name in importlib.import_module(f"ppl_vae.{package}").__all__]
    assert sorted(classes) == sorted(names)
    assert all(inspect.isclass(cls) and issubclass(cls, nn.Module) for cls in classes.values())


# build


@pytest.mark.parametrize(
    "module",
    [
        VAE(StandardNormal(2), Normal(MLP(2, (3, 2), hidden=()), scale="learned")),
        VAE(StandardNormal(2), Bernoulli(ConvDecoder(2, (1, 5, 4), 8, (3, 4), normalization="batch"))),
        MeanFieldGuide(MLP((1, 4, 4), hidden=8, activation="tanh", init="he"), 2),
        LinearGaussian(2, 3, scale=0.25),
    ],
    ids=lambda module: type(module).__name__,
)
def test_round_trip(module: nn.Module) -> None:
    built = build(describe(module), "model")
    assert type(built) is type(module)
    assert describe(built) == describe(module)
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (module, built)]
    assert shapes[0] == shapes[1]
    built.load_state_dict(module.state_dict())


def test_builds_the_callers_classes() -> None:
    guide = MeanFieldGuide(Mine(4, inner=Mine(2), sizes=(5,)), 2)
    built = build(describe(guide), "guide", classes=[Mine])
    assert type(built.encoder) is Mine
    assert built.encoder.sizes == (5,)
    assert built.encoder.inner.width == 2


def test_imports_nothing() -> None:
    before = set(sys.modules)
    description = {"class": "antigravity.Module", "prior": {"class": "this.Module"}}
    with pytest.raises(
        ValueError, match=r"^model: was made by 'antigravity.Module', which is no class of the lib"
    ):
        build(description, "model")
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (
            {"class": f"{__name__}.Mine", "width": 2},
            r"^model: was made by '.*Mine', which is no class of the library",
        ),
        (
            {"class": "VEA"},
            r"^model: was made by 'VEA', which is no class of the library \(did you mean 'VAE'\?\); ",
        ),
        ({"class": "os.system", "command": "true"}, r"^model: was made by 'os.system', which is no class "),
        ({"latent_dim": 2}, r"^model: was made by None, which is no class of the library"),
        ({"class": ["VAE"]}, r"^model: was made by \['VAE'\], which is no class of the library"),
        (
            {"class": "VAE", "prior": {"class": "Nothing"}, "likelihood": None},
            r"^model.prior: was made by 'Nothing', .*; pass the model as `model=` or its class in `classes=`",
        ),
        (
            {"class": "StandardNormal", "latent_dim": -1},
            r"^model: StandardNormal can't be built: latent_dim: expected a whole number above 0, got -1$",
        ),
        ({"class": "StandardNormal", "size": 2}, r"^model: StandardNormal can't be built: .*'size'"),
        ({"class": "StandardNormal", "self": 2}, r"^model: StandardNormal can't be built: "),
        ({"class": "VAE"}, r"^model: VAE can't be built: .*'prior' and 'likelihood'$"),
        (
            {"function": "mine.model"},
            r"^model: was the function 'mine.model', which is no class of the library; pass it as `model=`$",
        ),
    ],
)
def test_refuses(description: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(description, "model")
    assert "\n" not in str(caught.value)


def test_error_of_a_constructor_is_one_line() -> None:
    description = {"class": f"{__name__}.Refusing", "size": 2}
    with pytest.raises(ValueError, match=r"^model: .*Refusing can't be built: size: too large$"):
        build(description, "model", classes=[Refusing])
