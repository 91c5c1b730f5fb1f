"""The loop over epochs: steps, validation, a loss that is no number, and saving."""

import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import TraceTailAdaptive_ELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from ppl_vae._random import seeded
from ppl_vae.data import Split, batches, num_batches, rows_of_batches
from ppl_vae.infer.checking import Observation, check_batch
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.running import (
    Program,
    batch_arguments,
    evaluating,
    latent_sites,
    observed_sites,
    trace_pair,
)
from ppl_vae.infer.svi import SVI
from ppl_vae.training import saving
from ppl_vae.training.saving import Record, Run

VALIDATION_BATCH = 1000  # data per pass, for memory
SCHEDULED = ("kl_weight", "capacity", "temperature")  # settings of an estimator that a record holds
CHECK_EVERY = 50  # steps between two looks at the loss, which wait for the device


@dataclass
class Training:
    """A training in progress: the epochs, the record of each, and what is saved of them."""

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
    best: tuple[float, dict[str, Tensor]] = field(default_factory=lambda: (-math.inf, {}))

    # -- the loop ------------------------------------------------------------------------------

    def run_epochs(
        self,
        epochs: int,
        patience: int | None,
        callbacks: Sequence[Callable[[Run], object]],
        *,
        progress: bool,
        tensorboard: bool,
    ) -> Run:
        """Train up to an epoch and return the run; Ctrl-C ends it at the last finished one."""
        run, first = self.run, len(self.run.history)
        steps = num_batches(self.train, self.batch_size)
        bar = tqdm(
            total=None if steps is None else steps * epochs,
            initial=(steps or 0) * first,
            unit="step",
            disable=not progress,
            dynamic_ncols=True,
        )
        snapshot = self.snapshot()
        writer = None
        try:
            writer = _summary_writer(run.path, first) if tensorboard and run.path else None
            for epoch in range(first + 1, epochs + 1):
                if self._stopped_early(patience):
                    break
                bar.set_description(f"epoch {epoch}/{epochs}")
                record = self._epoch(epoch, snapshot, bar)
                after = self.snapshot()
                best = self._better(epoch, record, after)
                # one after the other, so that Ctrl-C finds all of an epoch or nothing
                snapshot, (run.best_epoch, self.best) = after, best
                run.history.append(record)
                self._save(epoch, snapshot)
                if writer is not None:
                    for name, value in record.items():
                        writer.add_scalar(name, value, epoch)
                bar.set_postfix_str(summary(record))
                stops = [callback(run) is True for callback in callbacks]
                if any(stops):
                    break
        except KeyboardInterrupt:
            self._restore(snapshot)
            run.interrupted = True
            done = len(run.history)
            if done:  # Ctrl-C may have come while the epoch was being saved
                self._save(done, snapshot)
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
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]  # which a scheduler may fill
        with seeded(self.seed, epoch, 0), pyro.validation_enabled(False):
            totals = self._steps(epoch, snapshot, bar)
        record |= {f"train_{name}": value for name, value in totals.items()}
        if self.validation is not None:
            with seeded(self.seed, 0, 1), pyro.validation_enabled(False):
                found = mean_parts(self.run.model, self.validation, self.device, self.svi.parts)
            record |= {f"validation_{name}": value for name, value in found.items()}
            if math.isnan(record["validation_elbo"]):
                raise _diverged(
                    f"the validation ELBO became nan in epoch {epoch}, after its last step", epoch
                )
        if self.scheduler is not None:
            metric = record.get("validation_elbo", record["train_elbo"])
            plateau = isinstance(self.scheduler, ReduceLROnPlateau)
            try:
                self.scheduler.step(*([-metric] if plateau else []))
            except ArithmeticError as error:
                name = type(self.scheduler).__name__
                raise ValueError(f"scheduler: {name} fails after epoch {epoch}: {error}") from error
        estimator = self.svi.objective.estimator
        if isinstance(estimator, Estimator):
            record |= scheduled(estimator, estimator.step - 1)
        return record | named_rates(rates) | {"seconds": round(time.perf_counter() - start, 3)}

    def _steps(self, epoch: int, snapshot: dict[str, Any], bar: tqdm) -> dict[str, float]:
        """Take one epoch's steps; return the epoch's means in nats per datum."""
        totals: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        count = step = 0
        unchecked = not isinstance(self.train, Split) and epoch == 1
        # Pyro's tail-adaptive estimator has gradients but no loss: it gives infinity
        without_loss = isinstance(self.svi.objective.estimator, TraceTailAdaptive_ELBO)
        for step, (size, loss, sums) in enumerate(self._taken_steps(unchecked), 1):
            count += size
            add_sums(totals, {"loss": loss} | sums)
            losses.append(-sums["elbo"] if without_loss else loss)
            bar.update()
            if step % CHECK_EVERY == 0:
                self._check_losses(losses, epoch, step, snapshot)
                losses.clear()
                bar.set_postfix_str(summary(per_datum(totals, count)))
        if not count:
            raise ValueError("data: expected a loader that can be iterated once per epoch, got no batch")
        self._check_losses(losses, epoch, step, snapshot)
        self._check_parameters(epoch, step)
        return per_datum(totals, count)

    def _taken_steps(self, unchecked: bool) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
        """Take an epoch's steps; yield the number of data, the loss and the parts of each."""
        if isinstance(self.train, Split):
            rows = rows_of_batches(len(self.train), self.batch_size, device=self.device, shuffle=True)
            for index in rows:
                yield len(index), *self.svi.step_of(self.train, index)
            return
        for step, batch in enumerate(self._batches(), 1):
            if unchecked:
                check_batch(f"data, batch {step}", batch, self.observed)
            loss, sums = self.svi.step_with_parts(*batch)
            yield len(batch[0]), loss, self.svi.parts(*batch) if sums is None else sums

    def _batches(self) -> Iterable[tuple[Tensor, ...]]:
        taken = 0
        for batch in batches(self.train, self.batch_size, device=self.device, shuffle=True):
            taken = taken or len(batch_arguments(self.run.model, batch))
            yield batch[:taken]

    def _better(
        self, epoch: int, record: Record, snapshot: dict[str, Any]
    ) -> tuple[int, tuple[float, dict[str, Tensor]]]:
        """Return the best epoch so far, its validation ELBO and its tensors."""
        if self.validation is None:
            return epoch, self.best
        elbo = record["validation_elbo"]
        if self.run.best_epoch and not elbo > self.best[0]:
            return self.run.best_epoch, self.best
        return epoch, (elbo, {name: snapshot["tensors"][name] for name in self.svi.objective.tensors()})

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
            value = float(losses[int(bad[0])])
            raise _diverged(f"the loss became {value} in epoch {epoch}, step {first}, {site}", epoch)

    def _check_parameters(self, epoch: int, step: int) -> None:
        for role, parameters in (self.svi.objective.trainable or {}).items():
            for name, parameter in parameters.items():
                if not parameter.isfinite().all():
                    what = (
                        f"the parameter {role}.{name} became NaN or infinite in epoch {epoch}, by step {step}"
                    )
                    raise _diverged(what, epoch)

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

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors that training changes by name, but for the optimiser's."""
        estimator = self.svi.objective.estimator
        own = {"estimator.step": estimator.step} if isinstance(estimator, Estimator) else {}
        return dict(self.svi.objective.tensors()) | own

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of all that training changes, as tensors and JSON data."""
        tensors = self._tensors()
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
            for name, tensor in self._tensors().items():
                tensor.copy_(tensors[name])
        for name, holder in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            if holder is not None:
                held = {k: v.clone() for k, v in tensors.items() if k.startswith(f"{name}.")}
                holder.load_state_dict(saving.unflatten(state[name], held, holder.state_dict()))

    def _save(self, epoch: int, snapshot: dict[str, Any]) -> None:
        """Write model, history and, last, the checkpoint, which alone says that the epoch is done."""
        run = self.run
        if run.path is None:
            return
        if run.best_epoch == epoch:
            saving.write_tensors(run.path / saving.MODEL, self.svi.objective.tensors(), {"epoch": epoch})
        saving.write_history(run.path, run.history)
        state = snapshot["state"] | {"epoch": epoch, "best_epoch": run.best_epoch, "best_elbo": self.best[0]}
        saving.write_tensors(run.path / saving.CHECKPOINT, snapshot["tensors"], state)

    def resume(self, folder: Path) -> None:
        """Take up the run that is in a folder.

        Raises:
            ValueError: if it has other settings, is damaged, or is one of ``fit_many``.
        """
        saved, path = saving.read_config(folder), folder / saving.CHECKPOINT
        if "members" in saved:
            raise ValueError(
                f"resume: the run in {folder} is one of fit_many, which saves no state to go on from"
            )
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
        own = self._tensors()
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
            saving.check_tensors(self.svi.objective.tensors(), best, folder / saving.MODEL)
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


def add_sums(totals: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Add sums to the totals of the same names."""
    if totals.keys() == sums.keys():
        with torch.no_grad():
            torch._foreach_add_([totals[name] for name in sums], list(sums.values()))
        return
    for name, value in sums.items():
        totals[name] = totals[name] + value if name in totals else value.detach().clone()


def per_datum(totals: Mapping[str, Tensor], count: int) -> dict[str, Any]:
    """Return sums over ``count`` data as means: numbers, or lists of them where a sum has several values."""
    return {name: (total.detach().cpu().double() / count).tolist() for name, total in totals.items()}


def mean_parts(
    model: Program, data: Any, device: torch.device, parts: Callable[..., Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Return ``parts(*batch)`` of all validation data, in nats per datum."""
    totals: dict[str, Tensor] = {}
    count = 0
    for batch in batches(data, VALIDATION_BATCH, device=device, shuffle=False):
        count += len(batch[0])
        add_sums(totals, parts(*batch_arguments(model, batch)))
    return per_datum(totals, count)


def scheduled(estimator: Estimator, step: Tensor) -> Record:
    """Return the values at a step of those settings that follow a schedule."""
    settings = {name: getattr(estimator, name, None) for name in SCHEDULED}
    return {name: float(schedule(step)) for name, schedule in settings.items() if callable(schedule)}


def named_rates(rates: Sequence[Any]) -> Record:
    """Return the learning rates of the parameter groups as a record holds them."""
    if rates[0] == rates[-1]:
        return {"learning_rate": float(rates[-1])}
    return {f"learning_rate_{i}": float(rate) for i, rate in enumerate(rates)}


def _diverged(what: str, epoch: int) -> FloatingPointError:
    return FloatingPointError(
        f"{what}; the parameters are those of epoch {epoch - 1}. Try a lower learning_rate or a clip_norm"
    )


def summary(record: Mapping[str, float]) -> str:
    """Return a record's ELBO and its parts in one line, of the validation data if there are any."""
    side = "validation_" if "validation_elbo" in record else "train_" if "train_elbo" in record else ""
    shown = {k.removeprefix(side): v for k, v in record.items() if k.startswith(side)}
    names = ["elbo", "reconstruction", *(k for k in shown if k.startswith("kl_"))]
    return f"{side}" + ", ".join(f"{name} {shown[name]:.2f}" for name in names)


def check_tensorboard() -> None:
    """Raise if the logger library is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("tensorboard: install it with `pip install 'ppl-vae[tensorboard]'`")


def _summary_writer(path: Path, purge: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path / "tensorboard"), purge_step=purge + 1)
