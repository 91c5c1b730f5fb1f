"""The documentation site leaves nothing out, and its links lead somewhere; `make docs` builds it."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = sorted(DOCS.rglob("*.md"))
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
    """Return the anchors of a page's headings, as GitHub and the site write them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+?)(?: \{.*\})?$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_every_page_is_in_the_navigation_once() -> None:
    pages = [entry for entry in NAVIGATION if "*" not in entry]
    assert sorted(pages) == sorted(path.relative_to(DOCS).as_posix() for path in PAGES)


def test_every_notebook_is_in_the_navigation() -> None:
    (pattern,) = [entry for entry in NAVIGATION if "*" in entry]
    assert (DOCS / "notebooks").readlink() == Path("../notebooks")
    shown = {path.name for path in DOCS.glob(pattern)}
    assert shown == {path.name for path in (ROOT / "notebooks").rglob("*.ipynb")}
    assert len(shown) > 0


def test_the_reference_shows_every_public_module() -> None:
    shown = [line for path in PAGES for line in re.findall(r"^::: (.+)$", path.read_text(), re.MULTILINE)]
    assert sorted(shown) == MODULES
    for module in MODULES:
        assert hasattr(importlib.import_module(module), "__all__")
        page = DOCS / "reference" / f"{module.removeprefix('ppl_vae.')}.md"
        assert f"\n::: {module}\n" in page.read_text()
        assert "members: [" not in page.read_text().replace(
            "inherited_members", ""
        )  # which would choose some
        assert f"]({page.name})" in (DOCS / "reference" / "index.md").read_text()


@pytest.mark.parametrize("path", [*PAGES, *sorted(ROOT.glob("*.md"))], ids=name)
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            there = path.parent / file if file else path
            assert there.exists(), target
            if anchor and there.suffix == ".md":
                assert anchor in slugs(there), target
