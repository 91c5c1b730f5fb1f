"""The Python examples of the README and of the docs run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {
    f"{path.stem}-{i}": example
    for path in TEXTS
    for i, example in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
}


def test_every_text_has_examples() -> None:
    assert {name.partition("-")[0] for name in EXAMPLES} == {path.stem for path in TEXTS}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "example"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_every_link_to_a_file_exists(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
