"""``python -m drivetrain`` is the ``drivetrain`` command."""

import sys

from drivetrain.cli import main

sys.exit(main())
