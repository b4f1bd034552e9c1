"""Weights in one stretch of memory with large pages.

A processor remembers where some thousand pages of 4 KiB lie, which is a few MiB; a step reads hundreds. With pages of
2 MiB the addresses of all weights fit, and weights that follow each other in a step follow each other in memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch

from drivetrain.hardware import ROOT, read_text

PAGE_BYTES = 2 << 20
_LINE = 64


def why_no_huge_pages() -> str | None:
    """Why this system gives none on request; None when it does."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return "the system has no large pages on request"
    enabled = read_text(ROOT / "sys/kernel/mm/transparent_hugepage/enabled")
    if enabled is None or "[never]" in enabled:
        return "large pages are switched off in the system"
    return None


def move(tensors: Iterable[torch.Tensor], takes_views: bool = False) -> int:
    """Move what the tensors refer to into large pages, one after the other; returns the bytes moved.

    Tensors keep their values, shapes and what they share. What torch did not allocate itself, such as a view of a file,
    stays where it is, or is copied (``takes_views``). Never more than one storage is there twice, files aside.
    """
    by_storage: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if (takes_views or storage.resizable()) and storage.nbytes() and tensor.device.type == "cpu":
            by_storage.setdefault(storage.data_ptr(), []).append(tensor)
    sizes = [group[0].untyped_storage().nbytes() for group in by_storage.values()]
    total = sum(_rounded(size) for size in sizes)
    if total < PAGE_BYTES:
        return 0
    area = _area(total)
    begin = 0
    for group, size in zip(by_storage.values(), sizes, strict=True):
        place = area[begin : begin + size]
        place.copy_(torch.empty(0, dtype=torch.uint8).set_(group[0].untyped_storage()))
        for tensor in group:
            whole = torch.empty(0, dtype=tensor.dtype).set_(
                place.untyped_storage(),
                (place.storage_offset() + tensor.storage_offset() * tensor.element_size()) // tensor.element_size(),
                tensor.shape,
                tensor.stride(),
            )
            tensor.data = whole
        begin += _rounded(size)
    return sum(sizes)


def _rounded(size: int) -> int:
    return -(-size // _LINE) * _LINE


def _area(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] in large pages, as far as the system has them. It lives as long as a tensor that uses it."""
    memory = mmap.mmap(-1, num_bytes + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % PAGE_BYTES
    return whole[first : first + num_bytes]
