"""Train the IWAE paper's one-layer VAE on MNIST, and measure log p(x) on the whole test set.

Network 784-200-200-50 with tanh, dynamic binarisation (test bits of the VampPrior experiments), decoder
bias at the logit of the data mean, the ELBO with the gradient that sticks the landing
(`STL_ELBO`) and two draws, Adam with cosine decay, batch 100, 100 epochs, K = 5000 importance samples.
Published (Burda et al., 2016, Table 1, VAE), after 3280 epochs at batch 20: -86.76 with 1 draw, -86.47
with 5.

    python benchmarks/mnist_vae.py [--epochs 100] [--device cpu] [--results benchmarks/results/mnist_vae.yaml]
"""

import argparse
import platform
import re
import time
from pathlib import Path

import torch
import yaml

from ppl_vae import evaluate, fit
from ppl_vae.data import Split, load_dataset
from ppl_vae.evaluation import Evaluation
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import STL_ELBO
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal


def main() -> None:
    """Train, evaluate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--learning_rate_model", type=float, default=4e-3)
    parser.add_argument("--learning_rate_guide", type=float, default=2.5e-3)
    parser.add_argument("--num_particles", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--root", default=None)
    parser.add_argument("--output", default="runs/mnist_vae")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parser.add_argument("--results", default="benchmarks/results/mnist_vae.yaml")
    settings = parser.parse_args()

    data = load_dataset("mnist", root=settings.root, binarization="dynamic")
    torch.manual_seed(settings.seed)
    model = VAE(
        StandardNormal(50), Bernoulli(MLP(50, (1, 28, 28), (200, 200), activation="tanh", init="xavier"))
    )
    guide = MeanFieldGuide(MLP((1, 28, 28), hidden=(200, 200), activation="tanh", init="xavier"), 50)
    model.likelihood.init_bias(data.train.x)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at batch 100 a second thread gains nothing
    run = fit(
        model,
        guide,
        data.train,
        validation=data.validation,
        elbo=STL_ELBO(2),
        learning_rate={"model": settings.learning_rate_model, "guide": settings.learning_rate_guide},
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        device=settings.device,
        seed=settings.seed,
        output=settings.output,
        overwrite=not settings.resume,
        resume=settings.resume,
    )
    torch.set_num_threads(threads)
    training = sum(record["seconds"] for record in run.history)
    print(
        f"trained {settings.epochs} epochs in {training / 60:.1f} minutes (sum over epochs); "
        f"best epoch {run.best_epoch}"
    )

    def timed(split: Split) -> tuple[Evaluation, float, float]:
        before, start = _memory(settings.device), time.perf_counter()
        result = evaluate(model, guide, split, num_particles=settings.num_particles, device=settings.device)
        return result, time.perf_counter() - start, _memory(settings.device, peak=True) - before

    _, thousand, memory = timed(Split(data.test.x[:1000]))
    print(f"K = {settings.num_particles} over 1,000 images: {thousand:.1f} s, {memory:.2f} GiB more memory")
    result, whole, _ = timed(data.test)
    print(result)

    record = {
        "set-up": "dynamic MNIST, 50,000 training images, 784-200-200-50 tanh, Xavier, decoder bias at the "
        "logit of the data mean, STL_ELBO with 2 draws, Adam with cosine decay to 0",
        **{k: v for k, v in vars(settings).items() if k not in ("root", "output", "resume", "results")},
        "best_epoch": run.best_epoch,
        "training_minutes": round(training / 60, 2),
        "seconds_1000_images": round(thousand, 1),
        "memory_1000_images_GiB": round(memory, 3),
        "seconds_test_set": round(whole, 1),
        "test": result.summary(),
        "machine": f"{_processor()}, 1 thread in training, {threads} in evaluation"
        + (f", {torch.cuda.get_device_name()}" if settings.device.startswith("cuda") else ""),
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        "published": "-86.76 (1 draw), -86.47 (5): Burda et al. 2016, Table 1, VAE, 3280 epochs at batch 20",
    }
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))
    print(f"recorded in {path}")


def _memory(device: str, peak: bool = False) -> float:
    """Return the memory in use, GiB, and start anew to watch its peak; or that peak."""
    if device.startswith("cuda"):
        if peak:
            return torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    line = re.search(f"{'VmHWM' if peak else 'VmRSS'}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    return int(line[1]) / 2**20 if line else float("nan")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
