"""The command line's way from names to pairs of every kind: data, layers, labels, and what is shared."""

import functools
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import ppl_vae
from ppl_vae import load_run
from ppl_vae._random import seeded
from ppl_vae.cli import main
from ppl_vae.cli.pieces import PIECES, full_name, known
from ppl_vae.data import load_dataset
from ppl_vae.evaluation import reconstruct
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.likelihoods import AutoregressiveCategorical
from ppl_vae.models import SequenceVAE
from ppl_vae.networks import RecurrentDecoder, RecurrentEncoder
from ppl_vae.priors import StandardNormal

SMALL = "--epochs 1 --latent_dim 2 --num_particles 2 --batch_size 500 --progress false --output o"
WIDTHS = {"encoder": 4, "decoder": 4, "flow": 4, "prior_flow": 4, "classifier": 4, "network": 4}
Cli = Callable[[str], tuple[int, str, str]]

# what is on the line, and which of the pieces with a setting `hidden` that means
PAIRS = {
    "normal-network": ("--likelihood normal --likelihood.scale network", "encoder decoder"),
    "student-t": (
        "--likelihood studentt --likelihood.scale network --likelihood.df network",
        "encoder decoder",
    ),
    "low-rank-normal": ("--likelihood lowranknormal --likelihood.rank 2", "encoder decoder"),
    "categorical": ("--likelihood categorical --likelihood.levels 17", "encoder decoder"),
    "discretized-logistic": (
        "--likelihood discretizedlogistic --likelihood.components 2 --likelihood.levels 17 --decoder conv "
        "--decoder.channels 4",
        "encoder decoder",
    ),
    "autoregressive": (
        "--likelihood autoregressive --likelihood.hidden 4 --likelihood.features 2",
        "encoder decoder",
    ),
    "vamp": ("--prior vamp --prior.components 20", "encoder decoder"),
    "vamp-flow": ("--prior vamp --prior.components 20 --guide flow", "encoder decoder flow"),
    "vamp-annealed": ("--prior vamp --prior.components 20 --guide annealed", "encoder decoder"),
    "flow-flow": ("--prior flow --guide flow --flow planar", "encoder decoder prior_flow"),
    "autoregressive-prior": ("--prior autoregressive --prior.hidden 4 --guide fullrank", "encoder decoder"),
    "gaussian-mixture-prior": ("--prior gaussianmixture --prior.components 3", "encoder decoder"),
    "sphere": ("--prior uniformsphere --guide hyperspherical", "encoder decoder"),
    "semi-amortized": ("--guide semiamortized --inner lowrank --inner.rank 1", "encoder decoder"),
    "annealed": ("--guide annealed --guide.steps 2", "encoder decoder"),
    "hamiltonian": ("--guide hamiltonian --guide.steps 2", "encoder decoder"),
    "cvae": ("--model cvae", "encoder decoder"),
    "cvae-conditional-prior": (
        "--model cvae --prior conditionalnormal --guide flow --encoder conv --encoder.channels 4",
        "encoder decoder flow network",
    ),
    "semi-supervised": (
        "--model semisupervised --labels 50 --model.alpha 5",
        "encoder decoder classifier",
    ),
    "gaussian-mixture": ("--model gaussianmixture --model.components 3", "encoder decoder"),
    "hierarchical": ("--model hierarchical", "encoder decoder network"),
    "ladder": (
        "--model hierarchical --guide ladder --latent_dims [4,3,2] --model.skip",
        "encoder decoder network",
    ),
    "very-deep": ("--model verydeep --model.sizes [1,4,8] --model.channels 3 --model.latent_channels 1", ""),
}
PLOTS = {"history", "latents", "reconstructions", "samples", "traversal", "interpolation"}
OF_Z = {"traversal", "interpolation"}
DRAWN = {
    "vamp": PLOTS,
    "gaussian-mixture": PLOTS,
    "cvae": PLOTS - OF_Z,
    "semi-supervised": PLOTS - OF_Z,
    "hierarchical": PLOTS - OF_Z - {"latents"},
    "very-deep": PLOTS - OF_Z - {"latents"},
}


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Return the command line in this process; ``fit`` draws no plots there, to save time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ppl_vae.cli.fitting.draw", lambda run, dataset: "none")

    def call(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(shlex.split(line))
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the folder of a trained pair, which is trained once."""
    folders: dict[str, Path] = {}

    def run_of(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp("fitted")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.setattr("ppl_vae.cli.fitting.draw", lambda run, dataset: "none")
                assert main(shlex.split(fit_line(name))) == 0
            folders[name] = folder / "o"
        return folders[name]

    return run_of


def fit_line(name: str) -> str:
    line, pieces = PAIRS[name]
    return " ".join([f"fit {SMALL} {line}", *(f"--{p}.hidden {WIDTHS[p]}" for p in pieces.split())])


def config_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


def fit_ok(cli: Cli, line: str) -> dict[str, Any]:
    code, _, err = cli(line)
    assert (code, err) == (0, "")
    return config_of(Path("o"))


# Every kind of pair, from end to end


@pytest.mark.parametrize("name", PAIRS)
def test_pair_is_trained_measured_drawn_from_and_resumed(
    name: str, cli: Cli, fitted: Callable[[str], Path]
) -> None:
    shutil.copytree(fitted(name), "o")
    kept = Path("o/evaluation.yaml").read_bytes()
    assert load_run("o").best_epoch == 1
    assert cli("evaluate o --num_particles 2 --progress false")[::2] == (0, "")
    assert Path("o/evaluation.yaml").read_bytes() == kept
    assert cli("sample o --size 12")[::2] == (0, "")
    with np.load("o/samples.npz") as drawn:
        assert drawn["x"].shape == drawn["mean"].shape == (12, 1, 8, 8)
        assert np.isfinite(drawn["mean"]).all()
    assert cli("fit --output o --resume --epochs 2 --num_particles 2 --progress false")[::2] == (0, "")
    assert len(load_run("o").history) == 2


@pytest.mark.parametrize("name", ["vamp", "semi-supervised", "ladder"])  # pieces that share parameters
def test_resuming_ends_with_the_bits_of_a_run_that_was_not_stopped(
    name: str, cli: Cli, fitted: Callable[[str], Path]
) -> None:
    shutil.copytree(fitted(name), "o")
    assert cli("fit --output o --resume --epochs 2 --num_particles 2 --progress false")[::2] == (0, "")
    Path("o").rename("resumed")
    fit_ok(cli, fit_line(name).replace("--epochs 1", "--epochs 2"))
    for file in ("model.safetensors", "checkpoint.safetensors"):
        assert (Path("o") / file).read_bytes() == (Path("resumed") / file).read_bytes()


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("name", DRAWN)
def test_plots_that_make_no_sense_are_left_out_with_a_line(
    name: str, cli: Cli, fitted: Callable[[str], Path]
) -> None:
    shutil.copytree(fitted(name), "o")
    code, out, err = cli("plot o")
    assert (code, out) == (0, "plots: o/plots\n")
    assert {path.stem for path in Path("o/plots").iterdir()} == DRAWN[name]
    missing = [plot for plot in ("latents", "traversal", "interpolation") if plot not in DRAWN[name]]
    assert err.count("\n") == bool(missing)
    if missing:
        assert err.startswith(f"ppl-vae plot: warning: no plot of {', '.join(missing)}: ")


# What goes where


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("normal-network", 2),
        ("student-t", 3),
        ("low-rank-normal", 4),
        ("categorical", 17),
        ("discretized-logistic", 6),
        ("autoregressive", 2),
        ("vamp", 1),
    ],
)
def test_decoder_has_as_many_outputs_as_the_likelihood_needs(
    name: str, channels: int, fitted: Callable[[str], Path]
) -> None:
    likelihood = config_of(fitted(name))["model"]["likelihood"]
    assert likelihood["decoder"]["out_shape"] == [channels, 8, 8]


def test_vamp_prior_holds_the_guide_of_the_run_and_starts_at_data(cli: Cli) -> None:
    config = fit_ok(cli, fit_line("vamp") + " --learning_rate 1e-9")
    assert config["model"]["prior"]["guide"] == config["guide"]
    assert config["model"]["prior"]["bounds"] == [0.0, 1.0]
    run = load_run("o")
    assert run.model.prior.guide is run.guide
    train = load_dataset("digits").train.x
    distance = torch.cdist(run.model.prior.pseudo_inputs.detach().flatten(1), train.flatten(1)).amin(1)
    assert distance.max() < 1e-6


def test_vamp_prior_holds_the_guide_that_the_runs_guide_starts_from(fitted: Callable[[str], Path]) -> None:
    run = load_run(fitted("vamp-annealed"))
    assert run.model.prior.guide is run.guide.guide
    assert run.guide.model is run.model


def test_vamp_prior_of_more_components_than_data_starts_at_random_without_bounds(cli: Cli) -> None:
    np.savez("real.npz", x=np.random.default_rng(0).normal(size=(60, 6)).astype("f4"))
    line = f"fit --data real.npz {SMALL} --likelihood normal --prior vamp --prior.components 49"
    config = fit_ok(cli, f"{line} --encoder.hidden 4 --decoder.hidden 4")  # of 48 data
    assert config["model"]["prior"]["bounds"] is None
    assert config["model"]["prior"]["x_shape"] == [6]


def test_guides_flow_has_a_context_and_the_priors_none(cli: Cli, fitted: Callable[[str], Path]) -> None:
    config = config_of(fitted("flow-flow"))
    assert config["guide"]["flow"]["class"] == "Planar"
    assert config["guide"]["flow"]["context_dim"] == 64
    assert config["model"]["prior"]["flow"]["class"] == "MaskedAutoregressive"
    assert config["model"]["prior"]["flow"]["context_dim"] is None
    config = fit_ok(cli, fit_line("flow-flow") + " --flow.context_dim 3")
    assert config["guide"]["flow"]["context_dim"] == 3
    config = fit_ok(cli, fit_line("flow-flow") + " --overwrite --flow.context_dim None")
    assert config["guide"]["flow"]["context_dim"] is None


def test_networks_of_a_conditional_model_know_the_number_of_classes(fitted: Callable[[str], Path]) -> None:
    config = config_of(fitted("cvae-conditional-prior"))
    assert config["guide"]["encoder"]["context"] == 10
    assert config["model"]["likelihood"]["decoder"]["context"] == 10
    assert config["model"]["prior"]["num_classes"] == 10
    assert config["model"]["prior"]["network"]["in_shape"] == 10


def test_samples_of_a_conditional_model_are_of_the_classes_in_turn(
    cli: Cli, fitted: Callable[[str], Path]
) -> None:
    shutil.copytree(fitted("cvae"), "o")
    assert cli("sample o --size 23 --seed 3")[0] == 0
    run = load_run("o")
    with seeded(3), torch.no_grad():
        expected = run.model.eval()(None, torch.arange(23) % 10)
    with np.load("o/samples.npz") as drawn:
        assert (drawn["x"] == expected.numpy()).all()


def test_samples_of_a_likelihood_without_a_mean_are_draws(tmp_path: Path, cli: Cli) -> None:
    likelihood = AutoregressiveCategorical(RecurrentDecoder(2, vocabulary=3, embedding=3, hidden=4), 5)
    encoder = RecurrentEncoder(vocabulary=3, embedding=3, hidden=4)
    model, guide = SequenceVAE(StandardNormal(2), likelihood), MeanFieldGuide(encoder, 2)
    x, lengths = torch.arange(3.0).repeat(20, 2)[:, :5], torch.arange(20) % 5 + 1
    ppl_vae.fit(model, guide, (x, lengths), epochs=1, output="o", progress=False)
    assert cli("sample o --size 7")[::2] == (0, "")
    with np.load("o/samples.npz") as drawn:
        assert [*drawn] == ["x"]
        assert drawn["x"].shape == (7, 5)
    code, _, err = cli("sample o --output s.png")
    assert (code, err) == (
        2,
        "ppl-vae sample: error: --output: s.png: the likelihood has no mean to show; write an .npz\n",
    )
    with pytest.raises(NotImplementedError, match="model: site 'x' has no mean that"):
        reconstruct(model, guide, x, lengths)


def test_labels_are_kept_for_training_alone_and_the_classifier_is_shared(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, Any] = {}
    fit = ppl_vae.fit

    @functools.wraps(fit)
    def watched(**arguments: Any) -> Any:
        trained.update(arguments)
        return fit(**arguments)

    monkeypatch.setattr("ppl_vae.fit", watched)
    config = fit_ok(cli, fit_line("semi-supervised"))
    assert trained["model"].classifier is trained["guide"].classifier
    assert int((trained["data"].y >= 0).sum()) == 50
    assert bool((trained["validation"].y >= 0).all())
    assert config["model"]["num_classes"] == 10
    assert config["guide"]["classifier"]["out_shape"] == 10
    assert config["elbo"]["class"].endswith("EnumELBO")


def test_components_are_those_of_the_model(fitted: Callable[[str], Path]) -> None:
    config = config_of(fitted("gaussian-mixture"))
    assert config["guide"]["class"] == "GaussianMixtureGuide"
    assert config["guide"]["components"] == config["model"]["components"] == 3


def test_layers_have_the_sizes_of_latent_dims(cli: Cli, fitted: Callable[[str], Path]) -> None:
    config = config_of(fitted("ladder"))
    layers = config["model"]["layers"]
    assert [layer["latent_dim"] for layer in layers] == [3, 4]
    assert [layer["network"]["in_shape"] for layer in layers] == [2, 5]  # with skips from all above
    assert config["model"]["prior"]["latent_dim"] == 2
    assert config["model"]["likelihood"]["decoder"]["in_shape"] == 9
    assert config["guide"]["latent_dims"] == [4, 3, 2]
    assert [e["in_shape"] for e in config["guide"]["encoders"]] == [[1, 8, 8], 4, 4]  # features of the last
    line = fit_line("hierarchical").replace("--latent_dim 2", "--latent_dim 6")
    config = fit_ok(cli, line)
    assert config["guide"]["latent_dims"] == [6, 3]
    assert [e["in_shape"] for e in config["guide"]["encoders"]] == [[1, 8, 8], 6]


def test_bias_of_counts_starts_at_their_mean(cli: Cli) -> None:
    x = np.random.default_rng(0).poisson([1.0, 5.0, 20.0, 100.0], size=(60, 4)).astype("f4")
    np.savez("counts.npz", x_train=x, x_test=x[:5], x_validation=x[:5])
    for likelihood in ("poisson", "negativebinomial"):
        line = f"fit --data counts.npz {SMALL} --overwrite --likelihood {likelihood} --learning_rate 1e-9"
        fit_ok(cli, f"{line} --encoder.hidden 4 --decoder.hidden 4")
        bias = load_run("o").model.likelihood.decoder.output_bias.detach()
        np.testing.assert_allclose(bias.exp().numpy(), x.mean(0), rtol=1e-5)
        fit_ok(cli, f"{line} --encoder.hidden 4 --decoder.hidden 4 --init_bias false")
        assert load_run("o").model.likelihood.decoder.output_bias.abs().max() < 1.0


# Names


@pytest.mark.parametrize(
    ("piece", "short", "full"),
    [
        ("model", "cvae", "CVAE"),
        ("model", "Vae", "VAE"),
        ("model", "hierarchical", "HierarchicalVAE"),
        ("prior", "vamp", "VampPrior"),
        ("prior", "FLOW", "FlowPrior"),
        ("guide", "meanfield", "MeanFieldGuide"),
        ("encoder", "conv", "ConvEncoder"),
        ("decoder", "conv", "ConvDecoder"),
        ("elbo", "stl", "STL_ELBO"),
        ("elbo", "trace", "Trace_ELBO"),
        ("elbo", "enum", "EnumELBO"),
        ("elbo", "RenyiELBO", "RenyiELBO"),
        ("elbo", "renyi", "Renyi"),
        ("optimizer", "sgd", "SGD"),
        ("likelihood", "mine.py:normal", "mine.py:normal"),
        ("likelihood", "norml", "norml"),
    ],
)
def test_short_names(piece: str, short: str, full: str) -> None:
    assert full_name(short, piece) == full


@pytest.mark.parametrize("piece", PIECES)
def test_whole_names_stand_for_themselves_in_any_case(piece: str) -> None:
    for name, cls in known(piece).items():
        assert full_name(name, piece) == name
        assert known(piece)[full_name(name.lower(), piece)] is cls


def test_a_run_is_resumed_by_another_spelling(cli: Cli, fitted: Callable[[str], Path]) -> None:
    shutil.copytree(fitted("cvae"), "o")
    assert config_of(Path("o"))["notes"]["command"]["model"] == "CVAE"
    line = "fit --output o --resume --epochs 2 --num_particles 2 --progress false"
    assert cli(f"{line} --model CVAE --guide meanfieldguide")[::2] == (0, "")
    assert "--model: the run to resume was made with 'CVAE', got 'VAE'" in cli(f"{line} --model vae")[2]


# One line for what is wrong


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model cvae --data none.npz", "--data: --model CVAE needs labels, none.npz has none"),
        ("--model semisupervised --data none.npz", "--data: --model SemiSupervisedVAE needs labels, none"),
        ("--labels 10", "--labels: --model VAE does not take data without a label; got 10"),
        ("--model cvae --labels 10", "--labels: --model CVAE does not take data without a label; got 10"),
        ("--model semisupervised --labels 10000", "--labels: expected at most 100 of class"),
        ("--latent_dims [3,2]", "--latent_dims: --model VAE has one layer; set --latent_dim"),
        ("--model hierarchical --latent_dims [3,0]", "--latent_dims[1]: expected a whole number above 0"),
        ("--model gaussianmixture", "--model.components: expected a value, got none"),
        (
            "--model gaussianmixture --model.components 2 --guide meanfield",
            "--guide: lacks the model's laten",
        ),
        (
            "--model gaussianmixture --model.components 2 --guide.components 2",
            "--guide.components: unknown setting",
        ),
        ("--model cvae --decoder residualmlp", "--decoder: ResidualMLP takes no label, which --model CVAE"),
        ("--prior conditionalnormal", "--prior: ConditionalNormal needs labels, which --model VAE does not"),
        (
            "--prior vamp --model hierarchical --guide ladder",
            "--guide: LadderGuide is made of the model, and its prior VampPrior of the guide; choose another",
        ),
        ("--prior vamp --model cvae", "--prior: VampPrior needs a guide whose posterior is one of x alone"),
        ("--prior vamp --model semisupervised", "--prior: VampPrior needs a guide whose posterior is one of"),
        ("--prior vamp --model hierarchical", "--prior: VampPrior needs a guide whose posterior is one of"),
        ("--prior vamp --prior.components 0", "--prior.components: expected a whole number above 0, got 0"),
        ("--prior flow --prior_flow planar", "--prior_flow: unknown 'planar'; expected AffineCoupling"),
        ("--prior flow --flow planar", "--flow: the other pieces take no flow"),
        ("--prior uniformsphere", "site 'z': model and guide disagree on where it is: on the sphere"),
        ("--likelihood lowranknormal", "--likelihood.rank: expected a value, got none"),
        ("--likelihood categorical --likelihood.levels 1", "--likelihood.levels: expected at least 2, got 1"),
        ("--likelihood categorical --likelihood.levels 16", "--data: datum 0 is outside the support of site"),
        ("--model verydeep", "--model.sizes: expected a value, got none"),
        (
            "--model verydeep --model.sizes [1,4] --model.channels 3 --model.latent_channels 1",
            "--guide.in_shape: expected (C, 4, 4), the model's last side, got (1, 8, 8)",
        ),
        ("--guide ladder", "--guide.model: expected a HierarchicalVAE, got VAE"),
        ("--model sequence", "--model: SequenceVAE is for use in Python: see docs/sequences.md"),
        ("--model DeepMarkovModel", "--model: DeepMarkovModel is for use in Python: see docs/sequences.md"),
        ("--guide local", "--guide: LocalGuide is for use in Python: see docs/guides.md"),
        ("--encoder recurrent", "--encoder: RecurrentEncoder is for use in Python: see docs/sequences.md"),
        ("--guide meanfeild", "--guide: unknown 'meanfeild' (did you mean 'MeanFieldGuide'?)"),
    ],
)
def test_one_line_says_what_is_wrong(line: str, message: str, cli: Cli) -> None:
    np.savez("none.npz", x=np.random.default_rng(0).integers(0, 2, (60, 6)).astype("f4"))
    code, out, err = cli(f"fit {SMALL} {line}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not Path("o").exists()
