"""The package as a whole: how it is imported, what it promises by name, and what its sources keep to."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ppl_vae"
SOURCES = sorted(PACKAGE.rglob("*.py"))
SUBPACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
MODULES = ("data", "sklearn", "sprites")
PUBLIC = ["ppl_vae", *(f"ppl_vae.{name}" for name in (*SUBPACKAGES, *MODULES))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that starts in the root of the checkout."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


# Import


@pytest.mark.parametrize("name", ["models", "guides"])
def test_root_entry_is_a_relative_link(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("ppl_vae") / name


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("models", "import models"),
        ("models", "from models import VAE"),
        ("models", "import models.vae"),
        ("guides", "import guides"),
        ("guides", "from guides.mean_field import MeanFieldGuide"),
    ],
)
def test_import_through_a_root_link_is_refused(name: str, statement: str) -> None:
    done = python(statement)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"import ppl_vae.{name}" in last
    assert f"'{name}'" in last


def test_import_is_light_and_keeps_the_global_settings() -> None:
    done = python(
        "import sys, torch\n"
        "dtype, state = torch.get_default_dtype(), torch.get_rng_state()\n"
        "import ppl_vae\n"
        "import pyro.distributions, pyro.infer.util, pyro.poutine.util\n"
        "print(sorted({'torchvision', 'matplotlib', 'sklearn'} & set(sys.modules)))\n"
        "print(torch.distributions.Distribution._validate_args)\n"
        "print(pyro.distributions.is_validation_enabled())\n"
        "print(pyro.infer.util.is_validation_enabled(), pyro.poutine.util.is_validation_enabled())\n"
        "print(torch.get_default_dtype() == dtype, torch.equal(torch.get_rng_state(), state))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["[]", "True", "True", "True True", "True True", ""]


def test_every_module_keeps_validation_on() -> None:
    names = [relative(path)[:-3].replace("/", ".").removesuffix(".__init__") for path in SOURCES]
    names = [name for name in names if not name.endswith("__main__")]
    done = python(
        "import importlib, torch\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    if not torch.distributions.Distribution._validate_args:\n"
        "        raise SystemExit(f'{name} switches argument validation off')\n"
    )
    assert done.returncode == 0, done.stderr


# Names


@pytest.mark.parametrize("module_name", PUBLIC)
def test_public_names_exist_and_have_a_docstring(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert inspect.getdoc(module)
    assert len(module.__all__) == len(set(module.__all__)) > 0
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
            # A class's own: getdoc would take the one of torch.nn.Module.
            assert value.__doc__, f"{module_name}.{name} has no docstring"


def is_result(value: object) -> bool:
    """Return whether users get it from a function and never make it: a dataclass of evaluation or tasks."""
    module = getattr(value, "__module__", "")
    return dataclasses.is_dataclass(value) and module.startswith(("ppl_vae.evaluation.", "ppl_vae.tasks."))


@pytest.mark.parametrize("module_name", PUBLIC)
def test_public_names_have_an_example(module_name: str) -> None:
    """The docstring of each function, and of each class but those of results, has an example that runs."""
    module = importlib.import_module(module_name)
    for name in module.__all__:
        value = getattr(module, name)
        if (inspect.isclass(value) or inspect.isroutine(value)) and not is_result(value):
            examples = doctest.DocTestParser().get_examples(value.__doc__)
            ran = [example for example in examples if not example.options.get(doctest.SKIP)]
            assert ran, f"{module_name}.{name} has no example that runs"


def test_version_is_that_of_pyproject() -> None:
    import tomllib

    import ppl_vae

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ppl_vae.__version__ == project["version"]


# Sources


def public_classes(tree: ast.Module) -> list[str]:
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    return [name for name in classes if not name.startswith("_")]


def asserts(tree: ast.Module) -> list[int]:
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def pyro_samples(tree: ast.Module) -> list[int]:
    """Lines that name ``pyro.sample``, under whatever name it was imported."""
    modules, functions = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in ("pyro", "pyro.primitives"):
                    modules.add(alias.asname or alias.name)
                elif alias.name.startswith("pyro.") and alias.asname is None:
                    modules.add("pyro")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if node.module in ("pyro", "pyro.primitives") and alias.name == "sample":
                    functions.add(alias.asname or alias.name)
                elif node.module == "pyro" and alias.name == "primitives":
                    modules.add(alias.asname or alias.name)
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "sample" and ast.unparse(node.value) in modules:
            lines.append(node.lineno)
        elif isinstance(node, ast.Name) and node.id in functions:
            lines.append(node.lineno)
    return lines


def parsed(paths: list[Path]) -> Iterator[tuple[str, ast.Module]]:
    for path in paths:
        yield relative(path), ast.parse(path.read_text(), filename=str(path))


@pytest.mark.parametrize("folder", ["models", "guides", "priors", "likelihoods"])
def test_one_public_class_per_file(folder: str) -> None:
    for name, tree in parsed(sorted((PACKAGE / folder).glob("*.py"))):
        found = public_classes(tree)
        stem = Path(name).stem
        if stem == "__init__":
            assert found == [], f"{name} only re-exports"
        elif stem.startswith("_"):
            assert len(found) <= 1, f"{name}: expected at most one public class, got {found}"
        else:
            assert len(found) == 1, f"{name}: expected one public class, got {found}"


def test_no_assert_in_the_library() -> None:
    assert {name: lines for name, tree in parsed(SOURCES) if (lines := asserts(tree))} == {}


def test_only_models_and_guides_sample() -> None:
    programs = {PACKAGE / "models", PACKAGE / "guides"}
    others = [path for path in SOURCES if path.parent not in programs]
    assert {name: lines for name, tree in parsed(others) if (lines := pyro_samples(tree))} == {}


def test_source_checks_find_what_they_look_for() -> None:
    found = ast.parse("class A: ...\nclass _B: ...\nclass C: ...\ndef f():\n    assert True\n")
    assert public_classes(found) == ["A", "C"]
    assert asserts(found) == [5]
    for source in (
        "import pyro\npyro.sample('z', d)",
        "import pyro as p\np.sample('z', d)",
        "import pyro.distributions\npyro.sample('z', d)",
        "import pyro.primitives\npyro.primitives.sample('z', d)",
        "from pyro import primitives\nprimitives.sample('z', d)",
        "from pyro import sample\nsample('z', d)",
        "from pyro.primitives import sample as draw\ndraw('z', d)",
    ):
        assert pyro_samples(ast.parse(source)) == [2], source
    for source in (
        "import pyro\nd.sample()",
        "import pyro\npyro.plate('data', 3)",
        "import random\nrandom.sample(x, 2)",
    ):
        assert pyro_samples(ast.parse(source)) == [], source
