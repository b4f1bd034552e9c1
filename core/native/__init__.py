"""Builds shared libraries from C++ and CUDA sources on first use, and opens them through a plain C interface.

A provider of kernels, ours or a third party's, describes a library as a :class:`SourceBuild` and opens it where it
makes its callables::

    build = SourceBuild("acme_norm", (Path(__file__).with_name("norm.cpp"),), flags=("-mavx2", "-mfma"))
    library = build.library()          # ctypes.CDLL; compiled by the first process that needs it, on this machine
    library.acme_norm.restype = None

Nothing here imports torch. A probe asks :func:`probe_compiler`, which only looks for the file.
"""

from drivetrain.native.build import SourceBuild, Unit, build_all
from drivetrain.native.compilers import Compiler, find_compiler, probe_compiler

__all__ = ["Compiler", "SourceBuild", "Unit", "build_all", "find_compiler", "probe_compiler"]
