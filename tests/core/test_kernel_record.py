"""A record holds for one machine, one torch and one version of each provider; what does not hold is left out, and the
reason is told."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.platform import PlatformFacts
from drivetrain.contracts.plugin import ProbeContext, Tier
from drivetrain.errors import ConfigError
from drivetrain.kernel_record import Ceilings, KernelRecord, read_record, record_path, save_record, use_of
from drivetrain.registry import PartRequest, Registry, Selection, Selector
from drivetrain.registry.why_not import why_not
from support.fake_plugins import FakeKernels, ref
from support.kernel_records import measured

FACTS = PlatformFacts(
    "cpu", "cpu", "A Processor", 1, frozenset({"float32"}), "avx2", "gloo", details={"cores": "2 of 4"}
)
NO_RECORD = "no measured record of this machine; drivetrain bench kernels makes one"
CEILINGS = Ceilings(30e9, {"float32": 150e9})
NORM = KernelSpec("rms_norm", "cpu", "float32", {"E": 8}, {"eps": 1e-5})
SILU = KernelSpec("silu_mul", "cpu", "float32", {"E": 8})


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    measurements = measured(NORM, "mine", 1e-6)
    path = save_record(FACTS, measurements, CEILINGS, tmp_path)
    assert path == record_path(FACTS, tmp_path)
    assert read_record(FACTS, tmp_path) == KernelRecord(tuple(measurements), CEILINGS)


def test_a_later_run_adds_and_replaces(tmp_path: Path) -> None:
    save_record(FACTS, [*measured(NORM, "mine", 1e-6), *measured(NORM, "reference", 3e-6)], CEILINGS, tmp_path)
    save_record(FACTS, [*measured(NORM, "mine", 2e-6), *measured(SILU, "mine", 5e-6)], CEILINGS, tmp_path)
    record = read_record(FACTS, tmp_path)
    assert record.seconds(NORM) == {"mine": pytest.approx(2e-6), "reference": pytest.approx(3e-6)}
    assert record.seconds(SILU) == {"mine": pytest.approx(5e-6)}


def test_a_machine_has_a_file_of_its_own(tmp_path: Path) -> None:
    others = [
        dataclasses.replace(FACTS, device_name="Another"),
        dataclasses.replace(FACTS, architecture="avx512"),
        dataclasses.replace(FACTS, details={"cores": "4 of 4"}),
        dataclasses.replace(FACTS, device_type="cuda"),
    ]
    assert len({record_path(facts, tmp_path) for facts in (FACTS, *others)}) == 5
    save_record(FACTS, measured(NORM, "mine", 1e-6), CEILINGS, tmp_path)
    for facts in others:
        assert read_record(facts, tmp_path) == KernelRecord()


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content) or content))

    return edit


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (edited(lambda c: c["identity"].update(torch="1.0")), "was measured with torch '1.0' (here '"),
        (edited(lambda c: c["identity"].update(drivetrain="9")), "was measured with drivetrain '9' (here '"),
        (
            edited(lambda c: c["identity"].update(device_name="Z80")),
            "was measured with device_name 'Z80' (here 'A Proc",
        ),
        (edited(lambda c: c.update(format=2)), "is of format 2, and this version reads 1"),
        (edited(lambda c: [c]), "is of format None"),
        (edited(lambda c: c["measurements"][0].pop("rows") and None), "is damaged: TypeError"),
        (edited(lambda c: c["measurements"][0].update(median_seconds=0)), "is damaged: ValueError: a median of 0"),
        (edited(lambda c: c.pop("ceilings") and None), "is damaged: KeyError: 'ceilings'"),
        (lambda path: path.write_text("{"), "can't be read: JSONDecodeError"),
        (lambda path: path.write_bytes(b"\xff"), "can't be read: UnicodeDecodeError"),
    ],
)
def test_a_record_that_does_not_hold_is_ignored_with_the_reason(tmp_path: Path, harm: Any, reason: str) -> None:
    path = save_record(FACTS, measured(NORM, "mine", 1e-6), CEILINGS, tmp_path)
    harm(path)
    record = read_record(FACTS, tmp_path)
    assert record.measurements == ()
    assert reason in record.ignored
    assert record.summary.startswith(f"no measured record holds: {path}")
    save_record(FACTS, measured(SILU, "mine", 1e-6), CEILINGS, tmp_path)
    assert read_record(FACTS, tmp_path) == KernelRecord(tuple(measured(SILU, "mine", 1e-6)), CEILINGS)


def test_no_record_says_how_one_is_made(tmp_path: Path) -> None:
    assert (
        read_record(FACTS, tmp_path).summary == "no measured record of this machine; drivetrain bench kernels makes one"
    )


def test_what_was_measured_of_another_version_of_a_provider_is_left_out() -> None:
    new, old = measured(NORM, "mine", 1e-6, version="fakes 1.0"), measured(NORM, "theirs", 1e-6, version="fakes 0.9")
    installed = [ref("kernels", name, FakeKernels) for name in ("mine", "theirs")]
    record = KernelRecord((*new, *old)).current(installed)
    assert record.measurements == tuple(new)
    assert record.ignored == "what was measured of theirs of fakes 0.9 is not of what is installed"


def test_constants_that_cost_nothing_do_not_tell_uses_apart() -> None:
    other = dataclasses.replace(NORM, params={"eps": 1e-6, "weight_offset": 0.0})
    assert use_of(other) == use_of(NORM)
    assert use_of(dataclasses.replace(NORM, params={"weight_offset": 1.0})) != use_of(NORM)


SAVING = """
import sys
from pathlib import Path
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernel_record import save_record
from core.test_kernel_record import CEILINGS, FACTS
from support.kernel_records import measured
folder, first = Path(sys.argv[1]), int(sys.argv[2])
for size in range(first, first + 10):
    save_record(FACTS, measured(KernelSpec("silu_mul", "cpu", "float32", {"E": size}), "mine", 1e-6), CEILINGS, folder)
"""


def test_processes_that_save_at_once_lose_nothing(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    commands = [[sys.executable, "-c", SAVING, str(tmp_path), first] for first in ("0", "100")]
    processes = [subprocess.Popen(command, cwd=tests) for command in commands]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert len(list(read_record(FACTS, tmp_path).uses())) == 20


def test_a_folder_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"can't be written.*XDG_CACHE_HOME"):
        save_record(FACTS, measured(NORM, "mine", 1e-6), CEILINGS, tmp_path / "file")


def test_reading_a_record_imports_no_torch() -> None:
    code = "import sys, drivetrain.kernel_record; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_the_floor_is_the_slower_of_moving_and_computing() -> None:
    ceilings = Ceilings(10.0, {"float32": 100.0, "bfloat16": 400.0})
    assert ceilings.floor_seconds(50, 100, "float32") == 5.0
    assert ceilings.floor_seconds(5, 400, "float32") == 4.0
    assert ceilings.floor_seconds(5, 400, "bfloat16") == 1.0
    assert ceilings.floor_seconds(5, 400, "float16") == 4.0


# --- ranking -------------------------------------------------------------------------------------------------------


class Tuned(FakeKernels):
    tier = Tier.TUNED


REFS = (
    ref("kernels", "plain", FakeKernels),
    ref("kernels", "reference", FakeKernels),
    ref("kernels", "tuned", Tuned),
)


def choose(record: KernelRecord, preferences: tuple[str, ...] = ()) -> tuple[Selection, Selector]:
    selector = Selector(Registry(REFS), {"kernels": PartRequest("kernels", "auto")})
    selector.prefer({"kernels": preferences})
    selector.rank_by("kernels", lambda ref: record.standing(ref.name, "cpu", "float32"), record.summary)
    selector.choose("kernels", ProbeContext())
    return selector.report["kernels"], selector


def times(**seconds: float) -> KernelRecord:
    return KernelRecord(tuple(m for name, time in seconds.items() for m in measured(NORM, name, time)))


def test_without_a_record_the_tier_decides() -> None:
    selection, _ = choose(KernelRecord())
    assert selection.chosen.name == "tuned"
    assert selection.reason == "tier tuned is above portable ('plain')"
    assert selection.measured == NO_RECORD


def test_the_record_comes_before_the_tier_and_is_cited() -> None:
    record = times(plain=1e-6, tuned=2e-6, reference=4e-6)
    selection, selector = choose(record)
    assert [c.name for c in selection.candidates] == ["plain", "tuned", "reference"]
    assert selection.reason == (
        "'plain' is 4.00x the reference by the measured record of 2026-11-25 (1 of 1 uses); "
        "'tuned' is 2.00x the reference by the measured record of 2026-11-25 (1 of 1 uses)"
    )
    assert selection.measured == "measured record of 2026-11-25: 1 uses of operations"
    (answer,) = why_not("kernels/reference", selector.report, Registry(REFS))
    assert "'reference' is what the others are measured against" in answer.reason


def test_the_platform_s_preference_comes_before_the_record() -> None:
    assert choose(times(plain=1e-6, tuned=2e-6, reference=4e-6), ("reference",))[0].chosen.name == "reference"


def test_one_that_was_measured_to_be_slower_ranks_below_the_reference() -> None:
    selection, _ = choose(times(tuned=8e-6, plain=8e-6, reference=4e-6))
    assert [c.name for c in selection.candidates] == ["reference", "tuned", "plain"]


def test_one_that_was_never_measured_ranks_with_the_reference_and_its_tier_decides() -> None:
    selection, _ = choose(times(plain=8e-6, reference=4e-6))
    assert [c.name for c in selection.candidates] == ["tuned", "reference", "plain"]


def test_differences_as_small_as_noise_leave_the_choice_to_the_tier() -> None:
    assert choose(times(plain=1.00e-6, tuned=1.02e-6, reference=1.01e-6))[0].chosen.name == "tuned"


def test_uses_in_another_dtype_or_on_another_device_do_not_count() -> None:
    record = KernelRecord(
        tuple(
            m
            for spec in (dataclasses.replace(NORM, dtype="bfloat16"), dataclasses.replace(NORM, device_type="cuda"))
            for name, time in (("plain", 1e-6), ("reference", 9e-6))
            for m in measured(spec, name, time)
        )
    )
    assert record.standing("plain", "cpu", "float32").score == 1.0
    assert record.standing("plain", "cuda", "float32").score == 9.0


def test_a_use_that_only_others_were_measured_in_counts_as_the_reference_s_speed() -> None:
    record = KernelRecord((*times(plain=1e-6, reference=4e-6).measurements, *measured(SILU, "reference", 1e-6)))
    assert record.standing("plain", "cpu", "float32").text.startswith("2.00x the reference")
    assert record.standing("plain", "cpu", "float32").text.endswith("(1 of 2 uses)")
