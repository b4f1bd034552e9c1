"""``python -m drivetrain`` is the ``drivetrain`` command."""

import sys

from drivetrain.cli import program

sys.exit(program())
