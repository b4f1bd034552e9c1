"""Builds and opens the C++ library of the CPU provider, for the vector instructions that this processor has.

The sources are the same for all: ``src/simd.h`` says how wide a vector is by what the compiler was told.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import torch

from drivetrain.contracts.source import Progress, silent
from drivetrain.hardware import read_processor
from drivetrain.native import SourceBuild

SOURCES = Path(__file__).with_name("src")

_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")

VARIANTS = {
    "avx512": (*(f"-m{name}" for name in _AVX512), "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "baseline": (),
}
"""Variant -> flags. ``baseline`` is what every processor of the machine's kind has: SSE2 on x86-64, NEON on arm64."""

FORMATS = {torch.float32: 0, torch.bfloat16: 1}
"""dtype -> its number in the library (``Format`` in ``src/matmul.h``)."""

CACHE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}
"""dtype in which keys and values are kept -> its number (``CacheFormat`` in ``src/attention.h``)."""

_POINTER, _INT, _LONG, _FLOAT, _DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
)

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "dt_set_threads": (None, _INT),
    "dt_rms_norm": (None, *[_POINTER] * 3, _FLOAT, _FLOAT, *[_INT] * 3, _POINTER, _POINTER),
    "dt_gated": (None, _POINTER, _POINTER, *[_INT] * 4, _POINTER),
    "dt_rotate": (None, *[_POINTER] * 3, *[_INT] * 5, _POINTER),
    "dt_linear": (_INT, _POINTER, _INT, _POINTER, _INT, _POINTER),
    "dt_gated_linear": (_INT, _POINTER, _INT, _POINTER, _POINTER, _INT, _INT, _POINTER),
    "dt_sample": (None, _POINTER, _INT, _INT, *[_POINTER] * 6),
    "dt_attend": (
        _INT,
        *[_POINTER] * 7,
        *[_LONG] * 5,
        _DOUBLE,
        _DOUBLE,
        *[_LONG] * 3,
        *[_POINTER] * 3,
        _LONG,
        *[_POINTER] * 2,
    ),
    "dt_decoder_forward": (_INT, *[_POINTER] * 3),
}
"""Function -> type of its result (None for none) and of its arguments."""


_GUARD = threading.Lock()
_OPENED: dict[str, ctypes.CDLL] = {}


def best_variant() -> str:
    """The widest variant that this processor runs. Reads files; starts nothing."""
    found = set(read_processor().instruction_sets)
    if found.issuperset(_AVX512) and "fma" in found:
        return "avx512"
    return "avx2" if found.issuperset({"avx2", "fma", "f16c"}) else "baseline"


def source_build(variant: str) -> SourceBuild:
    """What the library of one variant is made from."""
    return SourceBuild(
        f"drivetrain_cpu_{variant}",
        tuple(sorted(SOURCES.glob("*.cpp"))),
        flags=(
            *VARIANTS[variant],
            # Multiply and add become one instruction; nothing else may be reordered, so that NaN stays NaN.
            *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-pthread"),
        ),
    )


def open_library(variant: str = "auto", progress: Progress = silent) -> ctypes.CDLL:
    """The library, built where it is not yet, set to torch's number of threads. Raises KernelBuildError.

    variant: a key of ``VARIANTS``, or ``auto`` for the widest that the processor runs.
    """
    chosen = best_variant() if variant == "auto" else variant
    with _GUARD:
        library = _OPENED.get(chosen) or _OPENED.setdefault(chosen, _opened(chosen, progress))
    library.dt_set_threads(torch.get_num_threads())
    return library


def _opened(variant: str, progress: Progress) -> ctypes.CDLL:
    library = source_build(variant).library(progress=progress)
    library.variant = variant  # type: ignore[attr-defined]
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def check(status: int) -> None:
    """Raise for a status that is not 0."""
    if status != 0:
        raise MemoryError("the CPU kernels found no memory for a step's intermediate results")
