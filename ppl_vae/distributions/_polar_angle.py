r"""The angle between a von Mises-Fisher draw and the mean direction.

Its density on [0, pi] is :math:`f(t) \propto e^{\kappa (\cos t - 1)} \sin^{d-2} t`. All is computed in
float64, since that costs little here, and with 1 - cos t, which loses no digits at small angles.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

NODES = 80  # of the quadrature; the error is below 1e-11
PANELS = 96  # of the table; the error of its cumulative distribution is about 1e-8
WIDTHS = 8.0  # beyond as many about the mode there is less than 1e-14 of the mass
NEWTON_STEPS = 3


def dtype_of(x: Tensor) -> torch.dtype:
    """Return float64, or the tensor's own dtype where the device has none."""
    return x.dtype if x.device.type == "mps" else torch.float64


def integrate(concentration: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the log of the integral of the density without its constant, and E[1 - cos t].

    Both are differentiable, and of the shape of ``concentration``.
    """
    k = concentration.to(dtype_of(concentration)).unsqueeze(-1)
    low, high = _interval(k.detach(), dim)
    nodes, log_weights = _gauss_legendre(k.device, k.dtype)
    versine, square = _versine(low + (high - low) * nodes)
    log_terms = log_weights + 0.5 * (dim - 2) * square.log() - k * versine
    log_integral = log_terms.logsumexp(-1, keepdim=True)
    mean = ((log_terms - log_integral).exp() * versine).sum(-1)
    return (log_integral + (high - low).log()).squeeze(-1), mean


def draw(
    concentration: Tensor, log_integral: Tensor, mean: Tensor, dim: int, draws: int
) -> tuple[Tensor, Tensor]:
    """Return angles and their derivatives by the concentration, ``[n, draws]``, of constants ``[n]``.

    The cumulative distribution F is inverted at uniform draws: it is tabulated at the ends of panels, and
    a polynomial of degree five between. The derivative is that of implicit reparameterisation,
    - (dF / dk) / f.

    References:
        Implicit Reparameterization Gradients (Figurnov et al., 2018), arXiv:1805.08498
    """
    dtype = dtype_of(concentration)
    k, log_integral, mean = (x.detach().to(dtype).unsqueeze(-1) for x in (concentration, log_integral, mean))
    low, high = _interval(k, dim)
    width = (high - low) / PANELS
    places = torch.arange(PANELS + 1.0, dtype=dtype, device=k.device)
    versine, square = _versine(torch.addcmul(low, width, places))
    # the density at the ends and its derivatives, in units of a panel's width
    power = dim - 2.0
    cosine, k_square = 1.0 - versine, k * square
    f = width * _density(versine, square, k, log_integral, dim)
    step = width * square.sqrt()
    df = step * f * (power * cosine / square - k)
    bend = k_square * k - (2.0 * power + 1.0) * k * cosine - power
    if dim > 3:
        bend = bend + power * (power - 1.0) * cosine.square() / square
    ddf = width.square() * f * bend
    # those of (E[1 - cos t] - (1 - cos t)) f, whose integral is dF / dk
    away, shift = mean - versine, step * f
    g, dg = away * f, away * df - shift
    ddg = away * ddf - 2.0 * step * df - width.square() * cosine * f
    ends = torch.stack([_cumulated(f, df, ddf), _cumulated(g, dg, ddg), f, df, g, dg], 1)

    cdf = ends[:, 0]
    u = torch.rand(k.shape[0], draws, dtype=dtype, device=k.device)
    u = u.clamp(1e-12, 1.0 - 1e-12) * cdf[:, -1:]
    panel = torch.searchsorted(cdf[:, 1:-1].contiguous(), u, right=True)
    index = panel.unsqueeze(1).expand(-1, ends.shape[1], -1)
    starts, stops = ends.gather(-1, index), ends.gather(-1, index + 1)
    rises = (stops - starts).unbind(1)
    cdf0, dcdf0, f0, df0, g0, dg0 = starts.unbind(1)
    _, _, f1, df1, g1, dg1 = stops.unbind(1)
    rest = u - cdf0
    # start where it is with a density that is linear between the ends, at 0 with a power of the angle
    left = 2.0 * f0 / (f0 + f1)
    part = rest / rises[0]
    place = 2.0 * part / (left + (left.square() + 4.0 * (1.0 - left) * part).clamp(min=0.0).sqrt())
    place = torch.where(panel == 0, part ** (1.0 / (dim - 1.0)), place)
    rising = _hermite(rises[0], f0, f1, df0, df1)
    slopes = [c if i == 0 else (i + 1.0) * c for i, c in enumerate(rising)]
    tiny = torch.finfo(dtype).tiny
    for _ in range(NEWTON_STEPS):
        residual = torch.addcmul(rest, place, _polynomial(rising, place), value=-1)
        place = (place + residual / _polynomial(slopes, place).clamp(min=tiny)).clamp(0.0, 1.0)
    angle = low + width * (panel + place)
    change = dcdf0 + place * _polynomial(_hermite(rises[1], g0, g1, dg0, dg1), place)
    density = _density(*_versine(angle), k, log_integral, dim)
    return angle, -change / density.clamp(min=tiny)


def _interval(k: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the ends of an interval that holds the mass, inside of (0, pi)."""
    power, square = dim - 2.0, k.square()
    cosine = 2.0 * k / (power + (4.0 * square + power**2).sqrt())
    mode = cosine.clamp(max=1.0).acos()
    width = (square + power**2) ** -0.25  # the scale of the heavier tail
    low = torch.maximum(mode - WIDTHS * width, 1e-14 * width.clamp(max=1.0))
    # near pi, e^(kappa cos t) falls more slowly: like a Gaussian of the chord, 2 sin(t / 2)
    chord = 2.0 * (0.5 * (WIDTHS + 1.0) * width).clamp(max=1.0).asin()
    return low, torch.maximum(mode + WIDTHS * width, chord).clamp(max=math.pi * (1 - 1e-15))


def _versine(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 - cos t and sin^2 t, above 0."""
    versine = 2.0 * (0.5 * angle).sin().square()
    return versine, (versine * (2.0 - versine)).clamp(min=1e-30)


def _density(versine: Tensor, square: Tensor, k: Tensor, log_integral: Tensor, dim: int) -> Tensor:
    return (0.5 * (dim - 2) * square.log() - k * versine - log_integral).exp()


def _cumulated(f: Tensor, df: Tensor, ddf: Tensor) -> Tensor:
    """Return integrals up to the ends of panels, exact for polynomials of degree five between."""
    even, odd = f / 2.0 + ddf / 120.0, df / 10.0
    panels = (even + odd)[..., :-1] + (even - odd)[..., 1:]
    return torch.nn.functional.pad(panels.cumsum(-1), (1, 0))


def _hermite(rise: Tensor, f0: Tensor, f1: Tensor, df0: Tensor, df1: Tensor) -> list[Tensor]:
    """Return coefficients, from the linear, of the polynomial with this rise, slopes and bends at 0 and 1."""
    c2 = 0.5 * df0
    a, b, c = rise - f0 - c2, f1 - f0 - df0, 0.5 * df1 - c2
    d = 6.0 * a - 3.0 * b + c
    return [f0, c2, 4.0 * a - b + d, -9.0 * a + 4.0 * b - c - d, d]


def _polynomial(coefficients: list[Tensor], x: Tensor) -> Tensor:
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = torch.addcmul(coefficient, value, x)
    return value


@functools.cache
def _gauss_legendre(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return nodes in [0, 1] and the logs of their weights."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    log_weights = torch.tensor(np.log(weights / 2), dtype=dtype, device=device)
    return torch.tensor((nodes + 1) / 2, dtype=dtype, device=device), log_weights
