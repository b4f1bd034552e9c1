"""Builds and opens the C++ library of the CPU provider, for the vector instructions that this processor has.

The sources are the same for all: ``src/simd.h`` says how wide a vector is by what the compiler was told.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from pathlib import Path
from typing import Any

import torch

from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import KernelBuildError
from drivetrain.hardware import read_processor
from drivetrain.native import SourceBuild

_log = logging.getLogger("drivetrain")

SOURCES = Path(__file__).with_name("src")

_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
_AVX512_FLAGS = (*(f"-m{name}" for name in _AVX512), "-mfma", "-mf16c")

VARIANTS = {
    "amx": (*_AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512": _AVX512_FLAGS,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "dotprod": ("-march=armv8.2-a+dotprod",),
    "baseline": (),
}
"""Variant -> flags, best first. ``amx`` is ``avx512`` with the matrix unit, ``dotprod`` NEON with dot products of
integers; ``baseline`` is what every processor of the machine's kind has: SSE2 on x86-64, NEON on arm64."""

_EXTRA = {
    "avx512": {"avx512_vnni": "-mavx512vnni", "avx512_bf16": "-mavx512bf16"},
    "avx2": {"avx_vnni": "-mavxvnni"},
}
"""Variant -> instruction set -> flag for dot products of integers and of bfloat16, which is added where the processor
has them and the variant is the best that it runs."""

_FLAGS_OF_VENDOR = {"AuthenticAMD": ("-DDT_FETCH_FIRST",)}
"""Maker of the processor -> flags for what its caches do best."""

FORMATS = {torch.float32: 0, torch.bfloat16: 1}
"""dtype -> its number in the library (``Format`` in ``src/matmul.h``)."""

ROW_FORMATS = {**FORMATS, torch.float16: 2}
"""The same of operations that only convert numbers on their way."""

CACHE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}
"""dtype in which keys and values are kept -> its number (``CacheFormat`` in ``src/attention.h``)."""

_NEEDS = {
    "amx": (*_AVX512, "fma", "f16c", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    "avx512": (*_AVX512, "fma"),
    "avx2": ("avx2", "fma", "f16c"),
    "dotprod": ("asimddp", "atomics"),
    "baseline": (),
}
"""Variant -> instruction sets of the processor, by the names of the Linux kernel."""

_POINTER, _INT, _LONG, _FLOAT, _DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
)

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "dt_enable": (_INT,),
    "dt_set_threads": (None, _INT),
    "dt_rms_norm": (None, *[_POINTER] * 3, _FLOAT, _FLOAT, *[_INT] * 3, _POINTER, _POINTER),
    "dt_gated": (None, _POINTER, _POINTER, *[_INT] * 4, _POINTER),
    "dt_rotate": (None, *[_POINTER] * 3, *[_INT] * 5, _POINTER),
    "dt_rope_write": (_INT, _POINTER),
    "dt_linear": (_INT, _POINTER, _INT, _POINTER, _INT, _POINTER),
    "dt_gated_linear": (_INT, _POINTER, _INT, _POINTER, _POINTER, _INT, _INT, _POINTER),
    "dt_has_screen": (_INT,),
    "dt_largest": (_INT, _POINTER, _INT, *[_POINTER] * 5),
    "dt_sample": (None, _POINTER, _INT, _INT, *[_POINTER] * 6),
    "dt_token_losses": (_INT, _POINTER, _POINTER, _INT, _LONG, _FLOAT, _INT, _POINTER, _POINTER),
    "dt_logit_gradients": (_INT, *[_POINTER] * 4, _INT, _LONG, _FLOAT, _INT),
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


def runnable_variants() -> tuple[str, ...]:
    """The variants whose instructions this processor has, best first. Reads files; starts nothing."""
    found = set(read_processor().instruction_sets)
    return tuple(name for name in VARIANTS if found.issuperset(_NEEDS[name]))


def source_build(variant: str) -> SourceBuild:
    """What the library of one variant is made from."""
    processor = read_processor()
    found = processor.instruction_sets
    extra = _EXTRA.get(variant, {}) if variant == runnable_variants()[0] else {}
    return SourceBuild(
        f"drivetrain_cpu_{variant}",
        tuple(sorted(SOURCES.glob("*.cpp"))),
        flags=(
            *VARIANTS[variant],
            *(flag for name, flag in extra.items() if name in found),
            *_FLAGS_OF_VENDOR.get(processor.vendor, ()),
            # Multiply and add become one instruction; nothing else may be reordered, so that NaN stays NaN.
            *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-pthread"),
        ),
    )


def open_library(variant: str = "auto", progress: Progress = silent) -> ctypes.CDLL:
    """The library, built where it is not yet, set to torch's number of threads. Raises KernelBuildError.

    variant: a key of ``VARIANTS``, or ``auto`` for the best that this machine runs. What the processor has may still be
    unknown to the compiler, or refused by the system: then ``auto`` takes the next, with a warning.
    """
    with _GUARD:
        library = _OPENED.get(variant)
        if library is None:
            library = _best(progress) if variant == "auto" else _opened(variant, progress)
            _OPENED[variant] = library
    library.dt_set_threads(torch.get_num_threads())
    return library


def _best(progress: Progress) -> ctypes.CDLL:
    *others, last = runnable_variants()
    for variant in others:
        try:
            return _opened(variant, progress)
        except KernelBuildError as error:
            _log.warning("the CPU kernels can't use %s here, and the next variant is taken: %s", variant, error)
    return _opened(last, progress)


def _opened(variant: str, progress: Progress) -> ctypes.CDLL:
    library = _OPENED.get(variant)
    if library is not None:
        return library
    library = source_build(variant).library(progress=progress)
    library.variant = variant  # type: ignore[attr-defined]
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if library.dt_enable() != 0:
        raise KernelBuildError(
            "the system does not let this process use the matrix unit",
            where=f"kernels/cpu, instructions {variant}",
            allowed=tuple(name for name in VARIANTS if name != variant),
            hint="Linux 5.16 and later allow it, unless a sandbox forbids arch_prctl. Take another variant.",
        )
    _OPENED[variant] = library
    return library


def check(status: int) -> None:
    """Raise for a status that is not 0."""
    if status != 0:
        raise MemoryError("the CPU kernels found no memory for a step's intermediate results")
