"""Of all tests: support modules tell what an assert compared, whichever folder is named first; files with slow tests go
first, so that none is still running when every other process is done."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("support")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)
