"""The machine's two ceilings: how fast memory is read, and how fast products are computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from wire import serve

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.plugin import ProbeContext
from drivetrain.kernels.cpu import CpuKernels

_BUFFER_BYTES = 1 << 31
"""Several times the largest last-level cache of a server, of which a virtual machine sees all and owns a part."""

_ENOUGH_SECONDS = 4.0

_SIZE = 2048
"""Rows and columns of the products: 50 MB of operands and result, long enough to be bound by arithmetic."""

_FEW, _HOPELESS = 32, 8.0
"""Rows of a product that is tried first, and how many times as long as another one it may take: torch needs minutes for
bfloat16 where the processor has no instructions for it."""


class Ceilings:
    def measure(self, *, threads: int, repeats: int) -> dict[str, Any]:
        """The best of several: a ceiling is what was reached, not what is usual."""
        torch.set_num_threads(threads)
        return {
            "read_bytes_per_second": _read_rate(threads, repeats),
            "float32_flops": _product_rate(torch.float32, repeats),
            "bfloat16_flops": _product_rate(torch.bfloat16, repeats),
        }

    def close(self) -> dict[str, Any]:
        return {}


def _read_rate(threads: int, repeats: int) -> float:
    """Bytes a second over a buffer that no cache holds, read in two ways: one sum over all threads, and a dot product
    of its own halves in each thread."""
    buffer = torch.ones(_BUFFER_BYTES // 4)
    seconds = _best(buffer.sum, repeats)
    parts = buffer.chunk(threads)
    torch.set_num_threads(1)
    seconds = min(seconds, _best(lambda: _together([_dot_of_halves(part) for part in parts]), repeats))
    torch.set_num_threads(threads)
    return _BUFFER_BYTES / seconds


def _dot_of_halves(part: torch.Tensor) -> Callable[[], object]:
    left, right = part[: len(part) // 2], part[len(part) // 2 :]
    return lambda: torch.dot(left, right)


def _together(jobs: list[Callable[[], object]]) -> None:
    workers = [threading.Thread(target=job) for job in jobs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _product_rate(dtype: torch.dtype, repeats: int) -> float:
    """Of torch's library, or of Drivetrain's kernels where those are faster: a library may be made for another maker's
    processors."""
    products: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [torch.matmul]
    if CpuKernels.probe(ProbeContext()).ok:
        spec = KernelSpec("linear", "cpu", str(dtype).removeprefix("torch."), {"I": _SIZE, "O": _SIZE})
        linear = CpuKernels(CpuKernels.Config()).make(spec)
        products.append(lambda a, b: linear(a, b, None))
    few = {product: _seconds(product, dtype, _FEW, 1) for product in products}
    likely = [product for product in products if few[product] < _HOPELESS * min(few.values())]
    return 2 * _SIZE**3 / min(_seconds(product, dtype, _SIZE, repeats) for product in likely)


def _seconds(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: torch.dtype, rows: int, repeats: int
) -> float:
    """Of a product of so many rows."""
    a, b = torch.randn(rows, _SIZE).to(dtype), torch.randn(_SIZE, _SIZE).to(dtype)
    return _best(lambda: product(a, b), repeats)


def _best(job: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` after one to warm up; fewer where one takes long."""
    best = float("inf")
    begin = time.perf_counter()
    for turn in range(repeats + 1):
        started = time.perf_counter()
        job()
        ended = time.perf_counter()
        if turn:
            best = min(best, ended - started)
            if ended - begin > _ENOUGH_SECONDS:
                break
    return best


if __name__ == "__main__":
    serve(Ceilings())
