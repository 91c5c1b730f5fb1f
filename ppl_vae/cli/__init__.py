"""The command line: ``ppl-vae fit | evaluate | compare | sample | plot``.

The settings of a piece are the arguments of its class, those of a command the arguments of the function
behind it. What is wrong with them is said in one line on stderr, and the exit code is 2.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

from ppl_vae._checks import check_choice
from ppl_vae.cli.comparing import COMPARE_SETTINGS, compare
from ppl_vae.cli.evaluating import evaluate
from ppl_vae.cli.fitting import FIT_SETTINGS, fit
from ppl_vae.cli.saved import SETTINGS_OF_RUNS, plot, sample
from ppl_vae.cli.settings import Help, Setting

__all__ = ["main"]

_USAGE = """usage: ppl-vae COMMAND [--setting VALUE ...]

Variational autoencoders as Pyro model / guide pairs.

  fit       train a pair on data, evaluate it, draw plots, save all in a folder
  evaluate  ELBO, its parts and log p(x) of a saved run; with --all a report of all that suits it
  compare   of several runs a report, side by side; of one the ELBO estimators: bounds, gradient noise, time
  sample    draw data from a saved run's prior
  plot      draw the plots of a saved run again

ppl-vae fit                          a small VAE on handwritten digits, in under a minute
ppl-vae fit --data mnist --output runs/mnist
ppl-vae fit --encoder ConvEncoder --decoder ConvDecoder --latent_dim 8 --output runs/conv
ppl-vae fit --prior vamp --guide flow --output runs/vamp         short for VampPrior and FlowGuide
ppl-vae evaluate runs/mnist --all                                 writes runs/mnist/report.html
ppl-vae compare runs/conv runs/vamp                               writes comparison.html
ppl-vae compare runs/mnist --estimators "trace,stl,iwae(50),dreg(50)"
ppl-vae COMMAND --help               all settings; with --guide NAME etc. those of that class

With the environment variable PPL_VAE_DEBUG=1 an error shows where it came from."""

_WRONG_INPUT = (
    *(ValueError, TypeError, OSError, ImportError, NotImplementedError),
    *(AssertionError, OverflowError),  # of Pyro and torch, which check some arguments so
)
_FAILURES = (FloatingPointError, RuntimeError)

_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "fit": fit,
    "evaluate": evaluate,
    "compare": compare,
    "sample": sample,
    "plot": plot,
}
_SETTINGS: dict[str, Mapping[str, Setting]] = {
    "fit": FIT_SETTINGS,
    "compare": COMPARE_SETTINGS,
    **SETTINGS_OF_RUNS,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        words: the command line after ``ppl-vae``; by default the process's.

    Returns:
        The exit code: 2 for wrong input, 1 for a failure such as a loss that became NaN, 130 for Ctrl-C.

    Example:
        >>> main(["sample", "--help"])
        usage...
        0
    """
    name, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_USAGE)
        return 0
    if name == "--version":
        print(version("ppl-vae"))
        return 0

    def complain(text: str) -> None:
        line = text.strip().splitlines()[0]
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        print(f"ppl-vae {name}: {line}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
        warnings.filterwarnings("ignore", "interrupted: |Encountered NaN")  # said in another way
        try:
            check_choice("command", name, _COMMANDS)
            try:
                _COMMANDS[name](["--help" if word == "-h" else word for word in rest])
            except Help as text:
                print(text, flush=True)
        except KeyboardInterrupt as error:
            complain(str(error) or "interrupted")
            return 130
        except BrokenPipeError:  # who reads the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (*_WRONG_INPUT, *_FAILURES) as error:
            if os.environ.get("PPL_VAE_DEBUG"):
                raise
            complain(f"error: {_as_setting(str(error) or type(error).__name__, name)}")
            return 2 if isinstance(error, _WRONG_INPUT) else 1
    return 0


def _as_setting(reason: str, command: str) -> str:
    """Write the argument that an error of the library begins with as the user of a command types it."""
    name = re.split(r"[:.\[]", reason, maxsplit=1)[0]
    settings = _SETTINGS.get(command, {})
    if name == "x" and "data" in settings:  # how programs call the data
        return f"--data: {reason}"
    return f"--{reason}" if name in settings else reason
