"""The command line in this process, on a tiny model."""

from support.command_fixtures import cli, tiny

__all__ = ["cli", "tiny"]
