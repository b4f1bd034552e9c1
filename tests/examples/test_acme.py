"""The third-party example, installed from its wheel: found, described, explained, selected, examined, swapped in and
out of a live server, and refused when its contract is newer than this core's."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from drivetrain.contracts.kinds import KINDS as KINDS_OF_CORE
from drivetrain.native import find_compiler
from support.clean_environment import CleanEnvironment, build_wheels
from support.command_line import ONE_THREAD, make_tiny_folder
from support.doc_pages import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "acme-accelerator"
KINDS = ("platform", "attention", "quantizer")
GREEDY = ("--temperature", 0, "--max-tokens", 12, "--json")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Change = Callable[[str], str]


@contextmanager
def installed(folder: Path, changes: dict[str, Change] | None = None) -> Iterator[CleanEnvironment]:
    """The example's wheel in an environment of its own; ``changes`` are made to the sources before it is built."""
    source = folder / "source"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    for file, change in (changes or {}).items():
        path = source / file
        before = path.read_text(encoding="utf-8")
        path.write_text(change(before), encoding="utf-8")
        assert path.read_text(encoding="utf-8") != before, file
    with CleanEnvironment(folder / "environment") as environment:
        environment.install(build_wheels([source], folder / "wheels"))
        yield environment


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanEnvironment]:
    with installed(tmp_path_factory.mktemp("acme")) as environment:
        yield environment


def told(environment: CleanEnvironment, *arguments: object) -> Any:
    """The JSON that a command prints."""
    done = environment.drivetrain(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refusal(environment: CleanEnvironment, *arguments: object) -> str:
    """The one line with which a command refuses."""
    done = environment.drivetrain(*arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_it_is_found(environment: CleanEnvironment) -> None:
    rows = told(environment, "plugins", "list", "--json")
    assert {
        (row["kind"], row["name"], row["version"]) for row in rows if row["distribution"] == "acme-accelerator"
    } == {(kind, "acme", "1.2.0") for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_described(environment: CleanEnvironment, kind: str) -> None:
    facts = told(environment, "plugins", "info", f"{kind}/acme", "--json")
    # Written for 1.0 all of them; attention has come to 1.1, and the class was lifted.
    assert facts["contract"] == f"{kind} {KINDS_OF_CORE[kind].major}.{KINDS_OF_CORE[kind].minor}"
    assert facts["distribution"] == "acme-accelerator"
    assert facts["here"].startswith("yes: ")
    assert facts["options"]
    assert all(option["description"] for option in facts["options"])
    assert told(environment, "plugins", "info", f"{kind}/acme-accelerator/acme", "--json") == facts


def test_it_is_explained(environment: CleanEnvironment, tiny: Path) -> None:
    report = told(environment, "explain", "--model", tiny, "--platform", "acme", "--quantizer", "acme", "--json")
    chosen = {selection["kind"]: selection for selection in report["selections"]}
    assert chosen["platform"]["chosen"]["distribution"] == "acme-accelerator"
    assert chosen["platform"]["origin"] == "command line"
    # `auto` follows the order of preference of the chosen platform.
    assert (chosen["attention"]["requested"], chosen["attention"]["chosen"]["name"]) == ("auto", "acme")
    assert {c["name"] for c in chosen["attention"]["candidates"] if c["outcome"] == "eligible"} >= {"sdpa"}


def test_it_does_not_put_itself_before_the_built_in_parts(environment: CleanEnvironment, tiny: Path) -> None:
    report = told(environment, "explain", "--model", tiny, "--json")
    chosen = {selection["kind"]: selection["chosen"]["name"] for selection in report["selections"]}
    best = "paged-cpu" if find_compiler() else "sdpa"
    assert {kind: chosen[kind] for kind in KINDS} == {"platform": "cpu", "attention": best, "quantizer": "none"}


def test_it_is_selected_by_name_and_gives_the_same_tokens(environment: CleanEnvironment, tiny: Path) -> None:
    asked = ("generate", "--model", tiny, "a fox and a dog", *GREEDY)
    plain = told(environment, *asked, *ONE_THREAD)
    acme = told(environment, *asked, "--platform", "acme", "--attention", "acme")
    tokens = [found["completions"][0]["token_ids"] for found in (plain, acme)]
    assert len(tokens[0]) > 4
    assert tokens[0] == tokens[1]
    quantized = told(environment, *asked, *ONE_THREAD, "--quantizer", "acme", "--attention", "acme")
    assert quantized["completions"][0]["token_ids"]


def test_the_cards_memory_is_what_the_cache_is_cut_from(environment: CleanEnvironment, tiny: Path) -> None:
    asked = ("generate", "--model", tiny, "a fox", *GREEDY, "--platform", "acme")
    small = environment.drivetrain(*asked, "--set", "platform.memory_mib=1")
    assert small.returncode == 0, small.stderr
    assert "max_model_len is" in small.stderr, "a quarter of 1 MiB does not hold the whole context"
    line = refusal(environment, *asked, "--set", "platform.memory_mib=1", "--set", "engine.kv_memory=8MiB")
    assert "platform/acme: the card has no room" in line
    assert "platform.memory_mib" in line


def test_a_bad_option_is_one_clear_error(environment: CleanEnvironment, tiny: Path) -> None:
    line = refusal(environment, "explain", "--platform", "acme", "--set", "platform.memory_mb=1")
    assert "Did you mean 'memory_mib'?" in line


def test_its_own_tests_pass(environment: CleanEnvironment, tmp_path: Path) -> None:
    """They run Drivetrain's conformance kit."""
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(EXAMPLE / "pyproject.toml", tmp_path)
    done = environment.run_tests(tmp_path, timeout_seconds=500)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_the_kit_is_run_by_the_command_too(environment: CleanEnvironment) -> None:
    done = environment.drivetrain("plugins", "test", "platform/acme", "--json", timeout_seconds=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    counts = json.loads(done.stdout)["counts"]
    assert counts["passed"] > 10
    assert counts["failed"] == counts["error"] == 0


@contextmanager
def serving(environment: CleanEnvironment, tiny: Path, log: Path) -> Iterator[str]:
    """The URL of a server in the environment, which can be swapped with the token ``secret``."""
    words = ("serve", "--model", tiny, "--port", 0, "--admin-token", "secret", *ONE_THREAD)
    command = [environment.python, "-W", "error", "-m", "drivetrain", *words]
    with (
        log.open("w") as errors,
        subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            match = re.search(r"http://\S+", server.stdout.readline())
            assert match, log.read_text()
            yield match[0]
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            server.kill()


@pytest.mark.parametrize(
    ("part", "back", "is_exact"),
    [("attention=acme", "attention=sdpa", True), ("quantizer=acme", "quantizer=none", False)],
)
def test_it_is_swapped_in_and_out_of_a_live_server(
    environment: CleanEnvironment, tiny: Path, tmp_path: Path, part: str, back: str, is_exact: bool
) -> None:
    with serving(environment, tiny, tmp_path / "log") as url:

        def answer() -> str:
            body = {"model": str(tiny), "prompt": "a fox and a dog", "temperature": 0, "max_tokens": 12}
            reply = httpx.post(f"{url}/v1/completions", json=body | {"ignore_eos": True}, timeout=60)
            assert reply.status_code == 200, reply.text
            text: str = reply.json()["choices"][0]["text"]
            return text

        def parts() -> dict[str, str]:
            report = httpx.get(f"{url}/debug/selection", timeout=60).json()
            return {selection["kind"]: selection["chosen"]["name"] for selection in report["selections"]}

        answers = [answer()]
        for words in (part, back):
            done = environment.drivetrain("swap", url, words, "--admin-token", "secret")
            assert done.returncode == 0, done.stdout + done.stderr
            kind, _, name = words.partition("=")
            answers.append(answer())
            assert parts()[kind] == name
        assert answers[0] == answers[2]
        assert answers[0] == answers[1] or not is_exact


# --- a contract that this core does not speak ------------------------------------------------------------------------


def test_a_newer_major_version_is_never_imported_and_told_by_doctor(tmp_path: Path, tiny: Path) -> None:
    changes = {"pyproject.toml": lambda text: text.replace("attention.v1", "attention.v2")}
    with installed(tmp_path, changes) as environment:
        rows = told(environment, "plugins", "list", "--json")
        assert [row["kind"] for row in rows if row["name"] == "acme"] == ["platform", "quantizer"]
        line = refusal(environment, "generate", "--model", tiny, "x", "--attention", "acme")
        assert "'acme'" in line
        findings = json.loads(environment.drivetrain("doctor", "--json").stdout)["findings"]
    (finding,) = [found for found in findings if "drivetrain.attention.v2" in json.dumps(found)]
    assert "this core speaks 1" in json.dumps(finding)


def test_a_newer_minor_version_is_refused_with_both_versions(tmp_path: Path, tiny: Path) -> None:
    file = "src/acme_accelerator/attention.py"
    with installed(tmp_path, {file: lambda text: text.replace('version = "1.0"', 'version = "1.99"')}) as environment:
        line = refusal(environment, "generate", "--model", tiny, "x", "--attention", "acme")
        assert "1.99" in line
        assert "1.0" in line
        assert "pip install --upgrade drivetrain" in line
        # The others are as well as before.
        assert told(environment, "plugins", "info", "quantizer/acme", "--json")["here"].startswith("yes")
        report = told(environment, "explain", "--platform", "acme", "--json")
    attention = next(selection for selection in report["selections"] if selection["kind"] == "attention")
    assert attention["chosen"]["name"] == "sdpa"
