"""Drivetrain's conformance kit on the three plugins."""

from drivetrain.testing import AttentionSuite, PlatformSuite, QuantizerSuite


class TestAcmePlatform(PlatformSuite):
    plugin = "acme"


class TestAcmeAttention(AttentionSuite):
    plugin = "acme"


class TestAcmeQuantizer(QuantizerSuite):
    plugin = "acme"
