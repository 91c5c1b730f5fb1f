"""All scores of codes against known factors, in one table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from ppl_vae._checks import check_choice, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.data import Split, as_split, batches, check_data
from ppl_vae.evaluation.disentanglement_metrics._table import (
    JointCounts,
    check_bootstrap,
    check_factors,
    check_table,
    generator_of,
    information,
)
from ppl_vae.evaluation.disentanglement_metrics.dci import ESTIMATORS, dci
from ppl_vae.evaluation.disentanglement_metrics.fixed_factor import Groups, beta_vae_score, factor_vae_score
from ppl_vae.evaluation.disentanglement_metrics.mig import mutual_information_gap
from ppl_vae.evaluation.disentanglement_metrics.modularity import explicitness, modularity
from ppl_vae.evaluation.disentanglement_metrics.sap import check_continuous, sap_score
from ppl_vae.evaluation.disentanglement_metrics.score import Score
from ppl_vae.evaluation.generation import encode
from ppl_vae.infer.checking import running_on
from ppl_vae.infer.placing import place
from ppl_vae.infer.running import Program, batch_arguments

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Disentanglement:
    """What ``disentanglement`` measured.

    Attributes:
        scores: by name: ``"MIG"``, ``"SAP"``, ``"DCI disentanglement"``, ``"DCI completeness"``,
            ``"DCI informativeness"``, ``"beta-VAE"``, ``"FactorVAE"``, ``"modularity"``, ``"explicitness"``.
        mutual_information: of each code with each factor, nats, ``[latent, factors]``.
        entropy: of each factor, nats, ``[factors]``.
        importance: of each code for each factor, as DCI's predictors say, ``[latent, factors]``.
        names: of the factors.
        num_data: n.
    """

    scores: dict[str, Score]
    mutual_information: Tensor = field(repr=False)
    entropy: Tensor = field(repr=False)
    importance: Tensor = field(repr=False)
    names: tuple[str, ...]
    num_data: int

    @property
    def table(self) -> "pd.DataFrame":
        """A row for each score: ``score``, ``standard_error`` (NaN where unknown) and ``settings``."""
        import pandas as pd

        rows = [
            {"score": score.value, "standard_error": score.standard_error, "settings": _text(score.settings)}
            for score in self.scores.values()
        ]
        return pd.DataFrame(rows, index=pd.Index(list(self.scores), name="metric"))

    def summary(self) -> dict[str, Any]:
        """Return scores, standard errors (None where unknown) and settings as plain values, for a file."""
        return {"num_data": self.num_data, "factors": list(self.names)} | {
            name: {
                "value": score.value,
                "standard_error": None if math.isnan(score.standard_error) else score.standard_error,
                "settings": dict(score.settings),
            }
            for name, score in self.scores.items()
        }

    def __str__(self) -> str:
        latent = len(self.mutual_information)
        head = f"{latent} codes against {', '.join(self.names)}; {self.num_data} data"
        lines = [f"{name:<20} {score!s:<17}  {_text(score.settings)}" for name, score in self.scores.items()]
        return "\n".join([head, *(line.rstrip() for line in lines)])


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def disentanglement(
    codes: Program | Tensor,
    data: Any,
    *,
    names: Sequence[str] | None = None,
    bins: int = 20,
    continuous: bool | Sequence[bool] = False,
    estimator: Literal["gradient_boosting", "random_forest", "lasso"] = "gradient_boosting",
    num_data: int | None = 15_000,
    num_points: int = 10_000,
    batch_size: int = 1000,
    bootstrap: int = 100,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Disentanglement:
    """Score codes against the known factors of the data by all metrics of this package.

    They are ``mutual_information_gap``, ``sap_score``, ``dci``, ``beta_vae_score``, ``factor_vae_score``,
    ``modularity`` and ``explicitness``, in the conventions of disentanglement_lib; each function says how its
    score is defined. Of a guide, codes are the posterior means that ``encode`` gives. It is called with x
    alone, so that codes can't be told the factors.

    Args:
        codes: a guide over the latent ``z``, or codes ``[n, latent]``.
        data: for a guide, data with factors as y, whole numbers ``[n, factors]``: a ``Split``, a tuple
            ``(x, factors)``, a torch ``Dataset`` or ``DataLoader``. For codes, the factors.
        names: of the factors; "factor 0" and so on by default.
        bins: of each code, for mutual informations.
        continuous: factors for which SAP takes the squared correlation; one for all, or one for each.
        estimator: DCI's predictor. ``"gradient_boosting"`` is disentanglement_lib's, and takes minutes for
            thousands of data and factors of many values; ``"random_forest"`` takes seconds.
        num_data: if there are more data, so many at random are taken: by default as many as
            disentanglement_lib takes to train (10,000) and test (5,000); None for all.
        num_points: points that the beta-VAE and the FactorVAE score train on, two or more; half as many test.
        batch_size: how many data the guide is called with at a time.
        bootstrap: the number of resamples for standard errors; 0 for none of these.
        device: where the guide works; by default where its parameters are.
        seed: of all draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        Challenging Common Assumptions in the Unsupervised Learning of Disentangled Representations
        (Locatello et al., 2019), arXiv:1811.12359

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(3), torch.arange(4)).repeat(10, 1)
        >>> result = disentanglement(factors.float(), factors, estimator="random_forest", progress=False)
        >>> result.scores["MIG"].value
        1.0
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_positive_int("bins", bins)
    check_positive_int("batch_size", batch_size)
    if check_positive_int("num_points", num_points) < 2:
        raise ValueError(f"num_points: expected at least 2, got {num_points!r}")
    check_bootstrap(bootstrap)
    check_seed(seed)
    if num_data is not None:
        check_positive_int("num_data", num_data)

    def check(factors: Tensor) -> None:
        held = check_table(torch.zeros(len(factors), 2), factors, least_factors=2)
        check_continuous(continuous, len(held.sizes))
        _check_names(names, len(held.sizes))
        Groups(held)

    if isinstance(codes, (Tensor, np.ndarray)):
        whole = check_table(codes, data, least_factors=2)
        chosen = _rows(len(whole), num_data, seed)
        z, factors = whole.codes[chosen], whole.factors[chosen]
    elif callable(codes):
        z, factors = _encoded(codes, data, num_data, batch_size, device, seed, check)
    else:
        raise TypeError(f"codes: expected a guide or a tensor [n, latent], got {type(codes).__name__}")
    check(factors)
    table = check_table(z, factors)
    known = _check_names(names, len(table.sizes))

    scores: dict[str, Score] = {}
    steps = 6 + len(table.sizes)
    with tqdm(total=steps, unit="step", disable=not progress, dynamic_ncols=True) as bar:

        def done(name: str, score: Score) -> None:
            scores[name] = score
            bar.update()

        resampled: dict[str, int] = {"bootstrap": bootstrap, "seed": seed}
        drawn: dict[str, int] = {"num_train": num_points, "num_test": num_points // 2, "seed": seed}
        done("MIG", mutual_information_gap(z, factors, bins=bins, **resampled))
        done("SAP", sap_score(z, factors, continuous=continuous, **resampled))
        bar.set_description("DCI")
        parts = dci(z, factors, estimator=estimator, seed=seed, on_factor=bar.update)
        scores["DCI disentanglement"] = parts.disentanglement
        scores["DCI completeness"] = parts.completeness
        scores["DCI informativeness"] = parts.informativeness
        bar.set_description("beta-VAE")
        done("beta-VAE", beta_vae_score(z, factors, **drawn))
        bar.set_description("FactorVAE")
        done("FactorVAE", factor_vae_score(z, factors, **drawn))
        bar.set_description("modularity")
        done("modularity", modularity(z, factors, bins=bins, **resampled))
        done("explicitness", explicitness(z, factors, **resampled))
    mutual, entropy = information(JointCounts(table, bins)())
    return Disentanglement(scores, mutual, entropy, parts.importance, known, len(table))


def _rows(n: int, num_data: int | None, seed: int) -> Tensor:
    if num_data is None or n <= num_data:
        return torch.arange(n)
    return torch.randperm(n, generator=generator_of(seed, 7))[:num_data]


def _check_names(names: Sequence[str] | None, factors: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"factor {f}" for f in range(factors))
    if isinstance(names, str) or len(names) != factors or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names: expected a name for each of {factors} factors, got {names!r}")
    return tuple(names)


def _encoded(
    guide: Program,
    data: Any,
    num_data: int | None,
    batch_size: int,
    device: str | torch.device | None,
    seed: int,
    check: Callable[[Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Return codes and factors of the chosen data; ``check`` is to raise if the factors won't do."""
    where = place(device, guide)
    loaded = isinstance(data, (DataLoader, IterableDataset))
    if not loaded:
        data = _split(data)
        rows = _rows(len(data), num_data, seed)
        data = Split(data.x[rows], data.y[rows], data.dynamic)
        check(data.y)
    codes, factors = [], []
    with seeded(seed):
        for batch in batches(data, batch_size, device=where, shuffle=False):
            if len(batch) < 2:
                raise ValueError("data: expected factors as y, got x alone")
            x = batch[:1]
            if loaded:
                check_data(x[0], "data")
            try:
                batch_arguments(guide, x)
            except TypeError:
                raise TypeError(
                    "codes: expected a guide of x alone, since codes are not to be told the factors; "
                    "for another, give its codes"
                ) from None
            with running_on("data", x):
                z = encode(guide, *x).z
            if z.ndim != 2:
                raise ValueError(f"codes: expected a guide with a vector z, [n, latent], got {list(z.shape)}")
            codes.append(z)
            factors.append(check_factors(batch[1], "data: y"))
    if not codes:
        raise ValueError("data: expected a loader that gives batches, got none from it")
    z, whole = torch.cat(codes), torch.cat(factors)
    chosen = _rows(len(z), num_data, seed) if loaded else torch.arange(len(z))
    return z[chosen], whole[chosen]


def _split(data: Any) -> Split:
    """Return checked data with factors."""
    split = as_split(data, "data")
    if split.y is None:
        raise ValueError("data: expected factors as y, got x alone")
    factors = check_factors(split.y, "data: y")
    if len(factors) != len(split.x):
        raise ValueError(
            f"data: expected a row of factors for each of {len(split.x)} data, got {len(factors)}"
        )
    check_data(split.x, "data")
    return Split(split.x, factors, split.dynamic)
