"""Sprites: areas, symmetries and positions of what is drawn, the set of them, and the file of dSprites."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppl_vae.data import Dataset, check_data, load_dataset
from ppl_vae.sprites import DSPRITES_FILE, FACTORS, load_dsprites, make_sprites, render_sprites

RADIUS = 0.45
AREAS = {
    0: 2.0,
    1: math.pi / 2,
    2: 3.66246 / 1.25**2,
}  # in the unit circle; the heart's by summing over a grid
HALF = torch.tensor([0.5])


def draw(
    shape: int, scale: float = 1.0, turn: float = 0.0, x: float = 0.5, y: float = 0.5, **of: Any
) -> Tensor:
    numbers = (torch.tensor([value], dtype=torch.float64) for value in (scale, turn, x, y))
    return render_sprites(torch.tensor([shape]), *numbers, **of)


def rows(dataset: Dataset) -> tuple[Tensor, Tensor]:
    splits = (dataset.train, dataset.validation, dataset.test)
    return torch.cat([s.x for s in splits]), torch.cat([s.y for s in splits if s.y is not None])


def distinct(images: Tensor) -> int:
    return len({image.tobytes() for image in images.numpy()})


# -- the renderer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", AREAS)
@pytest.mark.parametrize(("scale", "turn", "size"), [(1.0, 0.0, 64), (0.7, 0.4, 64), (0.5, 2.0, 32)])
def test_the_pixels_sum_to_the_area_of_the_shape(shape: int, scale: float, turn: float, size: int) -> None:
    area = float(draw(shape, scale, turn, size=size).sum())
    expected = AREAS[shape] * (RADIUS * scale * size / 2) ** 2
    # a boundary of some 6 radii, each quarter pixel of which may be off by a quarter
    assert area == pytest.approx(expected, abs=6 * RADIUS * scale * size / 2 / 4 / 2)
    bits = draw(shape, scale, turn, size=size, antialias=1)
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    assert float(bits.sum()) == pytest.approx(expected, rel=0.15)


def test_antialiased_pixels_are_shares_of_points() -> None:
    image = draw(2, 0.8, 0.3, size=16, antialias=3)
    fine = draw(2, 0.8, 0.3, size=48, antialias=1)
    torch.testing.assert_close(image, torch.nn.functional.avg_pool2d(fine, 3))
    assert image.dtype == torch.float32


@pytest.mark.parametrize("shape", AREAS)
def test_a_quarter_turn_is_the_image_turned_counter_clockwise(shape: int) -> None:
    image, turned = draw(shape, 0.8, 0.3), draw(shape, 0.8, 0.3 + math.pi / 2)
    # rounding may move single points of the edge, 1 / 16 of a pixel each
    assert float((turned - image.rot90(1, (-2, -1))).abs().sum()) < 0.5
    period = {0: math.pi / 2, 1: math.pi, 2: 2 * math.pi}[shape]
    assert float((draw(shape, 0.8, 0.3 + period) - image).abs().sum()) < 0.5
    for part in (period / 2, period / 3):
        assert float((draw(shape, 0.8, 0.3 + part) - image).abs().sum()) > 20


def test_an_upright_heart_is_even_has_its_tip_below_and_its_notch_above() -> None:
    heart = draw(2, size=64, antialias=1)[0, 0]
    assert torch.equal(heart, heart.flip(1))
    lit = heart.any(1).nonzero()
    assert int(heart[lit[-1]].sum()) < int(heart[lit[0]].sum())
    assert heart[lit[0], 31] == 0 and heart[lit[-1], 31] == 1
    first = (heart[:, 31] > 0).nonzero()[0]
    assert int(first) > int(lit[0])


def test_x_goes_right_and_y_down_from_edge_to_edge() -> None:
    for shape in AREAS:
        middle = draw(shape, size=64)
        columns, lines = torch.arange(64.0), torch.arange(64.0)[:, None]
        for x, y in [(0.0, 0.5), (1.0, 0.0), (0.25, 0.75)]:
            moved = draw(shape, x=x, y=y, size=64)
            assert float(moved.sum()) == pytest.approx(
                AREAS[shape] * (RADIUS * 32) ** 2, rel=0.02
            )  # all is inside
            way = 64 * (1 - RADIUS)  # pixels from 0 to 1
            for grid, at in ((columns, x), (lines, y)):
                shift = float((grid * moved).sum() / moved.sum() - (grid * middle).sum() / middle.sum())
                assert shift == pytest.approx((at - 0.5) * way, abs=0.1)
    assert draw(0, 1.0, math.pi / 4, x=0.0, antialias=8)[..., 0].any()  # its corner touches the edge


@settings(deadline=None, max_examples=20)
@given(
    size=st.integers(16, 40),
    antialias=st.integers(1, 4),
    rest=st.lists(
        st.tuples(st.integers(0, 2), *[st.floats(0, 1)] * 3, st.floats(-10, 10)), min_size=1, max_size=40
    ),
)
def test_images_together_are_those_one_by_one(
    size: int, antialias: int, rest: list[tuple[float, ...]]
) -> None:
    shape, scale, x, y, turn = torch.tensor(rest).unbind(1)
    scale = 0.5 + scale / 2
    images = render_sprites(shape.long(), scale, turn, x, y, size=size, antialias=antialias)
    assert images.shape == (len(rest), 1, size, size) and images.dtype == torch.float32
    assert 0 <= float(images.min()) and float(images.max()) == 1.0
    i = len(rest) - 1
    alone = render_sprites(
        shape[i:].long(), scale[i:], turn[i:], x[i:], y[i:], size=size, antialias=antialias
    )
    assert torch.equal(alone, images[i:])


def test_one_value_stands_for_all() -> None:
    turns = torch.tensor([0.0, 0.3, 0.6])
    images = render_sprites(torch.tensor([0]), torch.ones(1), turns, HALF, HALF, size=16)
    assert len(images) == 3 and torch.equal(images[1:2], draw(0, 1.0, float(turns[1]), size=16))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"shape": torch.tensor([3])}, "shape: expected whole numbers from 0 to 2"),
        ({"shape": torch.tensor([-1])}, "shape: expected whole numbers"),
        ({"shape": torch.tensor([1.0])}, "shape: expected whole numbers"),
        ({"scale": torch.tensor([0.0])}, "scale: expected values above 0 and at most 1, got 0 to 0"),
        ({"scale": torch.tensor([1.5])}, "scale: expected values above 0"),
        ({"x": torch.tensor([-0.1])}, "x: expected values from 0 to 1, got -0.1"),
        ({"y": torch.tensor([1.1])}, "y: expected values from 0 to 1"),
        ({"rotation": torch.tensor([math.nan])}, "rotation: expected finite"),
        ({"rotation": torch.zeros(1, 1)}, r"rotation: expected a tensor \[n\], got shape \[1, 1\]"),
        ({"x": 0.5}, r"x: expected a tensor \[n\], got float"),
        ({"x": torch.rand(2), "y": torch.rand(3)}, "expected as many of each factor, or one, got .*x 2, y 3"),
        ({"size": 0}, "size: expected a whole number above 0"),
        ({"antialias": -1}, "antialias: expected a whole number above 0"),
    ],
)
def test_wrong_factors_are_named(wrong: dict[str, Any], match: str) -> None:
    good = {
        "shape": torch.tensor([0]),
        "scale": torch.ones(1),
        "rotation": torch.zeros(1),
        "x": HALF,
        "y": HALF,
    }
    with pytest.raises(ValueError, match=match):
        render_sprites(**(good | wrong))


# -- the set -----------------------------------------------------------------------------------------


def test_the_set_by_name_has_each_combination_once_and_no_image_twice() -> None:
    dataset = load_dataset("sprites")
    assert repr(dataset) == "Dataset('sprites', x_shape=(1, 32, 32), train=6144, validation=768, test=768)"
    x, y = rows(dataset)
    sizes = (3, 4, 10, 8, 8)
    index = np.ravel_multi_index(tuple(y.long().T.numpy()), sizes)
    assert sorted(index.tolist()) == list(range(math.prod(sizes)))
    assert distinct(x) == len(x) == 7680
    assert 0 <= float(x.min()) and float(x.max()) <= 1
    for key in ("train", "validation", "test"):
        split = getattr(dataset, key)
        check_data(split, key)
        assert split.source == {"name": "sprites", "binarization": None, "split": key}


def test_factors_are_those_that_were_drawn() -> None:
    x, y = rows(make_sprites(size=16, num_values=(3, 3, 4, 3, 2), antialias=2))
    again = render_sprites(
        y[:, 0].long(), 0.5 + y[:, 1] / 4, y[:, 2] * math.pi / 8, y[:, 3] / 2, y[:, 4], size=16, antialias=2
    )
    assert torch.equal(again, x)
    assert len(FACTORS) == y.shape[1]


def test_a_whole_turn_repeats_squares_and_ellipses_but_not_hearts() -> None:
    x, y = rows(make_sprites(size=32, num_values=(3, 1, 4, 1, 1), rotation_range=2 * math.pi, antialias=1))
    # bits whose points are not on an edge; a square of 4 quarter turns is one image
    assert [distinct(x[y[:, 0] == shape]) for shape in range(3)] == [1, 2, 4]


def test_a_random_part_has_no_repetition_and_follows_the_seed_alone() -> None:
    parts = {"size": 16, "num_data": 50, "num_values": (3, 6, 40, 32, 32)}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second, other = make_sprites(**parts), make_sprites(**parts), make_sprites(**parts, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(first.train), len(first.validation), len(first.test)] == [40, 5, 5]
    (x, y), (x_again, y_again), (_, y_other) = rows(first), rows(second), rows(other)
    assert torch.equal(x, x_again) and torch.equal(y, y_again) and not torch.equal(y, y_other)
    assert len(y.unique(dim=0)) == 50
    assert (y < torch.tensor([3, 6, 40, 32, 32])).all() and (
        y.amax(0) > torch.tensor([1, 4, 30, 24, 24])
    ).all()


def test_sprites_are_binarized_like_other_images() -> None:
    bits = load_dataset("sprites", binarization="threshold")
    assert set(bits.test.x.unique().tolist()) == {0.0, 1.0}
    assert bits.test.y is not None and bits.test.y.shape == (768, 5)
    assert bits.test.source == {"name": "sprites", "binarization": "threshold", "split": "test"}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"num_values": (4, 2, 2, 2, 2)}, "num_values: expected numbers for shape, .* up to 3 shapes, got"),
        ({"num_values": (3, 2, 2, 2)}, "num_values: expected numbers for shape"),
        ({"num_values": (3, 0, 2, 2, 2)}, r"num_values\[1\]: expected a whole number above 0"),
        ({"num_values": 5}, "num_values: expected numbers for shape"),
        ({"num_values": (2, 1, 1, 1, 1)}, "num_values: expected 3 to 2 combinations"),
        ({"num_data": 7681}, "num_data: expected 3 to 7680 combinations of factors, got 7681"),
        ({"num_data": 2}, "num_data: expected 3 to 7680"),
        ({"rotation_range": 0.0}, "rotation_range"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_sprites(**wrong)


# -- the file of dSprites ----------------------------------------------------------------------------


class Bomb:
    """What says so when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (warnings.warn, ("the metadata were unpickled",))


def arrays(n: int = 30) -> dict[str, Any]:
    generator = np.random.RandomState(0)
    classes = np.stack([np.zeros(n), *(generator.randint(0, k, n) for k in (3, 6, 40, 32, 32))], 1)
    images = np.zeros((n, 8, 8), np.uint8)
    images.reshape(n, -1)[np.arange(n), np.arange(n)] = 1  # each image says which one it is
    metadata = np.empty((), object)
    metadata[()] = {"author": Bomb()}
    return {
        "metadata": metadata,
        "imgs": images,
        "latents_classes": classes.astype(np.int64),
        "latents_values": classes.astype(np.float64),
    }


def put(folder: Path, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    held = {key: value for key, value in (arrays() | changed).items() if value is not None}
    np.savez_compressed(folder / DSPRITES_FILE, **held)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PPL_VAE_DATA", raising=False)
    return tmp_path / "cache" / "ppl-vae"


def test_dsprites_by_name_has_its_images_with_their_factors_and_leaves_the_pickle_alone(
    tmp_path: Path,
) -> None:
    root = put(tmp_path / "root")
    with pytest.warns(UserWarning, match="unpickled"):  # it would be noticed
        np.load(root / DSPRITES_FILE, allow_pickle=True)["metadata"]
    dataset = load_dataset("dsprites", root=root)
    assert repr(dataset) == "Dataset('dsprites', x_shape=(1, 8, 8), train=24, validation=3, test=3)"
    x, y = rows(dataset)
    which = x.flatten(1).argmax(1)
    assert sorted(which.tolist()) == list(range(30)) and float(x.sum()) == 30
    assert x.dtype == y.dtype == torch.float32
    assert torch.equal(y, torch.from_numpy(arrays()["latents_classes"][:, 1:]).float()[which])
    assert dataset.train.source == {"name": "dsprites", "binarization": None, "split": "train"}
    check_data(dataset.train, "train")


def test_dsprites_is_found_in_each_place(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache)
    assert len(load_dsprites().train) == 24
    put(tmp_path / "data" / "dsprites", **{key: value[:20] for key, value in arrays().items() if value.ndim})
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path / "data"))
    assert len(load_dsprites().train) == 16
    assert len(load_dsprites(tmp_path / "data").train) == 16


def test_a_part_of_dsprites_is_chosen_by_the_seed(tmp_path: Path) -> None:
    root = put(tmp_path)
    (x, _), (again, _), (other, _) = (rows(load_dsprites(root, num_data=10, seed=s)) for s in (0, 0, 1))
    assert len(x) == distinct(x) == 10
    assert torch.equal(x, again) and not torch.equal(x, other)
    for number in (2, 31):
        with pytest.raises(ValueError, match="num_data: expected 3"):
            load_dsprites(root, num_data=number)


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path: Path, cache: Path) -> None:
    where = "get it from https://github.com/google-deepmind/dsprites-dataset and put it there"
    with pytest.raises(FileNotFoundError, match=where) as raised:
        load_dataset("dsprites")
    assert str(cache / DSPRITES_FILE) in str(raised.value) and "PPL_VAE_DATA" in str(raised.value)
    with pytest.raises(FileNotFoundError, match=where) as raised:
        load_dataset("dsprites", root=tmp_path / "here")
    assert str(tmp_path / "here" / "dsprites" / DSPRITES_FILE) in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"imgs": None}, r"expected arrays 'imgs' and 'latents_classes', got \['metadata'"),
        ({"latents_classes": None}, "expected arrays"),
        ({"imgs": np.zeros((30, 8, 8), np.float32)}, "imgs: expected bits .* got float32"),
        ({"imgs": np.full((30, 8, 8), 255, np.uint8)}, "imgs: expected bits"),
        ({"imgs": np.zeros((30, 64), np.uint8)}, r"imgs: expected bits .* shape \[30, 64\]"),
        (
            {"imgs": np.zeros((29, 8, 8), np.uint8)},
            r"latents_classes: .*\[29, 6\], got int64 of shape \[30, 6\]",
        ),
        ({"latents_classes": np.zeros((30, 5), np.int64)}, "latents_classes: expected whole numbers"),
        ({"latents_classes": np.zeros((30, 6))}, "latents_classes: .* got float64"),
        ({"latents_classes": np.ones((30, 6), np.int64)}, "latents_classes: expected one colour, 0"),
        ({"latents_classes": np.array([Bomb()])}, "expected the .npz of dSprites, got Object arrays"),
    ],
)
def test_another_file_is_refused_and_no_pickle_is_loaded(tmp_path: Path, changed: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match) as raised:
        load_dsprites(put(tmp_path, **changed))
    assert DSPRITES_FILE in str(raised.value)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / DSPRITES_FILE).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=r"expected the \.npz of dSprites, got"):
        load_dsprites(tmp_path)
