"""``ppl-vae evaluate``: the measures of a saved run, with ``--all`` every one that suits it, as a report."""

import math
import platform
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from ppl_vae import plots
from ppl_vae._checks import check_choice, check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.cli import report
from ppl_vae.cli.saved import (
    COUNTS,
    EVALUATED,
    data_of,
    drawn_from,
    folder_of,
    measure,
    png_of,
    told,
    traverse_busiest,
    write_file,
)
from ppl_vae.data import Dataset, Split
from ppl_vae.evaluation import (
    InferenceGaps,
    LogLikelihood,
    active_units,
    collapse_report,
    elbo_decomposition,
    encode,
    inference_gaps,
    log_likelihood,
    reconstruct,
    sample_quality,
    simulation_based_calibration,
    train_classifier,
)
from ppl_vae.evaluation import sample as draw_samples
from ppl_vae.evaluation.evaluate import Estimate, Evaluation
from ppl_vae.evaluation.evaluate import evaluate as evaluate_pair
from ppl_vae.evaluation.generation import Latents
from ppl_vae.infer.placing import place
from ppl_vae.infer.running import batch_arguments
from ppl_vae.models import CVAE, SemiSupervisedVAE
from ppl_vae.training import Run
from ppl_vae.training.saving import EVALUATION

T = TypeVar("T")

REPORT = "report.html"
BINS = 20  # of the rank histograms
UNSUITED = (ValueError, TypeError, NotImplementedError)  # what a measure raises of a pair that it can't take
SHOWN = 30  # images
_ROWS = 20  # of a table that is not folded
_STEPS = 500  # of the classifier's training, at least


def evaluate(words: list[str]) -> None:
    """Measure a saved run."""
    text = (
        "Measure ELBO, its parts and log p(x) of a saved run, and keep them in RUN/evaluation.yaml. With "
        "--all, measure everything that suits the pair on some of the data, and write RUN/report.html too."
    )
    run, values, given = told("evaluate", text, words)
    check_choice("split", values["split"], ("train", "validation", "test"))
    if values["all"]:
        _evaluate_all(run, values, shlex.join(["ppl-vae", "evaluate", *words]))
        return
    for name in COUNTS:
        if name in given:
            raise ValueError(f"--{name}: expected only with --all, got {values[name]!r}")
    options = {name: values[name] for name in EVALUATED if name != "data"}
    measure(run, data_of(run, values), values["split"], options)


@dataclass(frozen=True)
class Job:
    """A run, and what to measure it on.

    Attributes:
        run: the pair.
        dataset: all data.
        data: those to measure on, their bits drawn once.
        values: settings by name.
    """

    run: Run
    dataset: Dataset
    data: Split
    values: Mapping[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that all measures take."""
        return {name: self.values[name] for name in ("seed", "device", "progress")}

    @property
    def where(self) -> torch.device:
        """The device to work on."""
        return place(self.values["device"], self.run.model, self.run.guide)

    def first(self, n: int) -> Split:
        """Return the first n data."""
        return Split(self.data.x[:n], None if self.data.y is None else self.data.y[:n])

    def batch(self, n: int) -> tuple[Tensor, ...]:
        """Return the first n data as the model's arguments, where it is."""
        part = self.first(n).to(self.where)
        tensors = (part.x,) if part.y is None else (part.x, part.y)
        return batch_arguments(self.run.model, tensors)


@dataclass(frozen=True)
class Found:
    """What a part of the report found.

    Attributes:
        summary: plain numbers, for the file.
        blocks: HTML, for the report.
        notes: what the reader is to see.
    """

    summary: dict[str, Any] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Part = tuple[str, str, Callable[[], Found]]  # title, what it is done on, what does it


def check_counts(values: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Raise if a count is below its least value, or another setting of measures is wrong."""
    for name, lowest in least.items():
        if check_positive_int(name, values[name]) < lowest:
            raise ValueError(f"--{name}: expected at least {lowest}, got {values[name]}")
    check_positive("memory", values["memory"])
    check_seed(values["seed"])


def fixed_data(split: Split, size: int, seed: int) -> Split:
    """Return so many data at random, with bits that are drawn once, so that all measures see the same."""
    with seeded(seed):
        x, *y = split.batch(torch.randperm(len(split))[:size])
    return Split(x, y[0] if y else None)


def attempt(function: Callable[[], T], found: list[str]) -> tuple[T | None, str | None]:
    """Return what the function gives, or the reason that the pair does not suit it.

    Its warnings are added to ``found``, and given once more.
    """
    result, reason = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            result = function()
        except UNSUITED as error:
            reason = " ".join(str(error).split()) or type(error).__name__
    texts = list(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning))
    for text in texts:
        warnings.warn(text, stacklevel=2)
    found += texts
    return result, reason


def _evaluate_all(run: Run, values: Mapping[str, Any], command: str) -> None:
    """Measure everything that suits the pair; write the report and the numbers."""
    least = dict.fromkeys(COUNTS, 1) | {"size": 2, "calibration_size": 5 * BINS, "num_particles": 2}
    check_counts(values, least)
    place(values["device"], run.model, run.guide)
    dataset = data_of(run, values)
    data = fixed_data(getattr(dataset, values["split"]), values["size"], values["seed"])
    job = Job(run, dataset, data, values)
    parts = _parts(job)
    done: dict[str, Found] = {}
    skipped: dict[str, str] = {}
    for i, (name, (title, what, function)) in enumerate(parts.items(), 1):
        print(f"[{i}/{len(parts)}] {title}: {what}", flush=True)
        if name == "evaluate":  # without it there is no pair, or none for these data
            done[name] = function()
            continue
        notes: list[str] = []
        found, reason = attempt(function, notes)
        if found is None:
            skipped[name] = reason or "nothing was found"
            print(f"  skipped: {skipped[name]}", flush=True)
        else:
            done[name] = Found(found.summary, found.blocks, [*found.notes, *notes])
    numbers = {"data": dataset.name, "split": values["split"], "epoch": run.best_epoch}
    numbers |= done["evaluate"].summary | {"seed": values["seed"]}
    numbers["parts"] = {k: v.summary for k, v in done.items() if k != "evaluate" and v.summary}
    numbers["skipped"] = skipped
    folder = folder_of(run)
    write_file(folder / EVALUATION, yaml.safe_dump(numbers, sort_keys=False).encode())
    write_file(folder / REPORT, _page(job, command, parts, done, skipped).encode())
    print(f"numbers: {folder / EVALUATION}\nreport: {folder / REPORT}")


def _page(
    job: Job, command: str, parts: Mapping[str, Part], done: Mapping[str, Found], skipped: Mapping[str, str]
) -> str:
    """Return the report."""
    run = job.run
    pair = f"{name_of(run, 'model')} with {name_of(run, 'guide')}, epoch {run.best_epoch}"
    head = {"command": command, "run": str(folder_of(run)), "pair": pair} | facts_of(job)
    contents = [
        (title, what if name in done else f"skipped: {skipped[name]}")
        for name, (title, what, _) in parts.items()
    ]
    blocks = [
        report.facts(head, code=("command",)),
        report.paragraph(
            "Numbers are in nats per datum where no other unit is named. A standard error is over data: how "
            "far other data of the same kind would move a mean. A Monte Carlo error is over draws."
        ),
        report.table(
            ["part", "done on"], contents, numbers=False, linked={parts[name][0]: name for name in done}
        ),
    ]
    for name, part in done.items():
        title, what, _ = parts[name]
        content = [report.paragraph(what, soft=True), *part.blocks, report.notes(part.notes)]
        blocks.append(report.section(name, title, content))
    return report.page(f"Evaluation of {folder_of(run).resolve().name}", blocks)


def facts_of(job: Job) -> dict[str, str]:
    """Return what gave the numbers, by name."""
    values, data, dataset = job.values, job.data, job.dataset
    total = len(getattr(dataset, values["split"]))
    binarization = (dataset.test.source or {}).get("binarization")
    of = f"{len(data)} of {total}, at random" if len(data) < total else f"all {total}"
    versions = {name: version(name) for name in ("ppl-vae", "torch", "pyro-ppl")}
    return {
        "data": f"{dataset.name}, x of {list(dataset.x_shape)}, binarisation {binarization or 'none'}",
        "measured on": f"{values['split']} data, {of}",
        "draws": f"{values['num_particles']} per datum",
        "seed": str(values["seed"]),
        "device": str(job.where),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items())
        + f", Python {platform.python_version()}",
    }


def name_of(run: Run, role: str) -> str:
    """Return the class or function that a role of the run is made of."""
    described = run.config[role]
    return str(described.get("class") or described.get("function") or "?").rpartition(".")[2]


# -- the parts -------------------------------------------------------------------------------------


def _parts(job: Job) -> dict[str, Part]:
    """Return each part by its name in the file."""
    values, n = job.values, len(job.data)
    on = f"{n} {values['split']} data"
    draws = f"{values['num_particles']} draws each"
    few = f"{min(values['gaps_size'], n)} {values['split']} data"
    epochs = len(job.run.history)

    def part(title: str, what: str, function: Callable[[Job], Found]) -> Part:
        return title, what, lambda: function(job)

    return {
        "history": part("Training history", f"{epochs} epochs", _history),
        "evaluate": part("ELBO and its parts", f"{on}, {draws}", _evaluation),
        "log_likelihood": part("Log-likelihood", f"{on}, {draws}", _log_likelihood),
        "inference_gaps": part("Inference gaps", f"{few}, {draws}", _gaps),
        "elbo_decomposition": part("Decomposition of the KL", f"{on}, 1 draw each", _decomposition),
        "active_units": part("Active units", on, _active),
        "collapse_report": part("Latent dimensions", f"{on}, 50 draws each", _collapse),
        "calibration": part("Calibration", f"{values['calibration_size']} data of the model", _calibration),
        "sample_quality": part("Quality of samples", f"{n} samples, {on}", _quality),
        "reconstructions": part(
            "Reconstructions", f"{min(SHOWN, n)} {values['split']} data", _reconstructions
        ),
        "samples": part("Samples", "64 draws of the model", _samples),
        "traversal": part("Latent traversal", f"the latents of {on}", _traversal),
        "latents": part("Latents", on, _latents),
    }


def estimates_table(rows: Mapping[str, Estimate], digits: int = 2, caption: str = "") -> str:
    """Return a table of estimates with both errors."""
    header = ["nats per datum", "mean", "standard error", "Monte Carlo error"]
    texts = [
        (
            name,
            report.number(estimate.mean, digits),
            report.number(estimate.standard_error, digits),
            report.significant(estimate.monte_carlo_error, 2),
        )
        for name, estimate in rows.items()
    ]
    return report.table(header, texts, caption=caption)


def _figure(draw: Callable[[], Any], alt: str) -> str:
    """Return a figure, or say why it can't be drawn."""
    try:
        return report.figure(png_of(draw()), alt)
    except UNSUITED as error:
        return report.paragraph(f"No plot: {error}")


def _history(job: Job) -> Found:
    history = job.run.history
    axes = plots.plot_history(history)
    text = f"The parameters are those of epoch {job.run.best_epoch} of {len(history)}."
    return Found({}, [report.paragraph(text), report.figure(png_of(axes), "Training history")])


def measured(job: Job) -> Evaluation:
    """Return the ELBO and its parts."""
    taken = {name: job.values[name] for name in ("num_particles", "memory")}
    return evaluate_pair(job.run.model, job.run.guide, job.data, **taken, **job.options)


def _evaluation(job: Job) -> Found:
    result = measured(job)
    print(result, flush=True)
    rows = {"ELBO": result.elbo, "reconstruction": result.reconstruction}
    rows |= {f"KL of {site}": kl for site, kl in result.kl.items()}
    rows |= {f"log p(x), {result.num_particles} draws": result.log_likelihood}
    text = "ELBO = reconstruction \N{MINUS SIGN} KL, a lower bound on log p(x)."
    return Found(result.summary(), [report.paragraph(text), estimates_table(rows)])


def weighed(job: Job) -> LogLikelihood:
    """Return log p(x) with what says how far it can be trusted."""
    taken = {name: job.values[name] for name in ("num_particles", "memory")}
    return log_likelihood(job.run.model, job.run.guide, job.data, **taken, **job.options)


def _log_likelihood(job: Job) -> Found:
    result = weighed(job)
    n = len(result.k_hat)
    rows = [
        ("k-hat, median", report.number(float(result.k_hat.median()))),
        ("k-hat above 0.7", f"{result.num_unreliable} of {n} data"),
        ("effective sample size, mean", f"{float(result.ess.mean()):.1f} of {result.num_particles}"),
    ]
    text = (
        "By importance sampling from the guide. A Pareto k-hat above 0.7 says that the estimate of a datum "
        "is unreliable, and likely too low: the guide is too narrow for it."
    )
    blocks = [
        report.paragraph(text),
        estimates_table({"log p(x)": result.log_likelihood}),
        report.table(["weights", "value"], rows),
    ]
    return Found(result.summary(), blocks)


def gaps_of(job: Job) -> InferenceGaps:
    """Return the inference gaps of the first data."""
    taken = {name: job.values[name] for name in ("num_particles", "memory")}
    data = job.first(job.values["gaps_size"])
    steps = job.values["gaps_steps"]
    return inference_gaps(job.run.model, job.run.guide, data, steps=steps, **taken, **job.options)


def _gaps(job: Job) -> Found:
    result = gaps_of(job)
    rows = {
        "log p(x)": result.log_likelihood,
        "ELBO, optimum of each datum": result.optimal_elbo,
        "ELBO, amortised": result.amortized_elbo,
        "approximation gap": result.approximation_gap,
        "amortisation gap": result.amortization_gap,
        "inference gap": result.inference_gap,
    }
    text = (
        "What the guide loses on log p(x): the approximation gap by its family, the amortisation gap by its "
        "encoder and head on top. Both together are KL(q(z | x) || p(z | x))."
    )
    blocks = [
        report.paragraph(text),
        estimates_table(rows, digits=3),
        _figure(lambda: plots.plot_gaps(result), "Inference gaps of each datum"),
    ]
    notes = []
    if not result.converged:
        notes.append(f"the optimum was still rising after {result.steps} steps; give more --gaps_steps")
    return Found(result.summary(), blocks, notes)


def _decomposition(job: Job) -> Found:
    taken = {"memory": job.values["memory"]} | job.options
    result = elbo_decomposition(job.run.model, job.run.guide, job.data, **taken)
    rows = {
        "ELBO": result.elbo,
        "reconstruction": result.reconstruction,
        "mutual information I(n; z)": result.mutual_information,
        "its upper bound": result.mutual_information_upper,
        "KL(q(z) || p(z))": result.marginal_kl,
        "total correlation": result.total_correlation,
        "dimension-wise KL": result.dimension_kl,
    }
    text = (
        "KL = mutual information + KL(q(z) || p(z)), and the latter = total correlation + dimension-wise KL, "
        f"where q(z) is the mixture over these data. The mutual information can't be above the log of their "
        f"number, {math.log(result.num_data):.2f}."
    )
    notes = [f"{name.replace('_', ' ')}: {reason}" for name, reason in result.reasons.items()]
    return Found(result.summary(), [report.paragraph(text), estimates_table(rows, digits=3)], notes)


def _active(job: Job) -> Found:
    taken = {"memory": job.values["memory"]} | job.options
    result = active_units(job.run.model, job.run.guide, job.data, **taken)
    rows = [(site, f"{count} of {len(result.variances[site])}") for site, count in result.counts.items()]
    text = f"Dimensions whose posterior mean has a variance over data above {result.threshold:g}."
    return Found(result.summary(), [report.paragraph(text), report.table(["site", "active"], rows)])


def _collapse(job: Job) -> Found:
    taken = {"memory": job.values["memory"]} | job.options
    result = collapse_report(job.run.model, job.run.guide, job.data, **taken)
    rows = [
        (
            f"{index[0]}[{index[1]}]",
            report.significant(float(row["variance_of_means"])),
            report.significant(float(row["kl"])),
            report.significant(float(row["posterior_sd"])),
            "yes" if row["active"] else "no",
        )
        for index, row in zip(result.table.index.tolist(), result.table.to_dict("records"), strict=True)
    ]
    header = [
        "dimension",
        "variance of posterior mean",
        "KL (nats)",
        "posterior standard deviation",
        "active",
    ]
    text = "A dimension that has collapsed to the prior has a variance and a KL of 0."
    blocks = [
        report.paragraph(text),
        _figure(lambda: plots.plot_collapse(result), "KL and variance of each latent dimension"),
        _maybe_folded(f"{len(rows)} dimensions", header, rows),
    ]
    notes = [f"KL of {site}: {reason}" for site, reason in result.reasons.items()]
    return Found(result.summary(), blocks, notes)


def _maybe_folded(summary: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    content = report.table(header, rows)
    return content if len(rows) <= _ROWS else report.folded(summary, content)


def _calibration(job: Job) -> Found:
    size, model = job.values["calibration_size"], job.run.model
    y = None
    if isinstance(model, CVAE):  # labels as often as in the data
        if job.data.y is None:
            raise ValueError("the model takes labels, the data have none")
        with seeded(job.values["seed"]):
            y = job.data.y[torch.randint(len(job.data), (size,))]
    taken = {"memory": job.values["memory"]} | job.options
    result = simulation_based_calibration(model, job.run.guide, size=size, bins=BINS, y=y, **taken)
    table = result.table
    error = {name: float(table[name].iloc[0]) for name in ("mean_se", "spread_se")}
    rows = [
        (
            str(name),
            report.significant(float(row["adjusted_p_value"]), 2),
            report.number(float(row["mean"]), 3),
            report.number(float(row["spread"]), 3),
        )
        for name, row in table.iterrows()
    ]
    header = ["quantity", "p, adjusted", "mean rank", "spread of ranks"]
    text = (
        f"Simulation-based calibration: of data that the model draws, the rank of the true latent among "
        f"{result.num_draws} draws of the guide. Ranks are uniform if the guide is the posterior: mean 0.5 ± "
        f"{error['mean_se']:.3f}, spread 1 ± {error['spread_se']:.3f}. A spread above 1 says that the guide "
        "is too narrow, one below 1 that it is too wide."
    )
    rejected = result.rejected
    verdict = f"{len(rejected)} of {len(rows)} quantities are rejected at level 0.05 for all together."
    blocks = [
        report.paragraph(text),
        report.paragraph(verdict),
        report.figures(
            [
                _figure(lambda: plots.plot_calibration(result), "Rank histograms"),
                _figure(lambda: plots.plot_coverage(result), "Coverage of central intervals"),
            ]
        ),
        _maybe_folded(f"{len(rows)} quantities", header, rows),
    ]
    return Found(result.summary(), blocks)


def _quality(job: Job) -> Found:
    train, seed, data = job.dataset.train, job.values["seed"], job.data
    if train.y is None or data.y is None:
        raise ValueError("the data have no labels to train a classifier on, whose features are needed")
    if not data.x.is_floating_point():
        raise ValueError(f"expected floating-point data, got {data.x.dtype}")
    count = min(job.values["classifier_size"], len(train))
    with seeded(seed):
        chosen = torch.randperm(len(train))[:count]
    some = Split(train.x[chosen], train.y[chosen], train.dynamic)
    epochs = math.ceil(_STEPS / math.ceil(count / 100))
    classifier = train_classifier(some, epochs=epochs, **job.options)
    with seeded(seed):
        generated = draw_samples(drawn_from(job.run), len(data)).x
    result = sample_quality(data, generated, classifier, **job.options)
    accuracy = classifier.accuracy(data)
    measures = {k: v for k, v in result.summary().items() if isinstance(v, dict)}
    rows = [
        (
            name.replace("_", " "),
            report.significant(row["value"], 4),
            report.significant(row["standard_error"], 2),
        )
        for name, row in measures.items()
    ]
    text = (
        f"By the {result.num_features} features of a small classifier, trained on {count} data of the train "
        f"split, which names {accuracy:.1%} of these data rightly. Frechet and kernel distance: lower is "
        "better. Precision and density say how good samples are, recall and coverage how various. Compare "
        "with other runs by the same data, counts and seed alone, not with published numbers. Expected "
        f"coverage of a perfect model: {result.expected_coverage:.3f}."
    )
    blocks = [report.paragraph(text), report.table(["measure", "value", "standard error"], rows)]
    summary = result.summary() | {"classifier_size": count, "classifier_accuracy": accuracy}
    return Found(summary, blocks)


def _reconstructions(job: Job) -> Found:
    with seeded(job.values["seed"]):
        result = reconstruct(job.run.model, job.run.guide, *job.batch(SHOWN))
    return _pictured(plots.plot_reconstructions(result), "Data and their reconstructions")


def _samples(job: Job) -> Found:
    with seeded(job.values["seed"]):
        result = draw_samples(drawn_from(job.run), 64)
    return _pictured(plots.plot_samples(result), "Samples")


def _encoded(job: Job) -> Latents:
    y = job.data.y
    with seeded(job.values["seed"]):
        batch = job.batch(len(job.data))
        return encode(job.run.guide, *batch, y=None if y is None or y.ndim > 1 else y)


def _traversal(job: Job) -> Found:
    if isinstance(job.run.model, (CVAE, SemiSupervisedVAE)):
        raise ValueError("x depends on the label, not on z alone")
    z = _encoded(job).z.to(job.where)
    with seeded(job.values["seed"]):
        result = traverse_busiest(job.run.model, z)
    return _pictured(plots.plot_traversal(result), "Latent traversal")


def _latents(job: Job) -> Found:
    return _pictured(plots.plot_latents(_encoded(job)), "Latents of the data")


def _pictured(axes: Any, alt: str) -> Found:
    return Found({}, [report.figure(png_of(axes), alt)])
