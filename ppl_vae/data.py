"""Data: named datasets and your own files as tensors, binarization and batches."""

import gzip
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from ppl_vae._checks import check_choice, check_positive_int, check_seed, did_you_mean

__all__ = [
    "Dataset",
    "Split",
    "as_split",
    "batches",
    "check_data",
    "load_dataset",
    "num_batches",
    "semi_supervised",
]

BINARIZATION_SEED = 777  # the seed of the VampPrior experiments
SPLIT_SEED = 0

_MNIST_LIKE = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_SPRITES = ("sprites", "dsprites")
_NAMES = ("digits", *_MNIST_LIKE, *_SPRITES)
_SPLITS = ("train", "validation", "test")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Data in memory: ``x`` ``[n, *event]`` and, where there are labels, ``y`` ``[n]``.

    With ``dynamic=True``, ``x`` holds probabilities and every batch is a fresh Bernoulli draw. ``source``
    says where the data come from: `load_dataset` puts its name, split and binarization there.

    Example:
        >>> split = Split(torch.rand(10, 1, 8, 8), torch.arange(10))
        >>> x, y = split.batch(torch.tensor([3, 5]))
        >>> x.shape, y
        (torch.Size([2, 1, 8, 8]), tensor([3, 5]))
    """

    x: Tensor
    y: Tensor | None = None
    dynamic: bool = False
    source: dict[str, str | None] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        y = "" if self.y is None else f", y={list(self.y.shape)}"
        return f"Split(x={list(self.x.shape)}{y}{', dynamic' if self.dynamic else ''})"

    def batch(self, index: Tensor) -> tuple[Tensor, ...]:
        """Return the rows ``index`` ``[m]`` as ``(x,)`` or ``(x, y)``; keep ``index`` on the device of ``x``.

        A dynamic split draws its bits from torch's global generator of that device.
        """
        x = self.x.index_select(0, index)
        if self.dynamic:
            x = torch.bernoulli(x)
        return (x,) if self.y is None else (x, self.y.index_select(0, index))

    def to(self, device: torch.device | str) -> "Split":
        """Return the split on ``device``."""
        return replace(self, x=self.x.to(device), y=None if self.y is None else self.y.to(device))


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A dataset in three splits.

    Example:
        >>> digits = load_dataset("digits")
        >>> digits.x_shape, digits.train, len(digits.test)
        ((1, 8, 8), Split(x=[1000, 1, 8, 8], y=[1000]), 447)
    """

    name: str
    train: Split
    validation: Split
    test: Split

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return tuple(self.train.x.shape[1:])

    def __repr__(self) -> str:
        sizes = f"train={len(self.train)}, validation={len(self.validation)}, test={len(self.test)}"
        dynamic = ", dynamic" if self.train.dynamic else ""
        return f"Dataset({self.name!r}, x_shape={self.x_shape}, {sizes}{dynamic})"


def load_dataset(
    name: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    binarization: str | None = None,
) -> Dataset:
    """Load a dataset into memory, split into train, validation and test.

    Values are float32, images ``[n, C, H, W]`` in [0, 1], vectors ``[n, d]``; labels are int64 ``[n]``.

    - ``"digits"``: scikit-learn's 8 x 8 digits, 1000 / 350 / 447 in file order.
    - ``"mnist"``, ``"fashion-mnist"``: 50,000 / 10,000 / 10,000, validation being the last 10,000 training
      images. The ``.gz`` files are read from ``<root>/MNIST/raw`` or ``<root>/FashionMNIST/raw``; nothing is
      written there. Without ``root``, the folder in the environment variable ``PPL_VAE_DATA`` and the user's
      cache are searched, then the files are downloaded into the cache.
    - ``"sprites"``: 7680 drawn images, 32 x 32, of all combinations of five factors, split 80 / 10 / 10; see
      ``ppl_vae.sprites.make_sprites`` for other sizes. ``"dsprites"``: the file of that dataset, 12 GB in
      memory, in ``root`` or where MNIST is searched; not downloaded. Labels of both are the factors, float32
      ``[n, 5]``, whole numbers from 0.
    - a path to an ``.npz``: arrays ``x`` and, if there are labels, ``y``, split 80 / 10 / 10 by a fixed
      permutation; or ``x_train``, ``x_validation``, ``x_test`` (and ``y_...``), where a missing validation
      split is the last tenth of train. uint8 is scaled by 1/255, ``[n, H, W]`` becomes ``[n, 1, H, W]``.
    - a path to a folder of images of one size, flat or in class subfolders (labels count the sorted names),
      split 80 / 10 / 10 by a fixed permutation. Grey images have one channel, all others are read as RGB.

    A known name wins over a folder of that name; write ``"./mnist"`` for the folder.

    Args:
        name: a name or a path from the list above.
        root: folder of the MNIST-like files or of that of dSprites; the other sets don't use it.
        binarization: ``None`` keeps the values; ``"threshold"`` is x >= 0.5; ``"static"`` draws each bit once
            from Bernoulli(x), with a fixed seed; ``"dynamic"`` draws the training bits anew in each batch and
            keeps the validation and test bits of ``"static"``, which on MNIST are those of the VampPrior
            experiments. Results under different binarizations can't be compared.

    Raises:
        ValueError: unknown name, bad or damaged file, or values outside [0, 1] under a binarization.
        FileNotFoundError: the path, or the files of a named dataset, are not there and can't be downloaded.

    References:
        VAE with a VampPrior (Tomczak and Welling, 2018), arXiv:1705.07120.

    Example:
        >>> load_dataset("digits", binarization="dynamic")
        Dataset('digits', x_shape=(1, 8, 8), train=1000, validation=350, test=447, dynamic)
    """
    check_choice("binarization", binarization, (None, "threshold", "static", "dynamic"))
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"name: expected a dataset's name or a path, got {name!r}")
    if name == "digits":
        splits = _load_digits()
    elif name in _MNIST_LIKE:
        splits = _load_mnist_like(str(name), root)
    elif name in _SPRITES:
        splits = _load_sprites(str(name), root)
    else:
        splits = _load_path(name)
    if binarization is not None:
        splits = _binarize(splits, binarization)
    source = {"name": os.fspath(name), "binarization": binarization}
    named = {key: replace(split, source={**source, "split": key}) for key, split in splits.items()}
    return Dataset(os.fspath(name), **named)


def check_data(data: Split | Tensor, name: str) -> None:
    """Raise unless ``x`` is floating-point, finite and not empty, and ``y``, if any, fits it.

    What fits is one integer label per datum, ``[n]``, or another tensor to be conditioned on: finite and
    floating-point, ``[n, *shape]`` of two dimensions or more.

    Args:
        data: the split, or ``x`` alone.
        name: what the messages call it.

    Raises:
        TypeError: ``x`` is not floating-point, or ``y`` are labels that are not integer.
        ValueError: no data, NaN or infinite values, or a ``y`` that is not of one row per datum.

    Example:
        >>> check_data(torch.tensor([[0.5, float("nan")]]), "train")
        Traceback (most recent call last):
        ValueError: train: expected finite x, got 1 NaN or infinite values, first in row 0
    """
    x, y = (data.x, data.y) if isinstance(data, Split) else (data, None)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected floating-point x, got {x.dtype}: convert it, as in x.float()")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name}: expected x of shape [n, *event] with n above 0, got {list(x.shape)}")
    bad = ~torch.isfinite(x.reshape(len(x), -1))
    if bad.any():
        count, row = int(bad.sum()), int(bad.any(-1).nonzero()[0])
        raise ValueError(f"{name}: expected finite x, got {count} NaN or infinite values, first in row {row}")
    if y is None:
        return
    if y.is_floating_point() and y.dim() > 1:
        if len(y) != len(x):
            raise ValueError(f"{name}: expected one row of y per datum, {len(x)}, got {len(y)}")
        if not torch.isfinite(y).all():
            raise ValueError(f"{name}: expected finite y, got NaN or infinite values")
        return
    if not _is_integer(y):
        raise TypeError(f"{name}: expected integer labels y, got {y.dtype}")
    if y.shape != (len(x),):
        raise ValueError(f"{name}: expected one label y per datum, [{len(x)}], got {list(y.shape)}")


def as_split(data: object, name: str) -> Split:
    """Return ``data`` as a split; the values are not checked, see `check_data`.

    Args:
        data: a `Split`, a tensor or NumPy array x, a tuple (x, y), or a map-style `torch.utils.data.Dataset`
            whose items are x or (x, y), which is stacked in memory. What follows y in its items is left out.
            NumPy floats become torch's default type, integer labels int64.
        name: what the messages call it.

    Raises:
        TypeError: ``data`` is none of these.
        ValueError: the dataset is empty or its items can't be stacked.

    Example:
        >>> as_split((torch.rand(4, 2), torch.arange(4)), "train")
        Split(x=[4, 2], y=[4])
    """
    if isinstance(data, Split):
        return data
    if isinstance(data, TensorDataset):
        data = data.tensors[:2]
    elif isinstance(data, TorchDataset) and not isinstance(data, IterableDataset) and isinstance(data, Sized):
        items: list[Any] = [data[i] for i in range(len(data))]
        if not items:
            raise ValueError(f"{name}: expected a dataset with items, got an empty one")
        try:
            data = default_collate([tuple(i[:2]) if isinstance(i, (tuple, list)) else i for i in items])
        except Exception as error:
            raise ValueError(f"{name}: can't stack the items of the dataset: {_one_line(error)}") from error
        data = tuple(data) if isinstance(data, list) else data
    parts = data if isinstance(data, tuple) else (data,)
    if len(parts) not in (1, 2) or not all(isinstance(part, (Tensor, np.ndarray)) for part in parts):
        got = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(f"{name}: expected a Split, tensor x, tuple (x, y) or map-style Dataset, got ({got})")
    x, *ys = (part if isinstance(part, Tensor) else _from_numpy(part, name) for part in parts)
    y = ys[0] if ys else None
    return Split(x, y.long() if y is not None and _is_integer(y) else y)


def batches(
    data: Split | Iterable[Tensor | Sequence[Tensor]],
    batch_size: int,
    *,
    device: torch.device | str,
    shuffle: bool,
) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches ``(x,)`` or ``(x, y)`` on ``device``, each datum once.

    Args:
        data: a split, or a DataLoader or other iterable of batches, taken as they come.
        batch_size: number of data in a batch of the split; the last one may be smaller.
        device: where the batches are.
        shuffle: whether to permute the split, with torch's global generator of ``device``.

    Raises:
        TypeError: an item of the iterable is neither a tensor nor a tuple or list of tensors.

    Example:
        >>> [len(x) for (x,) in batches(Split(torch.rand(5, 2)), 2, device="cpu", shuffle=True)]
        [2, 2, 1]
    """
    if isinstance(data, Split):
        data, batch_size = data.to(device), check_positive_int("batch_size", batch_size)
        yield from map(data.batch, rows_of_batches(len(data), batch_size, device=device, shuffle=shuffle))
        return
    for item in data:
        batch = tuple(item) if isinstance(item, (tuple, list)) else (item,)
        if not all(isinstance(part, Tensor) for part in batch):
            got = ", ".join(type(part).__name__ for part in batch)
            raise TypeError(f"batch: expected a tensor or a tuple of tensors, got {got}")
        yield tuple(part.to(device, non_blocking=True) for part in batch)


def rows_of_batches(
    size: int, batch_size: int, *, device: torch.device | str, shuffle: bool
) -> tuple[Tensor, ...]:
    """Return which of ``size`` rows `batches` puts into each batch, by the same draw."""
    return (torch.randperm if shuffle else torch.arange)(size, device=device).split(batch_size)


def semi_supervised(split: Split, labels: int = 100, *, seed: int = 0, repeat: int = 1) -> Split:
    """Return a split that keeps some labels, as many of each class, and has -1 for the others.

    Args:
        split: data with labels ``[n]``; what is labelled -1 already stays so.
        labels: how many labels to keep; if they don't divide by the number of classes, some classes keep one
            more.
        seed: of the choice.
        repeat: how often data with a label are in the new split. They come after all others, ``repeat - 1``
            times: batches of a shuffled split then hold more of them.

    Raises:
        ValueError: the split has no labels, or not enough of a class.

    Example:
        >>> digits = load_dataset("digits").train
        >>> part = semi_supervised(digits, labels=50)
        >>> part.y[part.y >= 0].bincount()
        tensor([5, 5, 5, 5, 5, 5, 5, 5, 5, 5])
    """
    labels = check_positive_int("labels", labels)
    repeat = check_positive_int("repeat", repeat)
    seed = check_seed(seed)
    if split.y is None:
        raise ValueError("split: expected data with labels, got y=None")
    if not _is_integer(split.y) or split.y.shape != (len(split),):
        raise ValueError(
            f"split: expected an integer label y per datum, [{len(split)}], got {split.y.dtype} "
            f"{list(split.y.shape)}"
        )
    y = split.y.cpu().numpy()
    generator = np.random.RandomState(seed)
    classes = generator.permutation(np.unique(y[y >= 0]))
    kept = []
    for i, label in enumerate(classes):
        wanted = labels // len(classes) + (i < labels % len(classes))
        rows = np.flatnonzero(y == label)
        if len(rows) < wanted:
            raise ValueError(f"labels: expected at most {len(rows)} of class {label}, got {wanted}")
        kept.append(generator.choice(rows, wanted, replace=False))
    if not kept:
        raise ValueError("split: expected data with labels, got -1 for all")
    index = torch.from_numpy(np.sort(np.concatenate(kept))).to(split.y.device)
    some = torch.full_like(split.y, -1)
    some[index] = split.y[index]
    x = split.x
    if repeat > 1:
        again = index.repeat(repeat - 1)
        x, some = torch.cat([x, x[again]]), torch.cat([some, some[again]])
    source = None if split.source is None else {**split.source, "labels": f"{labels}, seed {seed}"}
    return replace(split, x=x, y=some, source=source)


def num_batches(data: Split | Iterable[Any], batch_size: int) -> int | None:
    """Return how many batches `batches` yields, ``None`` if ``data`` does not know its length.

    Example:
        >>> num_batches(Split(torch.rand(5, 2)), 2)
        3
    """
    if isinstance(data, Split):
        return -(-len(data) // check_positive_int("batch_size", batch_size))
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None


def _from_numpy(array: np.ndarray, name: str) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected an array of numbers, got {array.dtype}")
    tensor = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _is_integer(y: Tensor) -> bool:
    return not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _binarize(splits: dict[str, Split], binarization: str) -> dict[str, Split]:
    """Turn values into bits, drawn for validation, then test, then train: the first two never change."""
    low = min(float(split.x.min()) for split in splits.values())
    high = max(float(split.x.max()) for split in splits.values())
    if low < 0 or high > 1:
        raise ValueError(f"binarization: expected values in [0, 1], got [{low:g}, {high:g}]")
    if binarization == "threshold":
        return {key: Split((split.x >= 0.5).float(), split.y) for key, split in splits.items()}
    generator = np.random.RandomState(BINARIZATION_SEED)  # a stream that NumPy promises to keep

    def draw(split: Split) -> Split:
        rows = np.array_split(split.x.numpy(), 50)  # in parts, since NumPy's bits are int64
        bits = np.concatenate([generator.binomial(1, part).astype(np.float32) for part in rows])
        return Split(torch.from_numpy(bits), split.y)

    bits = {key: draw(splits[key]) for key in ("validation", "test")}
    train = splits["train"]
    bits["train"] = Split(train.x, train.y, dynamic=True) if binarization == "dynamic" else draw(train)
    return bits


def _split_at(data: Split, sizes: list[int]) -> dict[str, Split]:
    """Cut the rows, in order, into train, validation and test."""
    xs = torch.split(data.x, sizes)
    ys = [None] * 3 if data.y is None else torch.split(data.y, sizes)
    return {key: Split(x, y) for key, x, y in zip(_SPLITS, xs, ys, strict=True)}


def _split_at_random(data: Split, name: str) -> dict[str, Split]:
    """Split 80 / 10 / 10 by a fixed permutation."""
    n, tenth = len(data), _tenth(len(data), name)
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(n))
    shuffled = Split(data.x[order], None if data.y is None else data.y[order])
    return _split_at(shuffled, [n - 2 * tenth, tenth, tenth])


def _tenth(n: int, name: str) -> int:
    if n < 3:
        raise ValueError(f"{name}: expected at least 3 data to split, got {n}")
    return max(1, n // 10)


def _load_digits() -> dict[str, Split]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy((digits.images / 16).astype(np.float32)).unsqueeze(1)
    return _split_at(Split(x, torch.from_numpy(digits.target.astype(np.int64))), [1000, 350, 447])


def _load_mnist_like(name: str, root: str | os.PathLike[str] | None) -> dict[str, Split]:
    from torchvision import datasets

    kind = getattr(datasets, _MNIST_LIKE[name])
    folder = _find_or_download(name, kind, root)
    read = {file: _read_gz(folder / file, md5) for file, md5 in kind.resources}

    def split(prefix: str) -> Split:
        x = read[f"{prefix}-images-idx3-ubyte.gz"].astype(np.float32) / np.float32(255)
        y = read[f"{prefix}-labels-idx1-ubyte.gz"].astype(np.int64)
        return Split(torch.from_numpy(x).unsqueeze(1), torch.from_numpy(y))

    train, test = split("train"), split("t10k")
    return {**_split_at(train, [len(train) - 10_000, 10_000, 0]), "test": test}


def _load_sprites(name: str, root: str | os.PathLike[str] | None) -> dict[str, Split]:
    from ppl_vae.sprites import load_dsprites, make_sprites

    dataset = make_sprites() if name == "sprites" else load_dsprites(root)
    return {key: getattr(dataset, key) for key in _SPLITS}


def _find_or_download(name: str, kind: Any, root: str | os.PathLike[str] | None) -> Path:
    """Return the folder that holds the four files of ``kind``."""
    raw = Path(_MNIST_LIKE[name]) / "raw"
    files = [file for file, _ in kind.resources]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ppl-vae"
    variable = os.environ.get("PPL_VAE_DATA")
    places = [Path(root)] if root is not None else [Path(variable), cache] if variable else [cache]
    for place in places:
        folder = place.expanduser() / raw
        if all((folder / file).is_file() for file in files):
            return folder
    put = f"put {', '.join(files)} into"
    if root is not None:
        raise FileNotFoundError(
            f"{name}: not under root: {put} {folder} (or set PPL_VAE_DATA to such a root)"
        )
    try:  # in a folder of its own, so that what is in the cache is always whole
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as fresh:
            kind(fresh, download=True)
            (cache / raw).mkdir(parents=True, exist_ok=True)
            for file in files:
                os.replace(Path(fresh) / raw / file, cache / raw / file)
    except Exception as error:
        put += f" <root>/{raw.as_posix()} and set PPL_VAE_DATA=<root>"
        raise FileNotFoundError(f"{name}: download failed ({_one_line(error)}): {put}") from error
    return cache / raw


def _read_gz(path: Path, md5: str) -> np.ndarray:
    """Read one MNIST-like file in memory: type, number of axes, big-endian sizes, then bytes."""
    packed = path.read_bytes()
    found = hashlib.md5(packed, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{path}: expected md5 {md5}, got {found}; delete the file and get it again")
    data = gzip.decompress(packed)
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + shape.nbytes).reshape(shape)


def _load_path(name: str | os.PathLike[str]) -> dict[str, Split]:
    path, text = Path(name).expanduser(), os.fspath(name)
    if text and path.is_dir():
        return _load_image_folder(path)
    is_npz = path.suffix.lower() == ".npz"
    if path.is_file():
        if not is_npz:
            raise ValueError(f"name: expected an .npz file or a folder of images, got the file {text!r}")
        return _load_npz(path)
    if is_npz or not isinstance(name, str) or "/" in text or os.sep in text:
        raise FileNotFoundError(f"name: no file or folder {text!r}")
    known = ", ".join(repr(choice) for choice in _NAMES)
    raise ValueError(f"name: unknown {name!r}{did_you_mean(name, _NAMES)}; expected {known} or a path")


def _load_npz(path: Path) -> dict[str, Split]:
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key]) for key in file.files}
    except Exception as error:
        raise ValueError(f"{path}: expected an .npz of plain arrays, got {_one_line(error)}") from error
    known = ["x", "y", *(f"{axis}_{key}" for axis in "xy" for key in _SPLITS)]
    for key in arrays:
        if key.startswith(("x", "y")) and key not in known:
            raise ValueError(f"{path}: unknown array {key!r}{did_you_mean(key, known)}; known are {known}")
    held = [key for key in known if key in arrays]
    if held in (["x"], ["x", "y"]):
        return _split_at_random(_npz_split(arrays, "", path), str(path))
    present, labelled = ([key for key in _SPLITS if f"{axis}_{key}" in arrays] for axis in "xy")
    whole = {"train", "test"} <= set(present) and labelled in ([], present) and not {"x", "y"} & set(held)
    if not whole:
        expected = "x (and y), or x_train, x_test (and x_validation), with a y_... for each or for none"
        raise ValueError(f"{path}: expected arrays {expected}, got {list(arrays)}")
    splits = {key: _npz_split(arrays, f"_{key}", path) for key in present}
    train = splits["train"]
    for key, split in splits.items():
        event, shape = list(train.x.shape[1:]), list(split.x.shape[1:])
        if shape != event:
            raise ValueError(f"{path}: x_{key}: expected data of shape {event}, got {shape}")
        if split.y is not None and train.y is not None and split.y.max() > train.y.max():
            last, got = int(train.y.max()), int(split.y.max())
            raise ValueError(f"{path}: y_{key}: expected labels 0..{last}, as in y_train, got {got}")
    if "validation" not in splits:
        tenth = _tenth(len(train), f"{path}: x_train")
        splits = {**_split_at(train, [len(train) - tenth, tenth, 0]), "test": splits["test"]}
    return splits


def _npz_split(arrays: dict[str, np.ndarray], suffix: str, path: Path) -> Split:
    name, x, labels = f"{path}: x{suffix}", arrays[f"x{suffix}"], arrays.get(f"y{suffix}")
    if x.dtype != np.uint8 and x.dtype.kind not in "fb":
        raise ValueError(f"{name}: expected uint8 or float values, got {x.dtype}")
    if x.ndim not in (2, 3, 4):
        raise ValueError(f"{name}: expected [n, d], [n, H, W] or [n, C, H, W], got {list(x.shape)}")
    with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite and is reported as such
        x = x.astype(np.float32) / np.float32(255 if x.dtype == np.uint8 else 1)
    y = None
    if labels is not None:
        if labels.dtype.kind not in "iuf" or not ((labels >= 0) & (labels == np.trunc(labels))).all():
            raise ValueError(f"{path}: y{suffix}: expected labels that are whole numbers from 0")
        y = torch.from_numpy(labels.astype(np.int64))
    split = Split(torch.from_numpy(x[:, None] if x.ndim == 3 else x), y)
    check_data(split, name)
    return split


def _load_image_folder(path: Path) -> dict[str, Split]:
    def images(folder: Path) -> list[Path]:
        return sorted(f for f in folder.iterdir() if f.suffix.lower() in _IMAGE_SUFFIXES and f.name[0] != ".")

    files, labels = images(path), None
    classes = sorted(f for f in path.iterdir() if f.is_dir() and f.name[0] != ".")
    if files and classes:
        got = f"{files[0].name} and {classes[0].name}/"
        raise ValueError(f"{path}: expected either images or class subfolders, got both ({got})")
    if classes:
        groups = [images(folder) for folder in classes]
        if [] in groups:
            raise ValueError(f"{classes[groups.index([])]}: expected images in the class subfolder, got none")
        files = [file for group in groups for file in group]
        labels = torch.tensor([label for label, group in enumerate(groups) for _ in group])
    if not files:
        raise ValueError(f"{path}: expected images ({', '.join(_IMAGE_SUFFIXES)}), got none")
    arrays = [_read_image(file) for file in files]
    height, width, channels = arrays[0].shape[0], arrays[0].shape[1], max(a.shape[2] for a in arrays)
    for file, array in zip(files, arrays, strict=True):
        h, w, _ = array.shape
        if (h, w) != (height, width):
            expected = f"{width} x {height} pixels as in {files[0].name}"
            raise ValueError(f"{file}: expected {expected}, got {w} x {h}")
    x = np.stack([np.broadcast_to(array, (height, width, channels)) for array in arrays])
    x = np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    return _split_at_random(Split(torch.from_numpy(x), labels), str(path))


def _read_image(file: Path) -> np.ndarray:
    """Return the image as uint8 ``[H, W, 1]`` if it is grey, else ``[H, W, 3]``."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode}")
            array = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except Exception as error:
        raise ValueError(f"{file}: expected an 8-bit image, got {_one_line(error)}") from error
    return np.atleast_3d(array)
