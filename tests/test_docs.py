"""The documentation site leaves nothing out, and its links lead somewhere; `make docs` builds it."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in [*ROOT.glob("ppl_vae/*.py"), *ROOT.glob("ppl_vae/*/__init__.py")]
    if "\n__all__ = " in path.read_text()
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def entries(items: list[Any]) -> list[str]:
    """Return the files of a navigation."""
    found: list[str] = []
    for item in items:
        for value in item.values() if isinstance(item, dict) else [item]:
            found += entries(value) if isinstance(value, list) else [value]
    return found


NAVIGATION = entries(SITE["nav"])


def slugs(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as the site writes them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+?)(?: \{.*\})?$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_every_page_and_notebook_is_in_the_navigation_once() -> None:
    assert (DOCS / "notebooks").readlink() == Path("../notebooks")
    notebooks = [f"notebooks/{path.name}" for path in NOTEBOOKS]
    assert sorted(NAVIGATION) == sorted([*notebooks, *(path.relative_to(DOCS).as_posix() for path in PAGES)])


def test_the_reference_shows_every_public_module() -> None:
    shown = [line for path in PAGES for line in re.findall(r"^::: (.+)$", path.read_text(), re.MULTILINE)]
    assert sorted(shown) == MODULES
    for module in MODULES:
        page = DOCS / "reference" / f"{module.removeprefix('ppl_vae.')}.md"
        assert f"\n::: {module}\n" in page.read_text()
        assert f"]({page.name})" in (DOCS / "reference" / "index.md").read_text()


def text_of(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text()
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("path", [*PAGES, *sorted(ROOT.glob("*.md")), *NOTEBOOKS], ids=name)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            there = path.parent / file if file else path
            assert there.exists(), target
            if anchor and there.suffix == ".md":
                assert anchor in slugs(there), target


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / ".ci" / "site_hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_bar_in_a_docstrings_table_does_not_end_the_cell(hooks: Any) -> None:
    table = "====  =====\na     KL(q(z | x)\n      over p(z))\n====  =====\n"
    assert hooks.as_markdown(table).splitlines()[2:] == [r"| `a` | KL(q(z \| x) over p(z)) |"]


def test_links_of_notebooks_lead_to_pages_of_the_site(hooks: Any) -> None:
    content = '<a href="../docs/guides.md#on-mnist"> <a href="02_priors.ipynb"> <a href="https://a.b/c.md">'
    page = SimpleNamespace(file=SimpleNamespace(src_uri="notebooks/01_first_vae.ipynb"))
    expected = '<a href="../guides.html#on-mnist"> <a href="02_priors.html"> <a href="https://a.b/c.md">'
    assert hooks.on_page_content(content, page) == expected
