"""`python -m qgraft`: the command, for launchers that start modules (torchrun -m qgraft train ...)."""

from qgraft.cli.main import entry_point

entry_point()
