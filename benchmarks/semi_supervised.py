"""Classify MNIST digits with 100 labels by a semi-supervised VAE, labels summed out; test accuracy.

`--model M2`: encoder, classifier and decoder with one hidden layer of 500 with softplus, 50 latent
dimensions, dynamic binarisation, labels in balance, `EnumELBO`, classification loss of weight 46, Adam with
rate 4.2e-4 and beta1 0.95, batch 200: the set-up of Pyro's tutorial, but for its grey pixels.
`--model M1+M2`: a VAE first, 784-500-500-2000-10 with ReLU and a KL weight of 0.02, trained without labels;
then the same with one hidden layer of 200 and 5 latent dimensions on its standardised posterior means of the
grey images, with a normal likelihood. Each draw of the labels is a training of its own; the VAE is trained
once.

    python benchmarks/semi_supervised.py [--model M1+M2] [--labels 100] [--draws 3] [--device cpu]
        [--results benchmarks/results/semi_supervised.yaml]

Published accuracy with 100, 600, 1000 and 3000 labels: Pyro's tutorial .9319 (95 % bounds .0060, five draws),
.9437, .9487, .9582, a supervised network .7712, .8716, .8863, .9108; M2 in Kingma et al. (2014) .8803, .9506,
.9640, .9608, M1+M2 .9667, .9741, .9760, .9782.
"""

import argparse
import functools
import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ppl_vae import fit
from ppl_vae.data import Split, load_dataset, semi_supervised
from ppl_vae.guides import MeanFieldGuide, SemiSupervisedGuide
from ppl_vae.infer import KL_ELBO, EnumELBO
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE, SemiSupervisedVAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

SHAPE, CLASSES = (1, 28, 28), 10
# by model: rate, weight of the classification loss, times a labelled datum is in an epoch, epochs
DEFAULTS = {"M2": (4.2e-4, 46.0, 1, 30), "M1+M2": (1e-3, 5.0, 20, 40)}


def accuracy(guide: SemiSupervisedGuide, x: Tensor, y: Tensor) -> float:
    """Return the share of data whose most probable class is the label."""
    device = next(guide.parameters()).device
    with torch.no_grad():
        guessed = torch.cat([guide.predict_proba(part.to(device)).argmax(-1).cpu() for part in x.split(1000)])
    return float((guessed == y).double().mean())


def bits(settings: argparse.Namespace) -> tuple[Split, dict[str, Split]]:
    """Return the training images, and those to classify."""
    data = load_dataset("mnist", root=settings.root, binarization="dynamic")
    grey = load_dataset("mnist", root=settings.root)
    train = Split(data.train.x[: settings.size], data.train.y[: settings.size], dynamic=True)
    return train, {"test": data.test, "test_of_grey_images": grey.test, "validation": data.validation}


def features(settings: argparse.Namespace) -> tuple[Split, dict[str, Split]]:
    """Return the features of a VAE, M1, of the training images and of those to classify."""
    images, _ = bits(settings)
    grey = load_dataset("mnist", root=settings.root)
    torch.manual_seed(settings.seed)
    hidden, latent = (500, 500, 2000), 10
    network = functools.partial(MLP, activation="relu", init="xavier")
    likelihood = Bernoulli(network(latent, SHAPE, hidden[::-1]))
    guide = MeanFieldGuide(network(SHAPE, hidden=hidden), latent)
    likelihood.init_bias(images.x)
    fit(
        VAE(StandardNormal(latent), likelihood),
        guide,
        Split(images.x, dynamic=True),
        elbo=KL_ELBO(kl_weight=0.02),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, settings.first_epochs
        ),
        epochs=settings.first_epochs,
        batch_size=100,
        device=settings.device,
        seed=settings.seed,
        compile=True,
    )
    guide.eval()

    def means(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([guide.posterior(part.to(settings.device)).mean for part in x.split(1000)]).cpu()

    z = means(images.x)
    loc, scale = z.mean(0), z.std(0)
    found = {
        name: Split((means(part.x) - loc) / scale, part.y)
        for name, part in {"test": grey.test, "validation": grey.validation}.items()
    }
    return Split((z - loc) / scale, images.y), found


def pair(settings: argparse.Namespace) -> tuple[SemiSupervisedVAE, SemiSupervisedGuide]:
    """Return M2 on images or on features."""
    if settings.model == "M2":
        shape, latent, hidden = SHAPE, 50, 500
    else:
        shape, latent, hidden = (10,), 5, 200
    network = functools.partial(MLP, hidden=hidden, activation="softplus")
    decoder = network(latent, shape, context=CLASSES)
    likelihood = Bernoulli(decoder) if settings.model == "M2" else Normal(decoder, scale="learned")
    classifier = network(shape, CLASSES)
    model = SemiSupervisedVAE(
        StandardNormal(latent), likelihood, CLASSES, classifier=classifier, alpha=settings.alpha
    )
    return model, SemiSupervisedGuide(network(shape, context=CLASSES), classifier, latent)


def main() -> None:
    """Train, classify, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="M1+M2", choices=list(DEFAULTS))
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--draws", type=int, default=1, help="draws of the labels")
    parser.add_argument("--learning_rate", type=float, default=None)
    parser.add_argument("--alpha", type=float, default=None, help="weight of the classification loss")
    parser.add_argument("--repeat", type=int, default=None, help="times a labelled datum is in an epoch")
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--first_epochs", type=int, default=12, help="of the VAE of M1+M2")
    parser.add_argument("--batch_size", type=int, default=200)
    parser.add_argument("--size", type=int, default=None, help="training images, all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--root", default=None)
    parser.add_argument("--results", default="benchmarks/results/semi_supervised.yaml")
    settings = parser.parse_args()
    names = ("learning_rate", "alpha", "repeat", "epochs")
    for name, default in zip(names, DEFAULTS[settings.model], strict=True):
        if getattr(settings, name) is None:
            setattr(settings, name, default)
    images, parts = bits(settings) if settings.model == "M2" else features(settings)
    rows: list[dict[str, Any]] = []
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(settings.seed, settings.seed + settings.draws):
        train = semi_supervised(images, settings.labels, seed=seed, repeat=settings.repeat)
        torch.manual_seed(seed)
        model, guide = pair(settings)
        if settings.model == "M2":
            model.likelihood.init_bias(images.x)
        run = fit(
            model,
            guide,
            train,
            elbo=EnumELBO(),
            optimizer=functools.partial(torch.optim.Adam, betas=(0.95, 0.999)),
            learning_rate=settings.learning_rate,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            device=settings.device,
            seed=seed,
            compile=True,
        )
        rows.append(
            {
                "draw": seed,
                **{f"accuracy_{name}": round(accuracy(guide, p.x, p.y), 4) for name, p in parts.items()},
                "train_elbo": round(run.history[-1]["train_elbo"], 3),
                "training_minutes": round(sum(record["seconds"] for record in run.history) / 60, 2),
            }
        )
        print(rows[-1], flush=True)
        found = torch.tensor([row["accuracy_test"] for row in rows], dtype=torch.float64)
        recorded = (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}
        recorded[settings.model] = {
            "set-up": f"MNIST, {len(images)} training images; the networks in the script's first lines; "
            "EnumELBO with one draw, classification loss of weight alpha, Adam with beta1 0.95",
            **{k: v for k, v in vars(settings).items() if k not in ("root", "results", "model")},
            "mean_test_accuracy": round(float(found.mean()), 4),
            "standard_error": round(float(found.std() / len(found) ** 0.5), 4) if len(found) > 1 else None,
            "draws_of_labels": rows,
            "threads": torch.get_num_threads(),
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        }
        path.write_text(yaml.safe_dump(recorded, sort_keys=False, width=100))
    print(f"recorded in {path}")


if __name__ == "__main__":
    main()
