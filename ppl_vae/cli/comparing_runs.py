"""``ppl-vae compare RUN RUN ...``: runs side by side on the same data, as a report."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ppl_vae import plots
from ppl_vae._checks import check_choice
from ppl_vae._random import seeded
from ppl_vae.cli import report
from ppl_vae.cli.evaluating import (
    UNSUITED,
    Job,
    attempt,
    check_counts,
    facts_of,
    fixed_data,
    gaps_of,
    measured,
    name_of,
    weighed,
)
from ppl_vae.cli.saved import data_of, drawn_from, load_saved, open_folder, png_of, write_file
from ppl_vae.data import Dataset
from ppl_vae.evaluation import active_units, reconstruct
from ppl_vae.evaluation import sample as draw_samples
from ppl_vae.evaluation.evaluate import Estimate
from ppl_vae.infer.placing import place
from ppl_vae.plots._tiles import check_images, draw_tiles
from ppl_vae.training import Run
from ppl_vae.training.saving import Record

REPORT, NUMBERS = "comparison.html", "comparison.yaml"
_IMAGES = 12  # reconstructed
_SAMPLES = 36


@dataclass(frozen=True)
class Measures:
    """What was measured of a run.

    Attributes:
        estimates: values of each datum, by name, those of runs on the same data.
        others: texts for the table, by name.
        numbers: plain numbers, for the file.
        reasons: why a measure is missing.
    """

    estimates: dict[str, Estimate]
    others: dict[str, str]
    numbers: dict[str, Any]
    reasons: dict[str, str]


def compare_runs(folders: Sequence[str], values: Mapping[str, Any], words: Sequence[str]) -> None:
    """Compare saved runs on the same data.

    Args:
        folders: those of the runs, two or more.
        values: settings by name.
        words: the command line after ``ppl-vae compare``.
    """
    check_choice("split", values["split"], ("train", "validation", "test"))
    check_counts(values, {"size": 2, "num_particles": 2, "gaps_size": 1, "gaps_steps": 1})
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if path.is_file():
            raise ValueError(f"RUN: expected the folders of saved runs, got the file {path}")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"RUN: expected different runs, got {', '.join(map(repr, folders))}")
    runs = [load_saved(path, values["classes"]) for path in paths]
    for run in runs:
        place(values["device"], run.model, run.guide)
    output = open_folder(Path(values["output"] or "."))
    dataset = _same_data(runs, values)
    split = getattr(dataset, values["split"])
    data = fixed_data(split, values["size"], values["seed"])
    jobs = [Job(run, dataset, data, values) for run in runs]
    notes = _notes_on(runs)
    found = []
    for i, (path, job) in enumerate(zip(paths, jobs, strict=True), 1):
        print(f"[{i}/{len(runs)}] {path}: {len(data)} {values['split']} data", flush=True)
        said: list[str] = []
        found.append(_measure(job, said))
        notes += [f"run {i}: {text}" for text in [*said, *found[-1].reasons.values()]]
    names = [str(i) for i in range(1, len(runs) + 1)]
    differences = _differences(found)
    command = shlex.join(["ppl-vae", "compare", *words])
    blocks = [
        report.facts({"command": command} | facts_of(jobs[0]), code=("command",)),
        report.table(
            ["run", "folder", "model", "guide", "epoch"],
            [
                (name, str(path), name_of(run, "model"), name_of(run, "guide"), str(run.best_epoch))
                for name, path, run in zip(names, paths, runs, strict=True)
            ],
            numbers=False,
        ),
        report.notes(notes),
        report.section("measures", "Measures", [_measures_table(found, names, values, len(data))]),
        report.section("differences", "Paired differences", _difference_blocks(differences, names)),
        report.section("settings", "Settings that differ", [_settings_table(runs, names)]),
        report.section("history", "Training", [_drawn(lambda: _plot_histories(runs), "Training curves")]),
        report.section(
            "reconstructions",
            "Reconstructions",
            [
                report.paragraph(
                    "Of the same data; one draw of the guide, the mean of x given it.", soft=True
                ),
                _drawn(lambda: _plot_reconstructions(jobs), "Data and reconstructions of each run"),
            ],
        ),
        report.section(
            "samples",
            "Samples",
            [
                report.paragraph("The mean of x given z from the prior.", soft=True),
                report.figures(
                    [
                        _drawn(lambda job=job, i=i: _plot_samples(job, i), f"Samples of run {i}")  # type: ignore[misc]
                        for i, job in enumerate(jobs, 1)
                    ]
                ),
            ],
        ),
    ]
    numbers = {
        "data": dataset.name,
        "split": values["split"],
        "seed": values["seed"],
        "runs": {
            str(path): {"epoch": run.best_epoch} | measures.numbers
            for path, run, measures in zip(paths, runs, found, strict=True)
        },
        f"difference to {paths[0]}": {
            str(path): {
                name: {"mean": e.mean, "standard_error": e.standard_error}
                for name, e in differences[i].items()
            }
            for i, path in enumerate(paths[1:])
        },
    }
    _say(found, differences, paths)
    write_file(output / NUMBERS, yaml.safe_dump(numbers, sort_keys=False).encode())
    page = report.page(f"Comparison of {len(runs)} runs", blocks)
    write_file(output / REPORT, page.encode())
    print(f"numbers: {output / NUMBERS}\nreport: {output / REPORT}")


def _same_data(runs: Sequence[Run], values: Mapping[str, Any]) -> Dataset:
    """Return the runs' data, or raise if they are not the same."""

    def source(run: Run) -> dict[str, Any]:
        named = run.config["data"].get("source")
        return named if isinstance(named, dict) else {}

    first = data_of(runs[0], values)
    for run in runs[1:]:
        what = f"{runs[0].path} and {run.path} were made on different data, which can't be compared"
        before, after = (source(r).get("binarization") or "none" for r in (runs[0], run))
        if before != after:
            raise ValueError(f"RUN: {what}: binarisation {before} and {after}")
        same = values["data"] or source(run).get("name") == source(runs[0]).get("name")
        other = first if same else data_of(run, values)
        x, x_other = (getattr(dataset, values["split"]).x for dataset in (first, other))
        if x.shape != x_other.shape or not torch.equal(x, x_other):
            shapes = f"x of {list(x.shape)} and {list(x_other.shape)}"
            raise ValueError(f"RUN: {what}: {first.name} and {other.name}, {shapes}")
    return first


def _notes_on(runs: Sequence[Run]) -> list[str]:
    """Return what the reader has to know of the runs to compare their numbers."""
    taken = [len(run.config["data"].get("batch") or [None]) for run in runs]
    if len(set(taken)) == 1:
        return []
    return [
        "the runs' models take different arguments: log p(x) of one that takes labels is log p(x | y) or "
        "log p(x, y), which can't be compared with log p(x)"
    ]


def _measure(job: Job, said: list[str]) -> Measures:
    """Measure a run; what does not suit it is left out."""
    evaluation = measured(job)
    kl = [estimate.values for estimate in evaluation.kl.values()]
    estimates = {"ELBO": evaluation.elbo, "reconstruction": evaluation.reconstruction}
    if kl:
        estimates["KL"] = Estimate(torch.stack(kl).sum(0), evaluation.num_particles, float("nan"))
    estimates["log p(x)"] = evaluation.log_likelihood
    numbers: dict[str, Any] = {"evaluate": evaluation.summary()}
    others: dict[str, str] = {}
    reasons: dict[str, str] = {}
    weights, reason = attempt(lambda: weighed(job), said)
    if weights is None:
        reasons["log_likelihood"] = f"no k-hat: {reason}"
    else:
        numbers["log_likelihood"] = weights.summary()
        others["k-hat, median"] = report.number(float(weights.k_hat.median()))
        others["k-hat above 0.7"] = f"{weights.num_unreliable} of {len(weights.k_hat)}"
        others["effective sample size"] = f"{float(weights.ess.mean()):.1f}"
    gaps, reason = attempt(lambda: gaps_of(job), said)
    if gaps is None:
        reasons["inference_gaps"] = f"no inference gaps: {reason}"
    else:
        numbers["inference_gaps"] = gaps.summary()
        estimates["approximation gap"] = gaps.approximation_gap
        estimates["amortisation gap"] = gaps.amortization_gap
        estimates["inference gap"] = gaps.inference_gap
        if not gaps.converged:
            said.append(f"the optimum was still rising after {gaps.steps} steps; give more --gaps_steps")
    taken = {"memory": job.values["memory"]} | job.options
    active, reason = attempt(lambda: active_units(job.run.model, job.run.guide, job.data, **taken), said)
    if active is None:
        reasons["active_units"] = f"no active units: {reason}"
    else:
        numbers["active_units"] = active.summary()
        for site, count in active.counts.items():
            others[f"active units of {site}"] = f"{count} of {len(active.variances[site])}"
    return Measures(estimates, others, numbers, reasons)


def _differences(found: Sequence[Measures]) -> list[dict[str, Estimate]]:
    """Return each later run's measures less those of the first, datum by datum."""
    first = found[0].estimates
    return [
        {name: estimate - first[name] for name, estimate in measures.estimates.items() if name in first}
        for measures in found[1:]
    ]


def _measures_table(
    found: Sequence[Measures], names: Sequence[str], values: Mapping[str, Any], size: int
) -> str:
    dash = "\N{EN DASH}"
    estimates = list(dict.fromkeys(name for measures in found for name in measures.estimates))
    others = list(dict.fromkeys(name for measures in found for name in measures.others))
    rows = []
    for name in estimates:
        cells = (
            report.with_error(
                m.estimates[name].mean, m.estimates[name].standard_error, 3 if "gap" in name else 2
            )
            if name in m.estimates
            else dash
            for m in found
        )
        rows.append((name, *cells))
    rows += [(name, *(m.others.get(name, dash) for m in found)) for name in others]
    caption = (
        f"Mean and standard error over {size} {values['split']} data, the same for all runs; gaps over "
        f"{min(values['gaps_size'], size)}; {values['num_particles']} draws per datum; nats per datum."
    )
    return report.table(["", *(f"run {name}" for name in names)], rows, caption=caption)


def _difference_blocks(differences: Sequence[Mapping[str, Estimate]], names: Sequence[str]) -> list[str]:
    dash = "\N{EN DASH}"
    rows = [
        (
            name,
            *(
                report.with_error(d[name].mean, d[name].standard_error, 3) if name in d else dash
                for d in differences
            ),
        )
        for name in dict.fromkeys(name for d in differences for name in d)
    ]
    text = (
        "Each run less run 1, datum by datum. What makes some data harder than others for both runs cancels, "
        "so that the standard errors are those to judge a difference by."
    )
    header = ["nats per datum", *(f"run {name} \N{MINUS SIGN} run 1" for name in names[1:])]
    return [report.paragraph(text), report.table(header, rows)]


def _settings_table(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return a table of the settings that are not the same in all runs."""
    flat = [_flat({k: v for k, v in run.config.items() if k != "notes"}) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    dash = "\N{EN DASH}"
    rows = [
        (key, *(settings.get(key, dash) for settings in flat))
        for key in keys
        if len({settings.get(key) for settings in flat}) > 1
    ]
    if not rows:
        return report.paragraph("None.")
    return report.table(["setting", *(f"run {name}" for name in names)], rows, numbers=False)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings by names with points, their values as text."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _say(
    found: Sequence[Measures], differences: Sequence[Mapping[str, Estimate]], paths: Sequence[Path]
) -> None:
    print("nats per datum, mean and standard error; in brackets the difference to the first run")
    for name in ("ELBO", "log p(x)"):
        for i, (path, measures) in enumerate(zip(paths, found, strict=True)):
            against = f"  ({differences[i - 1][name]})" if i else ""
            print(f"{name:<10} {measures.estimates[name]!s:>20}{against}  {path}")


# -- figures ---------------------------------------------------------------------------------------


def _drawn(draw: Callable[[], Any], alt: str) -> str:
    """Return a figure, or the reason that there is none."""
    try:
        return report.figure(png_of(draw()), alt)
    except UNSUITED as error:
        return report.paragraph(f"{alt}: none, {error}")


def _plot_histories(runs: Sequence[Run]) -> Any:
    """Draw the ELBO of all runs over epochs, of validation data if all have them."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    of_validation = all(any("validation_elbo" in row for row in run.history) for run in runs)
    key = "validation_elbo" if of_validation else "train_elbo"
    curves = [_curve(run.history, key) for run in runs]
    if not any(curves):
        raise ValueError("the runs have no history")
    _, ax = plt.subplots(figsize=(6.8, 4.0), layout="constrained")
    for i, curve in enumerate(curves, 1):
        if curve:
            style = {"marker": "o", "markersize": 3} if len(curve) <= 40 else {}
            ax.plot(*zip(*curve, strict=True), linewidth=1.4, label=f"run {i}", **style)  # type: ignore[arg-type]
    # a start far below the rest would hide it
    settled = [value for curve in curves for i, (_, value) in enumerate(curve) if i >= len(curve) / 10]
    low, high = min(settled), max(settled)
    if max(map(len, curves)) >= 20 and low - ax.dataLim.y0 > high - low > 0:
        ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.set_xlabel("epoch")
    ax.set_ylabel("ELBO (nats per datum)")
    ax.set_title(f"ELBO of {'validation' if of_validation else 'training'} data", fontsize="medium")
    ax.legend(frameon=False, fontsize="small")
    return ax


def _curve(history: Sequence[Record], key: str) -> list[tuple[float, float]]:
    return [(row["epoch"], row[key]) for row in history if key in row]


def _plot_reconstructions(jobs: Sequence[Job]) -> Any:
    """Draw some data, and below them what each run makes of them."""
    rows: list[torch.Tensor] = []
    for job in jobs:
        with seeded(job.values["seed"]):
            result = reconstruct(job.run.model, job.run.guide, *job.batch(_IMAGES))
        if not rows:
            rows.append(check_images("x", result.x, grid=1))
        rows.append(check_images("mean", result.mean, grid=1))
    labels = ["data", *(f"run {i}" for i in range(1, len(jobs) + 1))]
    return draw_tiles(torch.stack(rows), None, rows=labels)


def _plot_samples(job: Job, i: int) -> Any:
    with seeded(job.values["seed"]):
        result = draw_samples(drawn_from(job.run), _SAMPLES)
    axes = plots.plot_samples(result)
    axes.set_title(f"run {i}", fontsize="medium")
    return axes
