"""Draw each MNIST digit on demand from a conditional VAE; how often a classifier reads what was asked for.

The label enters encoder, decoder and prior: 784-500-500-32 and the mirror with ReLU, a masked autoregressive
flow of depth 4 given the label (`--prior standard`: a standard normal without). Dynamic binarisation, decoder
bias at the logit of the data mean, one draw, Adam with cosine decay, batch 100, compiled. The classifier is a
small convolutional network, trained on the training images with fresh bits; its accuracy on the bits of the
test images says how far to believe it. 100 samples of each digit are judged as they are drawn, as bits.

    python benchmarks/cvae_digits.py [--epochs 20] [--results benchmarks/results/cvae_digits.yaml]
"""

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
import yaml

from ppl_vae import evaluate, fit
from ppl_vae.data import Split, load_dataset
from ppl_vae.evaluation import train_classifier
from ppl_vae.flows import MaskedAutoregressive
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import KL_ELBO
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import CVAE
from ppl_vae.networks import MLP
from ppl_vae.priors import FlowPrior, StandardNormal

IMAGE, HIDDEN, LATENT, CLASSES, SAMPLES = (1, 28, 28), (500, 500), 32, 10, 100


def main() -> None:
    """Train, draw, judge, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prior", default="flow", choices=("flow", "standard"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--size", type=int, default=None, help="training images, all by default")
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--num_particles", type=int, default=1000, help="K of log p(x | y)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--root", default=None)
    parser.add_argument("--results", default="benchmarks/results/cvae_digits.yaml")
    settings = parser.parse_args()
    data = load_dataset("mnist", root=settings.root, binarization="dynamic")
    train = Split(data.train.x[: settings.size], data.train.y[: settings.size], dynamic=True)
    test = Split(data.test.x[: settings.images], data.test.y[: settings.images])
    options: Any = {"hidden": HIDDEN, "activation": "relu", "context": CLASSES}
    torch.manual_seed(settings.seed)
    flow = MaskedAutoregressive(LATENT, CLASSES, hidden=(300,), activation="relu")
    prior = FlowPrior(flow) if settings.prior == "flow" else StandardNormal(LATENT)
    model = CVAE(prior, Bernoulli(MLP(LATENT, IMAGE, **options)))
    guide = MeanFieldGuide(MLP(IMAGE, **options), LATENT)
    model.likelihood.init_bias(train.x)
    run = fit(
        model,
        guide,
        train,
        validation=data.validation,
        elbo=KL_ELBO(analytic_kl=False),
        learning_rate=settings.learning_rate,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs),
        epochs=settings.epochs,
        batch_size=100,
        device=settings.device,
        seed=settings.seed,
        compile=True,
    )
    result = evaluate(model, guide, test, num_particles=settings.num_particles, device=settings.device)
    classifier = train_classifier(train, seed=settings.seed, device=settings.device)
    torch.manual_seed(settings.seed)
    y = torch.arange(CLASSES, device=settings.device).repeat_interleave(SAMPLES)
    with torch.no_grad():
        read = classifier(model(None, y)).argmax(-1)
    right = (read == y).double().view(CLASSES, SAMPLES).mean(1).cpu()
    record = {
        "set-up": f"MNIST, dynamic binarisation, {len(train)} training images, {LATENT} latent dimensions, "
        "ELBO with one draw, Adam with cosine decay to 0, batch 100",
        **{k: v for k, v in vars(settings).items() if k not in ("root", "results")},
        "test_elbo": round(result.elbo.mean, 3),
        "test_log_likelihood": round(result.log_likelihood.mean, 3),
        "standard_error": round(result.log_likelihood.standard_error, 3),
        "samples": CLASSES * SAMPLES,
        "read_as_asked": round(float(right.mean()), 4),
        "read_as_asked_of_each_digit": [round(float(share), 2) for share in right],
        "classifier_accuracy_on_test_bits": round(classifier.accuracy(data.test), 4),
        "training_minutes": round(sum(record["seconds"] for record in run.history) / 60, 2),
        "threads": torch.get_num_threads(),
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }
    print(yaml.safe_dump(record, sort_keys=False))
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))


if __name__ == "__main__":
    main()
