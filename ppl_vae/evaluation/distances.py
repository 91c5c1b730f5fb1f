"""Distances between two distributions that are known by draws: sliced Wasserstein-2 and MMD."""

import math

import torch
from torch import Tensor

from ppl_vae._checks import check_positive, check_positive_int, check_seed

_BLOCK = 2**22  # numbers in one block of a kernel's matrix, or of projected draws


def sliced_wasserstein(x: Tensor, y: Tensor, *, num_projections: int = 100, seed: int = 0) -> Tensor:
    r"""Return the sliced Wasserstein-2 distance of two samples, for each of a batch of pairs.

    The root of the mean over directions of :math:`W_2^2` of the draws projected on them, which in one
    dimension compares sorted draws. Directions come in orthonormal sets of as many as there are dimensions,
    at least ``num_projections`` in all: the part that is due to the means is then without noise.

    It is above zero for two samples of one distribution: its square is some 6 / m for m draws each of a
    normal of unit variance.

    Args:
        x: draws, ``[*batch, m, dims]``.
        y: draws, ``[*batch, k, dims]``.
        num_projections: the least number of directions; one dimension needs a single one.
        seed: of the directions, which are the same for the whole batch.

    Returns:
        Distances in the units of the draws, ``[*batch]``, float64.

    Raises:
        TypeError, ValueError: if a shape is wrong or the draws are not finite.

    References:
        Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015)
        Orthogonal Estimation of Wasserstein Distances (Rowland et al., 2019), arXiv:1903.03784

    Example:
        >>> x = torch.randn(500, 2)
        >>> f"{float(sliced_wasserstein(x, x + torch.tensor([3.0, 4.0]))):.4f}"  # 5 / sqrt(2)
        '3.5355'
    """
    x, y = _check(x, y)
    wanted = check_positive_int("num_projections", num_projections)
    directions = _directions(x.shape[-1], wanted, check_seed(seed)).to(x)
    batch = x.shape[:-2]
    x, y = x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:])
    squared = x.new_zeros(len(x))
    size = max(1, _BLOCK // (len(x) * max(x.shape[1], y.shape[1]) or 1))
    for part in directions.split(size):
        squared += _wasserstein_1d(x @ part.mT, y @ part.mT).sum(-1)
    return (squared / len(directions)).sqrt().reshape(batch)


def squared_mmd(x: Tensor, y: Tensor, *, bandwidth: Tensor | float | None = None) -> Tensor:
    r"""Return the unbiased estimate of the squared maximum mean discrepancy, for each of a batch of pairs.

    Of the Gaussian kernel :math:`k(a, b) = \exp(-|a - b|^2 / (2 h^2))`. It is zero in expectation for two
    samples of one distribution, hence below zero for about half of them.

    Args:
        x: draws, ``[*batch, m, dims]``.
        y: draws, ``[*batch, k, dims]``.
        bandwidth: h, a number or ``[*batch]``; None for the median heuristic: ``median_distance`` of both
            samples together.

    Returns:
        ``[*batch]``, float64, at most 2.

    Raises:
        TypeError, ValueError: if a shape is wrong, the draws are not finite or the bandwidth is not above 0.

    References:
        A Kernel Two-Sample Test (Gretton et al., 2012), section 3 and 8

    Example:
        >>> x, y = torch.randn(2, 500, 2)
        >>> bool(squared_mmd(x, y) < 0.02), bool(squared_mmd(x, y + 2) > 0.2)
        (True, True)
    """
    x, y = _check(x, y)
    for name, draws in (("x", x), ("y", y)):
        if draws.shape[-2] < 2:
            raise ValueError(f"{name}: expected 2 draws or more, got {draws.shape[-2]}")
    batch = x.shape[:-2]
    if bandwidth is None:
        width = median_distance(torch.cat([x, y], -2))
        width = torch.where(width > 0, width, 1.0)  # all draws at one point
    elif isinstance(bandwidth, Tensor):
        width = bandwidth.detach().to(x)
        if not bool((width > 0).all() & width.isfinite().all()):
            raise ValueError("bandwidth: expected finite numbers above 0")
        try:
            width = width.expand(batch)
        except RuntimeError:
            raise ValueError(f"bandwidth: expected {list(batch)}, got shape {list(width.shape)}") from None
    else:
        width = x.new_full(batch, check_positive("bandwidth", bandwidth))
    x, y, width = x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:]), width.reshape(-1)
    m, k = x.shape[1], y.shape[1]
    within_x = (_kernel_sum(x, x, width) - m) / (m * (m - 1))
    within_y = (_kernel_sum(y, y, width) - k) / (k * (k - 1))
    between = _kernel_sum(x, y, width) / (m * k)
    return (within_x + within_y - 2 * between).reshape(batch)


def median_distance(x: Tensor, *, most: int = 500) -> Tensor:
    """Return the median distance of two draws, ``[*batch]``, float64: the usual bandwidth of a kernel.

    Args:
        x: draws, ``[*batch, m, dims]``.
        most: the number of draws to take, evenly spaced, where there are more.

    Raises:
        TypeError, ValueError: if a shape is wrong, the draws are not finite or there is one alone.

    Example:
        >>> median_distance(torch.tensor([[0.0], [1.0], [3.0]]))
        tensor(2., dtype=torch.float64)
    """
    x, _ = _check(x, x)
    m = x.shape[-2]
    if m < 2:
        raise ValueError(f"x: expected 2 draws or more, got {m}")
    if m > check_positive_int("most", most):
        x = x[..., torch.linspace(0, m - 1, max(2, most), device=x.device).long(), :]
    batch = x.shape[:-2]
    x = x.reshape(-1, *x.shape[-2:])
    rows, columns = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
    size = max(1, _BLOCK // x.shape[1] ** 2)
    medians = [torch.cdist(part, part)[:, rows, columns].median(-1).values for part in x.split(size)]
    return torch.cat(medians).reshape(batch) if medians else x.new_zeros(batch)


def _directions(dims: int, wanted: int, seed: int) -> Tensor:
    """Return unit vectors in orthonormal sets, ``[at least wanted, dims]``."""
    if dims == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    sets = torch.randn(math.ceil(wanted / dims), dims, dims, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(sets)
    # without the signs of r's diagonal the sets would not be uniform
    return (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT.reshape(-1, dims)


def _wasserstein_1d(x: Tensor, y: Tensor) -> Tensor:
    """Return W_2^2 of ``[*batch, m, p]`` and ``[*batch, k, p]``, in each of p columns, ``[*batch, p]``."""
    x, y = x.sort(-2).values, y.sort(-2).values
    m, k = x.shape[-2], y.shape[-2]
    if m == k:
        return (x - y).square().mean(-2)
    # both quantile functions are steps: integrate over the pieces between the steps of either
    steps = torch.cat([torch.arange(1, m + 1) * k, torch.arange(1, k + 1) * m]).unique()
    widths = torch.diff(steps, prepend=steps.new_zeros(1)).to(x) / (m * k)
    at_x, at_y = ((steps - 1) // k).to(x.device), ((steps - 1) // m).to(x.device)
    return ((x[..., at_x, :] - y[..., at_y, :]).square() * widths.unsqueeze(-1)).sum(-2)


def _kernel_sum(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    """Return the kernel's sum over pairs, ``[batch]``, of ``[batch, m, d]`` and ``[batch, k, d]``."""
    scaled = width.reshape(-1, 1, 1) * math.sqrt(2)
    x, y = x / scaled, y / scaled
    total = x.new_zeros(len(x))
    rows = max(1, _BLOCK // (len(x) * y.shape[1] or 1))
    for part in x.split(rows, 1):
        total += torch.cdist(part, y).square().neg().exp().sum((-2, -1))
    return total


def _check(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float64, or raise."""
    for name, draws in (("x", x), ("y", y)):
        if not isinstance(draws, Tensor) or not draws.is_floating_point():
            got = draws.dtype if isinstance(draws, Tensor) else type(draws).__name__
            raise TypeError(f"{name}: expected a tensor of floats, got {got}")
        if draws.dim() < 2 or not draws.shape[-2] or not draws.shape[-1]:
            raise ValueError(f"{name}: expected draws [*batch, m, dims], got shape {list(draws.shape)}")
        if not bool(draws.isfinite().all()):
            raise ValueError(f"{name}: expected finite draws, got NaN or infinite values")
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"y: expected the batch and the dimensions of x, {[*x.shape[:-2], 'k', x.shape[-1]]}, "
            f"got shape {list(y.shape)}"
        )
    return x.detach().double(), y.detach().double()
