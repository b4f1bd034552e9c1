"""The command line in this process, on a tiny model."""

import pytest

pytest.register_assert_rewrite("support.command_line", "support.command_fixtures", "support.live_server")

from support.command_fixtures import cli, tiny  # noqa: E402

__all__ = ["cli", "tiny"]
