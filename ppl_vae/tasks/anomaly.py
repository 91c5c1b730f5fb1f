"""Anomaly detection: data that a trained pair finds unlikely."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ppl_vae._checks import check_choice, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.evaluation.evaluate import Evaluation, evaluate
from ppl_vae.infer.checking import check_all
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.running import Program, evaluating

if TYPE_CHECKING:
    import pandas as pd

AnomalyScore = Literal["elbo", "log_likelihood", "reconstruction", "kl"]

SCORES: tuple[AnomalyScore, ...] = ("elbo", "log_likelihood", "reconstruction", "kl")


@dataclass(frozen=True, eq=False)
class AnomalyDetection:
    """How well each score tells anomalous data from normal data.

    The columns of ``table``:

    ====================  ==========================================================================
    auroc                 area under the ROC curve: the chance that an anomalous datum has a higher score
                          than a normal one; 0.5 is chance
    auroc_se              its standard error over new data of both kinds (DeLong et al., 1988)
    average_precision     area under the precision-recall curve; chance is ``share_anomalous``
    average_precision_se  its standard error over new data of both kinds, by the bootstrap
    ====================  ==========================================================================

    Attributes:
        normal: the scores of normal data, nats, ``[n]`` each.
        anomalous: the scores of anomalous data, nats, ``[m]`` each.
        table: one row per score.
        num_particles: K, the draws per datum.
    """

    normal: dict[str, Tensor] = field(repr=False)
    anomalous: dict[str, Tensor] = field(repr=False)
    table: "pd.DataFrame" = field(repr=False)
    num_particles: int

    @property
    def share_anomalous(self) -> float:
        """The share of the data that is anomalous: the average precision of chance."""
        n, m = (len(next(iter(scores.values()))) for scores in (self.normal, self.anomalous))
        return m / (n + m)

    def summary(self) -> dict[str, Any]:
        """Return plain numbers, for a file."""
        n, m = (len(next(iter(scores.values()))) for scores in (self.normal, self.anomalous))
        return {"num_normal": n, "num_anomalous": m, "num_particles": self.num_particles} | {
            str(name): {column: float(row[column]) for column in self.table.columns}
            for name, row in self.table.iterrows()
        }

    def __str__(self) -> str:
        rows = [
            f"{name:<16} {row['auroc']:>8.4f} +- {row['auroc_se']:.4f} "
            f"{row['average_precision']:>10.4f} +- {row['average_precision_se']:.4f}"
            for name, row in self.table.iterrows()
        ]
        n, m = (len(next(iter(scores.values()))) for scores in (self.normal, self.anomalous))
        head = f"{n} normal and {m} anomalous data, K={self.num_particles}; average precision of chance"
        return "\n".join(
            [f"{head} {m / (n + m):.4f}", f"{'score':<16} {'AUROC':>8} {'av. precision':>23}", *rows]
        )


def anomaly_scores(
    model: Program,
    guide: Program,
    data: Any,
    *,
    score: AnomalyScore = "elbo",
    num_particles: int = 100,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Return how anomalous each datum is, in nats: the higher, the more.

    Log-likelihoods of images are no sure sign: simple images of another kind may have higher ones than the
    training data (Nalisnick et al., 2019).

    Args:
        model: program over the latent sites and the data.
        guide: program over the latent sites.
        data: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch ``Dataset`` or
            ``DataLoader``.
        score: ``"elbo"``, minus the ELBO; ``"log_likelihood"``, minus the importance-sampled log p(x), which
            is lower or the same; ``"reconstruction"``, minus E[log p(x | z)]; ``"kl"``, the KL divergence of
            q(z | x) from p(z), summed over latent sites.
        num_particles: K, the number of draws per datum.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Returns:
        Scores ``[n]``, float64, on the CPU.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        Variational Autoencoder based Anomaly Detection using Reconstruction Probability (An & Cho, 2015)
        Do Deep Generative Models Know What They Don't Know? (Nalisnick et al., 2019), arXiv:1810.09136

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> anomaly_scores(model, guide, torch.randn(20, 5), progress=False).shape
        torch.Size([20])
    """
    check_choice("score", score, SCORES)
    result = evaluate(
        model,
        guide,
        data,
        num_particles=num_particles,
        memory=memory,
        device=device,
        seed=seed,
        progress=progress,
    )
    return _scores(result)[score]


def detect_anomalies(
    model: Program,
    guide: Program,
    normal: Any,
    anomalous: Any,
    *,
    num_particles: int = 100,
    bootstrap: int = 200,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AnomalyDetection:
    """Measure how well each score of ``anomaly_scores`` tells anomalous data from normal data.

    Args:
        model: program over the latent sites and the data, trained on normal data.
        guide: program over the latent sites.
        normal: held-out normal data: what ``evaluate`` takes.
        anomalous: anomalous data, likewise.
        num_particles: K, the number of draws per datum.
        bootstrap: resamplings for the standard error of the average precision.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> normal, anomalous = torch.randn(50, 5), 10 + torch.randn(30, 5)
        >>> result = detect_anomalies(model, guide, normal, anomalous, progress=False)
        >>> float(result.table.loc["log_likelihood", "auroc"])
        1.0
    """
    bootstrap, seed = check_positive_int("bootstrap", bootstrap), check_seed(seed)
    where = place(device, model, guide)
    kinds = {
        "normal": prepare_data(normal, "normal", where),
        "anomalous": prepare_data(anomalous, "anomalous", where),
    }
    with seeded(seed), evaluating(model, guide):
        for name, data in kinds.items():  # all of it before the first is evaluated
            check_all(model, guide, data, name, where)
    found: list[dict[str, Tensor]] = []
    for name, data in kinds.items():
        result = evaluate(
            model, guide, data, num_particles=num_particles, memory=memory, seed=seed, progress=progress
        )
        found.append(_scores(result))
        for score, values in found[-1].items():
            if bool(values.isnan().any()):
                row = int(values.isnan().nonzero()[0])
                raise ValueError(f"{name}: the score {score!r} of datum {row} is NaN")
    return AnomalyDetection(found[0], found[1], _table(found[0], found[1], bootstrap, seed), num_particles)


def _scores(result: Evaluation) -> dict[str, Tensor]:
    kl = sum((estimate.values for estimate in result.kl.values()), torch.zeros_like(result.elbo.values))
    return {
        "elbo": -result.elbo.values,
        "log_likelihood": -result.log_likelihood.values,
        "reconstruction": -result.reconstruction.values,
        "kl": kl,
    }


def _table(
    normal: Mapping[str, Tensor], anomalous: Mapping[str, Tensor], bootstrap: int, seed: int
) -> "pd.DataFrame":
    import pandas as pd
    from sklearn.metrics import average_precision_score, roc_auc_score

    rows = {}
    for score in normal:
        values = np.nan_to_num(torch.cat([normal[score], anomalous[score]]).numpy())  # infinite: the largest
        is_anomalous = np.repeat([0, 1], [len(normal[score]), len(anomalous[score])])
        rows[score] = {
            "auroc": float(roc_auc_score(is_anomalous, values)),
            "auroc_se": auroc_standard_error(is_anomalous, values),
            "average_precision": float(average_precision_score(is_anomalous, values)),
            "average_precision_se": average_precision_standard_error(is_anomalous, values, bootstrap, seed),
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "score"
    return table


def auroc_standard_error(is_anomalous: np.ndarray, scores: np.ndarray) -> float:
    """Return the standard error of the area under the ROC curve; NaN for one datum of a kind.

    Args:
        is_anomalous: 1 for anomalous data and 0 for normal ones, ``[n]``.
        scores: ``[n]``.

    References:
        Comparing the areas under two or more correlated receiver operating characteristic curves
        (DeLong et al., 1988)
    """
    from scipy.stats import rankdata

    ranks = rankdata(scores)
    variance = 0.0
    for kind in (0, 1):
        rows = is_anomalous == kind
        others = (ranks[rows] - rankdata(scores[rows])) / (~rows).sum()  # share of the other kind below each
        if len(others) < 2:
            return float("nan")
        variance += others.var(ddof=1) / len(others)
    return float(np.sqrt(variance))


def average_precision_standard_error(
    is_anomalous: np.ndarray, scores: np.ndarray, bootstrap: int, seed: int
) -> float:
    """Return the bootstrap's standard error of the average precision, resampling each kind by itself."""
    order = np.argsort(-scores, kind="stable")
    labels, sorted_scores = is_anomalous[order], scores[order]
    ends = np.append(np.flatnonzero(np.diff(sorted_scores)), len(scores) - 1)  # of data with the same score
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(bootstrap):
        weights = np.zeros(len(scores))
        for kind in (0, 1):
            rows = np.flatnonzero(labels == kind)
            weights[rows] = np.bincount(generator.integers(len(rows), size=len(rows)), minlength=len(rows))
        found.append(weighted_average_precision(labels, weights, ends))
    return float(np.std(found, ddof=1)) if bootstrap > 1 else float("nan")


def weighted_average_precision(labels: np.ndarray, weights: np.ndarray, ends: np.ndarray) -> float:
    """Return the average precision of weighted data, sorted from the highest score to the lowest.

    Args:
        labels: 1 for anomalous data, ``[n]``.
        weights: ``[n]``.
        ends: the last row of each run of equal scores.
    """
    hits, total = np.cumsum(weights * labels)[ends], np.cumsum(weights)[ends]
    precision = hits / np.where(total > 0, total, 1.0)
    return float(np.diff(hits, prepend=0.0) @ precision / hits[-1])
