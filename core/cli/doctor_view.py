"""How ``drivetrain doctor`` prints its report."""

from __future__ import annotations

from drivetrain.cli.console import format_number, print_table
from drivetrain.registry.doctor import DoctorReport, Level


def print_doctor(report: DoctorReport) -> None:
    """Versions, devices, compilers and plugins as tables; findings last, where they are read."""
    print_table(("part", "version or state"), _versions(report) + _devices(report) + _compilers(report))
    print()
    rows = [
        (
            health.plugin.kind,
            health.plugin.name,
            health.status.value,
            "" if health.import_seconds is None else f"{health.import_seconds:.2f} s",
            health.reason,
        )
        for health in report.plugins
    ]
    print_table(("kind", "plugin", "status", "import", "reason"), rows)
    print()
    for finding in report.findings:
        text = f"{finding.level.value}: {finding.subject}: {finding.text}"
        print(f"{text}. {finding.hint}" if finding.hint else text)
    notices = sum(finding.level is Level.NOTICE for finding in report.findings)
    examined = f"{len(report.plugins)} plugins examined in {report.seconds:.1f} s"
    print(f"{examined}: {report.num_problems} problems, {notices} notices")


def _versions(report: DoctorReport) -> list[tuple[str, str]]:
    versions = report.versions
    torch = versions.torch
    build = "not installed"
    if torch is not None:
        builds = [
            f"{name} {value}"
            for name, value in (("CUDA", torch.cuda), ("ROCm", torch.hip), ("XPU", torch.xpu))
            if value
        ]
        build = f"{torch.version} ({', '.join(builds) or 'for CPUs'})"
    rows = [
        ("drivetrain", versions.drivetrain),
        ("python", f"{versions.python} on {versions.system}"),
        ("torch", build),
    ]
    for package in versions.packages:
        if package.name != "torch":
            missing = f'not installed: pip install "drivetrain[{package.extra}]"' if package.extra else "not installed"
            rows.append((package.name, package.version or missing))
    return rows


def _devices(report: DoctorReport) -> list[tuple[str, str]]:
    processor, memory = report.devices.processor, report.devices.memory
    quota = f", quota of {processor.quota_cores:g}" if processor.quota_cores is not None else ""
    available = format_number(memory.available_bytes, "bytes")
    cores = f"{processor.physical_cores} cores, {processor.logical_cores} threads{quota}"
    rows = [
        ("processor", f"{processor.model}: {cores}; {' '.join(processor.instruction_sets)}"),
        ("memory", f"{format_number(memory.total_bytes, 'bytes')}, {available} available"),
    ]
    for accelerator in report.devices.accelerators:
        state = (
            f"driven by {', '.join(accelerator.driven_by)}" if accelerator.driven_by else "; ".join(accelerator.missing)
        )
        rows.append(("accelerator", f"{accelerator.device}: {state or 'no plugin knows it'}"))
    return rows


def _compilers(report: DoctorReport) -> list[tuple[str, str]]:
    return [
        (compiler.name, (compiler.version or "does not answer") if compiler.path else "not found")
        for compiler in report.compilers
    ]
