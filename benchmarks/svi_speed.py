"""Measure the milliseconds of a training step: Pyro, this library, hand-written PyTorch, NumPyro, pythae.

A VAE with Bernoulli likelihood, standard normal prior and Adam (rate 1e-3) on synthetic bits of MNIST's
size. All engines run in one process: a repeat is one pass of every engine over the same few batches, in an
order drawn anew, and a figure is the median over repeats of a pass's time per step. A step is all from
batch to changed parameters; a pass is timed until they are computed.

What keeps it fair:

- Every engine starts from the same weights. Their losses on one batch must agree within five standard
  errors at the start, and after the warm-up steps within that and a tenth of what the loss has fallen by
  (the draws differ), or the script stops.
- Batches are prepared in each engine's own type of array. pythae's trainer is timed twice: on them, and with
  its own data loader.
- All argument validation is off. Pyro and pythae have the Adam that their users get, the other PyTorch
  engines torch's fused one; a whole compiled step has torch's, for TorchInductor to fuse.
- The library's guide clamps log sigma and its programs check shapes; hand-written steps and Pyro's do not.
- `--threads n` on the CPU binds the process to n cores and sets torch's threads; JAX sizes its pool by the
  cores it may run on, and with one its `xla_cpu_multi_thread_eigen` is off.
- Of the ways to compile the hand-written steps, and of NumPyro's, the ratios take the fastest: over our
  `Trace_ELBO`, they tell how many times as long their step takes. `lax.scan` over steps is not measured.
- Compile times are first passes over an empty cache, less a later pass; a small function is compiled before.

NumPyro (with a JAX for the device) and pythae are optional: what can't be imported is left out.

    python benchmarks/svi_speed.py [--sizes 784-400-20 ...] [--threads 1] [--device cpu] [--fit]
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import logging
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
import yaml
from pyro.distributions.transforms import AffineAutoregressive, affine_autoregressive
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor, nn

from ppl_vae import fit
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import IWAE, KL_ELBO, STL_ELBO, SVI, CompiledSVI
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP, ConvDecoder, ConvEncoder
from ppl_vae.priors import StandardNormal

RATE = 1e-3
BATCHES = 8  # prepared batches, the steps of a pass
WARM_UP = 3  # passes before the timed ones
EVALUATIONS = 20  # losses averaged in a check
Adam = functools.partial(torch.optim.Adam, lr=RATE, fused=True)


class Size(NamedTuple):
    """What is trained."""

    hidden: tuple[int, ...]
    latent: int
    batch: int
    draws: int = 1
    convolutional: bool = False
    flow: bool = False


SIZES = {
    "784-400-20, batch 128": Size((400,), 20, 128),
    "784-64-20, batch 64": Size((64,), 20, 64),
    "IWAE K=50, batch 20, 784-200-200-50": Size((200, 200), 50, 20, draws=50),
    "convolutional, batch 64": Size((), 20, 64, convolutional=True),
    "IAF guide, 784-400-40, batch 128": Size((400,), 40, 128, flow=True),
}


class Engine(NamedTuple):
    """A way to train."""

    run: Callable[[], Any]  # one pass over the prepared batches
    loss: Callable[[], float]  # an estimate on the first batch, nats per datum, without a step


# -- what all train ----------------------------------------------------------------------------


def make_batches(size: Size, device: str, count: int = BATCHES) -> list[Tensor]:
    """Return batches of bits, each pixel with a probability of its own."""
    torch.manual_seed(1)
    x = torch.bernoulli(torch.sigmoid(2 * torch.randn(784)).expand(count * size.batch, 784))
    if size.convolutional:
        x = x.reshape(-1, 1, 28, 28)
    return list(x.to(device).split(size.batch))


class Networks(nn.Module):
    """The networks, with the same weights in every instance of a size."""

    def __init__(self, size: Size, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        if size.convolutional:
            encoder, decoder = ConvEncoder((1, 28, 28)), ConvDecoder(size.latent, (1, 28, 28))
        else:
            encoder, decoder = MLP(784, hidden=size.hidden), MLP(size.latent, 784, size.hidden[::-1])
        self.library = [encoder, decoder]  # in a list, which torch does not look into
        plain = [net if size.convolutional else net.layers for net in self.library]  # nn.Sequential
        self.encoder, self.decoder = plain
        self.head = nn.Linear(encoder.out_features, 2 * size.latent)
        self.flow = affine_autoregressive(size.latent, stable=True) if size.flow else None
        self.to(device)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log sigma of the guide."""
        loc, log_scale = self.head(self.encoder(x)).chunk(2, -1)
        return loc, log_scale


# -- Pyro and this library ---------------------------------------------------------------------


def pyro_programs(networks: Networks, size: Size) -> tuple[Callable, Callable]:
    """Return model and guide as a user of Pyro writes them."""

    def model(x: Tensor) -> None:
        pyro.module("decoder", networks.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(size.latent), x.new_ones(size.latent)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=networks.decoder(z)).to_event(x.dim() - 1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", networks.encoder)
        pyro.module("head", networks.head)
        if networks.flow is not None:
            pyro.module("flow", networks.flow)
        with pyro.plate("data", len(x)):
            loc, log_scale = networks.encode(x)
            q = dist.Normal(loc, log_scale.exp()).to_event(1)
            pyro.sample("z", q if networks.flow is None else dist.TransformedDistribution(q, [networks.flow]))

    return model, guide


class FlowGuide(MeanFieldGuide):
    """The mean-field guide, its draws transformed by an inverse autoregressive flow."""

    flow: AffineAutoregressive

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """Return q(z | x)."""
        return dist.TransformedDistribution(super().posterior(x), [self.flow])


def library_pair(networks: Networks, size: Size) -> tuple[VAE, MeanFieldGuide]:
    """Return the library's model and guide of these networks."""
    encoder, decoder = networks.library
    guide = (FlowGuide if size.flow else MeanFieldGuide)(encoder, size.latent)
    guide.head = networks.head
    if size.flow:
        guide.flow = networks.flow
    model = VAE(StandardNormal(size.latent), Bernoulli(decoder))
    return model.to(networks.head.weight.device), guide


def pyro_engine(size: Size, batches: list[Tensor], *, library: bool = False) -> Engine:
    """Return ``pyro.infer.SVI`` on plain programs or on the library's pair."""
    networks = Networks(size, str(batches[0].device))
    programs = (library_pair if library else pyro_programs)(networks, size)
    elbo: ELBO = Trace_ELBO()
    if size.draws > 1:
        elbo = RenyiELBO(alpha=0, num_particles=size.draws, vectorize_particles=True, max_plate_nesting=1)
    svi = pyro.infer.SVI(*programs, pyro.optim.Adam({"lr": RATE}), elbo)
    return Engine(passes(svi.step, batches), lambda: svi.evaluate_loss(batches[0]) / size.batch)


def library_engine(engine: type[SVI], elbo: ELBO, size: Size, batches: list[Tensor]) -> Engine:
    """Return one of the library's engines."""
    svi = engine(*library_pair(Networks(size, str(batches[0].device)), size), Adam, elbo)
    svi.setup(batches[0])
    return Engine(passes(svi.step, batches), lambda: float(svi.evaluate_loss(batches[0])) / size.batch)


def passes(step: Callable[[Tensor], Any], batches: list[Tensor]) -> Callable[[], None]:
    """Return a function that takes a step on each batch and waits for the last."""

    def run() -> None:
        for x in batches:
            step(x)
        if batches[0].is_cuda:
            torch.cuda.synchronize()

    return run


# -- hand-written PyTorch ----------------------------------------------------------------------


class HandWritten(nn.Module):
    """The loss, summed over the batch, without Pyro."""

    def __init__(self, size: Size, device: str, analytic: bool = False) -> None:
        super().__init__()
        self.networks = Networks(size, device)
        self.draws = size.draws
        self.analytic = analytic

    def forward(self, x: Tensor) -> Tensor:
        """Return the negative ELBO, or the negative importance-weighted bound."""
        loc, log_scale = self.networks.encode(x)
        scale = log_scale.exp()
        if self.draws > 1:
            z = loc + scale * torch.randn(self.draws, *loc.shape, device=x.device)
            logits = self.networks.decoder(z)
            log_p = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
            log_w = log_p.sum(-1) + (log_normal(z) - log_normal(z, loc, scale)).sum(-1)
            return -(log_w.logsumexp(0) - math.log(self.draws)).sum()
        z = loc + scale * torch.randn_like(loc)
        if self.analytic:
            kl = 0.5 * (loc.square() + scale.square() - 1 - 2 * log_scale).sum()
        else:
            kl = log_normal(z, loc, scale).sum()
            if (flow := self.networks.flow) is not None:  # AffineAutoregressive with stable=True
                mean, logit = flow.arn(z)
                logit = logit + flow.sigmoid_bias
                z = torch.lerp(mean, z, logit.sigmoid())
                kl = kl - F.logsigmoid(logit).sum()
            kl = kl - log_normal(z).sum()
        return kl + F.binary_cross_entropy_with_logits(self.networks.decoder(z), x, reduction="sum")


def log_normal(z: Tensor, loc: Any = 0.0, scale: Tensor | None = None) -> Tensor:
    """Return log N(z; loc, scale^2), elementwise."""
    if scale is not None:
        return -0.5 * ((z - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)
    return -0.5 * (z - loc).square() - 0.5 * math.log(2 * math.pi)


def hand_written_engine(
    size: Size,
    batches: list[Tensor],
    analytic: bool = False,
    compiled: str | None = None,
    mode: str | None = None,
) -> Engine:
    """Return hand-written steps: ``compiled`` is None, "loss" or "step" (with the optimiser's)."""
    module = HandWritten(size, str(batches[0].device), analytic)
    optimizer = Adam(module.parameters(), fused=compiled != "step")
    loss = torch.compile(module, mode=mode) if compiled == "loss" else module

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        optimizer.step()
        return value.detach()

    if compiled == "step":
        step = torch.compile(step, mode=mode)

    def estimate() -> float:
        with torch.no_grad():
            return float(module(batches[0])) / size.batch

    return Engine(passes(step, batches), estimate)


# -- other libraries ---------------------------------------------------------------------------


def numpyro_engine(size: Size, batches: list[Tensor], *, donate: bool = False) -> Engine:
    """Return NumPyro's SVI, its update compiled by ``jax.jit``, its state given up to the update or not."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from numpyro.infer import SVI as NumPyroSVI
    from numpyro.infer import RenyiELBO as NumPyroRenyi
    from numpyro.infer import Trace_ELBO as NumPyroTrace

    networks = Networks(size, "cpu")

    def dense(name: str, layer: nn.Linear, x: Any) -> Any:
        weight = numpyro.param(f"{name}.weight", jnp.array(layer.weight.detach().numpy().T))
        return x @ weight + numpyro.param(f"{name}.bias", jnp.array(layer.bias.detach().numpy()))

    def sequential(name: str, layers: Any, x: Any) -> Any:
        for i, layer in enumerate(layers):
            x = dense(f"{name}.{i}", layer, x) if isinstance(layer, nn.Linear) else jnp.tanh(x)
        return x

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", ndist.Normal(jnp.zeros(size.latent), jnp.ones(size.latent)).to_event(1))
            logits = sequential("decoder", networks.decoder, z)
            numpyro.sample("x", ndist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            features = sequential("encoder", networks.encoder, x)
            loc, log_scale = jnp.split(dense("head", networks.head, features), 2, -1)
            numpyro.sample("z", ndist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    own = [jnp.asarray(x.cpu().numpy()) for x in batches]
    elbo = NumPyroTrace() if size.draws == 1 else NumPyroRenyi(alpha=0, num_particles=size.draws)
    svi = NumPyroSVI(model, guide, numpyro.optim.Adam(RATE), elbo)
    state = svi.init(jax.random.PRNGKey(0), own[0])
    update = jax.jit(svi.update, donate_argnums=0 if donate else ())
    evaluate = jax.jit(svi.evaluate)
    evaluations = 0

    def run() -> None:
        nonlocal state
        for x in own:
            state, loss = update(state, x)
        jax.block_until_ready((state, loss))

    def estimate() -> float:
        nonlocal evaluations
        evaluations += 1
        fresh = state._replace(rng_key=jax.random.PRNGKey(evaluations))
        return float(evaluate(fresh, own[0])) / size.batch

    return Engine(run, estimate)


def pythae_engine(size: Size, batches: list[Tensor], *, own_loader: bool = False) -> Engine:
    """Return pythae's trainer on the prepared batches, or with the data loader that it makes."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import CallbackHandler

    networks = Networks(size, "cpu")
    with torch.no_grad():  # its head gives the log of the variance
        networks.head.weight[size.latent :] *= 2
        networks.head.bias[size.latent :] *= 2

    class Encoder(BaseEncoder):
        def forward(self, x: Tensor) -> ModelOutput:
            loc, log_variance = self.networks.encode(x)
            return ModelOutput(embedding=loc, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=torch.sigmoid(self.decoder(z)))

    encoder, decoder = Encoder(), Decoder()
    encoder.networks, decoder.decoder = networks, networks.decoder
    del networks.decoder
    x = torch.cat(batches).cpu()
    config = VAEConfig(input_dim=(784,), latent_dim=size.latent, reconstruction_loss="bce")
    settings = BaseTrainerConfig(
        per_device_train_batch_size=size.batch, learning_rate=RATE, no_cuda=not batches[0].is_cuda
    )
    model = PythaeVAE(config, encoder, decoder)
    trainer = BaseTrainer(model, BaseDataset(x, torch.zeros(len(x))), training_config=settings)
    if not own_loader:
        prepared = [{"data": x} for x in batches]
        trainer.train_loader = torch.utils.data.DataLoader(prepared, batch_size=None)
    trainer.set_optimizer()
    trainer.callback_handler = CallbackHandler([], trainer.model)

    def run() -> None:
        trainer.train_step(1)
        if batches[0].is_cuda:
            torch.cuda.synchronize()

    def estimate() -> float:
        with torch.no_grad():
            return float(trainer.model({"data": batches[0]}).loss)

    return Engine(run, estimate)


# -- measuring ---------------------------------------------------------------------------------

OURS, STOCK, PLAIN = "CompiledSVI", "Pyro", "SVI"
BY_HAND, BY_HAND_ANALYTIC = "hand-written", "hand-written, analytic KL"
NUMPYRO, PYTHAE, PYTHAE_LOADER = "NumPyro, jit", "pythae", "pythae, its data loader"


def make_engines(size: Size, batches: list[Tensor], peers: set[str]) -> dict[str, Callable[[], Engine]]:
    """Return what makes each engine, by name."""
    library = functools.partial(library_engine, size=size, batches=batches)
    by_hand = functools.partial(hand_written_engine, size, batches)
    elbo = Trace_ELBO if size.draws == 1 else functools.partial(IWAE, size.draws)
    made: dict[str, Callable[[], Engine]] = {
        STOCK: lambda: pyro_engine(size, batches),
        f"{STOCK}, the library's pair": lambda: pyro_engine(size, batches, library=True),
        PLAIN: lambda: library(SVI, elbo()),
        OURS: lambda: library(CompiledSVI, elbo()),
    }
    simple = size.draws == 1 and not size.flow
    if simple:
        made[f"{OURS}, KL_ELBO"] = lambda: library(CompiledSVI, KL_ELBO())
        made[f"{OURS}, STL_ELBO"] = lambda: library(CompiledSVI, STL_ELBO())
    modes = (None, "reduce-overhead") if batches[0].is_cuda else (None,)
    for name, analytic in ((BY_HAND, False), (BY_HAND_ANALYTIC, True))[: 1 + simple]:
        made[name] = functools.partial(by_hand, analytic=analytic)
        for compiled in ("loss", "step"):
            for mode in modes:
                row = f"{name}, torch.compile of the {compiled}{f' ({mode})' if mode else ''}"
                made[row] = functools.partial(by_hand, analytic=analytic, compiled=compiled, mode=mode)
    if "numpyro" in peers and not size.convolutional and not size.flow:
        made[NUMPYRO] = lambda: numpyro_engine(size, batches)
        made[f"{NUMPYRO}, donated state"] = lambda: numpyro_engine(size, batches, donate=True)
    if "pythae" in peers and simple and not size.convolutional:
        made[PYTHAE] = lambda: pythae_engine(size, batches)
        made[PYTHAE_LOADER] = lambda: pythae_engine(size, batches, own_loader=True)
    return made


def check_agreement(engines: dict[str, Engine], before: float = math.nan) -> float:
    """Return Pyro's mean loss; raise unless the other engines' are the same, within the tolerance above."""
    estimates = {name: [engine.loss() for _ in range(EVALUATIONS)] for name, engine in engines.items()}
    means = {name: statistics.mean(values) for name, values in estimates.items()}
    errors = {name: statistics.stdev(values) / EVALUATIONS**0.5 for name, values in estimates.items()}
    fallen = 0.0 if math.isnan(before) else before - means[STOCK]
    for name, mean in means.items():
        allowed = 5 * math.hypot(errors[name], errors[STOCK]) + 0.1 * fallen + 1e-5 * mean
        if not abs(mean - means[STOCK]) <= allowed:
            raise SystemExit(
                f"{'at the start' if math.isnan(before) else 'after the warm-up'} the loss of {name!r} is "
                f"{mean:.4f} nats per datum, that of {STOCK!r} {means[STOCK]:.4f}: expected a difference of "
                f"at most {allowed:.4f}"
            )
    return means[STOCK]


def measure(size: Size, device: str, repeats: int, peers: set[str]) -> dict[str, Any]:
    """Return a size's times and ratios."""
    torch._dynamo.reset()  # its limit of recompilations is one of all engines together
    pyro.clear_param_store()
    batches = make_batches(size, device)
    engines = {name: make() for name, make in make_engines(size, batches, peers).items()}
    start = check_agreement(engines)
    compiling = {}
    for name, engine in engines.items():
        torch.manual_seed(2)
        seconds = [timed(engine.run) for _ in range(WARM_UP)]
        if "ompile" in name or name.startswith(NUMPYRO):
            compiling[name] = round(seconds[0] - seconds[-1], 2)
    end = check_agreement(engines, start)
    print(
        f"  losses agree: {start:.1f} nats per datum, {end:.1f} after {WARM_UP * BATCHES} steps", flush=True
    )
    times: dict[str, list[float]] = {name: [] for name in engines}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(engines), len(engines)):
            times[name].append(timed(engines[name].run) / BATCHES)
    medians = {name: statistics.median(values) for name, values in times.items()}

    def fastest(beginning: str) -> str | None:
        return min((name for name in medians if name.startswith(beginning)), key=medians.get, default=None)

    ratios = {
        "stock_pyro": STOCK,
        "svi": PLAIN,
        "hand_written_eager": BY_HAND,
        "hand_written_compiled": fastest(f"{BY_HAND}, torch.compile"),
        "hand_written_analytic_compiled": fastest(f"{BY_HAND_ANALYTIC}, torch.compile"),
        "numpyro": fastest(NUMPYRO),
        "pythae": PYTHAE,
        "pythae_with_its_loader": PYTHAE_LOADER,
    }
    return {
        "milliseconds_per_step": {name: round(1000 * value, 3) for name, value in medians.items()},
        "seconds_to_compile": compiling,
        **{
            f"{key}_over_compiled": round(medians[name] / medians[OURS], 2)
            for key, name in ratios.items()
            if name in medians
        },
    }


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_fit(device: str, epochs: int) -> dict[str, Any]:
    """Return what ``fit`` adds to bare steps: each epoch over the mean of as many before and after."""
    size = SIZES["784-400-20, batch 128"]
    batches = make_batches(size, device, 390)
    held_out = torch.cat(make_batches(size, device, 79))[:10_000]
    bare = library_engine(CompiledSVI, Trace_ELBO(), size, batches)
    bare.run()

    def ratio(validation: Tensor | None) -> dict[str, float]:
        marks: list[tuple[float, float]] = []  # the end of an epoch, the start of the next

        def after_epoch(run: Any) -> None:
            ended = time.perf_counter()
            steps.append(timed(bare.run))
            marks.append((ended, time.perf_counter()))

        steps: list[float] = []
        with (
            tempfile.TemporaryDirectory() as folder,
            open(os.devnull, "w") as null,
            contextlib.redirect_stderr(null),  # the progress bar
        ):
            fit(
                *library_pair(Networks(size, device), size),
                torch.cat(batches),
                validation=validation,
                epochs=epochs,
                batch_size=size.batch,
                learning_rate=RATE,
                output=Path(folder) / "run",
                callbacks=[after_epoch],
                compile=True,
            )
        spent = [ended - started for (_, started), (ended, _) in itertools.pairwise(marks)]
        around = [(before + after) / 2 for before, after in itertools.pairwise(steps)]
        ratios = sorted(epoch / bare for epoch, bare in zip(spent, around, strict=True))
        return {
            "seconds_per_epoch": round(statistics.median(spent), 3),
            "seconds_of_bare_steps": round(statistics.median(around), 3),
            "fit_over_bare_steps": round(statistics.median(ratios), 3),
            "quartiles": [round(ratios[len(ratios) * i // 4], 3) for i in (1, 3)],
        }

    return {
        "set-up": f"784-400-20, 390 batches of 128, as in MNIST; epochs 2 to {epochs}; saved every epoch",
        "with 10,000 validation data": ratio(held_out),
        "without validation": ratio(None),
    }


# -- the record --------------------------------------------------------------------------------


def find_peers(device: str, threads: int) -> set[str]:
    """Return which other libraries can be imported, after setting what JAX reads at its import."""
    found = set()
    for name in ("numpyro", "pythae"):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: left out")
        else:
            found.add(name)
    if "numpyro" in found:
        os.environ.setdefault("JAX_PLATFORMS", "cpu" if device == "cpu" else "cuda")
        if device == "cpu" and threads == 1:
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
        try:
            import jax

            jax.devices()
        except (ImportError, RuntimeError) as error:
            print(f"numpyro is left out: {error}")
            found.discard("numpyro")
    return found


def machine(device: str) -> str:
    """Return processor, cores and accelerator, in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if device.startswith("cuda") else ""
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores{gpu}"


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), help="beginnings of their names")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fit", action="store_true", help="measure what `fit` adds to steps, too")
    parser.add_argument("--fit_epochs", type=int, default=3)
    parser.add_argument("--results", default="benchmarks/results/svi_speed.yaml")
    settings = parser.parse_args()
    chosen = [name for name in SIZES if any(name.startswith(wanted) for wanted in settings.sizes)]

    torch.set_num_threads(settings.threads)
    if settings.device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    peers = find_peers(settings.device, settings.threads)
    logging.disable(logging.INFO)
    pyro.enable_validation(False)
    record: dict[str, Any] = {
        "set-up": "Bernoulli VAE, tanh, Adam 1e-3, one draw unless stated; medians over "
        f"{settings.repeats} interleaved passes of {BATCHES} steps in one process",
        "machine": machine(settings.device),
        "device": settings.device,
        "threads": settings.threads,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("ppl-vae", "torch", "pyro-ppl")}
        | {name: version(name) for name in sorted(peers | ({"jax"} if "numpyro" in peers else set()))},
    }
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would go on uncompiled
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        first = torch.zeros(2, device=settings.device, requires_grad=True)
        torch.compile(lambda x: (x * x).sum())(first).backward()
        pyro.enable_validation(False)  # compiling may set it
        for name in chosen:
            print(name, flush=True)
            record[name] = measure(SIZES[name], settings.device, settings.repeats, peers)
            print(yaml.safe_dump(record[name], sort_keys=False, width=100), flush=True)
        if settings.fit:
            record["fit"] = measure_fit(settings.device, settings.fit_epochs)
            print(yaml.safe_dump(record["fit"], sort_keys=False, width=100))
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))
    print(f"recorded in {path}")


if __name__ == "__main__":
    main()
