"""``drivetrain bench kernels``: what is measured is what the operation needs, and the record that it leaves is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drivetrain.assembly import Parts, resolve_parts
from drivetrain.bench import kernels as bench
from drivetrain.config import load_settings
from drivetrain.contracts.kernels import OPERATIONS, KernelSpec
from drivetrain.errors import ConfigError, NoCandidateError, UnknownPluginError
from drivetrain.kernel_record import ROW_CLASSES, Ceilings, read_record, save_record
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.native import find_compiler
from drivetrain.registry import PluginRef, Registry, discover
from drivetrain.testing.kernel_oracle import Case
from support.command_line import ONE_THREAD
from support.native_kernels import NativeNorm, WithoutCompiler

Cli = Callable[..., Any]
REFERENCE = ReferenceKernels(ReferenceKernels.Config())
CEILINGS = Ceilings(10e9, {"float32": 50e9})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record, and a cache of libraries, of this test's own; and little to measure."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "_LEAST_COLD_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "_MOST_COLD_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "_USE_SECONDS", 0.0)
    torch.set_num_threads(1)


def parts_with(*plugins: type, kernels: str = "auto") -> Parts:
    ours = [ref for ref in discover() if ref.kind != "kernels" or ref.name == "reference"]
    mine = [PluginRef("kernels", p.__name__.lower(), "acme", "1.0", f"{p.__module__}:{p.__name__}") for p in plugins]
    settings = load_settings(None, {"platform": {"name": "cpu", "threads": 1}, "kernels": kernels})
    return resolve_parts(settings, registry=Registry([*ours, *mine]), leave_out=("frontend",))


# --- what a call needs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", sorted(name for name in OPERATIONS if not OPERATIONS[name].takes_modules))
def test_every_operation_can_be_measured_and_its_bytes_are_those_of_its_tensors(operation: str) -> None:
    """A new operation needs its usual sizes here; the rest is read off its signature."""
    for spec in bench.usual_specs("cpu", "float32", [operation])[:1]:
        inputs = Case(operation, bench.shapes_of(spec, 3), spec.sizes, spec.params).inputs(torch.float32, "cpu")
        results = REFERENCE.make(spec)(*inputs)
        moved, flops = bench.work_of(spec, 3, inputs, results)
        assert moved > 0
        assert (flops > 0) == (operation in bench._PRODUCTS)
    assert bench.usual_specs("cpu", "float32", [operation])


@pytest.mark.parametrize("operation", ["linear", "gated_linear"])
def test_operations_are_counted_as_torch_counts_them(operation: str) -> None:
    spec = KernelSpec(operation, "cpu", "float32", {"I": 24, "O": 40}, {"activation": 0.0})
    inputs = Case(operation, bench.shapes_of(spec, 16), spec.sizes, spec.params).inputs(torch.float32, "cpu")
    counter = FlopCounterMode(display=False)
    with counter:
        results = REFERENCE.make(spec)(*inputs)
    assert bench.work_of(spec, 16, inputs, results)[1] == counter.get_total_flops()


def test_a_linear_layer_moves_its_weight_its_input_and_its_result() -> None:
    spec = KernelSpec("linear", "cpu", "float32", {"I": 24, "O": 40})
    inputs = Case("linear", bench.shapes_of(spec, 16), spec.sizes).inputs(torch.float32, "cpu")
    assert [None if t is None else tuple(t.shape) for t in inputs] == [(16, 24), (40, 24), None]
    assert bench.work_of(spec, 16, inputs, torch.empty(16, 40)) == (4 * (16 * 24 + 40 * 24 + 16 * 40), 2 * 16 * 24 * 40)


def test_of_a_cache_that_is_written_to_only_the_new_rows_count() -> None:
    spec = KernelSpec("rope_write", "cpu", "float32", {"H": 2, "G": 1, "D": 8, "R": 8, "N": 16})
    inputs = Case("rope_write", bench.shapes_of(spec, 4), spec.sizes).inputs(torch.float32, "cpu")
    keys = inputs[5]
    assert keys is not None
    assert tuple(keys.shape) == (4, 16, 1, 8)
    q, k, angles, slots, rows = 4 * 2 * 8, 4 * 8, 4 * 8, 4 * 2, 4 * 8
    assert bench.work_of(spec, 4, inputs, inputs[0])[0] == 4 * (2 * q + 2 * k + 2 * angles + slots + 2 * rows)


def test_packed_weights_have_the_shapes_of_the_signature() -> None:
    spec = KernelSpec("linear_int4", "cpu", "float32", {"I": 64, "O": 6}, {"group": 32.0})
    assert bench.shapes_of(spec, 5) == ((5, 64), (6, 32), (6, 2), (6, 2), None)


# --- measuring -------------------------------------------------------------------------------------------------------

NORM = KernelSpec("rms_norm", "cpu", "float32", {"E": 64}, {"eps": 1e-5})
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_what_is_measured_is_recorded_ranks_and_is_cited() -> None:
    parts = parts_with(NativeNorm)
    found, _ = bench.offers(parts)
    measurements, refused = bench.measure([NORM], found, parts.platform, CEILINGS)
    assert refused == []
    assert {(m.provider, m.rows) for m in measurements} == {
        (name, rows) for name in ("nativenorm", "reference") for rows in ROW_CLASSES
    }
    for m in measurements:
        assert 0 < m.low_seconds <= m.median_seconds <= m.high_seconds
        assert m.num_samples >= 5
        assert m.share == pytest.approx(m.moved_bytes / 10e9 / m.median_seconds)
    save_record(parts.platform.facts(), measurements, CEILINGS)
    selection = parts_with(NativeNorm).report["kernels"]
    assert selection.measured.startswith("measured record of 20")
    times = read_record(parts.platform.facts()).seconds(NORM)
    assert times.keys() == {"nativenorm", "reference"}
    speed = times["reference"] / times["nativenorm"]
    if round(speed, 1) != 1.0:
        assert f"'nativenorm' is {speed:.2f}x the reference by the measured record of" in str(selection)
        assert selection.chosen.name == ("nativenorm" if speed > 1 else "reference")


@needs_compiler
def test_what_can_not_be_measured_is_listed_with_the_reason() -> None:
    parts = parts_with(WithoutCompiler)
    found, _ = bench.offers(parts)
    silu = KernelSpec("silu_mul", "cpu", "float32", {"E": 8})
    offset = KernelSpec("rms_norm", "cpu", "float32", {"E": 8}, {"weight_offset": 1.0})
    measurements, refused = bench.measure([NORM, silu, offset], found, parts.platform, CEILINGS)
    assert {m.provider for m in measurements} == {"reference"}
    reasons = [(entry.operation, entry.provider, entry.reason.partition(";")[0]) for entry in refused]
    assert reasons == [
        ("rms_norm", "withoutcompiler", "native library native-norm: no c++ compiler is here"),
        ("silu_mul", "withoutcompiler", "has no silu_mul"),
        ("rms_norm", "withoutcompiler", "the weight is taken as it is"),
    ]


def test_a_provider_is_named_or_every_one_that_works_is_taken() -> None:
    parts = parts_with()
    assert [offer.name for offer in bench.offers(parts)[0]] == ["reference"]
    assert bench.offers(parts, ["reference"])[0][0].provider is parts.kernels
    with pytest.raises(UnknownPluginError, match="Did you mean 'reference'"):
        bench.offers(parts, ["referense"])


class Refuses(ReferenceKernels):
    @classmethod
    def probe(cls, context: Any) -> Any:
        return REFERENCE.supports(KernelSpec("nothing", "cpu", "float32"))


def test_a_provider_that_refuses_is_told_and_alone_an_error() -> None:
    parts = parts_with(Refuses)
    assert [entry.provider for entry in bench.offers(parts)[1]] == ["refuses"]
    with pytest.raises(NoCandidateError, match="refuses: the reference has no operation 'nothing'"):
        bench.offers(parts, ["refuses"])


def test_the_ceilings_are_those_of_a_machine() -> None:
    parts = parts_with()
    ceilings = bench.measure_ceilings(parts.platform, ["float32"])
    assert 1e8 < ceilings.read_bytes_per_second < 1e13
    assert 1e8 < ceilings.flops_per_second["float32"] < 1e15


def test_products_of_a_provider_are_a_ceiling_where_torch_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_with()
    found, _ = bench.offers(parts)
    alone = bench.measure_ceilings(parts.platform, ["float32"])
    monkeypatch.setattr(bench, "_make", lambda offer, spec: lambda x, weight, bias: None)
    helped = bench.measure_ceilings(parts.platform, ["float32"], found)
    assert helped.flops_per_second["float32"] > 10 * alone.flops_per_second["float32"]
    monkeypatch.setattr(bench, "_make", lambda offer, spec: "has no linear")
    refused = bench.measure_ceilings(parts.platform, ["float32"], found)
    assert refused.flops_per_second["float32"] < 10 * alone.flops_per_second["float32"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_measures_records_and_is_cited_by_explain(cli: Cli) -> None:
    outcome = cli(
        *("bench", "kernels", *ONE_THREAD, "--provider", "reference", "--json"),
        *("--operation", "silu_mul", "--operation", "linear", "--sizes", "E=64,I=32,O=16"),
    )
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    assert [(m["operation"], m["sizes"], m["rows"]) for m in result["measurements"]] == [
        (operation, sizes, rows)
        for operation, sizes in (("silu_mul", {"E": 64}), ("linear", {"I": 32, "O": 16}))
        for rows in ROW_CLASSES
    ]
    assert Path(result["record"]).is_file()
    told = cli("explain", *ONE_THREAD, "--kernels", "reference", "--json")
    report = json.loads(told.out)
    assert {row["operation"]: row["reason"] for row in report["operations"]}["silu_mul"].startswith("measured on 20")
    (kernels,) = [s for s in report["selections"] if s["kind"] == "kernels"]
    assert kernels["measured"].endswith(": 2 uses of operations")


def test_the_uses_of_a_named_model_are_those_that_it_binds(cli: Cli, tiny: Path) -> None:
    outcome = cli(
        *("bench", "kernels", "--model", tiny, *ONE_THREAD, "--provider", "reference", "--no-save", "--json"),
        *("--operation", "rms_norm"),
    )
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["record"] is None
    config = json.loads((tiny / "config.json").read_text())
    assert {m["sizes"]["E"] for m in result["measurements"]} >= {config["hidden_size"]}
    assert {m["operation"] for m in result["measurements"]} == {"rms_norm"}


def test_the_table_has_a_row_for_each_measurement(cli: Cli) -> None:
    outcome = cli("bench", "kernels", *ONE_THREAD, "--provider", "reference", "--operation", "rms_norm", "--no-save")
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "reads" in lines[0]
    head = "operation sizes dtype rows provider median p10..p90 GB/s GFLOP/s share speed"
    assert " ".join(lines[2].split()) == head
    assert [line.split()[3] for line in lines[3:6]] == ["1", "16", "512"]
    assert all(line.endswith("1.00x") for line in lines[3:6])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--operation", "rms_nrm"), "no such logical operation; found 'rms_nrm'; allowed: add_rms_norm"),
        (("--sizes", "E=8"), "sizes belong to an operation. Name it with --operation."),
        (("--operation", "linear", "--sizes", "I=8"), "linear needs the size O; found 'I=8'; allowed: I=576, O=576"),
        (("--operation", "linear", "--sizes", "I=eight"), "not a size; found 'I=eight'"),
        (("--dtype", "int8"), "not a dtype of activations; found 'int8'; allowed: bfloat16, float16, float32"),
        (("--provider", "cuda"), "no installed plugin of kind 'kernels' is named 'cuda'"),
    ],
)
def test_what_makes_no_sense_is_an_error(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    outcome = cli("bench", "kernels", *ONE_THREAD, *arguments)
    assert outcome.status == 1
    assert message in outcome.err


def test_sizes_are_read_from_text() -> None:
    assert bench.parse_sizes("E=576, I=1536") == {"E": 576, "I": 1536}
    for text in ("E", "E=0", "e=4", "E=4;I=3"):
        with pytest.raises(ConfigError, match="not a size"):
            bench.parse_sizes(text)
