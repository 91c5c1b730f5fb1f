"""Train one network on MNIST with its layers in another precision, and compare test ELBO and time.

Network 784-200-200-50 with tanh, dynamic binarisation, decoder bias at the logit of the data mean,
`STL_ELBO`, Adam, batch 100, compiled. For each seed the runs have the same start, order and draws, and are
evaluated in
float32 with the same draws, so that a difference is what low precision did to training. The standard error is
over seeds.

    python benchmarks/precision.py [--device cuda] [--results benchmarks/results/precision.yaml]
"""

import argparse
import platform
import statistics
from pathlib import Path

import torch
import yaml

from ppl_vae import evaluate, fit
from ppl_vae.data import load_dataset
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import STL_ELBO
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal


def main() -> None:
    """Train, evaluate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--root", default=None)
    parser.add_argument("--results", default="benchmarks/results/precision.yaml")
    settings = parser.parse_args()
    data = load_dataset("mnist", root=settings.root, binarization="dynamic")
    precisions = ("float32", "bf16") if settings.device == "cpu" else ("float32", "tf32", "bf16")
    elbo: dict[str, list[float]] = {name: [] for name in precisions}
    seconds: dict[str, list[float]] = {name: [] for name in precisions}
    for seed in range(settings.seeds):
        for name in precisions:
            torch.manual_seed(seed)
            model = VAE(StandardNormal(50), Bernoulli(MLP(50, (1, 28, 28), (200, 200))))
            guide = MeanFieldGuide(MLP((1, 28, 28), hidden=(200, 200)), 50)
            model.likelihood.init_bias(data.train.x)
            run = fit(
                model,
                guide,
                data.train,
                elbo=STL_ELBO(),
                learning_rate=settings.learning_rate,
                epochs=settings.epochs,
                device=settings.device,
                seed=seed,
                compile=True,
                precision=name,
            )
            result = evaluate(
                model, guide, data.test, num_particles=10, device=settings.device, progress=False
            )
            elbo[name].append(result.elbo.mean)
            seconds[name] += [record["seconds"] for record in run.history[1:]]
            print(f"seed {seed}, {name}: test ELBO {elbo[name][-1]:.3f}", flush=True)
    record = {
        "set-up": "dynamic MNIST, 784-200-200-50 tanh, STL_ELBO, Adam, batch 100, compiled",
        **{k: v for k, v in vars(settings).items() if k not in ("root", "results")},
        "test_elbo": {name: [round(value, 3) for value in values] for name, values in elbo.items()},
        "seconds_per_epoch": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "threads": torch.get_num_threads(),
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }
    for name in precisions[1:]:
        differences = [low - full for low, full in zip(elbo[name], elbo["float32"], strict=True)]
        record[f"elbo of {name} - float32"] = {
            "mean": round(statistics.mean(differences), 3),
            "standard_error": round(statistics.stdev(differences) / len(differences) ** 0.5, 3),
        }
    print(yaml.safe_dump(record, sort_keys=False))
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))


if __name__ == "__main__":
    main()
