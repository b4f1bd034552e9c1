"""Triton's interpreter in less of its time: in processes that run it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def quicken() -> None:
    """Let it compute as a device does, which looks at no sum of integers twice; put itself into the place of the
    language once, not for each launch and each function that a kernel calls; and make what only depends on a shape or a
    dtype once, not for each number."""
    from triton.language import core
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
    interpreter._get_np_dtype = _np_dtype(interpreter._get_np_dtype)
    core.block_type.__init__ = _block_type(core)
    core.tensor.__init__ = _tensor(core)


def _np_dtype(find: Callable[..., Any]) -> Callable[..., Any]:
    found: dict[str, Any] = {}

    def find_quickly(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = find(dtype)
        return found[name]

    return find_quickly


def _block_type(core: Any) -> Callable[..., None]:
    made: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    init = core.block_type.__init__

    def init_quickly(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple(core._unwrap_shape(shape))
        if key not in made:
            init(self, element_ty, shape)
            made[key] = (self.shape, self.numel, str(self.shape))
        self.element_ty = element_ty
        self.shape, self.numel, text = made[key]
        self.name = f"<{text}, {element_ty}>"

    return init_quickly


def _tensor(core: Any) -> Callable[..., None]:
    made: dict[tuple[int, ...], tuple[Any, Any]] = {}
    init = core.tensor.__init__

    def init_quickly(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in made:
            init(self, handle, type)
            made[key] = (self.shape, self.numel)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = made[key]

    return init_quickly
