"""A third party's C++ kernel goes the whole way: compiled on first use, differentiable, visible to torch.compile."""

from __future__ import annotations

import pytest

from drivetrain.native import find_compiler
from drivetrain.testing import KernelsSuite

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


class TestNativeNorm(KernelsSuite):
    plugin = "support.native_kernels:NativeNorm"
