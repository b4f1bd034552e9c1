"""``drivetrain bench kernels``: measures kernel providers here, and keeps the figures in this machine's record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from drivetrain.cli.console import note, print_json, print_table, show_progress
from drivetrain.cli.options import with_settings
from drivetrain.config import Settings

if TYPE_CHECKING:
    from drivetrain.bench.kernels import Refused
    from drivetrain.kernel_record import Ceilings, Measurement


@with_settings()
def kernels(
    settings: Settings,
    operations: Annotated[
        list[str] | None, typer.Option("--operation", help="Only this operation. May be repeated.", show_default=False)
    ] = None,
    providers: Annotated[
        list[str] | None, typer.Option("--provider", help="Only this provider. May be repeated.", show_default=False)
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Sizes in place of a model's: E=4096 or I=4096,O=11008.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the activations. Default: the precision's.", show_default=False)
    ] = None,
    save: Annotated[bool, typer.Option(help="Keep the figures in this machine's record.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure every kernel provider in the uses that a model has, and record it: the record ranks providers.

    Without --model the sizes are those of smollm2-135m, and nothing is downloaded. Times are of one call: median, and
    10th to 90th percentile. The share is of this machine's ceiling for the bytes and operations that the call needs.

    Example: drivetrain bench kernels --operation rms_norm --operation linear
    """
    from drivetrain.assembly import resolve_parts
    from drivetrain.bench import kernels as bench
    from drivetrain.hardware import read_processor
    from drivetrain.kernel_record import save_record

    chosen = bench.check_operations(operations or ())
    wanted_sizes = bench.parse_sizes(sizes) if sizes is not None else None
    with show_progress() as progress:
        parts = resolve_parts(settings, progress=progress, leave_out=("frontend", "scheduler"))
        parts.platform.activate()
        facts = parts.platform.facts()
        kind, name = parts.platform.device().type, bench.check_dtype(dtype or parts.precision.dtypes().param)
        found, refused = bench.offers(parts, providers or ())
        if wanted_sizes is not None:
            specs = bench.sized_specs(kind, name, chosen, wanted_sizes)
        elif settings.model is None:
            specs = bench.usual_specs(kind, name, chosen)
        else:
            bound = bench.model_specs(parts, chosen, progress)
            specs = [dataclasses.replace(spec, dtype=name) for spec in bound]
        busy = bench.busy_note(read_processor().usable_cores)
        ceilings = bench.measure_ceilings(parts.platform, [name], found)
        measurements, more = bench.measure(specs, found, parts.platform, ceilings, progress)
    refused += more
    path = save_record(facts, measurements, ceilings) if save and measurements else None
    if as_json:
        print_json(
            {
                "device": facts.device_name,
                "busy": busy,
                "ceilings": dataclasses.asdict(ceilings),
                "record": path,
                "measurements": bench.summarize(measurements),
                "refused": [dataclasses.asdict(entry) for entry in refused],
            }
        )
        return
    _print(facts.device_name, ceilings, measurements, refused)
    for text in filter(None, (busy, f"recorded in {path}" if path else None)):
        note(text)


def _print(device: str, ceilings: Ceilings, measurements: Sequence[Measurement], refused: Sequence[Refused]) -> None:
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in ceilings.flops_per_second.items())
    print(f"{device}: reads {ceilings.read_bytes_per_second / 1e9:.1f} GB/s, computes {rates}\n")
    print_table(
        ("operation", "sizes", "dtype", "rows", "provider", "median", "p10..p90", "GB/s", "GFLOP/s", "share", "speed"),
        [_row(m, measurements) for m in measurements],
    )
    if refused:
        print()
        rows = [(r.operation or "all", _sizes(r.sizes), r.provider, r.reason) for r in refused]
        print_table(("operation", "sizes", "provider", "not measured"), rows)


def _row(m: Measurement, others: Sequence[Measurement]) -> tuple[str, ...]:
    reference = next((o for o in others if (o.use, o.rows, o.provider) == (m.use, m.rows, "reference")), None)
    return (
        m.operation,
        _sizes(m.sizes),
        m.dtype,
        str(m.rows),
        m.provider,
        _time(m.median_seconds),
        f"{_time(m.low_seconds)}..{_time(m.high_seconds)}",
        f"{m.moved_bytes / m.median_seconds / 1e9:.1f}",
        f"{m.flops / m.median_seconds / 1e9:.1f}" if m.flops else "",
        f"{m.share:.0%}",
        f"{reference.median_seconds / m.median_seconds:.2f}x" if reference else "",
    )


def _sizes(sizes: object) -> str:
    return " ".join(f"{dim}={size}" for dim, size in dict(sizes).items())  # type: ignore[call-overload]


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
