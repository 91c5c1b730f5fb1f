"""Training of a model / guide pair by stochastic variational inference."""

import contextlib
import functools
import inspect
import math
import os
import platform
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceTMC_ELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from ppl_vae._checks import check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.data import Split, batches, num_batches
from ppl_vae.description import describe
from ppl_vae.infer.checking import Observation, check_all, check_batch, first_batch, running_on
from ppl_vae.infer.log_weights import terms
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.recording import SiteRecorder, term_sums
from ppl_vae.infer.running import (
    Program,
    batch_arguments,
    evaluating,
    in_own_store,
    latent_sites,
    observed_sites,
    trace_pair,
)
from ppl_vae.infer.svi import SVI, OptimizerFactory
from ppl_vae.training import saving
from ppl_vae.training.saving import Record, Run

VALIDATION_BATCH = 1000  # data per pass, for memory
CHECK_EVERY = 50  # steps between two looks at the loss, which wait for the device

Adam: OptimizerFactory = functools.partial(torch.optim.Adam, fused=True)


def fit(
    model: Program,
    guide: Program,
    data: Any,
    *,
    validation: Any = None,
    elbo: ELBO | None = None,
    optimizer: OptimizerFactory = Adam,
    learning_rate: float | Mapping[str, float] = 1e-3,
    scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
    epochs: int = 100,
    batch_size: int = 100,
    clip_norm: float | None = None,
    patience: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    callbacks: Sequence[Callable[[Run], object]] = (),
    progress: bool = True,
    tensorboard: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Run:
    """Train a model and a guide on data; log, check and save every epoch.

    The pair is any two programs over the same latent sites: the library's, modules of yours, or
    plain Pyro functions that register their networks with ``pyro.module``. They are called with as
    many of a batch's tensors as the model takes: ``model(x)`` or ``model(x, y)``.

    Each epoch's record holds ELBO, reconstruction and KL of each latent site, in nats per datum:
    for the training data averaged over the epoch's steps, for the validation data with one draw per
    datum, the same in each epoch. With validation data the pair ends with the parameters of the
    epoch of the highest validation ELBO, else with the last ones. Noise and order depend on ``seed``
    and the epoch alone, so that a resumed run ends as an uninterrupted one does; the caller's random
    streams are left alone.

    Args:
        model: program over the latent sites and the data.
        guide: program over the latent sites.
        data: training data: a ``Split``, a tensor ``[n, *event]``, a tuple ``(x, y)``, a torch
            ``Dataset`` (stacked in memory) or a ``DataLoader``.
        validation: likewise; None for none.
        elbo: any ``pyro.infer.ELBO``; by default ``Trace_ELBO()``.
        optimizer: makes a torch optimiser from parameter groups: ``torch.optim.AdamW``, say, or a
            ``functools.partial`` of it. The gradient is that of the loss per datum.
        learning_rate: one for all, or ``{"model": ..., "guide": ...}``.
        scheduler: makes a torch scheduler from the optimiser; stepped once per epoch
            (``ReduceLROnPlateau`` with minus the ELBO).
        epochs: passes over the data.
        batch_size: data per step; a ``DataLoader`` has its own.
        clip_norm: the largest norm of the gradient of all parameters together.
        patience: stop after so many epochs without a higher validation ELBO.
        device: where to train; by default where the model's parameters are.
        seed: of noise and order.
        output: folder to save the run in, after every epoch.
        overwrite: replace a run that is there.
        resume: continue the run that is there, if any.
        callbacks: called with the run after each epoch; one that returns True ends the training.
        progress: show a progress bar.
        tensorboard: log to ``output/tensorboard`` too.
        notes: plain data of yours to keep in the run's settings.

    Returns:
        The run. Ctrl-C ends it at the last finished epoch, with ``run.interrupted``.

    Raises:
        TypeError, ValueError: before any work, naming the argument, what came and what was expected.
        FileExistsError: if ``output`` holds a run and neither ``overwrite`` nor ``resume`` is set.
        FloatingPointError: if the loss is NaN or infinite, naming epoch, step and site; the pair is
            left as after the last good epoch.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> run = fit(model, guide, torch.randn(200, 5), epochs=2, progress=False)
        >>> [record["epoch"] for record in run.history]
        [1, 2]
    """
    epochs = check_positive_int("epochs", epochs)
    batch_size = check_positive_int("batch_size", batch_size)
    rates = _learning_rates(learning_rate)
    if clip_norm is not None:
        clip_norm = check_positive("clip_norm", clip_norm)
    if patience is not None:
        patience = check_positive_int("patience", patience)
        if validation is None:
            raise ValueError("patience: expected validation data to stop by, got validation=None")
    seed = check_seed(seed)
    elbo = Trace_ELBO() if elbo is None else elbo
    if not isinstance(elbo, ELBO):
        raise TypeError(f"elbo: expected an instance of pyro.infer.ELBO such as Trace_ELBO(), got {elbo!r}")
    check_positive_int("elbo.num_particles", elbo.num_particles)
    if not callable(optimizer) or isinstance(optimizer, (Optimizer, pyro.optim.PyroOptim)):
        raise TypeError(
            "optimizer: expected a function that makes a torch optimiser, such as torch.optim.Adam, "
            f"got {' '.join(repr(optimizer).split())}"
        )
    if scheduler is not None and not callable(scheduler):
        raise TypeError(
            "scheduler: expected a function that makes a torch scheduler from the optimiser, "
            f"got {scheduler!r}"
        )
    if callable(callbacks) or not all(callable(callback) for callback in callbacks):
        raise TypeError(f"callbacks: expected a sequence of functions of the run, got {callbacks!r}")
    if tensorboard and output is None:
        raise ValueError("output: expected a folder for tensorboard=True, got None")
    where = place(device, model, guide)
    train = prepare_data(data, "data", where)
    held_out = None if validation is None else prepare_data(validation, "validation", where)
    config = {
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("ppl-vae", "torch", "pyro-ppl")},
        "model": describe(model),
        "guide": describe(guide),
        "elbo": describe(type(elbo))
        | {k: describe(v) for k, v in vars(elbo).items() if _plain(v) and k != "max_plate_nesting"},
        "optimizer": describe(optimizer),
        "learning_rate": describe(learning_rate),
        "scheduler": describe(scheduler),
        "epochs": epochs,
        "batch_size": batch_size,
        "clip_norm": clip_norm,
        "patience": patience,
        "device": str(where),
        "seed": seed,
        "data": _describe_data(train),
        "validation": None if held_out is None else _describe_data(held_out),
        "notes": describe(notes),
    }
    svi = SVI(
        model,
        guide,
        lambda _: _make_optimizer(
            optimizer,
            [
                {"params": list(group.values()), "lr": rates[role]}
                for role, group in (svi.objective.trainable or {}).items()
                if group
            ],
        ),
        elbo,
        clip_norm=clip_norm,
        per_datum=True,
    )
    with seeded(seed, 0, 2):
        batch = first_batch(model, train, "data", batch_size, where)
        with running_on("data", batch):
            svi.setup(*batch)
        _settle(elbo, model, guide, batch)
        observed = check_all(model, guide, train, "data", where)
        if held_out is not None:
            in_validation = check_all(model, guide, held_out, "validation", where)
            if not isinstance(held_out, Split):
                for i, loaded in enumerate(batches(held_out, batch_size, device=where, shuffle=False), 1):
                    check_batch(f"validation, batch {i}", loaded, in_validation)
    config["data"]["batch"] = [[[1, *x.shape[1:]], str(x.dtype).removeprefix("torch.")] for x in batch]
    made = svi.optim
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer: expected it to make a torch optimiser, it made {made!r}")
    schedule = None if scheduler is None else _make_scheduler(scheduler, made)
    training = _Training(
        svi=svi,
        optimizer=made,
        scheduler=schedule,
        train=train,
        validation=held_out,
        batch_size=batch_size,
        device=where,
        seed=seed,
        observed=observed,
        run=Run(model, guide, [], 0, config, None if output is None else Path(output)),
    )
    if output is not None:
        training.open_folder(overwrite=overwrite, resume=resume)
    try:
        return training.fit(epochs, patience, callbacks, progress=progress, tensorboard=tensorboard)
    except Exception:
        training.remove_empty_folder()
        raise


def _settle(elbo: Any, model: Program, guide: Program, batch: tuple[Tensor, ...]) -> None:
    """Let an estimator that guesses the number of plates do so now: its first step would draw for it."""
    vectorized = elbo.vectorize_particles or isinstance(elbo, (TraceEnum_ELBO, TraceTMC_ELBO))
    if vectorized and elbo.max_plate_nesting == math.inf:
        with evaluating(model, guide):
            elbo._guess_max_plate_nesting(in_own_store(model), in_own_store(guide), batch, {})


def _make_optimizer(optimizer: OptimizerFactory, groups: list[dict[str, Any]]) -> Optimizer:
    name = getattr(getattr(optimizer, "func", optimizer), "__name__", repr(optimizer))
    try:
        made = optimizer(groups)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"optimizer: {name} can't be made for these parameters: {reason}") from error
    if isinstance(made, Optimizer):
        closure = inspect.signature(type(made).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(
                f"optimizer: expected one that steps on given gradients, got {name}, which needs a closure"
            )
    return made


def _make_scheduler(scheduler: Callable[[Optimizer], Any], optimizer: Optimizer) -> Any:
    try:
        made = scheduler(optimizer)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"scheduler: can't be made for this optimiser: {error}") from error
    if not isinstance(made, (LRScheduler, ReduceLROnPlateau)):
        raise TypeError(f"scheduler: expected it to make a torch scheduler, it made {made!r}")
    return made


@dataclass
class _Training:
    svi: SVI
    optimizer: Optimizer
    scheduler: Any
    train: Any
    validation: Any
    batch_size: int
    device: torch.device
    seed: int
    observed: list[Observation]
    run: Run
    made_folder: bool = False
    best: tuple[float, dict[str, Tensor]] = field(default_factory=lambda: (-math.inf, {}))

    # -- the loop ------------------------------------------------------------------------------

    def fit(
        self,
        epochs: int,
        patience: int | None,
        callbacks: Sequence[Callable[[Run], object]],
        *,
        progress: bool,
        tensorboard: bool,
    ) -> Run:
        run, first = self.run, len(self.run.history)
        steps = num_batches(self.train, self.batch_size)
        bar = tqdm(
            total=None if steps is None else steps * epochs,
            initial=(steps or 0) * first,
            unit="step",
            disable=not progress,
            dynamic_ncols=True,
        )
        snapshot = self._snapshot()
        writer = None
        try:
            writer = _summary_writer(run.path, first) if tensorboard and run.path else None
            for epoch in range(first + 1, epochs + 1):
                if self._stopped_early(patience):
                    break
                bar.set_description(f"epoch {epoch}/{epochs}")
                record = self._epoch(epoch, snapshot, bar)
                best, after = self._better(epoch, record), self._snapshot()
                # one after the other, so that Ctrl-C finds all of an epoch or nothing
                snapshot, (run.best_epoch, self.best) = after, best
                run.history.append(record)
                self._save(epoch)
                if writer is not None:
                    for name, value in record.items():
                        writer.add_scalar(name, value, epoch)
                bar.set_postfix_str(_summary(record))
                stops = [callback(run) is True for callback in callbacks]
                if any(stops):
                    break
        except KeyboardInterrupt:
            self._restore(snapshot)
            run.interrupted = True
            done = len(run.history)
            if done:  # Ctrl-C may have come while the epoch was being saved
                self._save(done)
            where = f"; saved in {run.path}, continue with resume=True" if run.path and done else ""
            warnings.warn(f"interrupted: {done} of {epochs} epochs finished{where}", stacklevel=3)
        except Exception:
            self._restore(snapshot)
            raise
        finally:
            bar.close()
            if writer is not None:
                writer.close()
        if self.validation is not None and self.best[1]:
            with torch.no_grad():
                for name, tensor in self.svi.objective.tensors().items():
                    tensor.copy_(self.best[1][name])
        return run

    def _epoch(self, epoch: int, snapshot: dict[str, Any], bar: tqdm) -> Record:
        start = time.perf_counter()
        record: Record = {"epoch": epoch}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        with seeded(self.seed, epoch, 0), pyro.validation_enabled(False):
            totals = self._steps(epoch, snapshot, bar)
        record |= {f"train_{name}": value for name, value in totals.items()}
        if self.validation is not None:
            record |= {f"validation_{name}": value for name, value in self._validate().items()}
            if math.isnan(record["validation_elbo"]):
                raise FloatingPointError(
                    f"the validation ELBO became nan in epoch {epoch}, after its last step; the parameters "
                    f"are those of epoch {epoch - 1}. Try a lower learning_rate or a clip_norm"
                )
        if self.scheduler is not None:
            metric = record.get("validation_elbo", record["train_elbo"])
            plateau = isinstance(self.scheduler, ReduceLROnPlateau)
            try:
                self.scheduler.step(*([-metric] if plateau else []))
            except ArithmeticError as error:
                name = type(self.scheduler).__name__
                raise ValueError(f"scheduler: {name} fails after epoch {epoch}: {error}") from error
        record |= {
            "learning_rate" if len(rates) == 1 or rates[0] == rates[-1] else f"learning_rate_{i}": float(rate)
            for i, rate in enumerate(rates)
        }
        return record | {"seconds": round(time.perf_counter() - start, 3)}

    def _steps(self, epoch: int, snapshot: dict[str, Any], bar: tqdm) -> dict[str, float]:
        """Take one epoch's steps; return the epoch's means in nats per datum."""
        totals: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        count = step = 0
        unchecked = not isinstance(self.train, Split) and epoch == 1
        for step, batch in enumerate(self._batches(), 1):
            if unchecked:
                check_batch(f"data, batch {step}", batch, self.observed)
            with SiteRecorder() as recorder:
                loss = self.svi.step(*batch)
            sums = recorder.sums()
            if sums is None:
                with evaluating(self.run.model, self.run.guide):
                    sums = term_sums(terms(self.run.model, self.run.guide, *batch))
            count += len(batch[0])
            for name, value in ({"loss": loss} | sums).items():
                totals[name] = totals[name] + value if name in totals else value
            # Pyro's tail-adaptive estimator has gradients but no loss: it gives infinity
            losses.append(torch.where(loss.isinf(), -sums["elbo"].to(loss), loss))
            bar.update()
            if step % CHECK_EVERY == 0:
                self._check_losses(losses, epoch, step, snapshot)
                losses.clear()
                bar.set_postfix_str(_summary({k: float(v) / count for k, v in totals.items()}))
        if not count:
            raise ValueError("data: expected a loader that can be iterated once per epoch, got no batch")
        self._check_losses(losses, epoch, step, snapshot)
        self._check_parameters(epoch, step)
        return {name: float(value) / count for name, value in totals.items()}

    def _batches(self) -> Iterable[tuple[Tensor, ...]]:
        for batch in batches(self.train, self.batch_size, device=self.device, shuffle=True):
            yield batch_arguments(self.run.model, batch)

    def _validate(self) -> dict[str, float]:
        totals: dict[str, Tensor] = {}
        count = 0
        model, guide = self.run.model, self.run.guide
        with seeded(self.seed, 0, 1), evaluating(model, guide), pyro.validation_enabled(False):
            for batch in batches(self.validation, VALIDATION_BATCH, device=self.device, shuffle=False):
                count += len(batch[0])
                for name, value in term_sums(terms(model, guide, *batch_arguments(model, batch))).items():
                    totals[name] = totals[name] + value if name in totals else value
        return {name: float(value) / count for name, value in totals.items()}

    def _better(self, epoch: int, record: Record) -> tuple[int, tuple[float, dict[str, Tensor]]]:
        """Return the best epoch so far, its validation ELBO and its tensors."""
        if self.validation is None:
            return epoch, self.best
        elbo = record["validation_elbo"]
        if self.run.best_epoch and not elbo > self.best[0]:
            return self.run.best_epoch, self.best
        tensors = {k: v.detach().clone() for k, v in self.svi.objective.tensors().items()}
        return epoch, (elbo, tensors)

    def _stopped_early(self, patience: int | None) -> bool:
        return patience is not None and len(self.run.history) - self.run.best_epoch >= patience > 0

    # -- a loss that is no number --------------------------------------------------------------

    def _check_losses(self, losses: list[Tensor], epoch: int, step: int, snapshot: dict[str, Any]) -> None:
        if not losses:
            return
        bad = (~torch.stack(losses).isfinite()).nonzero()
        if len(bad):
            first = step - len(losses) + int(bad[0]) + 1
            site = self._find_bad_site(epoch, first, snapshot)
            raise FloatingPointError(
                f"the loss became {float(losses[int(bad[0])])} in epoch {epoch}, step {first}, {site}; "
                f"the parameters are those of epoch {epoch - 1}. Try a lower learning_rate or a clip_norm"
            )

    def _check_parameters(self, epoch: int, step: int) -> None:
        for role, parameters in (self.svi.objective.trainable or {}).items():
            for name, parameter in parameters.items():
                if not parameter.isfinite().all():
                    raise FloatingPointError(
                        f"the parameter {role}.{name} became NaN or infinite in epoch {epoch}, "
                        f"by step {step}; the parameters are those of epoch {epoch - 1}. "
                        "Try a lower learning_rate or a clip_norm"
                    )

    def _find_bad_site(self, epoch: int, bad_step: int, snapshot: dict[str, Any]) -> str:
        """Repeat the epoch up to the bad step and name the first site that is no number there."""
        self._restore(snapshot)
        with seeded(self.seed, epoch, 0), pyro.validation_enabled(False):
            for step, batch in enumerate(self._batches(), 1):
                if step < bad_step:
                    self.svi.step(*batch)
                    continue
                with evaluating(self.run.model, self.run.guide):
                    traces = trace_pair(self.run.model, self.run.guide, *batch)
                for trace, role in zip(reversed(traces), ("guide", "model"), strict=True):
                    for name, site in (latent_sites(trace) | observed_sites(trace)).items():
                        log_prob = site["fn"].log_prob(site["value"])
                        if not (site["value"].isfinite().all() and log_prob.sum().isfinite()):
                            return f"at site {name!r} of the {role}"
                break
        return "at no one site"

    # -- state ---------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, Any]:
        """Return a copy of all that training changes, as tensors and JSON data."""
        tensors = dict(self.svi.objective.tensors())
        state = {
            "optimizer": saving.flatten(self.optimizer.state_dict(), tensors, "optimizer"),
            "scheduler": None
            if self.scheduler is None
            else saving.flatten(self.scheduler.state_dict(), tensors, "scheduler"),
        }
        return {"tensors": {k: v.detach().clone() for k, v in tensors.items()}, "state": state}

    def _restore(self, snapshot: dict[str, Any]) -> None:
        tensors, state = snapshot["tensors"], snapshot["state"]
        with torch.no_grad():
            for name, tensor in self.svi.objective.tensors().items():
                tensor.copy_(tensors[name])
        for name, holder in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            if holder is not None:
                held = {k: v.clone() for k, v in tensors.items() if k.startswith(f"{name}.")}
                holder.load_state_dict(saving.unflatten(state[name], held, holder.state_dict()))

    def _save(self, epoch: int) -> None:
        """Write model, history and, last, the checkpoint, which alone says that the epoch is done."""
        run = self.run
        if run.path is None:
            return
        if run.best_epoch == epoch:
            saving.write_tensors(run.path / saving.MODEL, self.svi.objective.tensors(), {"epoch": epoch})
        saving.write_history(run.path, run.history)
        snapshot = self._snapshot()
        state = snapshot["state"] | {"epoch": epoch, "best_epoch": run.best_epoch, "best_elbo": self.best[0]}
        saving.write_tensors(run.path / saving.CHECKPOINT, snapshot["tensors"], state)

    def open_folder(self, *, overwrite: bool, resume: bool) -> None:
        """Create the run's folder, or take up the run that is in it."""
        folder, replaces = self.run.path, False
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"output: expected a folder, {folder} is a file")
        # what a write was ended in counts for nothing
        leftovers = {saving.temporary(folder / name).name for name in saving.FILES}
        if folder.is_dir() and any(file.name not in leftovers for file in folder.iterdir()):
            replaces = saving.is_run(folder)
            if not (replaces or (resume and (folder / saving.CONFIG).is_file())):
                raise FileExistsError(f"output: {folder} holds other files than a run; choose another folder")
            if resume:
                self._resume(folder)
                return
            if not overwrite:
                raise FileExistsError(
                    f"output: {folder} holds a run; set overwrite or resume, or choose another"
                )
            for name in (saving.CHECKPOINT, saving.MODEL, saving.HISTORY, saving.EVALUATION):
                (folder / name).unlink(missing_ok=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            saving.write_config(folder, self.run.config)
            self.made_folder = not replaces
        except OSError as error:
            raise OSError(f"output: can't write to {folder}: {error.strerror}") from None

    def remove_empty_folder(self) -> None:
        """Remove the folder that ``open_folder`` made if no epoch came to be saved in it."""
        folder = self.run.path
        if folder is None or not self.made_folder or self.run.history:
            return
        for name in saving.FILES:
            (folder / name).unlink(missing_ok=True)
            saving.temporary(folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        with contextlib.suppress(OSError):  # other files are the caller's
            folder.rmdir()

    def _resume(self, folder: Path) -> None:
        saved, path = saving.read_config(folder), folder / saving.CHECKPOINT
        for key, value in self.run.config.items():
            if key not in ("epochs", "versions", "device") and saved.get(key) != value:
                raise ValueError(
                    f"resume: {key} differs from the run in {folder}: "
                    f"{saved.get(key)!r} there, {value!r} here"
                )
        saving.write_config(folder, self.run.config)
        if not path.exists():
            return
        tensors, state = saving.read_tensors(path)
        own = self.svi.objective.tensors()
        saving.check_tensors(own, {k: v for k, v in tensors.items() if k in own}, path)
        try:
            self._restore(
                {
                    "tensors": {k: v.to(self.device) if k in own else v for k, v in tensors.items()},
                    "state": state,
                }
            )
            epoch, best_epoch, best_elbo = (state[k] for k in ("epoch", "best_epoch", "best_elbo"))
            history = saving.read_history(folder)[:epoch]
            self._check_optimizer_state()
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: damaged checkpoint: {type(error).__name__}: {reason}") from error
        if len(history) != epoch:
            raise ValueError(f"{folder / saving.HISTORY}: expected {epoch} epochs, found {len(history)}")
        self.run.history, self.run.best_epoch = history, best_epoch
        if self.validation is not None:
            best, _ = saving.read_tensors(folder / saving.MODEL)
            saving.check_tensors(own, best, folder / saving.MODEL)
            self.best = (best_elbo, {k: v.to(self.device) for k, v in best.items()})

    def _check_optimizer_state(self) -> None:
        """Raise if the moments have other shapes than their parameters, which fused steps don't look at."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                for name, value in self.optimizer.state.get(parameter, {}).items():
                    if group.get("fused") and isinstance(value, Tensor) and name != "step":
                        if value.shape != parameter.shape:
                            expected, got = list(parameter.shape), list(value.shape)
                            raise ValueError(f"expected {name} of shape {expected}, got {got}")


def _learning_rates(learning_rate: float | Mapping[str, float]) -> dict[str, float]:
    if not isinstance(learning_rate, Mapping):
        return dict.fromkeys(("model", "guide"), check_positive("learning_rate", learning_rate))
    if learning_rate.keys() != {"model", "guide"}:
        raise ValueError(
            f"learning_rate: expected a number or {{'model': ..., 'guide': ...}}, got {dict(learning_rate)!r}"
        )
    return {role: check_positive(f"learning_rate[{role!r}]", rate) for role, rate in learning_rate.items()}


def _describe_data(data: Any) -> dict[str, Any]:
    if not isinstance(data, Split):
        return {"loader": f"{type(data).__module__}.{type(data).__qualname__}"}
    content = zlib.crc32(data.x.detach().cpu().contiguous().numpy().tobytes())
    return {
        "source": describe(getattr(data, "source", None)),
        "size": len(data),
        "checksum": f"{content:08x}",
        "dynamic": data.dynamic,
        "labels": None
        if data.y is None
        else f"{zlib.crc32(data.y.cpu().contiguous().numpy().tobytes()):08x}",
    }


def _plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _summary(record: Mapping[str, float]) -> str:
    side = "validation_" if "validation_elbo" in record else "train_" if "train_elbo" in record else ""
    shown = {k.removeprefix(side): v for k, v in record.items() if k.startswith(side)}
    names = ["elbo", "reconstruction", *(k for k in shown if k.startswith("kl_"))]
    return f"{side}" + ", ".join(f"{name} {shown[name]:.2f}" for name in names)


def _summary_writer(path: Path, purge: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("tensorboard: install it with `pip install 'ppl-vae[tensorboard]'`") from None
    return SummaryWriter(str(path / "tensorboard"), purge_step=purge + 1)
