"""Observers are told what happens; one that breaks is reported once and counted, and nothing else suffers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from drivetrain.errors import PluginError
from drivetrain.observers import HOOK_NAMES, Observers, hookimpl
from support.distributions import run_python, write_distribution

STEP = {"seconds": 0.5, "num_tokens": 3, "num_running": 2}


class Watcher:
    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    @hookimpl
    def step_done(self, seconds: float, num_tokens: int, num_running: int) -> None:
        self.told.append(("step", seconds, num_tokens, num_running))

    @hookimpl
    def swap_done(self, new: str) -> None:
        self.told.append(("swap", new))


class Breaker:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    @hookimpl
    def step_done(self) -> None:
        raise self.error

    @hookimpl
    def swap_done(self) -> None:
        raise self.error


@pytest.fixture
def observers() -> Observers:
    return Observers(installed=False)


def test_hooks_get_their_arguments_by_name_and_may_leave_some_out(observers: Observers) -> None:
    watcher = Watcher()
    observers.register(watcher)
    observers.notify("step_done", **STEP)
    observers.notify("swap_done", kind="attention", old="a", new="b", epoch=1)
    observers.notify("state_saved", path="p", step=1)
    assert watcher.told == [("step", 0.5, 3, 2), ("swap", "b")]
    assert observers.num_failures == 0


def test_listens_tells_which_hooks_anybody_hears(observers: Observers) -> None:
    assert not any(observers.listens(hook) for hook in HOOK_NAMES)
    observers.register(Watcher())
    assert [hook for hook in HOOK_NAMES if observers.listens(hook)] == ["step_done", "swap_done"]


@pytest.mark.parametrize("error", [ValueError("oh"), SystemExit(3), KeyError("no")])
def test_a_raising_observer_is_reported_once_counted_and_does_not_stop_the_others(
    observers: Observers, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    first, last = Watcher(), Watcher()
    for observer in (first, Breaker(error), last):
        observers.register(observer)
    with caplog.at_level(logging.ERROR, logger="drivetrain"):
        for _ in range(3):
            observers.notify("step_done", **STEP)
        observers.notify("swap_done", kind="attention", old="a", new="b", epoch=1)
    assert len(first.told) == len(last.told) == 4
    assert observers.num_failures == 4
    (record,) = caplog.records
    assert "failed in step_done; further failures are only counted" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_two_raising_observers_are_both_reported(observers: Observers, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        observers.register(Breaker(ValueError("oh")))
    observers.notify("step_done", **STEP)
    assert len(caplog.records) == observers.num_failures == 2


def test_an_interrupt_is_not_swallowed(observers: Observers) -> None:
    observers.register(Breaker(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        observers.notify("step_done", **STEP)


class UnknownHook:
    @hookimpl
    def step_dome(self, seconds: float) -> None:
        """Misspelt."""


class UnknownArgument:
    @hookimpl
    def step_done(self, minutes: float) -> None:
        """Not told."""


class WrapsSteps:
    @hookimpl(wrapper=True)
    def step_done(self) -> Any:
        return (yield)


class NoHooks:
    def step_done(self, seconds: float) -> None:
        """Not marked."""


@pytest.mark.parametrize(
    ("observer", "message"),
    [
        (UnknownHook(), "unknown hook 'step_dome'"),
        (UnknownArgument(), "minutes"),
        (WrapsSteps(), "step_done can't be a wrapper"),
        (NoHooks(), "it marks no hook"),
        (object(), "it marks no hook"),
    ],
)
def test_an_observer_that_is_none_is_refused_and_leaves_nothing_behind(
    observers: Observers, observer: object, message: str
) -> None:
    watcher = Watcher()
    with pytest.raises(PluginError, match=message) as caught:
        observers.register(observer)
    assert "allowed: add_commands, add_routes, config_settled" in str(caught.value)
    observers.register(watcher)  # a refused one must not make later ones fail
    observers.notify("step_done", **STEP)
    assert len(watcher.told) == 1
    assert observers.num_failures == 0


def test_the_same_observer_is_not_registered_twice(observers: Observers) -> None:
    watcher = Watcher()
    observers.register(watcher)
    with pytest.raises(PluginError, match="registered already"):
        observers.register(watcher)
    observers.notify("step_done", **STEP)
    assert len(watcher.told) == 1


# --- installed ones ------------------------------------------------------------------------------------------------

WATCH = """
from drivetrain.observers import hookimpl

@hookimpl
def step_done(seconds, num_tokens):
    print("told", __name__, seconds, num_tokens)
"""
OBJECT = """
from drivetrain.observers import hookimpl

class Watch:
    @hookimpl
    def step_done(self, num_running):
        print("told object", num_running)

watch = Watch()
"""
TELL = """
import json, logging
logging.basicConfig(level=logging.CRITICAL)
from drivetrain.observers import Observers
observers = Observers()
observers.notify("step_done", seconds=0.5, num_tokens=3, num_running=2)
print(json.dumps(observers.num_failures))
"""
GROUP = "drivetrain.observer"


def test_installed_observers_are_told_and_may_share_a_name(tmp_path: Path) -> None:
    write_distribution(tmp_path, "acme-a", {GROUP: {"watch": "acme_a"}}, {"acme_a.py": WATCH})
    write_distribution(tmp_path, "acme-b", {GROUP: {"watch": "acme_b:watch"}}, {"acme_b.py": OBJECT})
    *told, failures = run_python(TELL, tmp_path).splitlines()
    assert sorted(told) == ["told acme_a 0.5 3", "told object 2"]
    assert json.loads(failures) == 0


@pytest.mark.parametrize(
    "source",
    [
        "raise RuntimeError('on import')",
        "raise SystemExit(3)",
        "from drivetrain.observers import hookimpl\n\n@hookimpl\ndef no_such_hook(x): ...\n",
        "from drivetrain.observers import hookimpl\n\n@hookimpl\ndef step_done(no_such_argument): ...\n",
        "from drivetrain.observers import hookimpl\n\n@hookimpl\ndef step_done(): raise SystemExit(4)\n",
        "nothing = 1",
    ],
)
def test_a_broken_installed_observer_is_counted_and_harms_nobody(tmp_path: Path, source: str) -> None:
    # Its name comes first, so that the good one is registered after it.
    write_distribution(tmp_path, "aaa", {GROUP: {"broken": "aaa_broken"}}, {"aaa_broken.py": source})
    write_distribution(tmp_path, "zzz", {GROUP: {"watch": "zzz_watch"}}, {"zzz_watch.py": WATCH})
    told, failures = run_python(TELL, tmp_path).splitlines()
    assert told == "told zzz_watch 0.5 3"
    assert json.loads(failures) == 1


def test_an_observer_whose_module_is_missing_or_malformed_is_counted(tmp_path: Path) -> None:
    write_distribution(tmp_path, "acme", {GROUP: {"gone": "acme_gone", "odd": "!!", "none": "json:nothing"}})
    assert run_python(TELL, tmp_path).strip() == "3"
