"""The CUDA platform on a GPU: the whole conformance suite, with what it captures."""

from __future__ import annotations

from drivetrain.testing.suites.platform import PlatformSuite


class TestSuite(PlatformSuite):
    """Every test of the suite, on the GPU."""

    plugin = "cuda"
