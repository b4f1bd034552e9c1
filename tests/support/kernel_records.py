"""Measurements of kernels that nobody made."""

from __future__ import annotations

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernel_record import ROW_CLASSES, Measurement


def measured(
    spec: KernelSpec, provider: str, seconds: float, rows: int | None = None, version: str = "acme 1.0"
) -> list[Measurement]:
    """``provider`` took ``seconds`` for one call; at every number of rows unless one is given."""
    return [
        Measurement(
            operation=spec.operation,
            device_type=spec.device_type,
            dtype=spec.dtype,
            sizes=dict(spec.sizes),
            params=dict(spec.params),
            rows=number,
            provider=provider,
            version=version,
            median_seconds=seconds,
            low_seconds=seconds * 0.9,
            high_seconds=seconds * 1.2,
            num_samples=9,
            moved_bytes=1000,
            flops=100,
            share=0.5,
            date="2026-11-25",
        )
        for number in (ROW_CLASSES if rows is None else (rows,))
    ]
