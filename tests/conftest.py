"""Of all tests: support modules tell what an assert compared, whichever folder is named first; files with slow tests go
first, so that none is still running when every other process is done; Ctrl-C works however the tests were started;
Triton's interpreter takes no longer than it must."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec

import pytest

pytest.register_assert_rewrite("support")


def pytest_configure() -> None:
    """A shell starts what runs in its background with Ctrl-C ignored, and children inherit that; tests interrupt this
    process and its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        from support.quick_interpreter import quicken

        quicken()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)
