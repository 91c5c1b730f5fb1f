"""What several test files need: pairs, data that are no tensors, and noise that runs can share."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import (
    CIWAE,
    CUBO,
    DIP_ELBO,
    IWAE,
    KL_ELBO,
    MIWAE,
    PIWAE,
    STL_ELBO,
    TVO,
    VIMCO,
    BetaTC_ELBO,
    DReG,
    EnumELBO,
    LinearWarmup,
    RelaxedELBO,
    Renyi,
    ScoreFunctionELBO,
    WakeSleep,
)
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

Program = Callable[..., Any]
Pair = tuple[Program, Program, list[nn.Module]]


def vae_pair() -> Pair:
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, 4, hidden=3))).double()
    guide = MeanFieldGuide(MLP(4, hidden=3), 2).double()
    return model, guide, [model, guide]


def function_pair() -> Pair:
    """Return plain functions with ``pyro.module``."""
    decoder, encoder = nn.Linear(2, 4).double(), nn.Linear(4, 4).double()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, [decoder, encoder]


PAIRS = {"VAE": vae_pair, "functions": function_pair}

ESTIMATORS: dict[str, Callable[[], ELBO]] = {
    "CIWAE": lambda: CIWAE(3),
    "CUBO": lambda: CUBO(3),
    "DIP_ELBO": DIP_ELBO,
    "DReG": lambda: DReG(3),
    "EnumELBO": EnumELBO,
    "IWAE": lambda: IWAE(3),
    "KL_ELBO": lambda: KL_ELBO(kl_weight=LinearWarmup(10, start=0.5)),
    "MIWAE": lambda: MIWAE(4, num_groups=2),
    "PIWAE": lambda: PIWAE(4, num_groups=2),
    "RelaxedELBO": RelaxedELBO,
    "Renyi": lambda: Renyi(3),
    "STL_ELBO": lambda: STL_ELBO(2),
    "ScoreFunctionELBO": lambda: ScoreFunctionELBO(2),
    "TVO": lambda: TVO(4),
    "VIMCO": lambda: VIMCO(3),
    "WakeSleep": lambda: WakeSleep(3),
    "BetaTC_ELBO": lambda: BetaTC_ELBO(100),
}


class Draws(Messenger):
    """Makes normal sites draw ``loc + scale * noise``, so that runs can share their noise."""

    def __init__(self, **noise: Tensor) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and not msg["is_observed"] and msg["name"] in self.noise:
            fn, noise = msg["fn"], self.noise[msg["name"]]
            transforms = getattr(fn, "transforms", [])
            base = fn.base_dist if transforms else fn
            normal = getattr(base, "base_dist", None)
            if isinstance(normal, torch.distributions.Normal):
                value = normal.loc + normal.scale * noise
            elif isinstance(base, torch.distributions.MultivariateNormal):
                value = base.loc + (base.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
            elif fn.support is dist.constraints.sphere:
                value = torch.nn.functional.normalize(fn.loc + noise, dim=-1)
            else:
                value = noise.expand(fn.shape())
            for transform in transforms:
                value = transform(value)
            msg["value"] = value
            msg["done"] = True


class Rows(Dataset):
    """A map-style dataset."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        return self.x[index]


class Stream(IterableDataset):
    """A dataset of ready batches that knows no length."""

    def __init__(self, x: Tensor, size: int) -> None:
        self.x, self.size = x, size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x.split(self.size))
