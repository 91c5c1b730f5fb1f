"""Measure log p(x) of MNIST digits by annealed importance sampling, and what it costs.

Network 784-200-200-50 with tanh (the IWAE paper's), dynamic binarisation, decoder bias at the logit of the
data mean, `STL_ELBO` with two draws, Adam with cosine decay, batch 100, compiled, a few epochs. Then, on the
first test digits: annealed importance sampling from the prior (sigmoidal schedule, Hamiltonian Monte Carlo of
10 leapfrog steps), and importance sampling with K draws of the guide; and, on digits that the model drew,
bidirectional Monte Carlo: a lower and an upper bound on log p(x), whose gap says how far annealing can be
trusted. Means over digits with their standard errors over digits; `monte_carlo_error` is that over new chains
or draws for the same digits.

    python benchmarks/ais.py [--epochs 10] [--num_data 100] [--results benchmarks/results/ais.yaml]
"""

import argparse
import math
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from ppl_vae import fit
from ppl_vae.data import Split, load_dataset
from ppl_vae.evaluation import (
    Estimate,
    annealed_importance_sampling,
    bidirectional_monte_carlo,
    log_likelihood,
)
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import STL_ELBO
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal


def main() -> None:
    """Train, measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--num_data", type=int, default=100, help="test digits, and as many simulated ones")
    parser.add_argument("--num_chains", type=int, default=16)
    parser.add_argument("--num_temperatures", type=int, default=1000)
    parser.add_argument("--leapfrog", type=int, default=10)
    parser.add_argument("--num_particles", type=int, default=5000, help="K of importance sampling")
    parser.add_argument("--training_images", type=int, default=None, help="fewer than all, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--root", default=None)
    parser.add_argument("--results", default="benchmarks/results/ais.yaml")
    settings = parser.parse_args()

    data = load_dataset("mnist", root=settings.root, binarization="dynamic")
    train = Split(data.train.x[: settings.training_images], dynamic=True)
    digits = data.test.x[: settings.num_data]
    torch.manual_seed(settings.seed)
    model = VAE(
        StandardNormal(50), Bernoulli(MLP(50, (1, 28, 28), (200, 200), activation="tanh", init="xavier"))
    )
    guide = MeanFieldGuide(MLP((1, 28, 28), hidden=(200, 200), activation="tanh", init="xavier"), 50)
    model.likelihood.init_bias(train.x)
    run = fit(
        model,
        guide,
        train,
        elbo=STL_ELBO(num_particles=2),
        learning_rate=2e-3,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs),
        epochs=settings.epochs,
        batch_size=100,
        device=settings.device,
        seed=settings.seed,
        compile=True,
    )

    record: dict[str, Any] = {
        "set-up": "dynamic MNIST, 784-200-200-50 tanh, Xavier, decoder bias at the logit of the data mean, "
        "STL_ELBO with two draws, Adam with cosine decay to 0, batch 100; chains from the prior, sigmoidal "
        "schedule",
        **{k: v for k, v in vars(settings).items() if k not in ("root", "results")},
        "training_minutes": round(sum(epoch["seconds"] for epoch in run.history) / 60, 2),
    }
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = {"device": settings.device, "seed": settings.seed}
    chains = shared | {
        "num_temperatures": settings.num_temperatures,
        "num_chains": settings.num_chains,
        "leapfrog": settings.leapfrog,
    }

    def measure(name: str, run: Callable[[], Any], numbers: Callable[[Any], dict[str, Any]]) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        result = run()
        cost = {
            "seconds": round(time.perf_counter() - wall, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
        }
        record[name] = numbers(result) | cost
        print(f"{name}\n{result}\n{cost}\n", flush=True)
        path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))
        return result

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "log_likelihood:")  # of k-hat, which is recorded
        sampled = measure(
            "importance_sampling",
            lambda: log_likelihood(model, guide, digits, num_particles=settings.num_particles, **shared),
            lambda result: {
                "log_likelihood": _numbers(result.log_likelihood),
                "k_hat_above_0.7": result.num_unreliable,
                "ess": round(float(result.ess.mean()), 1),
            },
        )
    annealed = measure(
        "annealed_importance_sampling",
        lambda: annealed_importance_sampling(model, None, digits, **chains),
        lambda result: {
            "log_likelihood": _numbers(result.log_likelihood),
            "acceptance": round(float(result.acceptance.mean()), 3),
            "ess": round(float(result.ess.mean()), 1),
        },
    )
    difference = (annealed.log_likelihood.values - sampled.log_likelihood.values).double()
    record["annealed_over_importance_sampling"] = _numbers(Estimate(difference, 0, math.nan))
    measure(
        "bidirectional_monte_carlo",
        lambda: bidirectional_monte_carlo(model, None, settings.num_data, **chains),
        lambda result: {
            **{name: _numbers(getattr(result, name)) for name in ("lower", "upper", "gap")},
            "acceptance": round(float(result.acceptance.mean()), 3),
        },
    )
    record["threads"] = torch.get_num_threads()
    record["versions"] = {"torch": str(torch.__version__), "python": platform.python_version()}
    path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))
    print(f"recorded in {path}")


def _numbers(estimate: Estimate) -> dict[str, float]:
    """Return nats per digit."""
    found = {"mean": estimate.mean, "standard_error": estimate.standard_error}
    if not math.isnan(estimate.monte_carlo_error):
        found["monte_carlo_error"] = estimate.monte_carlo_error
    return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    main()
