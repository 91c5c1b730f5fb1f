"""Sprites: images of one shape with known shape, scale, rotation and position, like those of dSprites."""

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppl_vae._checks import check_positive, check_positive_int, check_seed, check_sizes
from ppl_vae.data import Dataset, Split

__all__ = ["FACTORS", "SHAPES", "load_dsprites", "make_sprites", "render_sprites"]

FACTORS = ("shape", "scale", "rotation", "x", "y")
SHAPES = ("square", "ellipse", "heart")
DSPRITES_FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"

_RADIUS = 0.45  # of the circle around a sprite of scale 1, where half the image's side is 1
_SCALES = (0.5, 1.0)  # as in dSprites
_PASS = 2**18  # points that are looked at in one pass, which stay in the processor's caches
_HEART_RADIUS, _HEART_CENTRE = 1.25, 0.25  # of the circle around (u^2 + v^2 - 1)^3 = u^2 v^3
_SPLITS = ("train", "validation", "test")


def render_sprites(
    shape: Tensor,
    scale: Tensor,
    rotation: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    size: int = 64,
    antialias: int = 4,
) -> Tensor:
    """Draw white shapes on black.

    A square, an ellipse of axes 2 : 1 or a heart, each within a circle of 0.45 ``scale`` of half the image's
    side. All tensors are ``[n]``, or of a shape that expands to it.

    Args:
        shape: 0 is a square, 1 an ellipse, 2 a heart.
        scale: above 0 and at most 1; in dSprites from 0.5.
        rotation: radians, counter-clockwise. A square looks the same after a quarter turn, an ellipse after a
            half.
        x: of the centre, from 0, left, to 1, right; both so that a sprite of scale 1 touches the edge.
        y: of the centre, from 0, top, to 1, bottom.
        size: pixels of a side, 16 to 64 say.
        antialias: a pixel is the share of ``antialias`` x ``antialias`` points in it that are inside the
            shape; 1 looks at its centre only and gives bits.

    Returns:
        Images ``[n, 1, size, size]`` in [0, 1], float32, on the device of ``shape``.

    Raises:
        ValueError: if shapes don't fit, values are out of range, or settings are not whole numbers above 0.

    Example:
        >>> turn = torch.linspace(0, 3, 5)
        >>> half = torch.full((5,), 0.5)
        >>> render_sprites(torch.tensor([2]), torch.ones(1), turn, half, half, size=16).shape
        torch.Size([5, 1, 16, 16])
    """
    size, antialias = check_positive_int("size", size), check_positive_int("antialias", antialias)
    named = {"shape": shape, "scale": scale, "rotation": rotation, "x": x, "y": y}
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.ndim != 1 or not len(value):
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected a tensor [n], got {got}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinite ones")
    if shape.is_floating_point() or bool(((shape < 0) | (shape >= len(SHAPES))).any()):
        raise ValueError(f"shape: expected whole numbers from 0 to {len(SHAPES) - 1}, got {shape.unique()}")
    for name, value, low in (("scale", scale, 0.0), ("x", x, 0.0), ("y", y, 0.0)):
        if bool(((value < low) | (value > 1)).any()) or (name == "scale" and not bool((value > 0).all())):
            expected = "above 0 and at most 1" if name == "scale" else "from 0 to 1"
            raise ValueError(
                f"{name}: expected values {expected}, got {float(value.min()):g} to {float(value.max()):g}"
            )
    try:
        shape, *numbers = torch.broadcast_tensors(*named.values())
    except RuntimeError:
        shapes = ", ".join(f"{name} {len(value)}" for name, value in named.items())
        raise ValueError(f"shape: expected as many of each factor, or one, got {shapes}") from None
    scale, rotation, x, y = (number.float() for number in numbers)
    images = torch.empty(len(shape), 1, size, size, device=shape.device)
    points = size * antialias
    # of the points' rows and columns, from -1 to 1
    grid = (torch.arange(points, device=shape.device) + 0.5) * (2 / points) - 1
    for kind in range(len(SHAPES)):
        rows = (shape == kind).nonzero().squeeze(1)
        for part in rows.split(max(1, _PASS // points**2)):
            size_of, turn = scale[part] * _RADIUS, rotation[part]
            across = (grid - (2 * x[part, None] - 1) * (1 - _RADIUS)) / size_of[:, None]
            up = ((2 * y[part, None] - 1) * (1 - _RADIUS) - grid) / size_of[:, None]
            cos, sin = turn.cos()[:, None], turn.sin()[:, None]
            u = (cos * across)[:, None, :] + (sin * up)[:, :, None]
            v = (cos * up)[:, :, None] - (sin * across)[:, None, :]
            inside = _inside(kind, u, v).view(-1, size, antialias, size, antialias)
            images[part, 0] = inside.float().mean((2, 4)) if antialias > 1 else inside[:, :, 0, :, 0].float()
    return images


def make_sprites(
    *,
    size: int = 32,
    num_values: Sequence[int] = (3, 4, 10, 8, 8),
    num_data: int | None = None,
    rotation_range: float = math.pi / 2,
    antialias: int = 4,
    seed: int = 0,
) -> Dataset:
    """Draw a dataset of sprites, all combinations of factors or a random part of them.

    Labels are the five factors, shape, scale, rotation, x and y, as whole numbers from 0: ``y`` is
    ``[n, 5]``, float32, since integer labels are ``[n]``. Scales go from 0.5 to 1 and positions from edge to
    edge, in equal steps, ends included; a factor of one value is in the middle of its range (rotation: 0).
    Rotations go from 0 to ``rotation_range`` in equal steps, the end left out. By default that is a quarter
    turn, since a square looks the same after that: all images differ. dSprites has 40 rotations of a full
    turn, both ends included, so that some of its images are the same under different factors;
    ``rotation_range=2 * math.pi`` has such images too.

    Args:
        size: pixels of a side.
        num_values: how many values the five factors have, at most three shapes; (3, 6, 40, 32, 32) in
            dSprites.
        num_data: how many of the combinations, at random without repetition; None for all.
        rotation_range: radians.
        antialias: see ``render_sprites``; 1 for bits.
        seed: of the choice and the split, 80 / 10 / 10 at random.

    Raises:
        ValueError: if a number is wrong, or there are fewer combinations than ``num_data``.

    Example:
        >>> make_sprites(size=16, num_data=100)
        Dataset('sprites', x_shape=(1, 16, 16), train=80, validation=10, test=10)
    """
    sizes = check_sizes("num_values", num_values)
    if len(sizes) != len(FACTORS) or sizes[0] > len(SHAPES):
        raise ValueError(
            f"num_values: expected numbers for {', '.join(FACTORS)}, up to {len(SHAPES)} shapes, got {sizes}"
        )
    check_positive("rotation_range", rotation_range)
    generator = torch.Generator().manual_seed(check_seed(seed))
    total = math.prod(sizes)
    number = total if num_data is None else check_positive_int("num_data", num_data)
    if not 3 <= number <= total:
        name = "num_values" if num_data is None else "num_data"
        raise ValueError(f"{name}: expected 3 to {total} combinations of factors, got {number}")
    chosen = torch.randperm(total, generator=generator)[:number]
    factors = torch.stack(torch.unravel_index(chosen, sizes), 1)
    scale, x, y = (_steps(factors[:, i], sizes[i]) for i in (1, 3, 4))
    low, high = _SCALES
    images = render_sprites(
        factors[:, 0],
        low + (high - low) * scale,
        factors[:, 2] * (rotation_range / sizes[2]),
        x,
        y,
        size=size,
        antialias=antialias,
    )
    tenth = max(1, number // 10)
    parts = [number - 2 * tenth, tenth, tenth]
    split = [
        Split(a, b, source={"name": "sprites", "binarization": None, "split": key})
        for a, b, key in zip(images.split(parts), factors.float().split(parts), _SPLITS, strict=True)
    ]
    return Dataset("sprites", *split)


def load_dsprites(
    root: str | os.PathLike[str] | None = None, *, num_data: int | None = None, seed: int = 0
) -> Dataset:
    """Load dSprites from its file ``dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz``.

    It has 737,280 images of 64 x 64 bits, which as float32 take 12 GB. Labels are as in ``make_sprites``: the
    five factors ``[n, 5]`` as whole numbers, float32, without the colour, which is always white. The file is
    at github.com/google-deepmind/dsprites-dataset; it is not downloaded. Its pickled metadata are not read.

    Args:
        root: folder of the file, or of a folder ``dsprites`` with it; by default the folder in the
            environment variable ``PPL_VAE_DATA``, then the user's cache.
        num_data: how many images, at random without repetition; None for all.
        seed: of the choice and the split, 80 / 10 / 10 at random.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if the file is not what it should be, or has fewer images than ``num_data``.

    References:
        beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework (Higgins et al.,
        2017)

    Example:
        >>> dataset = load_dsprites("/data", num_data=10_000)  # doctest: +SKIP
        >>> load_dsprites("nowhere")
        Traceback (most recent call last):
            ...
        FileNotFoundError: dsprites: no file nowhere/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz, ...
    """
    check_seed(seed)
    if num_data is not None and check_positive_int("num_data", num_data) < 3:
        raise ValueError(f"num_data: expected 3 or more, to split, got {num_data}")
    path = _find_dsprites(root)
    images, classes = _read_dsprites(path)
    number = len(images) if num_data is None else num_data
    if not 3 <= number <= len(images):
        raise ValueError(f"num_data: expected 3 to {len(images)}, the images in {path}, got {number}")
    order = np.random.RandomState(seed).permutation(len(images))[:number]
    tenth = max(1, number // 10)
    splits = {}
    for key, rows in zip(_SPLITS, np.split(order, [number - 2 * tenth, number - tenth]), strict=True):
        x = torch.from_numpy(images[rows]).float().unsqueeze(1)
        y = torch.from_numpy(classes[rows, 1:].astype(np.float32))
        splits[key] = Split(x, y, source={"name": "dsprites", "binarization": None, "split": key})
    return Dataset("dsprites", **splits)


def _inside(kind: int, u: Tensor, v: Tensor) -> Tensor:
    """Return which points are inside a shape that fits the unit circle, v upwards."""
    if kind == 0:
        return torch.maximum(u.abs(), v.abs()) <= math.sqrt(0.5)
    if kind == 1:
        return u.square() + 4 * v.square() <= 1
    u, v = u.square() * _HEART_RADIUS**2, v * _HEART_RADIUS + _HEART_CENTRE
    squares = v.square()
    return (u + squares - 1).pow(3) <= u * squares * v


def _steps(values: Tensor, number: int) -> Tensor:
    return values / (number - 1) if number > 1 else torch.full(values.shape, 0.5)


def _find_dsprites(root: str | os.PathLike[str] | None) -> Path:
    """Return the file, or raise with where it was looked for and where to get it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ppl-vae"
    variable = os.environ.get("PPL_VAE_DATA")
    roots = [Path(root)] if root is not None else [Path(variable), cache] if variable else [cache]
    places = [
        place.expanduser() / part for place in roots for part in (DSPRITES_FILE, f"dsprites/{DSPRITES_FILE}")
    ]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise FileNotFoundError(
        f"dsprites: no file {looked}: get it from https://github.com/google-deepmind/dsprites-dataset and "
        "put it there" + ("" if root is not None else ", or give root or set PPL_VAE_DATA to its folder")
    )


def _read_dsprites(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the bits ``[n, H, W]`` and the six factors ``[n, 6]``; reads no other array of the file."""
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            keys = list(file.files)
            missing = [key for key in ("imgs", "latents_classes") if key not in keys]
            arrays = {} if missing else {key: np.asarray(file[key]) for key in ("imgs", "latents_classes")}
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: expected the .npz of dSprites, got {reason}; get it again") from error
    if missing:
        raise ValueError(f"{path}: expected arrays 'imgs' and 'latents_classes', got {keys}")
    images, classes = arrays["imgs"], arrays["latents_classes"]
    if images.dtype != np.uint8 or images.ndim != 3 or images.size == 0 or images.max() > 1:
        raise ValueError(
            f"{path}: imgs: expected bits [n, H, W] in uint8, got {images.dtype}, shape {list(images.shape)}"
        )
    if classes.dtype.kind not in "iu" or classes.shape != (len(images), 6) or (classes < 0).any():
        raise ValueError(
            f"{path}: latents_classes: expected whole numbers from 0, [{len(images)}, 6], got "
            f"{classes.dtype} of shape {list(classes.shape)}"
        )
    if (classes[:, 0] != 0).any():
        raise ValueError(f"{path}: latents_classes: expected one colour, 0, got {np.unique(classes[:, 0])}")
    return images, classes
