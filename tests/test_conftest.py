"""The fixtures that every test runs under do their work: seen from a test run of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

INNER = """
import pyro, pytest, torch
from hypothesis import given, strategies
from torch.distributions import Distribution

def test_switches_validation_off():
    Distribution.set_default_validate_args(False)

def test_validation_is_on_again():
    assert Distribution._validate_args

def test_changes_the_default_dtype():
    torch.set_default_dtype(torch.float64)

def test_default_dtype_is_back():
    assert torch.get_default_dtype() == torch.float32

def test_fills_the_parameter_store():
    pyro.param("leaked", torch.ones(()))

def test_parameter_store_is_empty():
    assert not list(pyro.get_param_store())

@pytest.mark.parametrize("repeat", [0, 1])
def test_draws_from_seed_0(repeat):
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))

@given(strategies.integers())
def test_each_example_draws_from_seed_0(value):
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))

def test_mnist(mnist_root):
    assert (mnist_root / "MNIST" / "raw").is_dir()
"""


def run_inner(folder: Path, data: Path, *options: str) -> dict[str, set[str]]:
    """Run INNER under the conftest of the checkout; return outcome -> names of tests, or reasons of skips."""
    (folder / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (folder / "test_inner.py").write_text(INNER)
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--rootdir", folder]
    done = subprocess.run(
        [*pytest, *options, folder],
        cwd=folder,
        env={**os.environ, "PPL_VAE_DATA": str(data)},
        capture_output=True,
        text=True,
    )
    outcomes: dict[str, set[str]] = {}
    for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE):
        outcomes.setdefault(outcome, set()).add(name.split("::")[-1])
    for reason in re.findall(r"^SKIPPED \[1\] .*?: (.*)", done.stdout, flags=re.MULTILINE):
        outcomes.setdefault("SKIPPED", set()).add(reason)
    return outcomes


def test_clean_start_and_mnist_root(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "MNIST" / "raw").mkdir(parents=True)
    outcomes = run_inner(tmp_path, data)
    # A test that breaks a global default passes and then fails at its end; the next one finds it mended.
    assert outcomes["ERROR"] == {"test_switches_validation_off", "test_changes_the_default_dtype"}
    assert "FAILED" not in outcomes
    assert {
        "test_validation_is_on_again",
        "test_default_dtype_is_back",
        "test_parameter_store_is_empty",
        "test_draws_from_seed_0[0]",
        "test_draws_from_seed_0[1]",
        "test_each_example_draws_from_seed_0",
        "test_mnist",
    } <= outcomes["PASSED"]


def test_mnist_root_without_the_files_is_a_skip_that_says_so(tmp_path: Path) -> None:
    outcomes = run_inner(tmp_path, tmp_path, "-k", "mnist")
    assert outcomes == {
        "SKIPPED": {f"no MNIST/raw in {tmp_path}: set PPL_VAE_DATA to the folder that holds it"}
    }
