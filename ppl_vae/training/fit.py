"""Training of a model / guide pair by stochastic variational inference."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ppl_vae._checks import check_choice, check_positive, check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.data import num_batches
from ppl_vae.infer.checking import check_all, check_validation, first_batch, running_on
from ppl_vae.infer.compiled_svi import CompiledSVI
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.placing import place, prepare_data
from ppl_vae.infer.precision import PRECISIONS, Precision
from ppl_vae.infer.running import Program, settle
from ppl_vae.infer.svi import SVI, OptimizerFactory
from ppl_vae.training.folder import Folder
from ppl_vae.training.loop import Training, check_tensorboard
from ppl_vae.training.saving import Run, is_run, read_config
from ppl_vae.training.settings import (
    Adam,
    check_elbo,
    check_rate_is_free,
    describe_batch,
    describe_data,
    learning_rates,
    make_optimizer,
    settings_of_run,
)

WORTH_COMPILING = 120  # seconds of plain steps; compiling takes ten to fifty


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
    compile: bool | Literal["auto"] = False,
    precision: Precision = "float32",
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
    and the epoch alone, so that a resumed run ends as an uninterrupted one does (but for a
    ``DataLoader`` with a generator of its own); the caller's random streams are left alone. Modules
    train in the mode that they come in: call ``.train()`` on one that was evaluated.

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
        compile: trace the step once and compile it (``CompiledSVI``): seconds at the start, then faster steps
            with the same draws. ``"auto"`` does so if plain steps would take two minutes or more, and says
            which; a resumed run goes on as it began.
        precision: that of linear layers, convolutions and attention in training, as in ``SVI``.
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
    rates = learning_rates(learning_rate)
    if clip_norm is not None:
        clip_norm = check_positive("clip_norm", clip_norm)
    if patience is not None:
        patience = check_positive_int("patience", patience)
        if validation is None:
            raise ValueError("patience: expected validation data to stop by, got validation=None")
    seed = check_seed(seed)
    check_choice("compile", compile, (True, False, "auto"))
    check_choice("precision", precision, PRECISIONS)
    elbo = Trace_ELBO() if elbo is None else elbo
    check_elbo(elbo, "Trace_ELBO()")
    if not callable(optimizer) or isinstance(optimizer, (Optimizer, pyro.optim.PyroOptim)):
        raise TypeError(
            "optimizer: expected a function that makes a torch optimiser, such as torch.optim.Adam, "
            f"got {' '.join(repr(optimizer).split())}"
        )
    check_rate_is_free(optimizer)
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
    config = settings_of_run(
        model,
        guide,
        elbo,
        {
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "scheduler": scheduler,
            "epochs": epochs,
            "batch_size": batch_size,
            "clip_norm": clip_norm,
            "patience": patience,
            "device": str(where),
            "seed": seed,
            "compile": compile,
            "precision": precision,
        },
        data=describe_data(train),
        validation=None if held_out is None else describe_data(held_out),
        notes=notes,
    )
    svi: SVI = (CompiledSVI if compile else SVI)(
        model,
        guide,
        lambda _: make_optimizer(
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
        precision=precision,
    )
    with seeded(seed, 0, 2):
        batch = first_batch(model, train, "data", batch_size, where)
        with running_on("data", batch):
            svi.setup(*batch)
        settle(elbo, model, guide, batch)
        if isinstance(elbo, Estimator):
            elbo.step.zero_()
        if isinstance(svi, CompiledSVI) and compile == "auto":
            before = _compiled_before(output) if resume else None
            if before is None:
                svi.plain, reason = _is_short(svi, batch, num_batches(train, batch_size), epochs)
                print(reason, file=sys.stderr)
            else:
                svi.plain = not before
            config["compile"] = not svi.plain
        observed = check_all(model, guide, train, "data", where)
        if held_out is not None:
            check_validation(model, guide, held_out, batch_size, where)
    config["data"]["batch"] = describe_batch(batch)
    made: Any = svi.optim  # made by now
    schedule = None if scheduler is None else _make_scheduler(scheduler, made)
    if tensorboard:
        check_tensorboard()
    training = Training(
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
    training.snapshot()  # what can't be saved is said before a run is replaced
    folder = Folder(training.run)
    folder.open(overwrite=overwrite, resume=training.resume if resume else None)
    try:
        return training.run_epochs(epochs, patience, callbacks, progress=progress, tensorboard=tensorboard)
    except Exception:
        folder.remove_if_empty()
        raise


def _is_short(
    svi: CompiledSVI, batch: tuple[Tensor, ...], steps: int | None, epochs: int
) -> tuple[bool, str]:
    """Return whether training takes too little time to compile for, and a line that says so."""
    if steps is None:
        return True, "compile='auto': plain steps, since the data's number of batches is unknown"
    try:
        seconds = svi.time_plain_step(*batch)
    except NotImplementedError as error:
        return True, f"compile='auto': plain steps, since {error}"
    total = f"{steps * epochs} plain steps of {1000 * seconds:.2g} ms"
    if steps * epochs * seconds < WORTH_COMPILING:
        return True, f"compile='auto': plain steps, since {total} take less than {WORTH_COMPILING} s"
    return False, f"compile='auto': compiled steps, since {total} would take {steps * epochs * seconds:.0f} s"


def _compiled_before(output: str | os.PathLike[str] | None) -> bool | None:
    """Return whether the run to resume is compiled; None if there is none."""
    if output is None or not is_run(Path(output)):
        return None
    return read_config(Path(output)).get("compile") is True


def _make_scheduler(scheduler: Callable[[Optimizer], Any], optimizer: Optimizer) -> Any:
    try:
        made = scheduler(optimizer)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"scheduler: can't be made for this optimiser: {error}") from error
    if not isinstance(made, (LRScheduler, ReduceLROnPlateau)):
        raise TypeError(f"scheduler: expected it to make a torch scheduler, it made {made!r}")
    return made
