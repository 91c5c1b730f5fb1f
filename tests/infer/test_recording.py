"""Tests of the recorder: the ELBO's parts from the runs that an estimator makes anyway."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from torch import Tensor, nn

from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import SVI, Objective
from ppl_vae.infer.log_weights import terms
from ppl_vae.infer.recording import SiteRecorder, term_sums
from ppl_vae.likelihoods import Normal
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

Program = Callable[..., Any]
TRACE = [
    Trace_ELBO(),
    Trace_ELBO(num_particles=3),
    Trace_ELBO(num_particles=3, vectorize_particles=True),
    Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    TraceGraph_ELBO(),
    TraceEnum_ELBO(strict_enumeration_warning=False),
]


def name_of(elbo: ELBO) -> str:
    return f"{type(elbo).__name__}-{elbo.num_particles}-{elbo.vectorize_particles}-{elbo.max_plate_nesting}"


traces = pytest.mark.parametrize("elbo", TRACE, ids=name_of)


def vae_pair() -> tuple[Program, Program]:
    model = VAE(StandardNormal(2), Normal(MLP(2, 3, hidden=5), scale="learned"))
    return model.double(), MeanFieldGuide(MLP(3, hidden=5), 2).double()


def two_latent_pair() -> tuple[Program, Program]:
    """Return plain functions over z2 -> z1 -> x, with networks registered by ``pyro.module``."""
    decoder, encoder = nn.Linear(2, 3).double(), nn.Linear(3, 4).double()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 0.8).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z1), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = encoder(x).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, log_scale.exp()).to_event(1))
            pyro.sample("z2", dist.Normal(0.5 * z1, 0.9).to_event(1))

    return model, guide


def masked_pair() -> tuple[Program, Program]:
    mask = torch.tensor([True, False, True, True, False])
    model, guide = vae_pair()
    return poutine.mask(model, mask=mask), poutine.mask(guide, mask=mask)


PAIRS = {"vae": (vae_pair, ["z"]), "functions": (two_latent_pair, ["z1", "z2"]), "mask": (masked_pair, ["z"])}


def x_of() -> Tensor:
    return torch.randn(5, 3).double()


@traces
@pytest.mark.parametrize("pair", PAIRS)
def test_sums_are_the_estimators_own_elbo(pair: str, elbo: ELBO) -> None:
    make, sites = PAIRS[pair]
    model, guide = make()
    x = x_of()
    with SiteRecorder() as recorder:
        loss = elbo.loss(model, guide, x)
    sums = recorder.sums()
    assert sums is not None
    assert sums.keys() == {"elbo", "reconstruction", *(f"kl_{site}" for site in sites)}
    assert float(sums["elbo"]) == pytest.approx(-loss, rel=1e-12)
    parts = sums["reconstruction"] - sum(sums[f"kl_{site}"] for site in sites)
    assert float(parts) == pytest.approx(-loss, rel=1e-12)


@pytest.mark.parametrize(
    "elbo",
    [Trace_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)],
    ids=name_of,
)
def test_sums_are_those_of_log_weights_with_the_same_draws(elbo: ELBO) -> None:
    model, guide = two_latent_pair()
    x = x_of()
    torch.manual_seed(3)
    with SiteRecorder() as recorder:
        elbo.loss(model, guide, x)
    torch.manual_seed(3)
    expected = term_sums(terms(model, guide, x, num_particles=elbo.num_particles))
    sums = recorder.sums()
    assert sums is not None
    assert sums.keys() == expected.keys()
    for name, value in sums.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-12, atol=1e-12)


@traces
def test_sums_of_a_training_step(elbo: ELBO) -> None:
    model, guide = vae_pair()
    x = x_of()
    svi = SVI(model, guide, torch.optim.Adam, elbo)
    svi.step(x)
    with SiteRecorder() as recorder:
        loss = svi.step(x)
    sums = recorder.sums()
    assert sums is not None
    # TraceGraph's loss is a Python number, which comes back as a float32.
    assert float(sums["elbo"]) == pytest.approx(-float(loss), rel=1e-6)
    assert not any(value.requires_grad for value in sums.values())


def test_kl_is_sampled_where_the_loss_is_analytic() -> None:
    model, guide = vae_pair()
    x = x_of()
    with SiteRecorder() as recorder:
        loss = TraceMeanField_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1).loss(
            model, guide, x
        )
    sums = recorder.sums()
    assert sums is not None
    posterior, prior = guide.posterior(x), model.prior().expand((5,))
    analytic = torch.distributions.kl_divergence(posterior, prior).sum()
    weights = terms(model, guide, x, num_particles=2000).kl["z"].sum(1)
    error = float((weights.std() / 2000**0.5).detach())
    assert abs(float(sums["kl_z"] - analytic.detach())) < 5 * error
    assert float(sums["elbo"]) != pytest.approx(-loss, rel=1e-12)
    assert float(sums["reconstruction"] - analytic.detach()) == pytest.approx(-loss, rel=1e-9)


def test_renyi_records_the_elbo_of_its_draws() -> None:
    model, guide = vae_pair()
    x = x_of()
    with SiteRecorder() as recorder:
        loss = RenyiELBO(num_particles=4).loss(model, guide, x)
    sums = recorder.sums()
    assert sums is not None
    assert float(sums["elbo"]) < -loss  # the mean of logs is below the log of the mean


def test_scale_of_a_plate_is_left_out() -> None:
    # Sums are those of the batch; the estimator's loss is that of all data.
    def plate(x: Tensor) -> Any:
        return pyro.plate("data", 1000, subsample_size=len(x), dim=-1)

    def model(x: Tensor) -> None:
        with plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with plate(x):
            pyro.sample("z", dist.Normal(x / 2, 0.5).to_event(1))

    with SiteRecorder() as recorder:
        loss = Trace_ELBO().loss(model, guide, x_of())
    sums = recorder.sums()
    assert sums is not None
    assert 200 * float(sums["elbo"]) == pytest.approx(-loss, rel=1e-12)


# What has no plain draws from the guide


def mixture_pair() -> tuple[Program, Program]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(torch.ones(2).double()))
            pyro.sample("x", dist.Normal(y[..., None].double().expand(*y.shape, 3), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Categorical(torch.ones(len(x), 2).double()))

    return model, guide


@pytest.mark.parametrize("side", ["model", "guide"])
def test_enumerated_sites_have_no_sums(side: str) -> None:
    model, guide = mixture_pair()
    if side == "model":
        model, guide = config_enumerate(model), lambda x: None
    else:
        guide = config_enumerate(guide)
    with SiteRecorder() as recorder:
        TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x_of())
    assert recorder.sums() is None


def test_drawn_discrete_sites_have_sums() -> None:
    model, guide = mixture_pair()
    with SiteRecorder() as recorder:
        loss = Trace_ELBO().loss(model, guide, x_of())
    sums = recorder.sums()
    assert sums is not None
    assert float(sums["elbo"]) == pytest.approx(-loss, rel=1e-12)


def test_reweighted_wake_sleep_has_no_sums() -> None:
    # It detaches the guide's draws, so that runs of model and guide can't be told apart.
    model, guide = vae_pair()
    with SiteRecorder() as recorder:
        Objective(model, guide, ReweightedWakeSleep(num_particles=2)).loss_and_grads(x_of())
    assert recorder.sums() is None


def test_nothing_ran() -> None:
    with SiteRecorder() as recorder:
        pass
    assert recorder.sums() is None


def test_guide_without_model_has_no_sums() -> None:
    with SiteRecorder() as recorder:
        vae_pair()[1](x_of())
    assert recorder.sums() is None


def test_records_only_inside_its_context() -> None:
    model, guide = vae_pair()
    x = x_of()
    recorder = SiteRecorder()
    Trace_ELBO().loss(model, guide, x)
    with recorder:
        loss = Trace_ELBO().loss(model, guide, x)
    Trace_ELBO().loss(model, guide, x)
    sums = recorder.sums()
    assert sums is not None
    assert float(sums["elbo"]) == pytest.approx(-loss, rel=1e-12)


def test_recording_changes_nothing() -> None:
    results = []
    for record in (False, True):
        torch.manual_seed(0)
        model, guide = vae_pair()
        x = x_of()
        svi = SVI(model, guide, torch.optim.Adam, Trace_ELBO())
        for _ in range(3):
            if record:
                with SiteRecorder() as recorder:
                    svi.step(x)
                recorder.sums()
            else:
                svi.step(x)
        results.append([*model.parameters(), *guide.parameters(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
