"""The reports of ``ppl-vae evaluate --all`` and ``ppl-vae compare RUN RUN``."""

import importlib
import shlex
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml

from ppl_vae import load_run
from ppl_vae._random import seeded
from ppl_vae.cli import main, report
from ppl_vae.data import Split, load_dataset
from ppl_vae.evaluation.evaluate import evaluate

evaluating = importlib.import_module("ppl_vae.cli.evaluating")
fitting = importlib.import_module("ppl_vae.cli.fitting")

pytestmark = pytest.mark.filterwarnings("default::UserWarning")  # of k-hat, after two epochs

FIT = "--epochs 2 --num_particles 2 --encoder.hidden 8 --decoder.hidden 8 --progress false"
FEW = "--size 40 --num_particles 25 --gaps_size 4 --gaps_steps 3 --progress false"
ALL = f"{FEW} --calibration_size 100 --classifier_size 50"
PARTS = [
    *("history", "evaluate", "log_likelihood", "inference_gaps", "elbo_decomposition", "active_units"),
    *("collapse_report", "calibration", "sample_quality"),
    *("reconstructions", "samples", "traversal", "latents"),
]
STRANGE = "<script>alert(1)&amp;.npz"  # a file's name; it has no labels


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Page(HTMLParser):
    """A page that is parsed, its tags closed in order."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def ids(self) -> list[str | None]:
        return [value for name, value in self.attributes if name == "id"]

    def row(self, first: str) -> list[str]:
        return next(cells[1:] for cells in self.rows if cells[0] == first)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs on digits and on bits, which are reported on in copies of it."""
    folder = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    np.savez(folder / STRANGE, x=rng.integers(0, 2, (400, 6)).astype("f4"))
    np.savez(folder / "other.npz", x=rng.integers(0, 2, (400, 6)).astype("f4"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(fitting, "draw", lambda run, dataset: "none")
        for name, options in {
            "a": "--latent_dim 2",
            "b": "--latent_dim 3 --guide FullRankGuide",
            "static": "--latent_dim 2 --binarization static",
            "<b>bits": f"--latent_dim 2 --data '{STRANGE}'",
            "other": "--latent_dim 2 --data other.npz",
        }.items():
            assert main(shlex.split(f"fit {FIT} {options} --output '{name}'")) == 0
    return folder


@pytest.fixture
def cli(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[str], Result]]:
    """Return the command line in a copy of ``home``; a classifier is hardly trained there, to save time."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluating, "_STEPS", 2)

    def call(line: str) -> Result:
        capsys.readouterr()
        code = main(shlex.split(line))
        return Result(code, *capsys.readouterr())

    yield call
    plt = pytest.importorskip("matplotlib.pyplot")
    assert plt.get_fignums() == []  # every figure was closed


def read(path: str | Path) -> dict[str, Any]:
    return yaml.safe_load(Path(path).read_text())


def assert_alone(page: Page) -> None:
    """Fail if the page needs anything from elsewhere, or runs anything."""
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset", "href", "data", "action"):
            assert value is not None
            assert value.startswith("#" if name == "href" else "data:image/png;base64,")
    for foreign in ("http://", "https://", "url(", "@import", "file:"):
        assert foreign not in page.source


def data_of(name: str, size: int, seed: int = 0) -> Split:
    """Return the test data that a report is on."""
    split = load_dataset(name, binarization="dynamic").test
    with seeded(seed):
        return Split(*split.batch(torch.randperm(len(split))[:size]))


# evaluate --all


def test_evaluate_all_writes_every_part_of_a_pair_on_labelled_images(cli: Callable[[str], Result]) -> None:
    result = cli(f"evaluate a --all {ALL} --seed 3")
    assert result.code == 0, result
    page, numbers = Page("a/report.html"), read("a/evaluation.yaml")
    assert_alone(page)
    assert page.ids == PARTS
    assert numbers["skipped"] == {}
    assert list(numbers["parts"]) == PARTS[2:9]
    assert page.source.count("<img ") == 9
    for text in (
        f"ppl-vae evaluate a --all {ALL} --seed 3",
        "VAE with MeanFieldGuide",
        "digits, x of [1, 8, 8], binarisation dynamic",
        "test data, 40 of 447, at random",
        "25 per datum",
        f"torch {torch.__version__.split('+')[0]}",
        "nats per datum",
        "100 data of the model",
    ):
        assert text in page.text
    for part, line in zip(
        PARTS, [row for row in result.out.splitlines() if row.startswith("[")], strict=True
    ):
        assert f"/{len(PARTS)}] " in line, part
    assert result.out.endswith("numbers: a/evaluation.yaml\nreport: a/report.html\n")

    run = load_run("a")
    expected = evaluate(
        run.model, run.guide, data_of("digits", 40, 3), num_particles=25, seed=3, progress=False
    )
    assert {name: numbers[name] for name in expected.summary()} == expected.summary()
    assert page.row("ELBO")[:2] == [
        report.number(expected.elbo.mean),
        report.number(expected.elbo.standard_error),
    ]
    counts = {name: part["num_data"] for name, part in numbers["parts"].items() if "num_data" in part}
    assert counts == dict.fromkeys(PARTS[2:7], 40) | {"inference_gaps": 4, "calibration": 100}
    unreliable = numbers["parts"]["log_likelihood"]["num_unreliable"]
    assert page.row("k-hat above 0.7") == [f"{unreliable} of 40 data"]
    assert "the optimum was still rising after 3 steps; give more --gaps_steps" in page.text
    assert numbers["parts"]["sample_quality"]["classifier_size"] == 50


def test_what_does_not_suit_is_skipped_with_its_reason_and_names_are_escaped(
    cli: Callable[[str], Result],
) -> None:
    result = cli(f"evaluate --all '<b>bits' {ALL}")
    assert result.code == 0, result
    page, numbers = Page("<b>bits/report.html"), read("<b>bits/evaluation.yaml")
    assert_alone(page)
    skipped = numbers["skipped"]
    assert list(skipped) == ["sample_quality", "reconstructions", "samples", "traversal"]
    assert page.ids == [part for part in PARTS if part not in skipped]
    assert "no labels to train a classifier on" in skipped["sample_quality"]
    for reason in skipped.values():
        assert f"  skipped: {reason}" in result.out
    assert page.row("Quality of samples") == [f"skipped: {skipped['sample_quality']}"]
    assert "images [C, H, W] are needed" in page.text
    assert f"{STRANGE}, x of [6]" in page.text
    assert "Evaluation of <b>bits" in page.text
    assert "<b>" not in page.source
    assert "<script>" not in page.source
    assert cli(f"evaluate --all '<b>bits' {ALL}").code == 0  # the same again
    assert Page("<b>bits/report.html").source == page.source
    assert read("<b>bits/evaluation.yaml") == numbers


def test_a_guide_without_a_head_and_discrete_latents_are_no_obstacle(
    cli: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = "--model gaussianmixture --model.components 2 --latent_dim 2"
    line = f"fit {FIT} --data other.npz {pair} --output mixture"
    monkeypatch.setattr(fitting, "draw", lambda run, dataset: "none")
    assert cli(line).code == 0
    result = cli(f"evaluate mixture --all {ALL}")
    assert result.code == 0, result
    page, skipped = Page("mixture/report.html"), read("mixture/evaluation.yaml")["skipped"]
    assert "inference_gaps" in skipped
    assert {"evaluate", "log_likelihood", "history"} <= set(page.ids)
    assert page.row("Inference gaps") == [f"skipped: {skipped['inference_gaps']}"]


@pytest.mark.parametrize("error", [KeyError("no"), AttributeError("none"), RuntimeError("broken")])
def test_a_bug_is_not_taken_for_a_pair_that_does_not_suit(
    error: Exception, cli: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    before = Path("other/evaluation.yaml").read_bytes()
    monkeypatch.setattr(evaluating, "log_likelihood", broken)
    if isinstance(error, RuntimeError):
        assert cli(f"evaluate other --all {ALL}").code == 1
    else:
        with pytest.raises(type(error)):
            cli(f"evaluate other --all {ALL}")
    assert not Path("other/report.html").exists()
    assert Path("other/evaluation.yaml").read_bytes() == before


def test_parts_that_refuse_are_named_and_the_others_run(
    cli: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {
        "log_likelihood": ValueError,
        "inference_gaps": TypeError,
        "simulation_based_calibration": NotImplementedError,
    }
    for name, kind in refused.items():

        def refuse(*_: Any, kind: type[Exception] = kind, **__: Any) -> None:
            raise kind("guide: <i>not</i>\n this one")

        monkeypatch.setattr(evaluating, name, refuse)
    assert cli(f"evaluate other --all {ALL}").code == 0
    page, skipped = Page("other/report.html"), read("other/evaluation.yaml")["skipped"]
    for name, title in {
        "log_likelihood": "Log-likelihood",
        "inference_gaps": "Inference gaps",
        "calibration": "Calibration",
    }.items():
        assert skipped[name] == "guide: <i>not</i> this one"
        assert page.row(title) == ["skipped: guide: <i>not</i> this one"]
    assert {"evaluate", "elbo_decomposition", "collapse_report"} <= set(page.ids)


def test_evaluate_without_all_writes_no_report(cli: Callable[[str], Result]) -> None:
    assert cli("evaluate other --num_particles 2 --progress false").code == 0
    assert not Path("other/report.html").exists()
    assert "parts" not in read("other/evaluation.yaml")
    assert cli("evaluate other --all false --num_particles 2 --progress false").code == 0
    assert not Path("other/report.html").exists()


# compare RUN RUN


def test_compare_gives_paired_differences_of_what_evaluate_measures(cli: Callable[[str], Result]) -> None:
    result = cli(f"compare a b {FEW} --output here")
    assert result.code == 0, result
    assert result.out.endswith("numbers: here/comparison.yaml\nreport: here/comparison.html\n")
    page, numbers = Page("here/comparison.html"), read("here/comparison.yaml")
    assert_alone(page)
    assert page.ids == ["measures", "differences", "settings", "history", "reconstructions", "samples"]
    assert page.source.count("<img ") == 4
    data = data_of("digits", 40)
    a, b = (
        evaluate(run.model, run.guide, data, num_particles=25, progress=False)
        for run in (load_run("a"), load_run("b"))
    )
    assert numbers["runs"]["a"]["evaluate"] == a.summary()
    assert numbers["runs"]["b"]["evaluate"] == b.summary()
    found = numbers["difference to a"]["b"]
    for name, difference in {
        "ELBO": b.elbo.values - a.elbo.values,
        "reconstruction": b.reconstruction.values - a.reconstruction.values,
        "KL": b.kl["z"].values - a.kl["z"].values,
        "log p(x)": b.log_likelihood.values - a.log_likelihood.values,
    }.items():
        mean, error = float(difference.mean()), float(difference.std() / 40**0.5)
        assert found[name]["mean"] == pytest.approx(mean, rel=1e-9)
        assert found[name]["standard_error"] == pytest.approx(error, rel=1e-9)
        assert [report.with_error(mean, error, 3)] in [row[1:] for row in page.rows if row[0] == name]
    assert page.row("KL") == [report.with_error(r.kl["z"].mean, r.kl["z"].standard_error) for r in (a, b)]
    assert {"approximation gap", "amortisation gap", "inference gap"} <= found.keys()
    assert numbers["runs"]["b"]["inference_gaps"]["num_data"] == 4
    settings = {
        row[0]: row[1:] for row in page.rows if row[0].startswith(("guide.", "model.", "seed", "epochs"))
    }
    assert settings["guide.class"] == ["MeanFieldGuide", "FullRankGuide"]
    assert settings["guide.latent_dim"] == settings["model.prior.latent_dim"] == ["2", "3"]
    assert "epochs" not in settings
    assert page.row("active units of z")[1].endswith(" of 3")
    assert "the same for all runs" in page.text


def test_compare_of_vectors_says_why_there_are_no_images(cli: Callable[[str], Result]) -> None:
    shutil.copytree("<b>bits", "<i>copy")
    assert cli(f"compare '<b>bits' '<i>copy' {FEW}").code == 0
    page = Page("comparison.html")
    assert_alone(page)
    assert "images [C, H, W] are needed" in page.text
    assert "None." in page.text  # settings that differ
    difference = read("comparison.yaml")["difference to <b>bits"]["<i>copy"]
    assert difference["ELBO"] == {"mean": 0.0, "standard_error": 0.0}
    assert "<b>" not in page.source
    assert page.row("1")[0] == "<b>bits"


# Bad input


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("evaluate nowhere --all", ["nowhere: expected the folder of a saved run, found no config.yaml"]),
        ("evaluate a b --all", ["RUN: expected the folder of a saved run", "'a', 'b'"]),
        ("evaluate --all", ["RUN: expected the folder of a saved run", "got none"]),
        ("evaluate a --size 3", ["--size: expected only with --all, got 3"]),
        ("evaluate a --gaps_steps 3", ["--gaps_steps: expected only with --all, got 3"]),
        ("evaluate a --all --size 1", ["--size: expected at least 2, got 1"]),
        ("evaluate a --all --size 0", ["--size: expected a whole number above 0, got 0"]),
        ("evaluate a --all --gaps_size 0", ["--gaps_size: expected a whole number above 0, got 0"]),
        ("evaluate a --all --num_particles 1", ["--num_particles: expected at least 2, got 1"]),
        ("evaluate a --all --calibration_size 99", ["--calibration_size: expected at least 100, got 99"]),
        ("evaluate a --all --memory -1", ["--memory: "]),
        ("evaluate a --all --seed -1", ["--seed: expected a whole number from 0"]),
        ("evaluate a --all --split tset", ["--split: unknown 'tset' (did you mean 'test'?)"]),
        ("evaluate a --all --device cuda:99", ["--device: "]),
        ("evaluate a --all --data other.npz", ["--data: "]),
        ("compare a nowhere", ["nowhere: expected the folder of a saved run, found no config.yaml"]),
        ("compare a other.npz", ["RUN: expected the folders of saved runs, got the file other.npz"]),
        ("compare a empty", ["empty: expected the folder of a saved run, found no config.yaml in it"]),
        ("compare a ./a", ["RUN: expected different runs, got 'a', './a'"]),
        ("compare a other", ["RUN: a and other were made on different data", "digits and other.npz"]),
        ("compare other '<b>bits'", ["other and <b>bits were made on different data", "x of [40, 6]"]),
        ("compare a static", ["a and static were made on different data", "binarisation dynamic and static"]),
        (
            "compare a b --estimators stl",
            ["--estimators: expected only with one saved run or none", "2 runs"],
        ),
        ("compare a b --epochs 3", ["--epochs: expected only with one saved run or none"]),
        ("compare a --gaps_size 3", ["--gaps_size: expected only with several saved runs, got 3"]),
        ("compare a b --size 1", ["--size: expected at least 2, got 1"]),
        ("compare a b --split tset", ["--split: unknown 'tset' (did you mean 'test'?)"]),
        ("compare a b --output other.npz", ["--output: expected a folder, got the file other.npz"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    line: str, parts: list[str], cli: Callable[[str], Result]
) -> None:
    Path("empty").mkdir()
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    result = cli(line)
    assert result.code == 2, result
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


# The page


def test_everything_given_as_text_is_escaped(tmp_path: Path) -> None:
    evil = "</style><script>\"'&lt;"
    blocks = [
        report.facts({evil: evil, "plain": evil}, code=(evil,)),
        report.paragraph(evil),
        report.notes([evil]),
        report.table([evil], [[evil, evil], ["<script>", "1"]], caption=evil, linked={evil: 'x"><script>'}),
        report.section('y"><script>', evil, [report.folded(evil, report.paragraph(evil))]),
    ]
    blocks.append(report.figure(bytes(24), evil))
    path = tmp_path / "page.html"
    path.write_text(report.page(evil, blocks), encoding="utf-8")
    page = Page(path)
    assert "<script" not in page.source
    assert page.tags.isdisjoint({"script"})
    assert page.ids == ['y"><script>']
    assert ("href", '#x"><script>') in page.attributes
    assert page.rows == [[evil], [evil, evil], ["<script>", "1"]]
    assert page.texts.count(evil) == 14
    assert ("alt", evil) in page.attributes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (report.number(-1.234), "−1.23"),
        (report.number(float("nan")), "–"),
        (report.number(float("-inf")), "−∞"),
        (report.significant(0.00012345), "0.000123"),
        (report.significant(-1e-9), "−1e−09"),
        (report.with_error(-2.0, 0.125, 3), "−2.000 ± 0.125"),
        (report.with_error(-2.0, float("nan")), "−2.00"),
    ],
)
def test_numbers_in_words(text: str, expected: str) -> None:
    assert text == expected
