"""How good and how various samples are, judged by features of theirs and of real data."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ppl_vae._checks import check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.data import Split, batches
from ppl_vae.evaluation.classifier import Classifier, train_classifier
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.running import evaluating

_GROUPS = 10  # of the jackknife
_TIE = 1e-12  # of the largest squared norm: squared distances nearer than that are one


@dataclass(frozen=True, eq=False)
class SampleQuality:
    """What ``sample_quality`` measured: n real data, m generated ones.

    A ball is that around a datum which reaches to its k-th nearest neighbour in its own set.

    Attributes:
        frechet_distance: the squared Frechet distance between normals with the means and covariances of the
            two sets, 0 or above; small sets make it larger.
        kernel_distance: the unbiased estimate of the squared maximum mean discrepancy under the kernel
            ``(a . b / features + 1) ** 3``; it can be below 0.
        in_real: which generated data are inside a real datum's ball, ``[m]``.
        in_generated: which real data are inside a generated datum's ball, ``[n]``.
        real_neighbors: how many real data's balls each generated datum is in, ``[m]``.
        covered: which real data have a generated datum inside their ball, ``[n]``.
        standard_errors: of the six measures by name, over new draws of both sets; NaN for sets too small.
        num_real: n.
        num_generated: m.
        num_features: the number of features.
        k: which neighbour a ball reaches to.
    """

    frechet_distance: float
    kernel_distance: float
    in_real: Tensor = field(repr=False)
    in_generated: Tensor = field(repr=False)
    real_neighbors: Tensor = field(repr=False)
    covered: Tensor = field(repr=False)
    standard_errors: dict[str, float]
    num_real: int
    num_generated: int
    num_features: int
    k: int

    @property
    def precision(self) -> float:
        """The share of generated data that are inside a real datum's ball, in [0, 1]: quality."""
        return _mean(self.in_real)

    @property
    def recall(self) -> float:
        """The share of real data that are inside a generated datum's ball, in [0, 1]: variety."""
        return _mean(self.in_generated)

    @property
    def density(self) -> float:
        """The mean number of real balls that a generated datum is in, over k; 1 for sets of one distribution.

        Unlike precision it counts balls, so that a ball around an outlier counts once; it can be above 1.
        """
        return _mean(self.real_neighbors) / self.k

    @property
    def coverage(self) -> float:
        """The share of real data whose ball holds a generated datum, in [0, 1]: variety."""
        return _mean(self.covered)

    @property
    def expected_coverage(self) -> float:
        """The coverage that sets of one continuous distribution have in expectation."""
        n, m = self.num_real, self.num_generated
        return 1 - math.prod((n - 1 - j) / (n - 1 - j + m) for j in range(self.k))

    def summary(self) -> dict[str, Any]:
        """Return values and standard errors as plain numbers, for a file."""
        counts = {
            "num_real": self.num_real,
            "num_generated": self.num_generated,
            "num_features": self.num_features,
            "k": self.k,
        }
        measures = {
            name: {"value": getattr(self, name), "standard_error": error}
            for name, error in self.standard_errors.items()
        }
        return counts | measures

    def __str__(self) -> str:
        rows = {name: row for name, row in self.summary().items() if isinstance(row, dict)}
        lines = [
            f"{name.replace('_', ' '):<20} {row['value']:>10.4g} +- {row['standard_error']:.2g}"
            for name, row in rows.items()
        ]
        lines[-1] += f"  ({self.expected_coverage:.4g} if the sets are of one distribution)"
        head = (
            f"value and standard error; {self.num_generated} generated and {self.num_real} real data, "
            f"{self.num_features} features, k={self.k}"
        )
        return "\n".join([head, *lines])


def sample_quality(
    real: Any,
    generated: Any,
    features: Classifier | nn.Module | Callable[[Tensor], Tensor] | None = None,
    *,
    k: int = 5,
    batch_size: int = 500,
    memory: int = 256 * 2**20,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SampleQuality:
    """Measure how near generated data are to real ones, and how much of the real ones they cover.

    All of it is of features, the same for both sets. Numbers depend on the features, on n, m and k: compare
    models by one set of features, the same real data and as many generated ones. Numbers by a small
    classifier can't be compared with published ones, which are by the Inception network, nor with those by
    another classifier; what they are good for is to compare models of one data set.

    Precision and recall are the improved ones of Kynkaanniemi et al., who take k=3; k=5 is that of Naeem et
    al. for density and coverage. Balls are closed. Distances and moments are in float64.

    Standard errors are by a jackknife over ten groups of either set; that of the kernel distance by the part
    that each datum has in it (Hajek's projection). They are on the safe side: for sets of one distribution
    some 1.5 times too large, for shares near 0 or 1 up to twice. None holds the noise of training.

    Args:
        real: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch ``Dataset`` or
            ``DataLoader``; best data that neither the model nor the classifier has seen.
        generated: likewise, of the same event shape; ``sample(model, m).x``, say. Draws and means of a
            likelihood have different features: take what the real data are.
        features: a ``Classifier``, whose features are taken; or any module or function from a batch
            ``[b, *event]`` to ``[b, features]``, ``torch.nn.Flatten()`` for the data themselves. By default
            a classifier is trained on ``real``, which must have labels; to compare models, train one with
            ``train_classifier``, on the training data, and pass it to each call.
        k: which neighbour a ball reaches to, below n and m.
        batch_size: data that features are taken of in a pass; a ``DataLoader`` has its own.
        memory: bytes that a block of pairwise distances may take.
        device: where to work, and where modules stay; by default where the parameters of ``features`` are.
        seed: of the default classifier, the jackknife's groups and the draws of dynamic binarization.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), arXiv:1706.08500;
        Demystifying MMD GANs (Binkowski et al., 2018), arXiv:1801.01401;
        Improved Precision and Recall Metric (Kynkaanniemi et al., 2019), arXiv:1904.06991;
        Reliable Fidelity and Diversity Metrics (Naeem et al., 2020), arXiv:2002.09797

    Example:
        >>> real, near, far = torch.randn(200, 4), torch.randn(100, 4), torch.randn(100, 4) + 9
        >>> result = sample_quality(real, near, torch.nn.Flatten(), progress=False)
        >>> result.precision > 0.8, result.recall > 0.8
        (True, True)
        >>> sample_quality(real, far, torch.nn.Flatten(), progress=False).precision
        0.0
    """
    k = check_positive_int("k", k)
    batch_size = check_positive_int("batch_size", batch_size)
    check_positive("memory", memory)
    check_seed(seed)
    if features is not None and not callable(features):
        raise TypeError(f"features: expected a module or a function of data, got {type(features).__name__}")
    owners = [o for o in (features, getattr(features, "__self__", None)) if isinstance(o, nn.Module)]
    where = place(device, *owners)
    sets = {
        "real": prepare_data(real, "real", where),
        "generated": prepare_data(generated, "generated", where),
    }
    shapes = {name: tuple(data.x.shape) for name, data in sets.items() if isinstance(data, Split)}
    for name, shape in shapes.items():
        _check_count(name, shape[0], k)
    if len(shapes) == 2 and shapes["real"][1:] != shapes["generated"][1:]:
        raise ValueError(
            f"generated: expected data of the shape of the real ones, {list(shapes['real'][1:])}, "
            f"got {list(shapes['generated'][1:])}"
        )
    if features is None:
        if getattr(sets["real"], "y", None) is None:
            raise ValueError(
                "features: expected a module or a function of data, since real has no labels to train a "
                "classifier on, got None"
            )
        features = train_classifier(sets["real"], device=where, seed=seed, progress=progress)
    function = features.features if isinstance(features, Classifier) else features
    a, b = (
        _features(function, data, name, batch_size, where, (seed, i), progress)
        for i, (name, data) in enumerate(sets.items())
    )
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"generated: expected {a.shape[1]} features as of real, got {b.shape[1]}")
    for name, values in (("real", a), ("generated", b)):
        _check_count(name, len(values), k)
    with seeded(seed, 2):  # on the CPU: the same on each device
        groups = [_groups(len(x)).to(x.device) for x in (a, b)]
    with tqdm(
        total=2 * len(a) + len(b), unit="row", desc="distances", disable=not progress, dynamic_ncols=True
    ) as bar:
        real_balls, generated_balls, kernel = _pairs(a, b, groups, k, memory, bar)
    kernel_value, kernel_error = _kernel_distance(*kernel)
    left_out = {
        "frechet_distance": _frechet_without(a, b, groups),
        "precision": real_balls.share_inside_without(lambda count: (count > 0).double()),
        "recall": generated_balls.share_inside_without(lambda count: (count > 0).double()),
        "density": real_balls.share_inside_without(lambda count: count.double() / k),
        "coverage": real_balls.share_hit_without(),
    }
    errors = {name: _jackknife(*values) for name, values in left_out.items()}
    for x, of in zip((a, b), groups, strict=True):
        if len(x) - int(of.bincount().max()) <= k:  # without a group there is no k-th neighbour
            errors |= dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
        if len(x) < 3:
            errors["frechet_distance"] = math.nan
    order = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")
    return SampleQuality(
        frechet_distance(a, b),
        kernel_value,
        (real_balls.counts[0] > 0).cpu(),
        (generated_balls.counts[0] > 0).cpu(),
        real_balls.counts[0].cpu(),
        real_balls.hit[0].cpu(),
        {name: (errors | {"kernel_distance": kernel_error})[name] for name in order},
        len(a),
        len(b),
        a.shape[1],
        k,
    )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Return the squared Frechet distance of the normals that have the moments of two sets.

    It is :math:`|\mu_a - \mu_b|^2 + \mathrm{tr}(C_a + C_b - 2 (C_a C_b)^{1/2})`. The last term is the sum of
    the singular values of :math:`R_a R_b^\top`, where :math:`R^\top R = C`: unlike the eigenvalues of
    :math:`C_a C_b` these need no square root of what is 0 but for rounding.

    Args:
        a: features, ``[n, features]``, n at least 2.
        b: features, ``[m, features]``, m at least 2.

    Raises:
        ValueError: naming the argument, what came and what was expected.

    References:
        GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), arXiv:1706.08500

    Example:
        >>> a = torch.randn(50, 3)
        >>> round(frechet_distance(a, a + 2), 6)
        12.0
    """
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, Tensor) or x.dim() != 2 or len(x) < 2:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected features [n, features], n at least 2, got {got}")
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name}: expected finite features, got NaN or infinite ones")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b: expected {a.shape[1]} features as of a, got {b.shape[1]}")
    return _frechet(*_moments(a), *_moments(b))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and a matrix R whose R^T R is the covariance."""
    x = x.double()
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / math.sqrt(len(x) - 1), mode="r").R


def _frechet(mean_a: Tensor, root_a: Tensor, mean_b: Tensor, root_b: Tensor) -> float:
    overlap = torch.linalg.svdvals(root_a @ root_b.mT).sum()
    squares = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum()
    return max(0.0, float(squares - 2 * overlap))


def _groups(n: int) -> Tensor:
    """Return a random group for each of n data, ``[n]``; the groups of a jackknife, of nearly one size."""
    return torch.randperm(n) % min(_GROUPS, n)


def _jackknife(real: Tensor, generated: Tensor) -> float:
    """Return a standard error from what comes out without one group of a set in turn, for either set."""
    return math.sqrt(sum(float(x.var(correction=0)) * (len(x) - 1) for x in (real, generated)))


def _frechet_without(a: Tensor, b: Tensor, groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the Frechet distances without each group of the real, and of the generated data."""
    whole = _moments(a), _moments(b)
    real = [_frechet(*fewer, *whole[1]) for fewer in _moments_without(a, groups[0])]
    generated = [_frechet(*whole[0], *fewer) for fewer in _moments_without(b, groups[1])]
    return torch.tensor(real, dtype=torch.float64), torch.tensor(generated, dtype=torch.float64)


def _moments_without(x: Tensor, groups: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the moments, as ``_moments`` does, of a set without each of its groups."""
    center = x.mean(0)
    x = x - center
    total, square = x.sum(0), x.mT @ x
    found = []
    for g in range(int(groups.max()) + 1):
        group = x[groups == g]
        n = len(x) - len(group)
        mean = (total - group.sum(0)) / n
        covariance = (square - group.mT @ group - n * mean.outer(mean)) / max(n - 1, 1)
        values, vectors = torch.linalg.eigh(covariance)
        found.append((mean + center, values.clamp(min=0).sqrt().unsqueeze(1) * vectors.mT))
    return found


class _Balls:
    """What the balls of one set hold of the other set: with all balls, and without each group of either set.

    Args:
        radii: squared, with all balls and without each group, ``[1 + groups, balls]``; -inf of one left out.
        groups: of the balls, ``[balls]``.
        points: groups of the other set, ``[points]``.

    Attributes:
        counts: how many balls each point is in, ``[1 + groups, points]``.
        hit: which balls hold a point, ``[1 + groups, balls]``.
        held: how many points of each group each ball holds, ``[balls, groups of points]``.
    """

    def __init__(self, radii: Tensor, groups: Tensor, points: Tensor) -> None:
        self.radii, self.groups, self.points = radii, groups, points
        self.largest = radii.amax(0)
        self.counts = torch.zeros(len(radii), len(points), dtype=torch.long, device=radii.device)
        self.hit = torch.zeros_like(radii, dtype=torch.bool)
        self.held = groups.new_zeros(len(groups), int(points.max()) + 1)

    def add(self, distances: Tensor, balls: Tensor | slice, points: Tensor | slice) -> None:
        """Count a block of squared distances, ``[some balls, some points]``."""
        ball, point = (distances <= self.largest[balls].unsqueeze(1)).nonzero(as_tuple=True)
        found = distances[ball, point]
        ball = ball if isinstance(balls, slice) else balls[ball]
        point = point if isinstance(points, slice) else points[point]
        for g, radii in enumerate(self.radii):
            inside = found <= radii[ball]
            inner_ball, inner_point = ball[inside], point[inside]
            self.counts[g].index_add_(0, inner_point, torch.ones_like(inner_point))
            self.hit[g, inner_ball] = True
            if g == 0:
                cell = inner_ball * self.held.shape[1] + self.points[inner_point]
                self.held.view(-1).index_add_(0, cell, torch.ones_like(cell))

    def share_inside_without(self, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean of a function of ``counts`` over points, without groups of balls and of points."""
        values = value(self.counts)
        groups = torch.arange(self.held.shape[1], device=values.device)
        kept = (self.points != groups.unsqueeze(1)).double()
        return values[1:].mean(1), (kept * values[0]).sum(1) / kept.sum(1)

    def share_hit_without(self) -> tuple[Tensor, Tensor]:
        """Return the share of balls that hold a point, without groups of balls and of points."""
        balls = (self.radii[1:] >= 0).sum(1)
        others = self.held.sum(1, keepdim=True) - self.held
        return self.hit[1:].sum(1).double() / balls, (others > 0).double().mean(0)


def _pairs(
    a: Tensor, b: Tensor, groups: Sequence[Tensor], k: int, memory: float, bar: Any
) -> tuple[_Balls, _Balls, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Compare real features ``[n, features]`` with generated ones ``[m, features]``, block by block.

    Returns:
        The real balls, the generated ones, and sums of the kernel: over the other real data ``[n]``, over the
        other generated ones ``[m]``, of each real datum over the generated ones and the other way round.
    """
    size = max(1, int(memory // (4 * 8 * max(len(a), len(b)))))  # some four matrices at a time
    center = a.mean(0)
    near_a, near_b = a - center, b - center
    slack = _TIE * max(float(x.square().sum(1).max()) for x in (near_a, near_b))

    def within(x: Tensor, near: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        radii, sums = [], []
        wanted = min(len(x) - 1, 2 * k + 20)  # without a group too: one holds few of these
        for rows in torch.arange(len(x), device=x.device).split(size):
            distances = _squared_distances(near[rows], near)
            own = torch.arange(len(rows), device=x.device)
            distances[own, rows] = math.inf
            nearest = distances.topk(wanted, largest=False)
            radii.append(_radii(nearest.values, of[nearest.indices], of[rows], int(of.max()) + 1, k))
            kernel = _kernel(x[rows], x)
            sums.append(kernel.sum(1) - kernel[own, rows])
            bar.update(len(rows))
        return torch.cat(radii, 1) + slack, torch.cat(sums)

    radii_a, sums_a = within(a, near_a, groups[0])
    radii_b, sums_b = within(b, near_b, groups[1])
    real = _Balls(radii_a, groups[0], groups[1])
    generated = _Balls(radii_b, groups[1], groups[0])
    across_a, across_b = [], torch.zeros_like(sums_b)
    for rows in torch.arange(len(a), device=a.device).split(size):
        distances = _squared_distances(near_a[rows], near_b)
        real.add(distances, rows, slice(None))
        generated.add(distances.mT, slice(None), rows)
        kernel = _kernel(a[rows], b)
        across_a.append(kernel.sum(1))
        across_b += kernel.sum(0)
        bar.update(len(rows))
    return real, generated, (sums_a, sums_b, torch.cat(across_a), across_b)


def _radii(values: Tensor, groups: Tensor, own: Tensor, num_groups: int, k: int) -> Tensor:
    """Return the k-th smallest of each row with all groups and without each, ``[1 + groups, rows]``.

    Args:
        values: sorted, ``[rows, some]``.
        groups: of the values, ``[rows, some]``.
        own: of the rows, ``[rows]``; -inf is returned where the row itself is left out.
        num_groups: the number of groups.
        k: which is returned; the last one, if there are fewer.
    """
    radii = [values[:, k - 1]]
    for g in range(num_groups):
        rank = (groups != g).cumsum(1)
        at = (rank < k).sum(1, keepdim=True).clamp(max=values.shape[1] - 1)
        radii.append(values.gather(1, at).squeeze(1).masked_fill(own == g, -math.inf))
    return torch.stack(radii)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return ``[n, m]``; true to rounding of the squared norms, which ``_TIE`` allows for."""
    squares = a.square().sum(1).unsqueeze(1) + b.square().sum(1)
    return torch.addmm(squares, a, b.mT, alpha=-2).clamp_(min=0)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    gram = torch.addmm(a.new_ones(()), a, b.mT, alpha=1 / a.shape[1])
    return gram.square().mul_(gram)


def _kernel_distance(xx: Tensor, yy: Tensor, xy: Tensor, yx: Tensor) -> tuple[float, float]:
    """Return the unbiased squared discrepancy and its standard error, from sums over the other data.

    The error is that of Hajek's projection: the part of each datum.
    """
    n, m = len(xx), len(yy)
    part_x = xx / (n - 1) - xy / m
    part_y = yy / (m - 1) - yx / n
    variance = 4 * float(part_x.var()) / n + 4 * float(part_y.var()) / m
    return float(part_x.mean() + part_y.mean()), math.sqrt(variance)


def _features(
    function: Callable[[Tensor], Tensor],
    data: Any,
    name: str,
    batch_size: int,
    device: torch.device,
    key: tuple[int, ...],
    progress: bool,
) -> Tensor:
    """Return the features of data in float64, ``[n, features]``."""
    total = len(data) if isinstance(data, Split) else None
    found: list[Tensor] = []
    with (
        seeded(*key),
        evaluating(function),
        tqdm(
            total=total, unit="datum", desc=f"features, {name}", disable=not progress, dynamic_ncols=True
        ) as bar,
    ):
        for x, *_ in batches(data, batch_size, device=device, shuffle=False):
            try:
                values = function(x)
            except RuntimeError as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(
                    f"features: can't run on data of {name} of shape {list(x.shape)} ({x.dtype}): {reason}"
                ) from error
            if not isinstance(values, Tensor) or values.dim() < 1 or len(values) != len(x):
                got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"features: expected them to be [{len(x)}, features], got {got}")
            values = values.reshape(len(x), -1).double()
            if not torch.isfinite(values).all():
                raise ValueError(f"features: expected finite features of {name}, got NaN or infinite ones")
            if found and values.shape[1] != found[0].shape[1]:
                raise ValueError(f"features: expected {found[0].shape[1]} of each, got {values.shape[1]}")
            found.append(values)
            bar.update(len(x))
    if not found:
        raise ValueError(f"{name}: expected a loader that gives batches, got none from it")
    return torch.cat(found)


def _check_count(name: str, n: int, k: int) -> None:
    if n <= k:
        raise ValueError(f"{name}: expected more than k={k} data, got {n}")


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
