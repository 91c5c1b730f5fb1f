"""The benchmark's slopes, from fewer repeats than it takes: within 0.1 of those that the theory gives."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest

from ppl_vae.infer import IWAE, DReG

FILE = Path(__file__).parents[2] / "benchmarks" / "signal_to_noise.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("signal_to_noise", FILE)
    if spec is None or spec.loader is None:
        pytest.skip(f"no {FILE}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_iwae_loses_the_guides_signal_and_gains_the_models(benchmark: ModuleType) -> None:
    repeats = {1: 100_000, 10: 30_000, 100: 20_000, 300: 20_000}
    found = [benchmark.ratios(IWAE(k), n, seed=0) for k, n in repeats.items()]
    assert benchmark.slope(list(repeats), [row["model"] for row in found]) == pytest.approx(0.5, abs=0.1)
    assert benchmark.slope(list(repeats), [row["guide"] for row in found]) == pytest.approx(-0.5, abs=0.1)


def test_dreg_keeps_the_guides_signal(benchmark: ModuleType) -> None:
    found = [benchmark.ratios(DReG(k), 2000, seed=0)["guide"] for k in (1, 10, 100, 1000)]
    assert all(later > earlier for earlier, later in itertools.pairwise(found))
