"""Augmentation: new labelled data near given ones."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from pyro.poutine import Trace
from torch import Tensor
from tqdm import tqdm

from ppl_vae._checks import check_at_least, check_choice, check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.data import Split, as_split, semi_supervised
from ppl_vae.evaluation.generation import is_on_sphere, named_site
from ppl_vae.infer.placing import place
from ppl_vae.infer.running import Program, Site, evaluating, latent_sites, trace_pair
from ppl_vae.tasks._passes import (
    arguments,
    check_programs,
    in_memory,
    mean_and_error,
    run_one,
    run_pair,
    sizes_of_passes,
)

_METHODS = ("posterior", "interpolation")


@dataclass(frozen=True, eq=False)
class Augmented:
    """New data near given ones, those not included.

    Attributes:
        x: the new data, ``[copies * n, *event]``: the first new one of each datum, then the second.
        y: their labels, those of the data that they come from, ``[copies * n]``; or None.
        source: from which datum each comes, ``[copies * n]``.
        original: the data that were given, ``[n, *event]``.
        copies: how many new ones there are for each.
    """

    x: Tensor
    y: Tensor | None
    source: Tensor = field(repr=False)
    original: Tensor = field(repr=False)
    copies: int


@dataclass(frozen=True, eq=False)
class AugmentationScore:
    """Accuracies of a classifier that few labels train, without and with augmentation.

    Each repeat chooses other labels; both classifiers of a repeat have the same ones, and all are tested on
    the same data. Standard errors are over the choice of labels and the draws, for this pair and these test
    data.

    Attributes:
        without: accuracy on the test data without augmentation, ``[repeats]``.
        augmented: accuracy with augmentation, ``[repeats]``.
        labels: how many labels there are to train with.
        copies: new data for each.
        num_test: how many data the accuracies are of.
    """

    without: Tensor
    augmented: Tensor
    labels: int
    copies: int
    num_test: int

    @property
    def gain(self) -> tuple[float, float]:
        """The mean of accuracy with minus accuracy without augmentation, and its paired standard error."""
        return mean_and_error(self.augmented - self.without)

    def summary(self) -> dict[str, Any]:
        """Return plain numbers, for a file."""
        result: dict[str, Any] = {
            "labels": self.labels,
            "copies": self.copies,
            "repeats": len(self.without),
            "num_test": self.num_test,
        }
        named = {"without": mean_and_error(self.without), "augmented": mean_and_error(self.augmented)}
        for name, (mean, error) in (named | {"gain": self.gain}).items():
            result[name] = {"mean": mean, "standard_error": error}
        return result

    def __str__(self) -> str:
        summary = self.summary()
        head = (
            f"accuracy on {self.num_test} data, {self.labels} labels, {self.copies} copies, "
            f"{len(self.without)} repeats"
        )
        rows = [
            f"{label:<22} {summary[name]['mean']:>8.4f} +- {summary[name]['standard_error']:.4f}"
            for name, label in (
                ("without", "without augmentation"),
                ("augmented", "with augmentation"),
                ("gain", "gain, paired"),
            )
        ]
        return "\n".join([head, *rows])


def augment(
    model: Program,
    guide: Program,
    x: Any,
    y: Tensor | None = None,
    *,
    copies: int = 1,
    method: Literal["posterior", "interpolation"] = "posterior",
    scale: float = 1.0,
    draw: bool = False,
    memory: int = 512 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Augmented:
    """Make new data near given ones, by decoding latents near theirs.

    Args:
        model: program over the latent sites and the data, the site "x".
        guide: program over the same latent sites.
        x: data ``[n, *event]``, or a ``Split``, which has its labels.
        y: labels ``[n]``, which new data inherit; whole numbers.
        copies: how many new data there are for each.
        method: ``"posterior"``: draws of the guide at the datum. ``"interpolation"``: points between its
            latent and that of another datum of the same class, at random; needs labels, and programs of one
            latent site ``z``.
        scale: how far from the datum's latent. ``"posterior"``: multiplies the draw's distance from the
            posterior mean; other than 1, it needs a latent site ``z`` alone, whose family has a mean.
            ``"interpolation"``: the largest share of the other datum, 0.5 for half the way.
        draw: draw data from the likelihood; by default the new data are its means.
        memory: bytes that a pass may take beyond the data and the parameters.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the draws.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        NotImplementedError: if the likelihood has no mean, and ``draw`` is False.

    References:
        Dataset Augmentation in Feature Space (DeVries & Taylor, 2017), arXiv:1702.05538

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 4), MeanFieldGuide(MLP(4), 2)
        >>> augment(model, guide, torch.randn(6, 4), torch.arange(6) % 2, copies=3).x.shape
        torch.Size([18, 4])
    """
    copies = check_positive_int("copies", copies)
    check_choice("method", method, _METHODS)
    scale = check_at_least("scale", scale)
    check_positive("memory", memory)
    check_seed(seed)
    if method == "interpolation" and scale > 1:
        raise ValueError(f"scale: expected a share from 0 to 1 of the other datum, got {scale}")
    if y is not None and (isinstance(x, Split) and x.y is not None):
        raise ValueError("y: expected labels in the split or in `y`, got both")
    where = place(device, model, guide)
    with seeded(seed), evaluating(model, guide):
        if y is not None:
            x = Split(x.x, y, x.dynamic) if isinstance(x, Split) else (x, y)
        split = in_memory(x, "x", where, seed)
        labels = split.y
        if method == "interpolation" and (labels is None or labels.dim() != 1):
            raise ValueError("y: expected labels [n] of the data to interpolate between, got None")
        batch = arguments(model, split, "x")
        check_programs(model, guide, batch, "x")
        if method == "interpolation" or scale != 1:
            _check_plane(model, guide, batch, scale)
        size, chunk = sizes_of_passes(model, guide, batch, copies, memory)
        new = []
        if method == "interpolation" and labels is not None:
            z, neighbours = _posterior_means(guide, batch, size), _Neighbours(labels)
        for start in range(0, len(split), size):
            rows = slice(start, start + size)
            small, found = tuple(t[rows] for t in batch), []
            for first in range(0, copies, chunk):
                k = min(chunk, copies - first)
                if method == "interpolation":
                    share = scale * torch.rand((k, len(small[0]), 1), dtype=z.dtype, device=z.device)
                    latents = torch.lerp(z[rows].expand(k, -1, -1), z[neighbours.draw(k, rows)], share)
                    trace = run_one(model, small, k, {"z": latents})
                else:
                    trace = _near(model, guide, small, k, scale)
                site: Site = trace.nodes["x"]
                found.append((site["fn"].sample() if draw else _mean_of(site)).cpu())
            new.append(torch.cat(found))
    source = torch.arange(len(split)).repeat(copies)
    return Augmented(
        torch.cat(new, dim=1).flatten(0, 1),
        None if labels is None else labels.cpu()[source],
        source,
        split.x.cpu(),
        copies,
    )


def augmentation_score(
    model: Program,
    guide: Program,
    train: Split,
    test: Split,
    *,
    labels: int = 50,
    copies: int = 5,
    method: Literal["posterior", "interpolation"] = "posterior",
    scale: float = 1.0,
    draw: bool = False,
    repeats: int = 10,
    classifier: Callable[[], Any] | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AugmentationScore:
    """Measure whether augmentation helps a classifier that has few labels.

    Args:
        model: program over the latent sites and the data, trained without looking at ``test``.
        guide: program over the same latent sites.
        train: data with labels, few of which each repeat chooses, as many of each class.
        test: data with labels to test on.
        labels: how many labels to train with.
        copies: new data for each, as in ``augment``; so are ``method``, ``scale`` and ``draw``.
        method: how new data are made.
        scale: how far from the data they are.
        draw: whether new data are drawn from the likelihood.
        repeats: choices of labels, at least 2.
        classifier: makes a classifier with scikit-learn's ``fit`` and ``score``; by default
            ``LogisticRegression``.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of the choices and draws.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 4), MeanFieldGuide(MLP(4), 2)
        >>> train, test = (Split(torch.randn(40, 4), torch.arange(40) % 2) for _ in range(2))
        >>> score = augmentation_score(model, guide, train, test, labels=10, repeats=3, progress=False)
        >>> score.augmented.shape
        torch.Size([3])
    """
    repeats, seed = check_positive_int("repeats", repeats), check_seed(seed)
    if repeats < 2:
        raise ValueError(f"repeats: expected at least 2 for a standard error, got {repeats}")
    splits = {"train": as_split(train, "train"), "test": as_split(test, "test")}
    for name, split in splits.items():
        if split.y is None:
            raise ValueError(f"{name}: expected data with labels, got y=None")
    make = _logistic_regression if classifier is None else classifier
    if not callable(make):
        raise TypeError(f"classifier: expected a function that makes one, got {type(make).__name__}")
    test_x, test_y = _features(splits["test"].x), splits["test"].y.cpu().numpy()  # type: ignore[union-attr]
    accuracies = []
    for repeat in tqdm(range(repeats), desc="augmenting", disable=not progress, dynamic_ncols=True):
        chosen = semi_supervised(splits["train"], labels, seed=seed + repeat)
        rows = (cast(Tensor, chosen.y) >= 0).nonzero()[:, 0]
        few = Split(chosen.x[rows], cast(Tensor, chosen.y)[rows], chosen.dynamic)
        new = augment(
            model,
            guide,
            few,
            copies=copies,
            method=method,
            scale=scale,
            draw=draw,
            device=device,
            seed=seed + repeat,
        )
        x, y, new_y = new.original, cast(Tensor, few.y).cpu(), cast(Tensor, new.y)
        with seeded(seed, repeat):
            without = make().fit(_features(x), y.numpy()).score(test_x, test_y)
            both = _features(torch.cat([x, new.x.to(x)])), torch.cat([y, new_y]).numpy()
            accuracies.append((float(without), float(make().fit(*both).score(test_x, test_y))))
    without, augmented = torch.tensor(accuracies, dtype=torch.float64).unbind(1)
    return AugmentationScore(without, augmented, labels, copies, len(splits["test"]))


def _logistic_regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=2000)


def _features(x: Tensor) -> Any:
    return x.detach().cpu().reshape(len(x), -1).numpy()


def _check_plane(model: Program, guide: Program, batch: tuple[Tensor, ...], scale: float) -> None:
    """Raise unless both programs have one latent site ``z``, in all of space, whose family has a mean."""
    model_trace, guide_trace = trace_pair(model, guide, *(t[:2] for t in batch))
    names = sorted(latent_sites(model_trace).keys() | latent_sites(guide_trace).keys())
    if names != ["z"]:
        raise ValueError(
            f"model: expected one latent site 'z' to move in, got {names}; use method='posterior', scale=1"
        )
    site = named_site(guide_trace, "z", "guide")
    if is_on_sphere(site):
        raise ValueError("guide: expected latents in a plane, got a sphere; use method='posterior', scale=1")
    try:
        _ = site["fn"].mean
    except NotImplementedError:
        raise ValueError(
            f"guide: expected a family with a mean, got {type(site['fn']).__name__}; use method='posterior', "
            f"scale=1 in place of scale={scale}"
        ) from None


def _posterior_means(guide: Program, batch: tuple[Tensor, ...], size: int) -> Tensor:
    """Return the guide's mean of each datum's z, ``[n, latent]``."""
    parts = zip(*(t.split(size) for t in batch), strict=True)
    sites: list[Site] = [run_one(guide, part, 1).nodes["z"] for part in parts]
    return torch.cat([site["fn"].mean[0] for site in sites])


class _Neighbours:
    """Draws other data of the same class.

    Args:
        y: labels ``[n]``.
    """

    def __init__(self, y: Tensor) -> None:
        self._order = torch.argsort(y, stable=True)
        counts = torch.unique_consecutive(y[self._order], return_counts=True)[1]
        start, size = (t.repeat_interleave(counts) for t in (counts.cumsum(0) - counts, counts))
        self._start, self._size, self._place = (torch.empty_like(self._order) for _ in range(3))
        self._start[self._order], self._size[self._order] = start, size
        self._place[self._order] = torch.arange(len(y), device=y.device) - start

    def draw(self, count: int, rows: slice) -> Tensor:
        """Return another datum of each one's class, ``[count, rows]``; itself where it is alone."""
        start, size, place = self._start[rows], self._size[rows], self._place[rows]
        others = torch.rand((count, len(size)), dtype=torch.float64, device=size.device) * (size - 1)
        step = 1 + others.long().clamp(max=size - 2)  # 0 where it is alone
        return self._order[start + (place + step) % size]


def _near(model: Program, guide: Program, batch: tuple[Tensor, ...], k: int, scale: float) -> Trace:
    """Return the model's trace at k draws of the guide, moved away from or towards its means."""
    if scale == 1:
        return run_pair(model, guide, batch, k)[0]
    site: Site = run_one(guide, batch, k).nodes["z"]
    mean = site["fn"].mean
    return run_one(model, batch, k, {"z": mean + scale * (site["value"] - mean)})


def _mean_of(site: Any) -> Tensor:
    try:
        mean: Tensor = site["fn"].mean
    except NotImplementedError:
        raise NotImplementedError(
            f"model: site 'x' has no mean that {type(site['fn']).__name__} knows; use draw=True"
        ) from None
    return mean
