"""Precisions and a suite for tests of the runner itself: tests that crash, hang, end the process, or need hardware."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from pydantic import Field

from drivetrain.contracts.plugin import PluginConfig, Probe, ProbeContext
from drivetrain.contracts.precision import Dtypes, Precision
from drivetrain.plugins.precision.fp32 import Fp32Precision
from drivetrain.testing.suite import not_run
from drivetrain.testing.suites.precision import PrecisionSuite


class WithOption(Precision):
    """Takes its format from an option."""

    class Config(PluginConfig):
        param: str = Field("float32", description="format of parameters")

    config: Config

    def dtypes(self) -> Dtypes:
        return Dtypes(self.config.param, "float32")


class CrashesOnUse(Fp32Precision):
    """Brings the process down."""

    def dtypes(self) -> Dtypes:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError("a crashed process goes on")


class HangsOnUse(Fp32Precision):
    """Does not return."""

    def dtypes(self) -> Dtypes:
        time.sleep(3600)
        raise AssertionError("an hour has passed")


class ExitsOnUse(Fp32Precision):
    """Ends the process without a word."""

    def dtypes(self) -> Dtypes:
        os._exit(0)


class SetsTheEnvironment(Fp32Precision):
    """Configures another library through the environment, and moves the process, whenever it is probed."""

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        os.environ["WILD_HOME"] = "/wild"
        os.chdir("/")
        return super().probe(context)


class RunnerSuite(PrecisionSuite):
    """One test of each outcome."""

    test_parameters: Any = None

    def test_passes(self, record_property: Any) -> None:
        """Passing is told,
        with the whole rule.

        And no more than the rule.
        """
        record_property("figure", 7)

    def test_fails(self) -> None:
        """Failing is told with its reason."""
        assert self.dtypes().param == "float8", "wrong format"

    def test_errs(self, no_such_fixture: None) -> None:
        """A test that can't be set up is an error."""

    def test_skips(self) -> None:
        """What is not claimed is skipped."""
        self.require_claim("surely_not_claimed")

    def test_not_run(self) -> None:
        """What this machine can't show is NOT RUN."""
        not_run("no such device")

    @pytest.mark.parametrize("value", [1, 2])
    def test_twice(self, value: int) -> None:
        """Parameters show in the test's name."""
        self.dtypes()
