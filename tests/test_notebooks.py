"""Every notebook runs from top to bottom, at the small size that the variable CI asks for."""

import ast
import importlib
import pkgutil
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXPECTED = [
    "01_first_vae",
    "02_priors",
    "03_guides_and_flows",
    "04_elbo_estimators",
    "05_is_my_posterior_right",
    "06_labels",
    "07_structure",
    "08_disentanglement_and_collapse",
    "09_speed",
]
SWITCH = 'SMALL = "CI" in os.environ'
SCREEN = 40  # lines

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_the_notebooks_are_those_of_the_list() -> None:
    assert [path.stem for path in NOTEBOOKS] == EXPECTED


def test_every_notebook_of_the_checkout_is_run_by_the_tests() -> None:
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "*.ipynb"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, or no git")
    assert {ROOT / line for line in tracked.stdout.splitlines()} <= set(NOTEBOOKS)


@pytest.mark.filterwarnings("ignore")  # Jupyter's own, the library's would show in the kernel
@every_notebook
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    importlib.import_module("matplotlib.font_manager")  # whose first import may take long, and says so
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not printed


@every_notebook
def test_notebook_is_committed_as_it_ran_from_top_to_bottom_without_a_warning(path: Path) -> None:
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    texts = [{**output.get("data", {}), "image/png": None} for output in outputs]
    assert not re.search(r"/(home|root|tmp|work|Users)/", str([texts, [o.get("text") for o in outputs]]))


@every_notebook
def test_notebook_says_what_the_reader_will_be_able_to_do_cites_papers_and_ends_with_what_to_try(
    path: Path,
) -> None:
    text = [cell.source for cell in cells(path, "markdown")]
    assert text[0].startswith("# ")
    assert "After this notebook you can" in text[0]
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", text[0])
    last = nbformat.read(path, as_version=4).cells[-1]
    assert last.cell_type == "markdown"
    assert last.source.startswith("## What to try next")


@every_notebook
def test_notebook_has_one_switch_and_no_cell_longer_than_a_screen(path: Path) -> None:
    code = cells(path, "code")
    assert SWITCH in code[0].source
    assert not any("environ" in cell.source for cell in code[1:])
    assert max(len(cell.source.splitlines()) for cell in code) <= SCREEN


@every_notebook
def test_notebook_uses_public_names_alone(path: Path) -> None:
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ppl_vae":
                module = importlib.import_module(str(node.module))
                inside = pkgutil.iter_modules(getattr(module, "__path__", []), f"{module.__name__}.")
                packages = {found.name.rpartition(".")[2] for found in inside if found.ispkg}
                names = {alias.name for alias in node.names}
                assert names <= packages | {*module.__all__}, node.module
                assert not any(name.startswith("_") for name in names)
            if isinstance(node, ast.Import):
                assert all(not alias.name.startswith("ppl_vae.") for alias in node.names)
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_") or node.attr.startswith("__"), node.attr
