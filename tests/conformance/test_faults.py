"""A plugin that raises, hangs or runs out of memory, in every phase of its life: the core tells of it and lives on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from drivetrain.contracts.plugin import ProbeContext
from drivetrain.contracts.scheduler import StepPlan, View
from drivetrain.errors import PluginError, PluginLoadError, PluginRefusedError, RequestFailedError
from drivetrain.plugins.scheduler.fcfs import FcfsScheduler
from drivetrain.registry import Outcome, PartRequest, PluginRef, Registry, Selector
from drivetrain.registry.doctor import Status, examine_plugins
from drivetrain.serving.loop import EngineLoop
from drivetrain.testing.manners import examine_manners
from support.fake_model import add, expected_tokens, fake_lm, finish, greedy, make_engine, prompts
from support.fake_plugins import PlainScheduler, ref
from support.fake_stack import Client, make_stack, wait_until

torch.set_num_threads(1)

LIMIT_SECONDS = 4.0
PATIENCE_SECONDS = 40.0
"""For what ends by itself, on a busy machine too."""

FAULTS = {
    "raises": "raise ValueError('it is broken')",
    "memory": "raise MemoryError('no room for 8 GiB')",
    "device-memory": "import torch; raise torch.OutOfMemoryError('CUDA out of memory')",
    "recursion": "raise RecursionError('too deep')",
    "exits": "raise SystemExit(3)",
    "hangs": "import time; time.sleep(3600)",
}
"""Name of a fault -> the statement that makes it."""

LOUD = [fault for fault in FAULTS if fault != "hangs"]
"""A hang inside the caller's own process can't be ended from within; doctor and the kit bound it in theirs."""

SAID = {
    "raises": "ValueError: it is broken",
    "memory": "MemoryError: no room for 8 GiB",
    "device-memory": "OutOfMemoryError: CUDA out of memory",
    "recursion": "RecursionError: too deep",
    "exits": "3",
}
"""What the report must then hold."""

MODULE = """
from support.fake_plugins import PlainScheduler

{in_import}

class Faulty(PlainScheduler):
    @classmethod
    def probe(cls, context):
        {in_probe}
        return super().probe(context)

    def __init__(self, config):
        {in_create}
        super().__init__(config)
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], PluginRef]:
    """Write a plugin with one fault in one phase: ``import``, ``probe`` or ``create``."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(phase: str, fault: str) -> PluginRef:
        name = f"faulty_{phase}_{fault}".replace("-", "_")
        places = {f"in_{place}": FAULTS[fault] if place == phase else "" for place in ("import", "probe", "create")}
        places = {place: text or "pass" for place, text in places.items()}
        (tmp_path / f"{name}.py").write_text(MODULE.format(**places), encoding="utf-8")
        return ref("scheduler", name, f"{name}:Faulty", distribution="faulty")

    return write


SOUND = ref("scheduler", "sound", PlainScheduler, distribution="sound")


def choose(name: str, *refs: PluginRef) -> Selector:
    selector = Selector(Registry(refs), {"scheduler": PartRequest("scheduler", name, origin="argument")})
    selector.choose("scheduler", ProbeContext())
    return selector


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_tells_of_every_fault_in_import_and_probe(faulty: Callable[[str, str], PluginRef]) -> None:
    """Each in a process of its own: all are told apart, and the sound plugin beside them is ok."""
    refs = {faulty(phase, fault): fault for phase in ("import", "probe") for fault in LOUD}
    *broken, sound = examine_plugins([*refs, SOUND], PATIENCE_SECONDS)
    assert sound.status is Status.OK
    for entry in broken:
        assert entry.status is Status.BROKEN, entry.plugin.name
        assert SAID[refs[entry.plugin]] in entry.reason


def test_doctor_bounds_what_hangs_in_its_import_or_probe(faulty: Callable[[str, str], PluginRef]) -> None:
    """Each is stopped at the limit, and the report says in which step it stayed."""
    phases = ("import", "probe")
    for phase, entry in zip(phases, examine_plugins([faulty(p, "hangs") for p in phases], LIMIT_SECONDS), strict=True):
        assert entry.status is Status.HUNG
        assert f"its {phase} did not return" in entry.reason


# --- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", LOUD)
def test_selection_passes_over_what_breaks_in_its_import_or_probe(
    faulty: Callable[[str, str], PluginRef], fault: str
) -> None:
    """Under auto another plugin is chosen, as a fallback that is told with what was raised."""
    for phase in ("import", "probe"):
        report = choose("auto", faulty(phase, fault), SOUND).report["scheduler"]
        assert report.chosen == SOUND
        broken = next(candidate for candidate in report.candidates if candidate.distribution == "faulty")
        assert broken.outcome is Outcome.BROKEN
        assert SAID[fault] in broken.reason
        assert report.fallback is not None
        assert SAID[fault] in report.fallback


@pytest.mark.parametrize("fault", LOUD)
def test_a_named_plugin_that_breaks_is_an_error_of_the_tree(
    faulty: Callable[[str, str], PluginRef], fault: str
) -> None:
    """By name nothing falls back: import, probe and creation each end in an error that says what was raised."""
    wanted = {"import": PluginLoadError, "probe": PluginRefusedError, "create": PluginError}
    for phase, error in wanted.items():
        plugin = faulty(phase, fault)
        with pytest.raises(error) as raised:
            choose(plugin.name, plugin, SOUND)
        assert SAID[fault] in str(raised.value)


# --- the engine ------------------------------------------------------------------------------------------------------

ERRORS: dict[str, Callable[[], Exception]] = {
    "raises": lambda: ValueError("it is broken"),
    "memory": lambda: MemoryError("no room for 8 GiB"),
    "device-memory": lambda: torch.OutOfMemoryError("CUDA out of memory"),
}
PROMPT = [5, 9, 12, 3, 3, 44]


class FaultyOnce(FcfsScheduler):
    """Raises in its plan once, or holds it up until a gate opens."""

    error: Exception | None = None
    gate: threading.Event | None = None

    def plan(self, view: View) -> StepPlan:
        if self.gate is not None:
            self.gate.wait(30)
        error, self.error = self.error, None
        if error is not None:
            raise error
        return super().plan(view)


def make_faulty_scheduler() -> FaultyOnce:
    return FaultyOnce(FaultyOnce.Config.model_validate({"max_batched_tokens": 16, "max_running": 4}))


@pytest.fixture
def loops(caplog: pytest.LogCaptureFixture) -> Iterator[list[EngineLoop]]:
    caplog.set_level(logging.CRITICAL + 1, "drivetrain")
    made: list[EngineLoop] = []
    yield made
    for loop in made:
        loop.shutdown()


def started(loops: list[EngineLoop], **options: object) -> tuple[EngineLoop, Client]:
    loop = EngineLoop(make_stack(**options))
    loops.append(loop)
    loop.start()
    return loop, Client(loop)


@pytest.mark.parametrize("fault", ERRORS)
def test_the_engine_lives_on_after_a_fault_in_the_model(loops: list[EngineLoop], fault: str) -> None:
    """The requests of that step end with the error; what they held is free; the next request is served right."""
    loop, client = started(loops)
    fake_lm(loop.stack.engine).faults.error = ERRORS[fault]()
    ticket = client.submit(PROMPT, greedy(4))
    (reason,) = client.reasons(ticket)
    assert str(reason) == "error"
    assert str(ERRORS[fault]()) in str(client.run.last[ticket.request_id, 0].error)
    expect_sound(loop, client)


@pytest.mark.parametrize("fault", ERRORS)
def test_a_fault_in_the_scheduler_ends_every_request_and_is_told(loops: list[EngineLoop], fault: str) -> None:
    """Without a plan there is no next step: all requests end with the error, health says so, and nobody waits."""
    scheduler = make_faulty_scheduler()
    scheduler.error = ERRORS[fault]()
    loop, client = started(loops, scheduler=scheduler)
    tickets = [client.submit(prompt, greedy(4)) for prompt in prompts(1)]
    for ticket in tickets:
        assert [str(reason) for reason in client.reasons(ticket)] == ["error"]
        assert str(ERRORS[fault]()) in str(client.run.last[ticket.request_id, 0].error)
    wait_until(lambda: loop.health().state == "failed", "failed")
    assert str(ERRORS[fault]()) in str(loop.health().error)
    with pytest.raises(RequestFailedError):
        client.submit(PROMPT, greedy(1))


def expect_sound(loop: EngineLoop, client: Client) -> None:
    wait_until(lambda: loop.is_empty, "empty")
    engine = loop.stack.engine
    engine.kv.check()
    assert [pool.num_used for pool in engine.kv.pools] == [0] * len(engine.kv.pools)
    ticket = client.submit(PROMPT, greedy(4))
    assert [str(reason) for reason in client.reasons(ticket)] == ["length"]
    assert client.run.tokens[ticket.request_id, 0] == expected_tokens(PROMPT, 4)


def test_a_hang_in_the_scheduler_shows_as_a_stall_and_ends_with_it(loops: list[EngineLoop]) -> None:
    """Health tells a step that does not return from one that works, and requests go on once it returns."""
    scheduler = make_faulty_scheduler()
    loop, client = started(loops, scheduler=scheduler, settings={"stall_seconds": 0.3})
    scheduler.gate = threading.Event()
    ticket = client.submit(PROMPT, greedy(4))
    wait_until(lambda: not loop.health().ok, "stalled")
    scheduler.gate.set()
    assert [str(reason) for reason in client.reasons(ticket)] == ["length"]
    wait_until(lambda: loop.health().ok, "healthy")
    expect_sound(loop, client)


@pytest.mark.parametrize("fault", ERRORS)
def test_an_engine_of_its_own_thread_fails_only_the_step(fault: str) -> None:
    """Without the loop as well: requests that were not in the failing step are not touched."""
    engine = make_engine(max_running=1)
    first, second = prompts(2)
    add(engine, "first", first, greedy(4))
    add(engine, "second", second, greedy(4))
    fake_lm(engine).faults.error = ERRORS[fault]()
    run = finish(engine)
    assert str(run.last["first", 0].finish_reason) == "error"
    assert run.tokens["second", 0] == expected_tokens(second, 4)


# --- the kit ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_kit_bounds_a_plugin_that_hangs_in_its_import(faulty: Callable[[str, str], PluginRef]) -> None:
    """The examination of manners ends at its limit and says in which step the plugin stayed."""
    started_at = time.monotonic()
    manners = examine_manners(faulty("import", "hangs"), {}, PATIENCE_SECONDS / 2)
    assert time.monotonic() - started_at < PATIENCE_SECONDS
    assert manners.failure is not None
    assert "import: did not return within" in manners.failure
