"""The base of every suite: which plugin is tested, what it claims, and the words for what can't be run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

import pytest

from drivetrain.contracts.plugin import Plugin, PluginConfig, Probe, ProbeContext
from drivetrain.registry import PluginRef, Registry, load
from drivetrain.registry.discovery import check_contract
from drivetrain.testing.manners import Manners, examine_afresh, examine_manners
from drivetrain.testing.pytest_plugin import NOT_RUN


def not_run(reason: str) -> NoReturn:
    """End the test as NOT RUN: what it is about is claimed, but this machine can't show it."""
    pytest.skip(NOT_RUN + reason)


def about(what: object) -> Callable[[str], str]:
    """For ``torch.testing.assert_close(msg=...)``: its message, with ``what`` was compared before it."""
    return lambda message: f"{what}: {message}"


_LOADED: dict[tuple[str, str], type[Plugin]] = {}
"""Plugins by kind and name. Without it every use looks through all installed distributions again, which takes two
thirds of a suite's time."""


class Suite:
    """A plugin's examination.

    plugin:  its name (``"my-attention"`` or ``"dist/my-attention"``), ``"module:Class"``, or the class itself.
    options: for its Config; most plugins need none.
    time_limit_seconds: for what runs in a process of its own.
    """

    kind: ClassVar[str]
    plugin: ClassVar[str | type[Plugin]]
    options: ClassVar[Mapping[str, Any]] = {}
    time_limit_seconds: ClassVar[float] = 60.0

    # --- what suites use ---------------------------------------------------------------------------------------------

    @classmethod
    def ref(cls) -> PluginRef:
        """Where the plugin comes from; a class that no distribution registers stands for itself."""
        if isinstance(cls.plugin, str) and ":" not in cls.plugin:
            return Registry().find(cls.kind, cls.plugin)
        target = cls.plugin
        if not isinstance(target, str):
            target = f"{target.__module__}:{target.__qualname__}"
        return PluginRef(cls.kind, target.rpartition(":")[2], "unregistered", "0", target)

    @classmethod
    def plugin_class(cls) -> type[Plugin]:
        """The plugin's class, checked against the contract. Raises PluginLoadError or ContractError."""
        if not isinstance(cls.plugin, str):
            check_contract(cls.ref(), cls.plugin)
            return cls.plugin
        key = (cls.kind, cls.plugin)
        if key not in _LOADED:
            _LOADED[key] = load(cls.ref())
        return _LOADED[key]

    @classmethod
    def make(cls, **options: Any) -> Any:
        """An instance with the suite's options, and ``options`` over them."""
        plugin = cls.plugin_class()
        return plugin(plugin.Config.model_validate({**cls.options, **options}))

    @classmethod
    def claims(cls, ability: str) -> bool:
        return ability in cls.plugin_class().abilities()

    @classmethod
    def require_claim(cls, ability: str) -> None:
        """Skip the test, with the reason, unless the plugin claims ``ability``."""
        if not cls.claims(ability):
            pytest.skip(f"not claimed: {ability}")

    @classmethod
    def require_probe(cls, context: ProbeContext) -> None:
        """End the test as NOT RUN when the plugin says that it can't work in ``context`` on this machine."""
        probe = cls.plugin_class().probe(context)
        if not probe.ok:
            not_run(f"{probe.code}: {probe.reason}")

    # --- what every plugin of every kind has to do -------------------------------------------------------------------

    def test_contract_is_fulfilled(self) -> None:
        """The class is of its kind, complete, and its methods can be called as the contract says."""
        check_contract(self.ref(), self.plugin_class())

    def test_config_refuses_unknown_keys(self) -> None:
        """A misspelt option is an error, not silence."""
        config = self.plugin_class().Config
        assert issubclass(config, PluginConfig)
        with pytest.raises(ValueError, match="surely_no_such_option"):
            config.model_validate({**self.options, "surely_no_such_option": 1})

    def test_every_option_is_described(self) -> None:
        """``plugins info`` prints what each option means."""
        silent = [name for name, field in self.plugin_class().Config.model_fields.items() if not field.description]
        assert not silent, f"options without a description: {', '.join(silent)}"

    def test_probe_answers_in_an_empty_context(self) -> None:
        """Told nothing, the probe answers, and a "no" says why in a sentence and a code."""
        probe = self.plugin_class().probe(ProbeContext())
        assert isinstance(probe, Probe), f"probe returned {type(probe).__name__} instead of a Probe"
        assert probe.reason, "the probe gives no reason"
        assert probe.ok or probe.code not in ("", "ok"), "a refusal needs a code of its own"

    def test_probe_is_repeatable(self) -> None:
        """The same context gets the same answer."""
        assert self.plugin_class().probe(ProbeContext()) == self.plugin_class().probe(ProbeContext())

    # --- manners: what importing and probing may not do, seen in a child process -------------------------------------

    @classmethod
    def manners(cls) -> Manners:
        """What importing and probing the plugin did to a child process. Fails the test when that came to no end."""
        manners = examine_manners(cls._importable_ref(), cls.options, cls.time_limit_seconds)
        if manners.failure is not None:
            pytest.fail(f"in a process of its own: {manners.failure}")
        return manners

    @classmethod
    def _importable_ref(cls) -> PluginRef:
        ref = cls.ref()
        if "<locals>" in ref.target:
            pytest.skip("the class is defined inside a function, where no other process can import it")
        return ref

    def _expect_no_breach(self, topic: str) -> None:
        breaches = self.manners().breaches.get(topic, ())
        assert not breaches, "; ".join(breaches)

    def test_import_and_probe_open_no_device(self) -> None:
        """Importing and probing open no device context, and do not try to."""
        self._expect_no_breach("device")

    def test_import_and_probe_start_no_thread(self) -> None:
        """Importing and probing start no thread, not even one that ends."""
        self._expect_no_breach("threads")

    def test_import_and_probe_start_no_process(self) -> None:
        """Importing and probing start no process, not even one that ends."""
        self._expect_no_breach("processes")

    def test_import_and_probe_leave_the_environment(self) -> None:
        """Importing and probing set, change and remove no environment variable."""
        self._expect_no_breach("environment")

    def test_import_and_probe_leave_the_process(self) -> None:
        """Importing and probing leave folder, search path, signal handlers, warnings and root logger as they are."""
        self._expect_no_breach("process")

    def test_import_and_probe_leave_torch(self) -> None:
        """Importing and probing leave torch's dtype, threads, modes, random states and functions as they are."""
        self._expect_no_breach("torch")

    def test_import_and_probe_leave_drivetrain(self) -> None:
        """Importing and probing replace nothing in drivetrain's modules, classes and tables."""
        self._expect_no_breach("drivetrain")

    def test_import_and_probe_print_nothing(self) -> None:
        """Importing and probing leave standard output to the program: it may be JSON that another one reads."""
        self._expect_no_breach("output")

    def test_works_in_a_forked_process(self) -> None:
        """Imported before a fork, the plugin's probe gives the same answer after it."""
        self._expect_no_breach("fork")

    def test_works_in_a_spawned_process(self, record_property: Callable[[str, object], None]) -> None:
        """Imported anew in a spawned process, the plugin's probe gives the same answer."""
        afresh = examine_afresh(self._importable_ref(), self.time_limit_seconds)
        if afresh.import_seconds is not None:
            with_torch = ", torch included" if afresh.imports_torch else ""
            record_property("import_time", f"{afresh.import_seconds * 1000:.0f} ms{with_torch}")
        if afresh.failure is not None:
            pytest.fail(f"in a process of its own: {afresh.failure}")
        assert not afresh.breach, afresh.breach
