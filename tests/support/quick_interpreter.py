"""Triton's interpreter in less of its time: in processes that run it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def quicken() -> None:
    """Let it compute as a device does, which looks at no sum of integers twice, and put itself into the place of the
    language once, not for each launch and each function that a kernel calls."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            patch(function)
        return interpreter._LangPatchScope()  # with nothing to undo

    interpreter._patch_lang = patch_once
