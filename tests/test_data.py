"""Datasets, binarization and batches."""

import functools
import gzip
import hashlib
import math
import os
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from ppl_vae.data import (
    BINARIZATION_SEED,
    Dataset,
    Split,
    as_split,
    batches,
    check_data,
    load_dataset,
    num_batches,
    semi_supervised,
)

FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
BINARIZATIONS = [None, "threshold", "static", "dynamic"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache, no data folder, and a downloader that has no network."""
    import torchvision.datasets.mnist

    def offline(url: str, **_: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", offline)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PPL_VAE_DATA", raising=False)
    return tmp_path / "cache" / "ppl-vae"


def sha(x: Tensor) -> str:
    """Sixteen hex digits that pin the bits `x`."""
    return hashlib.sha256(x.to(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- splits and batches ---------------------------------------------------------------------------------


def test_split_gathers_rows_in_the_order_of_the_index() -> None:
    x, y = torch.rand(6, 2, 3), torch.arange(6)
    index = torch.tensor([4, 0, 4])
    split = Split(x, y)
    assert len(split) == 6
    bx, by = split.batch(index)
    assert torch.equal(bx, x[index])
    assert torch.equal(by, index)
    (only,) = Split(x).batch(index)
    assert torch.equal(only, x[index])
    assert repr(split) == "Split(x=[6, 2, 3], y=[6])"
    assert repr(Split(x, dynamic=True)) == "Split(x=[6, 2, 3], dynamic)"


def test_dynamic_split_draws_fresh_bits_from_the_global_generator() -> None:
    n = 20_000
    split = Split(torch.tensor([0.0, 1.0, 0.3]).expand(n, 3), torch.zeros(n, dtype=torch.int64), dynamic=True)
    rows = torch.arange(n)
    torch.manual_seed(0)
    first, second = split.batch(rows)[0], split.batch(rows)[0]
    torch.manual_seed(0)
    again = split.batch(rows)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 1.0}
    # 5 standard errors of a Bernoulli(0.3) mean
    assert abs(float(first[:, 2].mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n)
    assert first[:, 0].sum() == 0
    assert first[:, 1].sum() == n


def test_split_to_keeps_what_it_is() -> None:
    split = Split(torch.rand(3, 2), torch.arange(3), True, {"name": "my data"}).to("meta")
    assert split.x.is_meta
    assert split.y is not None
    assert split.y.is_meta
    assert split.dynamic
    assert split.source == {"name": "my data"}
    assert Split(torch.rand(3, 2)).to("cpu").y is None


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), shuffle=st.booleans(), labels=st.booleans())
def test_batches_visit_each_datum_once(n: int, batch_size: int, shuffle: bool, labels: bool) -> None:
    rows = torch.arange(n)
    split = Split(rows[:, None].float(), rows if labels else None)
    got = list(batches(split, batch_size, device="cpu", shuffle=shuffle))
    assert len(got) == num_batches(split, batch_size) == math.ceil(n / batch_size)
    assert all(len(batch[0]) == batch_size for batch in got[:-1])
    visited = torch.cat([batch[0] for batch in got])[:, 0].long()
    assert torch.equal(visited.sort().values, rows)
    assert shuffle or torch.equal(visited, rows)
    assert all(len(batch) == 1 + labels for batch in got)
    if labels:
        assert torch.equal(torch.cat([batch[1] for batch in got]), visited)


def test_batches_shuffle_follows_the_global_seed() -> None:
    split = Split(torch.arange(100.0)[:, None])

    def order(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([x for (x,) in batches(split, 7, device="cpu", shuffle=True)])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


class Stream(IterableDataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


def test_batches_takes_a_loader_as_it_comes() -> None:
    x, y = torch.rand(5, 2), torch.arange(5)
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    got = list(batches(loader, 99, device="cpu", shuffle=True))
    assert [len(batch[0]) for batch in got] == [2, 2, 1]
    assert num_batches(loader, 99) == 3
    assert torch.equal(torch.cat([batch[0] for batch in got]), x)
    assert torch.equal(torch.cat([batch[1] for batch in got]), y)
    stream = Stream([x, (x, y), [x]])
    assert [len(batch) for batch in batches(stream, 1, device="cpu", shuffle=False)] == [1, 2, 1]
    assert num_batches(stream, 1) is None
    (moved,) = next(batches(stream, 1, device="meta", shuffle=False))
    assert moved.is_meta


@pytest.mark.parametrize("item", [{"x": torch.rand(2)}, (torch.rand(2), "label"), 3.0])
def test_batches_rejects_what_is_no_tensor(item: object) -> None:
    with pytest.raises(TypeError, match=r"expected a tensor or a tuple of tensors, got .*(dict|str|float)"):
        next(batches(Stream([item]), 1, device="cpu", shuffle=False))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_is_positive(batch_size: int) -> None:
    split = Split(torch.rand(3, 2))
    with pytest.raises(ValueError, match="batch_size"):
        next(batches(split, batch_size, device="cpu", shuffle=False))
    with pytest.raises(ValueError, match="batch_size"):
        num_batches(split, batch_size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batch_does_not_wait_for_the_device() -> None:
    split = Split(torch.rand(50, 1, 8, 8), torch.arange(50), dynamic=True).to("cuda")
    order = torch.randperm(50, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x, y = split.batch(order[10:20])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.is_cuda
    assert torch.equal(y, order[10:20])


# --- check_data and as_split ----------------------------------------------------------------------------


def test_check_data_passes_good_data() -> None:
    check_data(torch.rand(3, 2, dtype=torch.float64), "train")
    check_data(Split(torch.rand(3, 1, 2, 2), torch.arange(3)), "train")


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (torch.ones(3, 2, dtype=torch.int64), TypeError, "floating-point x, got torch.int64: convert"),
        (torch.ones(3, 2, dtype=torch.bool), TypeError, "floating-point x, got torch.bool"),
        (torch.ones(0, 2), ValueError, r"n above 0, got \[0, 2\]"),
        (torch.ones(2, 0), ValueError, r"got \[2, 0\]"),
        (torch.tensor(1.0), ValueError, r"got \[\]"),
        (Split(torch.ones(3, 2), torch.arange(4)), ValueError, r"one label y per datum, \[3\], got \[4\]"),
        (Split(torch.ones(3, 2), torch.ones(3, 1).long()), ValueError, r"\[3\], got \[3, 1\]"),
        (Split(torch.ones(3, 2), torch.ones(3)), TypeError, "integer labels y, got torch.float32"),
        (Split(torch.ones(3, 2), torch.ones(3).bool()), TypeError, "integer labels y, got torch.bool"),
    ],
)
def test_check_data_names_what_is_wrong(data: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match="^train: .*" + match) as raised:
        check_data(data, "train")
    one_line(raised)


@settings(deadline=None, max_examples=25)
@given(
    bad=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_check_data_counts_non_finite_values(bad: set[tuple[int, int]], value: float) -> None:
    x = torch.zeros(6, 2, 2)
    for row, column in bad:
        x[row].view(-1)[column] = value
    with pytest.raises(ValueError, match=f"got {len(bad)} NaN or infinite.*first in row {min(bad)[0]}$"):
        check_data(x, "x")


class Items(TorchDataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def test_as_split_takes_what_people_have() -> None:
    x, y = torch.rand(4, 3), torch.tensor([0, 2, 1, 1])
    split = Split(x, y)
    assert as_split(split, "train") is split
    assert as_split(x, "train").x is x
    assert as_split((x,), "train").y is None
    weights = torch.rand(4)
    for data in (
        (x, y),
        (x, y.to(torch.uint8)),
        (x.numpy(), y.numpy().astype(np.int32)),
        TensorDataset(x, y),
        TensorDataset(x, y, weights),
        Items([(x[i], y[i]) for i in range(4)]),
        Items([[x[i], int(y[i]), "a name"] for i in range(4)]),
        Items([(x[i].numpy(), y[i].numpy()) for i in range(4)]),
    ):
        got = as_split(data, "train")
        assert got.y is not None
        assert got.y.dtype == torch.int64
        assert torch.equal(got.x, x)
        assert torch.equal(got.y, y)
        check_data(got, "train")
    for unlabelled in (TensorDataset(x), Items(list(x)), x.numpy()):
        got = as_split(unlabelled, "train")
        assert torch.equal(got.x, x)
        assert got.y is None


def test_as_split_reads_any_numpy_float() -> None:
    x = np.arange(6, dtype=np.float64).reshape(3, 2)
    frozen = x.copy()
    frozen.flags.writeable = False
    for array in (x, x.astype(">f8"), x.astype(np.float16), frozen):
        got = as_split(array, "train").x
        assert got.dtype == torch.get_default_dtype()
        assert torch.equal(got, torch.arange(6.0).reshape(3, 2))
    assert torch.equal(as_split(x[::-1], "train").x[0], torch.tensor([4.0, 5.0]))
    assert as_split(torch.ones(2, 2, dtype=torch.float64), "train").x.dtype == torch.float64


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ([1.0, 2.0], TypeError, r"got \(list\)"),
        ("mnist", TypeError, r"got \(str\)"),
        ((torch.ones(2), torch.ones(2), torch.ones(2)), TypeError, r"got \(Tensor, Tensor, Tensor\)"),
        ((), TypeError, r"got \(\)"),
        (np.array(["a", "b"]), TypeError, "array of numbers, got <U1"),
        (np.array([None, 1]), TypeError, "array of numbers, got object"),
        (Items([]), ValueError, "got an empty one"),
        (Items([{"x": torch.ones(2)}]), TypeError, r"got \(dict\)"),
        (Items([torch.ones(2), torch.ones(3)]), ValueError, "can't stack.*equal size"),
        (Items([Image.new("L", (2, 2))]), ValueError, "can't stack.*Image"),
        (Stream([torch.ones(2)]), TypeError, r"got \(Stream\)"),
    ],
)
def test_as_split_names_what_it_got(data: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match="^train: .*" + match) as raised:
        as_split(data, "train")
    one_line(raised)


# --- digits and binarization ----------------------------------------------------------------------------


def test_digits() -> None:
    from sklearn.datasets import load_digits

    digits = load_dataset("digits")
    reference = load_digits()
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1000, 350, 447]
    assert digits.x_shape == (1, 8, 8)
    x = torch.cat([part.x for part in parts])
    assert x.dtype == torch.float32
    assert np.array_equal(x[:, 0].numpy() * 16, reference.images)
    y = torch.cat([part.y for part in parts if part.y is not None])
    assert y.dtype == torch.int64
    assert np.array_equal(y.numpy(), reference.target)
    assert repr(digits) == "Dataset('digits', x_shape=(1, 8, 8), train=1000, validation=350, test=447)"
    for part in parts:
        check_data(part, "digits")


def test_binarization_draws_validation_then_test_then_train() -> None:
    grey, static, dynamic = (load_dataset("digits", binarization=b) for b in (None, "static", "dynamic"))
    stream = np.random.RandomState(BINARIZATION_SEED)
    assert static.train.x.dtype == torch.float32
    for key in ("validation", "test", "train"):
        expected = stream.binomial(1, getattr(grey, key).x.numpy())
        assert np.array_equal(getattr(static, key).x.numpy(), expected)
        assert torch.equal(getattr(static, key).y, getattr(grey, key).y)
    assert torch.equal(dynamic.validation.x, static.validation.x)
    assert torch.equal(dynamic.test.x, static.test.x)
    assert dynamic.train.dynamic
    assert torch.equal(dynamic.train.x, grey.train.x)
    assert not (dynamic.test.dynamic)
    assert not (dynamic.validation.dynamic)
    assert not (static.train.dynamic)
    assert repr(dynamic).endswith("test=447, dynamic)")
    assert dynamic.test.source == {"name": "digits", "split": "test", "binarization": "dynamic"}


@pytest.mark.parametrize("binarization", ["static", "dynamic"])
def test_test_bits_of_digits_never_change(binarization: str) -> None:
    torch.manual_seed(5)
    data = load_dataset("digits", binarization=binarization)
    assert (sha(data.validation.x), sha(data.test.x)) == ("5a778659a7e16533", "666137162d4301e6")


def test_loading_leaves_the_global_generators_alone() -> None:
    def states() -> list[str]:
        return [str(torch.get_rng_state().tolist()), str(np.random.get_state())]  # noqa: NPY002

    before = states()
    load_dataset("digits", binarization="static")
    assert states() == before


def test_threshold_is_at_a_half(tmp_path: Path) -> None:
    x = np.array([0.0, 0.49, 0.5, 1.0], np.float32)[None].repeat(5, axis=0)
    np.savez(tmp_path / "x.npz", x=x)
    data = load_dataset(tmp_path / "x.npz", binarization="threshold")
    assert data.train.x[0].tolist() == [0, 0, 1, 1]
    assert not data.train.dynamic


@pytest.mark.parametrize("binarization", ["threshold", "static", "dynamic"])
def test_binarization_names_the_range_of_other_values(tmp_path: Path, binarization: str) -> None:
    np.savez(tmp_path / "x.npz", x=np.linspace(-3.25, 5.5, 40).reshape(20, 2))
    with pytest.raises(ValueError, match=r"binarization: expected values in \[0, 1\], got \[-3.25, 5.5\]"):
        load_dataset(tmp_path / "x.npz", binarization=binarization)


def test_unknown_binarization() -> None:
    with pytest.raises(ValueError, match=r"binarization: unknown 'dynamik'.*did you mean 'dynamic'"):
        load_dataset("digits", binarization="dynamik")


# --- names and paths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        (
            "mnits",
            ValueError,
            r"name: unknown 'mnits' \(did you mean 'mnist'\?\); expected 'digits', 'mnist'",
        ),
        ("MNIST", ValueError, "did you mean 'mnist'"),
        ("", ValueError, "name: unknown ''"),
        ("my/digits", FileNotFoundError, "name: no file or folder 'my/digits'"),
        ("digits.npz", FileNotFoundError, "name: no file or folder 'digits.npz'"),
        (Path("nowhere"), FileNotFoundError, "name: no file or folder 'nowhere'"),
        (3, TypeError, "name: expected a dataset's name or a path, got 3"),
    ],
)
def test_unknown_names(name: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as raised:
        load_dataset(name)
    one_line(raised)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match=r"name: expected an .npz file or a folder of images.*x.csv"):
        load_dataset(tmp_path / "x.csv")


# --- MNIST-like -----------------------------------------------------------------------------------------


def pack(array: np.ndarray) -> bytes:
    """Bytes in the IDX format, gzipped."""
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes(), compresslevel=1, mtime=0)


@functools.cache
def small_mnist() -> dict[str, bytes]:
    """The files of a small MNIST of 12 + 10,000 and 20 images."""
    files = {}
    for part, n in (("train", 10_012), ("t10k", 20)):
        pixels = np.add.outer(np.arange(n), np.arange(28 * 28)).reshape(n, 28, 28) % 256
        files[f"{part}-images-idx3-ubyte.gz"] = pack(pixels)
        files[f"{part}-labels-idx1-ubyte.gz"] = pack(np.arange(n) % 10)
    return files


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The small MNIST, with the checksums that torchvision knows replaced by its own."""
    import torchvision.datasets

    resources = [(file, hashlib.md5(data).hexdigest()) for file, data in small_mnist().items()]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    return small_mnist()


def write(root: Path, files: dict[str, bytes]) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file, data in files.items():
        (raw / file).write_bytes(data)
    return raw


def serve(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], fail_after: int = 99) -> list[str]:
    """Let torchvision download ``files`` and lose the network after some; return the log of requests."""
    import torchvision.datasets.mnist

    log: list[str] = []

    def download(url: str, download_root: str, filename: str, md5: str) -> None:
        log.append(filename)
        if len(log) > fail_after:
            raise URLError("connection lost")
        (Path(download_root) / filename).write_bytes(files[filename])
        (Path(download_root) / filename[:-3]).write_bytes(gzip.decompress(files[filename]))

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", download)
    return log


def check_fake(data: Dataset, files: dict[str, bytes]) -> None:
    assert [len(split) for split in (data.train, data.validation, data.test)] == [12, 10_000, 20]
    assert data.x_shape == (1, 28, 28)
    assert data.train.x.dtype == torch.float32
    pixels = np.frombuffer(gzip.decompress(files[FILES[0]]), np.uint8, offset=16).astype(np.float32)
    x = torch.cat([data.train.x, data.validation.x])
    assert np.array_equal(x.numpy().ravel(), pixels / 255)
    assert data.test.y is not None
    assert data.test.y.tolist() == [i % 10 for i in range(20)]
    assert data.validation.y is not None
    assert data.validation.y[0] == 12 % 10


def test_mnist_files_are_read_from_a_folder_that_cannot_be_written(
    tmp_path: Path, fake: dict[str, bytes], cache: Path
) -> None:
    raw = write(tmp_path / "data", fake)
    raw.chmod(0o555)
    try:
        data = load_dataset("mnist", root=tmp_path / "data")
        check_fake(data, fake)
        assert sorted(os.listdir(raw)) == sorted(FILES)
        assert not cache.exists()
    finally:
        raw.chmod(0o755)


def test_mnist_is_looked_for_in_order(
    tmp_path: Path, fake: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(cache, fake)
    check_fake(load_dataset("mnist"), fake)  # the cache
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path / "data"))
    check_fake(load_dataset("mnist"), fake)  # an empty data folder
    raw = write(tmp_path / "data", fake)
    (raw / FILES[0]).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"{FILES[0]}: expected md5 \w+, got \w+") as raised:
        load_dataset("mnist")  # the data folder comes before the cache
    one_line(raised)
    with pytest.raises(FileNotFoundError, match="under root"):
        load_dataset("mnist", root=tmp_path)  # a given root stands alone


def test_mnist_is_downloaded_once(
    fake: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = serve(monkeypatch, fake)
    check_fake(load_dataset("mnist"), fake)
    assert log == FILES
    check_fake(load_dataset("mnist"), fake)
    assert log == FILES
    assert [path.name for path in cache.iterdir()] == ["MNIST"]


def test_a_broken_download_leaves_nothing_behind(
    fake: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, fake, fail_after=2)
    with pytest.raises(FileNotFoundError, match="connection lost"):
        load_dataset("mnist")
    assert list(cache.iterdir()) == []
    serve(monkeypatch, fake)
    check_fake(load_dataset("mnist"), fake)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_offline_says_which_files_to_put_where(name: str, folder: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{name}: download failed .*no network") as raised:
        load_dataset(name)
    message = one_line(raised)
    assert all(file in message for file in FILES)
    assert f"<root>/{folder}/raw" in message
    assert "PPL_VAE_DATA" in message
    with pytest.raises(FileNotFoundError, match=f"^{name}: not under root") as raised:
        load_dataset(name, root=tmp_path)
    message = one_line(raised)
    assert all(file in message for file in FILES)
    assert str(tmp_path / folder / "raw") in message
    assert "PPL_VAE_DATA" in message


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError, match="mnist: download failed"):
        load_dataset("mnist")


def real_root(folder: str) -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    for root in (Path(REAL_DATA), beside) if REAL_DATA else (beside,):
        if all((root / folder / "raw" / file).is_file() for file in FILES):
            return root
    pytest.skip(f"no {folder} files: set PPL_VAE_DATA to a folder with {folder}/raw/*.gz")


REAL_DATA = os.environ.get("PPL_VAE_DATA")  # read before the fixture hides it


@pytest.mark.parametrize(
    ("name", "folder", "mean", "bits"),
    [
        ("mnist", "MNIST", 0.1307, "a700b0d972959b58"),
        ("fashion-mnist", "FashionMNIST", 0.2860, "33bc86729d1a5fab"),
    ],
)
def test_real_mnist(name: str, folder: str, mean: float, bits: str) -> None:
    data = load_dataset(name, root=real_root(folder), binarization="dynamic")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [50_000, 10_000, 10_000]
    assert data.x_shape == (1, 28, 28)
    assert data.train.dynamic
    # the well-known mean of the 60,000 training images, of which these are 50,000
    assert abs(float(data.train.x.mean()) - mean) < 1e-3
    assert data.test.y is not None
    assert data.test.y.bincount().sum() == 10_000
    assert set(data.test.x.unique().tolist()) == {0.0, 1.0}
    assert sha(data.test.x) == bits


# --- .npz -----------------------------------------------------------------------------------------------


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path / "x.npz", **arrays)
    return path / "x.npz"


@settings(deadline=None, max_examples=25)
@given(n=st.integers(3, 60), labels=st.booleans(), event=st.sampled_from([(3,), (4, 5), (2, 4, 5)]))
def test_npz_splits_80_10_10(
    tmp_path_factory: pytest.TempPathFactory, n: int, labels: bool, event: tuple[int, ...]
) -> None:
    rows = np.arange(n)
    x = np.broadcast_to(rows.reshape(n, *(1 for _ in event)), (n, *event)).astype(np.float64)
    path = save(tmp_path_factory.mktemp("npz"), x=x, **({"y": rows.astype(np.int16)} if labels else {}))
    data, again = load_dataset(path), load_dataset(str(path))
    tenth = max(1, n // 10)
    parts = (data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [n - 2 * tenth, tenth, tenth]
    assert data.x_shape == ((1, *event) if len(event) == 2 else event)
    assert torch.equal(again.train.x, data.train.x)
    assert data.name == str(path)
    first = torch.cat([part.x.reshape(len(part), -1)[:, 0] for part in parts])
    assert torch.equal(first.sort().values, torch.arange(n).float())
    for part in parts:
        assert part.x.dtype == torch.float32
        assert (part.y is not None) == labels
        assert part.y is None or torch.equal(part.y, part.x.reshape(len(part), -1)[:, 0].long())


def test_npz_scales_bytes_only(tmp_path: Path) -> None:
    x = np.full((5, 2), 255, np.uint8)
    assert load_dataset(save(tmp_path, x=x)).train.x.unique().tolist() == [1.0]
    assert load_dataset(save(tmp_path, x=x.astype(np.float64))).train.x.unique().tolist() == [255.0]
    assert load_dataset(save(tmp_path, x=x > 0)).train.x.unique().tolist() == [1.0]


def test_npz_with_splits_of_its_own(tmp_path: Path) -> None:
    x = np.arange(60, dtype=np.float32).reshape(30, 2)
    y = np.arange(30) % 3
    data = load_dataset(
        save(
            tmp_path,
            x_train=x[:20],
            x_validation=x[20:26],
            x_test=x[26:],
            y_train=y[:20].astype(np.float64),
            y_validation=y[20:26],
            y_test=y[26:],
            names=np.array(["a", "b"]),
        )
    )
    parts = (data.train, data.validation, data.test)
    assert np.array_equal(torch.cat([part.x for part in parts]), x)
    assert np.array_equal(torch.cat([part.y for part in parts if part.y is not None]), y)
    data = load_dataset(save(tmp_path, x_train=x[:25], x_test=x[25:]))
    assert np.array_equal(data.train.x, x[:23])
    assert np.array_equal(data.validation.x, x[23:25])
    assert np.array_equal(data.test.x, x[25:])
    assert data.test.y is None


X = np.ones((6, 2), np.float32)
Y = np.arange(6)
HOLES = X.copy()
HOLES[4, 0], HOLES[5] = np.nan, np.inf


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"images": X}, r"expected arrays x \(and y\), or x_train.*got \['images'\]"),
        ({}, r"expected arrays x.*got \[\]"),
        ({"x_train": X}, r"expected arrays.*got \['x_train'\]"),
        ({"y": Y}, r"expected arrays.*got \['y'\]"),
        ({"x": X, "x_train": X, "x_test": X}, "expected arrays"),
        ({"x_train": X, "x_test": X, "y": Y}, "expected arrays"),
        ({"x_train": X, "x_test": X, "y_train": Y}, "for each or for none"),
        ({"x_train": X, "x_val": X, "x_test": X}, "unknown array 'x_val' .did you mean"),
        ({"x": np.array([[None, 1]] * 5)}, "plain arrays, got Object arrays"),
        ({"x": X[:0]}, r"x: expected x of shape \[n, \*event\] with n above 0, got \[0, 2\]"),
        ({"x": X[:2]}, "at least 3 data to split, got 2"),
        ({"x_train": X[:1], "x_test": X}, "x_train: expected at least 3 data to split, got 1"),
        ({"x": HOLES}, "x: expected finite x, got 3 NaN or infinite values, first in row 4"),
        ({"x": np.full((5, 2), 1e300)}, "got 10 NaN or infinite values, first in row 0"),
        ({"x_train": X, "x_test": HOLES}, "x_test: expected finite x, got 3"),
        ({"x": X, "y": Y[:4]}, r"one label y per datum, \[6\], got \[4\]"),
        ({"x": X, "y": Y[:, None]}, r"one label y per datum, \[6\], got \[6, 1\]"),
        ({"x": X, "y": Y - 1}, "y: expected labels that are whole numbers from 0"),
        ({"x": X, "y": Y + 0.5}, "y: expected labels that are whole numbers"),
        ({"x": X, "y": Y * np.nan}, "y: expected labels that are whole numbers"),
        ({"x": X, "y": Y.astype(str)}, "y: expected labels that are whole numbers"),
        ({"x": X.astype(np.int64)}, "x: expected uint8 or float values, got int64"),
        ({"x": X.astype(complex)}, "x: expected uint8 or float values, got complex128"),
        ({"x": X[:, 0]}, r"x: expected \[n, d\], \[n, H, W\] or \[n, C, H, W\], got \[6\]"),
        ({"x": X[:, :, None, None, None]}, r"got \[6, 2, 1, 1, 1\]"),
        ({"x_train": X, "x_test": X[:, :1]}, r"x_test: expected data of shape \[2\], got \[1\]"),
        (
            {"x_train": X, "x_test": X, "y_train": Y % 2, "y_test": Y % 3},
            "y_test: expected labels 0..1, as in y_train, got 2",
        ),
        (
            {"x_train": X, "x_validation": X, "x_test": X, "y_train": Y, "y_validation": Y + 4, "y_test": Y},
            "y_validation: expected labels 0..5, as in y_train, got 9",
        ),
    ],
)
def test_npz_errors(tmp_path: Path, arrays: dict[str, np.ndarray], match: str) -> None:
    path = save(tmp_path, **arrays)
    with pytest.raises(ValueError, match=match) as raised:
        load_dataset(path)
    assert one_line(raised).startswith(f"{path}: ")


def test_npz_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"expected an .npz of plain arrays, got .*not a zip"):
        load_dataset(path)
    with path.open("wb") as file:
        np.save(file, X)
    with pytest.raises(ValueError, match=r"expected an .npz of plain arrays, got .*not a zip"):
        load_dataset(path)
    whole = save(tmp_path, x=X).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"expected an .npz of plain arrays"):
        load_dataset(path)


# --- folders of images ----------------------------------------------------------------------------------


def paint(file: Path, value: int, mode: str = "L", size: tuple[int, int] = (5, 4)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "1", "I;16") else (value,) * len(mode)).save(file)


def test_flat_folder(tmp_path: Path) -> None:
    for i in range(20):
        paint(tmp_path / f"{i:02}.{('png', 'BMP', 'tif', 'TIFF')[i % 4]}", i)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    data = load_dataset(tmp_path)
    parts = (data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [16, 2, 2]
    assert data.x_shape == (1, 4, 5)
    values = torch.cat([part.x for part in parts])
    assert torch.equal((values * 255).round().amax((1, 2, 3)).sort().values, torch.arange(20.0))
    assert torch.equal(values.amax((1, 2, 3)), values.amin((1, 2, 3)))
    assert data.train.y is None
    assert values.dtype == torch.float32
    assert torch.equal(load_dataset(str(tmp_path)).train.x, data.train.x)


def test_class_subfolders(tmp_path: Path) -> None:
    for label, name in enumerate(("ant", "bee", "cat")):
        for i in range(10):
            paint(tmp_path / name / f"{i}.png", 10 * label + i)
    (tmp_path / ".cache").mkdir()
    data = load_dataset(tmp_path)
    for part in (data.train, data.validation, data.test):
        value = (part.x[:, 0, 0, 0] * 255).round().long()
        assert part.y is not None
        assert torch.equal(part.y, value // 10)


def test_one_colour_image_makes_all_rgb(tmp_path: Path) -> None:
    for i in range(4):
        paint(tmp_path / f"{i}.png", 7, "1" if i == 1 else "L")
    paint(tmp_path / "4.png", 9, "RGBA")
    paint(tmp_path / "5.gif", 9, "RGB")
    data = load_dataset(tmp_path)
    assert data.x_shape == (3, 4, 5)
    x = torch.cat([data.train.x, data.validation.x, data.test.x]) * 255
    assert sorted(x.round().amax((1, 2, 3)).tolist()) == [7, 7, 7, 9, 9, 255]
    assert torch.equal(x[:, 0], x[:, 2])


def test_image_axes_are_channels_height_width(tmp_path: Path) -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    for i in range(3):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    x = load_dataset(tmp_path).test.x[0]
    assert np.array_equal((x * 255).round().numpy(), pixels.transpose(2, 0, 1))


def test_folder_errors(tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(ValueError, match=str(folder)) as raised:
            load_dataset(folder)
        return one_line(raised)

    (tmp_path / "none").mkdir()
    assert "none: expected images (.png, .jpg" in message(tmp_path / "none")
    for i in range(5):
        paint(tmp_path / "size" / f"{i}.png", i, size=(6, 4) if i == 3 else (5, 4))
    assert "3.png: expected 5 x 4 pixels as in 0.png, got 6 x 4" in message(tmp_path / "size")
    paint(tmp_path / "mixed" / "0.png", 1)
    paint(tmp_path / "mixed" / "a" / "0.png", 1)
    assert "expected either images or class subfolders, got both (0.png and a/)" in message(
        tmp_path / "mixed"
    )
    paint(tmp_path / "classes" / "a" / "0.png", 1)
    (tmp_path / "classes" / "b").mkdir()
    assert "b: expected images in the class subfolder, got none" in message(tmp_path / "classes")
    paint(tmp_path / "broken" / "0.png", 1)
    (tmp_path / "broken" / "1.png").write_bytes(b"no image")
    assert "1.png: expected an 8-bit image, got cannot identify" in message(tmp_path / "broken")
    paint(tmp_path / "deep" / "0.png", 1, "I;16")
    assert "0.png: expected an 8-bit image, got mode I;16" in message(tmp_path / "deep")
    paint(tmp_path / "few" / "0.png", 1)
    assert "few: expected at least 3 data to split, got 1" in message(tmp_path / "few")


@pytest.mark.parametrize("binarization", BINARIZATIONS)
def test_any_image_set_can_be_binarized(tmp_path: Path, binarization: str | None) -> None:
    for i in range(10):
        paint(tmp_path / f"{i}.png", 100 + i)
    data = load_dataset(tmp_path, binarization=binarization)
    (x,) = data.train.batch(torch.arange(8))
    bits = set(x.unique().tolist()) <= {0.0, 1.0}
    assert bits == (binarization is not None)


@pytest.mark.parametrize("y", [torch.rand(30), torch.randn(30, 4), torch.zeros(30, 2, dtype=torch.long)])
def test_semi_supervised_refuses_what_is_no_label_per_datum(y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^split: expected an integer label y per datum, \[30\], got"):
        semi_supervised(Split(torch.rand(30, 2), y), labels=2)


def test_batches_in_order_are_contiguous_copies() -> None:
    x = torch.rand(7, 2, 3).transpose(1, 2)
    for (batch,) in batches(Split(x), 3, device="cpu", shuffle=False):
        assert batch.is_contiguous()
        batch.zero_()
    assert (x != 0).any()
