"""Rate and distortion over a sweep of KL weights."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ppl_vae._checks import check_at_least, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.evaluation.evaluate import Estimate, Evaluation, evaluate
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.estimators.kl_elbo import KL_ELBO
from ppl_vae.infer.running import Program
from ppl_vae.infer.svi import OptimizerFactory
from ppl_vae.training.fit import fit
from ppl_vae.training.fit_many import fit_many
from ppl_vae.training.saving import Run
from ppl_vae.training.settings import Adam

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class RateDistortion:
    """What ``rate_distortion`` measured on test data, nats per datum.

    Attributes:
        table: a row per KL weight, the index ``"kl_weight"``: ``rate`` (the KL of all latent sites),
            ``distortion`` (minus the reconstruction), ``elbo`` = - distortion - rate, ``log_likelihood``
            (importance-sampled), each with its standard error over data, ``rate_se`` and so on. Errors are
            of the test data alone, not of training: another seed gives other points.
        runs: the trained pairs, in the order of the weights.
        evaluations: what ``evaluate`` found of each.
        together: whether all were trained in one vectorised step.
    """

    table: "pd.DataFrame" = field(repr=False)
    runs: list[Run] = field(repr=False)
    evaluations: list[Evaluation] = field(repr=False)
    together: bool

    def summary(self) -> dict[str, Any]:
        """Return the table's rows as plain numbers, for a file."""
        rows = self.table.reset_index().to_dict("records")
        return {
            "num_data": self.evaluations[0].num_data,
            "num_particles": self.evaluations[0].num_particles,
            "weights": [{str(name): float(value) for name, value in row.items()} for row in rows],
        }

    def __str__(self) -> str:
        import pandas as pd

        shown = {
            name: [
                f"{v:.2f} +- {e:.2f}" for v, e in zip(self.table[name], self.table[f"{name}_se"], strict=True)
            ]
            for name in ("rate", "distortion", "elbo", "log_likelihood")
        }
        head = f"nats per datum, mean and standard error over {self.evaluations[0].num_data} test data"
        return f"{head}\n{pd.DataFrame(shown, index=self.table.index).to_string(line_width=10_000)}"


def rate_distortion(
    make: Callable[[], tuple[Program, Program]],
    train: Any,
    test: Any,
    *,
    kl_weights: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
    elbo: Estimator | None = None,
    optimizer: OptimizerFactory = Adam,
    learning_rate: float | Mapping[str, float] = 1e-3,
    epochs: int = 100,
    batch_size: int = 100,
    clip_norm: float | None = None,
    num_particles: int = 100,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RateDistortion:
    r"""Train a pair for each KL weight, and measure rate and distortion of each on test data.

    The ELBO is minus distortion minus rate: pairs of one ELBO lie on a line of slope -1, and the KL weight
    says where on the line that a family of programs can reach. All pairs start alike and are trained for all
    epochs; none is chosen by validation data, which would favour those near the ELBO's maximum. They are
    trained by ``fit_many`` where their programs allow it, else by ``fit`` one after the other.

    Args:
        make: returns a fresh model and a fresh guide. Called with all random streams seeded.
        train: training data, as in ``fit``.
        test: data to measure on, as in ``evaluate``.
        kl_weights: of the objective, one pair each.
        elbo: an estimator of this library with a ``kl_weight``, whose weight is set; by default
            ``KL_ELBO()``.
        optimizer: as in ``fit``.
        learning_rate: likewise.
        epochs: passes over the data.
        batch_size: data per step.
        clip_norm: the largest norm of each pair's gradient.
        num_particles: draws per datum in ``evaluate``.
        device: where to work; by default where the first model's parameters are.
        seed: of the pairs' start, of training and of evaluation.
        progress: show progress bars.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        Fixing a Broken ELBO (Alemi et al., 2018), arXiv:1711.00464

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> def make():
        ...     return LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> x = torch.randn(100, 5)
        >>> result = rate_distortion(make, x, x, kl_weights=(0.5, 2.0), epochs=2, progress=False)
        >>> list(result.table.index)
        [0.5, 2.0]
    """
    import pandas as pd

    weights = _check_weights(kl_weights)
    check_positive_int("num_particles", num_particles)
    seed = check_seed(seed)
    if not callable(make):
        raise TypeError(f"make: expected a function that returns a pair (model, guide), got {make!r}")
    estimator = _check_elbo(elbo)
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "clip_norm": clip_norm,
        "device": device,
        "progress": progress,
    }
    with seeded(seed, 0, 2):
        pair = _check_pair(make())
        evaluate(*pair, test, num_particles=1, device=device, seed=seed, progress=False)  # test data that fit
    runs, together = _train(make, pair, train, weights, estimator, seed, settings)
    found = [
        evaluate(
            run.model,
            run.guide,
            test,
            num_particles=num_particles,
            device=device,
            seed=seed,
            progress=progress,
        )
        for run in runs
    ]
    rows = []
    for evaluation in found:
        values = sum((kl.values for kl in evaluation.kl.values()), torch.zeros(()))
        rate = Estimate(values, num_particles, math.nan)
        row = {"rate": rate.mean, "rate_se": rate.standard_error}
        row["distortion"] = -evaluation.reconstruction.mean
        row["distortion_se"] = evaluation.reconstruction.standard_error
        for name in ("elbo", "log_likelihood"):
            estimate = getattr(evaluation, name)
            row |= {name: estimate.mean, f"{name}_se": estimate.standard_error}
        rows.append(row)
    table = pd.DataFrame(rows, index=pd.Index(weights, name="kl_weight"))
    return RateDistortion(table, runs, found, together)


def _train(
    make: Callable[[], tuple[Program, Program]],
    pair: tuple[Program, Program],
    train: Any,
    weights: list[float],
    estimator: Estimator,
    seed: int,
    settings: dict[str, Any],
) -> tuple[list[Run], bool]:
    """Return a run per weight, and whether they were trained together."""
    if all(isinstance(program, nn.Module) for program in pair):
        made: Any = make
        try:
            runs = fit_many(made, train, seeds=(seed,), kl_weights=weights, elbo=estimator, **settings)
            return runs, True
        except ValueError as error:
            if "`fit` in a loop" not in str(error):  # what it says of programs that vmap can't run
                raise
    runs = []
    for weight in weights:
        with seeded(seed, 0, 2):
            model, guide = _check_pair(make())
        own: Any = copy.deepcopy(estimator)
        own.kl_weight = weight
        runs.append(fit(model, guide, train, elbo=own, seed=seed, **settings))
    return runs, False


def _check_weights(weights: Any) -> list[float]:
    if isinstance(weights, str) or not isinstance(weights, Sequence) or not weights:
        raise TypeError(f"kl_weights: expected a sequence of numbers from 0, got {weights!r}")
    found = [check_at_least(f"kl_weights[{i}]", weight) for i, weight in enumerate(weights)]
    if len(set(found)) < len(found):
        raise ValueError(f"kl_weights: expected each weight once, got {found}")
    return found


def _check_elbo(elbo: Any) -> Any:
    if elbo is None:
        return KL_ELBO()
    if not (isinstance(elbo, Estimator) and "kl_weight" in inspect.signature(type(elbo)).parameters):
        got = elbo.__name__ if isinstance(elbo, type) else type(elbo).__name__
        raise TypeError(f"elbo: expected an estimator with a `kl_weight`, such as KL_ELBO(), got {got}")
    return elbo


def _check_pair(made: Any) -> tuple[Program, Program]:
    if not isinstance(made, tuple) or len(made) != 2 or not all(map(callable, made)):
        raise TypeError(
            "make: expected a function that returns a pair (model, guide), it returned "
            f"{' '.join(repr(made).split())}"
        )
    return made
