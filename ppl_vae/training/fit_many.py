"""Several small models trained at once: one vectorised step over the parameters of all."""

import contextlib
import copy
import inspect
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO, TraceTailAdaptive_ELBO
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from ppl_vae._checks import check_at_least, check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.data import Split, batches, num_batches
from ppl_vae.infer.checking import (
    Observation,
    check_all,
    check_batch,
    check_validation,
    first_batch,
    running_on,
)
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.estimators.kl_elbo import KL_ELBO
from ppl_vae.infer.objective import Objective
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.running import batch_arguments
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.svi import OptimizerFactory
from ppl_vae.infer.vmapped import Tensors, VmappedStep, named_tensors, spread
from ppl_vae.training import saving
from ppl_vae.training.folder import open_folders
from ppl_vae.training.loop import (
    CHECK_EVERY,
    add_sums,
    mean_parts,
    named_rates,
    per_datum,
    scheduled,
    summary,
)
from ppl_vae.training.saving import Record, Run
from ppl_vae.training.settings import (
    Adam,
    check_elbo,
    check_elementwise,
    describe_batch,
    describe_data,
    learning_rates,
    make_optimizer,
    settings_of_run,
)


def fit_many(
    make: Callable[[], tuple[nn.Module, nn.Module]],
    data: Any,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    kl_weights: Sequence[float | Schedule] | None = None,
    validation: Any = None,
    elbo: ELBO | None = None,
    optimizer: OptimizerFactory = Adam,
    learning_rate: float | Mapping[str, float] = 1e-3,
    epochs: int = 100,
    batch_size: int = 100,
    clip_norm: float | None = None,
    device: str | torch.device | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    compile: bool = False,
) -> list[Run]:
    """Train a pair for each seed, or for each seed and KL weight, all in one vectorised step.

    Each member has parameters, buffers and noise of its own, and steps as if it were trained alone; all
    see the same batches in the same order. A step of eight small models takes about three times as long as
    a step of one; the larger the models, the less is gained over ``fit`` in a loop. Order and noise depend
    on the first seed, the epoch and the members' number, so that a member's draws are not those of ``fit``.

    The records are those of ``fit``, ``seconds`` are those of all members together. With validation data
    each pair ends with the parameters of its best epoch, else with the last ones. Global random streams and
    Pyro's parameter store are left alone.

    Args:
        make: returns a fresh model and a fresh guide, both modules that ``torch.func.vmap`` can run: they
            read no parameter and no draw in Python (``if z > 0``) and change buffers in place. Called once
            per member with all random streams seeded by its seed, so that members of one seed start alike.
        data: training data, as in ``fit``.
        seeds: one per member.
        kl_weights: the estimator's ``kl_weight``, a number or a schedule, of each member; all combinations
            of seed and weight are trained, those of the first seed first. None for the weight of ``elbo``.
        validation: likewise; None for none.
        elbo: an estimator of this library, or one of ``pyro.infer`` with a differentiable loss and without
            ``kl_weights``; by default ``KL_ELBO()``.
        optimizer: as in ``fit``; one whose step on a number depends on that number's gradients alone.
        learning_rate: one for all, or ``{"model": ..., "guide": ...}``.
        epochs: passes over the data.
        batch_size: data per step; a ``DataLoader`` has its own.
        clip_norm: the largest norm of each member's gradient.
        device: where to train; by default where the first model's parameters are.
        output: folder to save the runs in, after every epoch: ``output/00``, ``output/01``, ...
        overwrite: replace the runs that are there.
        progress: show a progress bar, with means over members.
        compile: trace the step once and compile it: seconds at the start, then faster steps with the
            same draws.

    Returns:
        A run per member. Ctrl-C ends all at the last finished epoch, with ``run.interrupted``.

    Raises:
        TypeError, ValueError: before any work, naming the argument, what came and what was expected; for
            programs, too, that ``torch.func.vmap`` can't run.
        FileExistsError: if ``output`` holds runs and ``overwrite`` is not set, or other files.
        FloatingPointError: if the loss of a member is NaN or infinite, naming it; the pairs and the saved
            runs are left as after the last good epoch.

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> def make():
        ...     return LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> runs = fit_many(make, torch.randn(200, 5), kl_weights=(1.0, 4.0), epochs=2, progress=False)
        >>> [(run.config["seed"], run.config["kl_weight"]) for run in runs[:3]]
        [(0, 1.0), (0, 4.0), (1, 1.0)]
    """
    epochs = check_positive_int("epochs", epochs)
    batch_size = check_positive_int("batch_size", batch_size)
    rates = learning_rates(learning_rate)
    clip_norm = None if clip_norm is None else check_positive("clip_norm", clip_norm)
    estimator = _check_elbo(elbo, kl_weights)
    check_elementwise(optimizer)
    chosen = [(s, w) for s in _check_seeds(seeds) for w in _check_weights(kl_weights)]
    members: list[_Member] = []
    where: Any = device
    for seed, weight in chosen:
        with seeded(seed, 0, 2):
            model, guide = _check_pair(make())
            where = place(where, model, guide)
            if not members:
                train = prepare_data(data, "data", where)
                held_out = None if validation is None else prepare_data(validation, "validation", where)
                batch = first_batch(model, train, "data", batch_size, where)
            own = copy.copy(estimator)
            if weight is not None:
                own.kl_weight = weight
            objective = Objective(model, guide, own)
            with running_on("data", batch):
                objective.setup(*batch)
        members.append(_Member(seed, weight, objective, Run(model, guide, [], 0, {})))
    with seeded(chosen[0][0], 0, 2):
        first = members[0].run
        observed = check_all(first.model, first.guide, train, "data", where)
        if held_out is not None:
            check_validation(first.model, first.guide, held_out, batch_size, where)
        objectives = [member.objective for member in members]
        own_weights = [] if kl_weights is None else [weight for _, weight in chosen]
        step = VmappedStep(objectives, estimator, batch, kl_weights=own_weights, compile=compile)
    groups = [
        {"params": group, "lr": rates[role]}
        for role in ("model", "guide")
        if (group := [p for name, p in step.trained.items() if name.startswith(f"{role}.")])
    ]
    described = describe_data(train) | {"batch": describe_batch(batch)}
    in_validation = None if held_out is None else describe_data(held_out)
    for i, member in enumerate(members):
        options = {
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "scheduler": None,
            "epochs": epochs,
            "batch_size": batch_size,
            "clip_norm": clip_norm,
            "patience": None,
            "device": str(where),
            "seed": member.seed,
            "compile": compile,
            "precision": "float32",
            "kl_weight": getattr(member.objective.estimator, "kl_weight", 1.0),
            "member": i,
            "members": len(members),
            "seeds": [seed for seed, _ in chosen],
        }
        program = member.run.model, member.run.guide, member.objective.estimator
        settings = settings_of_run(*program, options, data=described, validation=in_validation)
        member.run.config = copy.deepcopy(settings)  # no run shares a setting with another
        if output is not None:
            member.run.path = Path(output) / f"{i:02d}"
    made = make_optimizer(optimizer, groups)
    training = _Training(members, step, made, train, held_out, batch_size, where, clip_norm, observed)
    folders = (
        []
        if output is None
        else open_folders(Path(output), [member.run for member in members], overwrite=overwrite)
    )
    try:
        return training.run_epochs(epochs, progress=progress)
    except Exception:
        for folder in folders:
            folder.remove_if_empty()
        if output is not None:
            with contextlib.suppress(OSError):  # runs are in it
                Path(output).rmdir()
        raise


@dataclass
class _Member:
    seed: int
    kl_weight: float | Schedule | None
    objective: Objective
    run: Run

    def __str__(self) -> str:
        weight = "" if self.kl_weight is None else f", kl_weight {self.kl_weight}"
        return f"the member of seed {self.seed}{weight}"


# -- the epochs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Finished:
    """What the finished epochs gave: replaced as a whole, so that Ctrl-C finds all of an epoch or nothing.

    Attributes:
        records: those of the members, for each epoch.
        tensors: of each member's best epoch, ``[members, ...]``.
    """

    records: list[list[Record]]
    tensors: Tensors

    def best(self, i: int) -> int:
        """Return a member's epoch of the highest validation ELBO; the last one without validation data."""
        elbos = [r[i]["validation_elbo"] for r in self.records if "validation_elbo" in r[i]]
        return elbos.index(max(elbos)) + 1 if elbos else len(self.records)


@dataclass
class _Training:
    members: list[_Member]
    step: VmappedStep
    optimizer: Optimizer
    train: Any
    validation: Any
    batch_size: int
    device: torch.device
    clip_norm: float | None
    observed: list[Observation]

    def run_epochs(self, epochs: int, *, progress: bool) -> list[Run]:
        """Train, and return the runs; Ctrl-C ends them at the last finished epoch."""
        per_epoch = num_batches(self.train, self.batch_size)
        total = None if per_epoch is None else per_epoch * epochs
        bar = tqdm(total=total, unit="step", disable=not progress, dynamic_ncols=True)
        done = _Finished([], self.step.tensors())
        try:
            for epoch in range(1, epochs + 1):
                bar.set_description(f"epoch {epoch}/{epochs}")
                done = self._after(done, self._epoch(epoch, bar))
                self._save(done)
                last = done.records[-1]
                means = {name: sum(record[name] for record in last) / len(last) for name in last[0]}
                bar.set_postfix_str(summary(means))
        except KeyboardInterrupt:
            self._save(done)  # Ctrl-C may have come while the epoch was being saved
            for member in self.members:
                member.run.interrupted = True
            path, count = self.members[0].run.path, len(done.records)
            where = f"; saved in {path.parent}" if path and count else ""
            warnings.warn(f"interrupted: {count} of {epochs} epochs finished{where}", stacklevel=3)
        finally:
            bar.close()
            self._publish(done)
        return [member.run for member in self.members]

    def _epoch(self, epoch: int, bar: tqdm) -> list[Record]:
        start = time.perf_counter()
        with seeded(self.members[0].seed, epoch, 0), self.step.running():
            means = {f"train_{name}": values for name, values in self._steps(epoch, bar).items()}
        if self.validation is not None:
            with seeded(self.members[0].seed, 0, 1), self.step.running():
                model = self.members[0].run.model
                found = mean_parts(model, self.validation, self.device, self.step.validate)
            means |= {f"validation_{name}": values for name, values in found.items()}
            for member, elbo in zip(self.members, means["validation_elbo"], strict=True):
                if math.isnan(elbo):
                    raise _failed(f"the validation ELBO of {member} became nan in epoch {epoch}", epoch)
        last = self.step.count - 1
        means |= {name: weights.tolist() for name, weights in self.step.kl_weights(last).items()}
        common = scheduled(self.step.elbo, last) if isinstance(self.step.elbo, Estimator) else {}
        common |= named_rates([group["lr"] for group in self.optimizer.param_groups])
        common["seconds"] = round(time.perf_counter() - start, 3)
        return [
            {"epoch": epoch} | {name: values[i] for name, values in means.items()} | common
            for i in range(len(self.members))
        ]

    def _steps(self, epoch: int, bar: tqdm) -> dict[str, list[float]]:
        """Take one epoch's steps; return each member's means in nats per datum."""
        totals: Tensors = {}
        losses: list[Tensor] = []
        count = step = 0
        unchecked = not isinstance(self.train, Split) and epoch == 1
        for step, batch in enumerate(self._batches(), 1):
            if unchecked:
                check_batch(f"data, batch {step}", batch, self.observed)
            loss, parts = self.step.take(batch, self.optimizer, self.clip_norm)
            count += len(batch[0])
            add_sums(totals, {"loss": loss} | parts)
            losses.append(loss)
            bar.update()
            if step % CHECK_EVERY == 0:
                self._check_losses(losses, epoch, step)
                losses.clear()
                bar.set_postfix_str(summary(per_datum({k: v.mean() for k, v in totals.items()}, count)))
        if not count:
            raise ValueError("data: expected a loader that can be iterated once per epoch, got no batch")
        self._check_losses(losses, epoch, step)
        for name, parameter in self.step.trained.items():
            finite = parameter.detach().isfinite().reshape(len(parameter), -1).all(1).tolist()
            if not all(finite):
                member = self.members[finite.index(False)]
                what = f"the parameter {name} of {member} became NaN or infinite in epoch {epoch}"
                raise _failed(what, epoch)
        return per_datum(totals, count)

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in batches(self.train, self.batch_size, device=self.device, shuffle=True):
            yield batch_arguments(self.members[0].run.model, batch)

    def _check_losses(self, losses: list[Tensor], epoch: int, step: int) -> None:
        bad = (~torch.stack(losses).isfinite()).nonzero().tolist() if losses else []
        if bad:
            at, i = bad[0]
            value, first = float(losses[at][i]), step - len(losses) + at + 1
            what = f"the loss of {self.members[i]} became {value} in epoch {epoch}, step {first}"
            raise _failed(what, epoch)

    def _after(self, done: _Finished, records: list[Record]) -> _Finished:
        """Return what the epochs gave with one more."""
        after = _Finished([*done.records, records], self.step.tensors())
        best = [after.best(i) == len(after.records) for i in range(len(self.members))]
        mask = torch.tensor(best, device=self.device)
        for name, tensor in after.tensors.items():
            tensor.copy_(torch.where(spread(mask, tensor), tensor, done.tensors[name]))
        return after

    def _publish(self, done: _Finished) -> None:
        """Put what the epochs gave into the members' runs."""
        for i, member in enumerate(self.members):
            with torch.no_grad():
                for name, tensor in named_tensors(member.objective).items():
                    tensor.copy_(done.tensors[name][i])
            member.run.history[:] = [records[i] for records in done.records]
            member.run.best_epoch = done.best(i)

    def _save(self, done: _Finished) -> None:
        """Write each member's model and history, if there are folders."""
        saved = [(m.run, m.run.path, m.objective) for m in self.members if m.run.path and done.records]
        if saved:
            self._publish(done)
        for run, path, objective in saved:
            if run.best_epoch == len(run.history):
                saving.write_tensors(path / saving.MODEL, objective.tensors(), {"epoch": run.best_epoch})
            saving.write_history(path, run.history)


def _failed(what: str, epoch: int) -> FloatingPointError:
    advice = "Try a lower learning_rate or a clip_norm"
    return FloatingPointError(f"{what}; all runs are as of epoch {epoch - 1}. {advice}")


# -- checks ------------------------------------------------------------------------------------------


def _check_seeds(seeds: Any) -> list[int]:
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or not seeds:
        raise TypeError(f"seeds: expected a sequence of whole numbers from 0, got {seeds!r}")
    try:
        return [check_seed(seed) for seed in seeds]
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("seed:", "seeds:")) from None


def _check_weights(weights: Any) -> list[Any]:
    if weights is None:
        return [None]
    if isinstance(weights, str) or not isinstance(weights, Sequence) or not weights:
        raise TypeError(f"kl_weights: expected a sequence of numbers from 0, or None, got {weights!r}")
    return [w if callable(w) else check_at_least(f"kl_weights[{i}]", w) for i, w in enumerate(weights)]


def _check_elbo(given: Any, weights: Any) -> Any:
    """Return the estimator as the members share it."""
    elbo: Any = KL_ELBO() if given is None else copy.copy(given)
    check_elbo(elbo, "KL_ELBO()")
    if not hasattr(elbo, "differentiable_loss") or isinstance(elbo, TraceTailAdaptive_ELBO):
        what = f"a differentiable loss, such as KL_ELBO(), got {type(elbo).__name__}"
        raise ValueError(f"elbo: expected an estimator with {what}")
    if weights is not None:
        if not (isinstance(elbo, Estimator) and "kl_weight" in inspect.signature(type(elbo)).parameters):
            what = f"a `kl_weight` for kl_weights={weights!r}, such as KL_ELBO(), got {type(elbo).__name__}"
            raise ValueError(f"elbo: expected an estimator with {what}")
        elbo.kl_weight = 1.0
    return elbo


def _check_pair(made: Any) -> tuple[nn.Module, nn.Module]:
    if not isinstance(made, tuple) or len(made) != 2 or not all(isinstance(p, nn.Module) for p in made):
        raise TypeError(
            "make: expected a function that returns a pair (model, guide) of modules, it returned "
            f"{' '.join(repr(made).split())}; plain functions train with `fit` in a loop"
        )
    return made
