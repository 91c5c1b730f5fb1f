"""The command line: ``ppl-vae fit | evaluate | sample | plot``.

The settings of a piece are the arguments of its class, those of a command the arguments of the function
behind it. What is wrong with them is said in one line on stderr, and the exit code is 2.
"""

from ppl_vae.cli.commands import main as main

__all__ = ["main"]
