"""``drivetrain plugins new``: the package of a plugin of any kind, which is found, loads and does its work."""

from __future__ import annotations

import json
import keyword
import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drivetrain.cli.scaffold import Scaffold
from drivetrain.contracts.kinds import KINDS
from drivetrain.errors import ConfigError, UnknownPluginError
from drivetrain.registry import discover
from drivetrain.testing import SUITES
from support.clean_environment import CleanEnvironment, build_wheels
from support.distributions import run_python, write_distribution
from support.doc_pages import ROOT
from support.tiny_models import VOCAB_SIZE, tiny_tokenizer

Cli = Callable[..., Any]

NAME = "acme-one"

LOAD_ALL = """
import json, warnings
warnings.simplefilter("error")
from drivetrain.contracts.plugin import Probe, ProbeContext
from drivetrain.registry import Registry, discover, load, summary_of
found = {}
for ref in discover():
    if ref.name == "acme-one":
        plugin = load(ref)
        made = plugin(plugin.Config())
        assert isinstance(plugin.probe(ProbeContext()), Probe)
        fields = plugin.Config.model_fields
        assert fields and all(field.description for field in fields.values()), ref
        found[ref.kind] = [type(made).__name__, summary_of(ref), ref.distribution]
print(json.dumps(found))
"""

DESCRIBE_ALL = """
import contextlib, io, json, sys
from drivetrain.cli import main
for kind in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main(["plugins", "info", f"{kind}/acme-one", "--json"]) == 0, kind
    print(json.dumps(json.loads(shown.getvalue())))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> folder of a generated package."""
    root = tmp_path_factory.mktemp("scaffold")
    made = {}
    for kind in KINDS:
        scaffold = Scaffold(kind, NAME)
        made[kind] = root / scaffold.distribution
        scaffold.write(made[kind])
    return made


def project(folder: Path) -> dict[str, Any]:
    """The table [project] of a package."""
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_has_everything_that_publishing_needs(packages: dict[str, Path], kind: str) -> None:
    folder = packages[kind]
    table = project(folder)
    assert table["entry-points"].keys() == {KINDS[kind].group}
    ((name, target),) = table["entry-points"][KINDS[kind].group].items()
    module, _, class_name = target.partition(":")
    source = folder.joinpath("src", *module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    assert name == NAME
    assert f"class {class_name}(" in source
    assert any(line.startswith("drivetrain>=") for line in table["dependencies"])
    assert table["optional-dependencies"]["test"] == ["drivetrain[test]"]
    package = module.partition(".")[0]
    for file in ("README.md", "LICENSE", ".github/workflows/test.yml", f"src/{package}/py.typed"):
        assert (folder / file).is_file(), file
    tests = (folder / "tests" / "test_conformance.py").read_text(encoding="utf-8")
    suite = next((name for name, of in SUITES.items() if of == kind), "Suite")
    assert f"class Test{class_name}({suite}):" in tests
    for path in folder.rglob("*"):
        if path.is_file():
            assert "$" not in path.read_text(encoding="utf-8").replace("$ ", "").replace("${{ matrix.python }}", ""), (
                path
            )


def test_every_package_is_found_loads_and_keeps_its_contract(packages: dict[str, Path], tmp_path: Path) -> None:
    for kind, folder in packages.items():
        table = project(folder)
        write_distribution(tmp_path, table["name"], table["entry-points"], version=table["version"])
        shutil.copytree(folder / "src", tmp_path, dirs_exist_ok=True)
        assert kind in table["keywords"]
    found = json.loads(run_python(LOAD_ALL, tmp_path))
    assert found.keys() == KINDS.keys()
    for kind, (class_name, summary, distribution) in found.items():
        assert class_name == Scaffold(kind, NAME).class_name
        assert summary.endswith(".")
        assert distribution == f"drivetrain-{kind}-acme-one"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a", "x1", "layer", "plugin", "config", "a-b_c-3", "z" * 40])
def test_no_name_makes_code_that_does_not_compile_or_hides_another(kind: str, name: str) -> None:
    scaffold = Scaffold(kind, name)
    source = scaffold.files[f"src/{scaffold.package_name}/{kind}.py"]
    compile(source, f"{kind}.py", "exec")
    assert source.count(f"class {scaffold.class_name}(") == 1
    assert source.count(scaffold.class_name) == 1
    assert scaffold.class_name.isidentifier()
    assert not keyword.iskeyword(scaffold.package_name)


def test_a_package_name_of_ones_own_is_used_throughout() -> None:
    scaffold = Scaffold("scheduler", "shortest", "acme_scheduling")
    assert scaffold.distribution == "acme-scheduling"
    assert "src/acme_scheduling/scheduler.py" in scaffold.files
    assert 'shortest = "acme_scheduling.scheduler:ShortestScheduler"' in scaffold.files["pyproject.toml"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_names_the_files_and_the_next_step(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = cli("plugins", "new", "scheduler", "shortest")
    assert shown.status == 0, shown.err
    written = [Path(line) for line in shown.out.splitlines()]
    assert all(path.is_file() for path in written)
    assert sorted(written) == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert "cd drivetrain-scheduler-shortest" in shown.err
    folder = tmp_path / "deep" / "down"
    assert cli("plugins", "new", "source", "shelf", "--folder", folder, "--package", "shelf_models").status == 0
    assert (folder / "src" / "shelf_models" / "source.py").is_file()


def test_nothing_that_exists_is_touched(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    shown = cli("plugins", "new", "scheduler", "shortest", "--folder", folder)
    assert shown.status == 1
    assert "something at this place already" in shown.error
    assert [path.read_text() for path in folder.iterdir()] == ["mine"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert cli("plugins", "new", "scheduler", "shortest", "--folder", tmp_path / "dangling").status == 1


def test_a_folder_that_cannot_be_made_is_one_clear_error(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shown = cli("plugins", "new", "scheduler", "shortest", "--folder", tmp_path / "file" / "below")
    assert shown.status == 1
    assert shown.error.startswith("error: ")
    assert len(shown.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name", ["", "A", "two words", "-x", "x-", "a--b", "1st", "é", "a/b", "../x", "auto", "a.b", "z" * 41, "$name"]
)
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not a name for a plugin"):
        Scaffold("attention", name)


@pytest.mark.parametrize("package", ["", "A", "a-b", "class", "_", "json", "drivetrain", "a.b", "../x"])
def test_a_bad_package_name_is_refused(package: str) -> None:
    with pytest.raises(ConfigError):
        Scaffold("attention", NAME, package)


def test_an_unknown_kind_is_told_the_nearest(cli: Cli) -> None:
    with pytest.raises(UnknownPluginError, match="Did you mean 'attention'"):
        Scaffold("atention", NAME)
    shown = cli("plugins", "new", "atention", NAME)
    assert (shown.status, len(shown.err.splitlines())) == (1, 1)


def test_a_name_that_is_taken_is_refused() -> None:
    for ref in discover():
        with pytest.raises(ConfigError, match=f"{ref.distribution} {ref.version}"):
            Scaffold(ref.kind, ref.name)


# --- style, types, and the packages installed ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_code_is_in_the_house_style(packages: dict[str, Path]) -> None:
    pytest.importorskip("ruff")
    folders = [str(folder) for folder in packages.values()]
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "--no-cache", *folders], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_types_fit_the_contracts(packages: dict[str, Path], tmp_path: Path) -> None:
    """Of the generated classes, and of the example's."""
    pytest.importorskip("mypy")
    # mypy does not look through an editable installation, so it gets the folders laid out as a wheel has them.
    layout = tmp_path / "drivetrain"
    layout.mkdir()
    for path in (*(ROOT / "core").iterdir(), *(ROOT / name for name in ("plugins", "backends", "kernels"))):
        (layout / path.name).symlink_to(path)
    sources = [folder / "src" for folder in (*packages.values(), ROOT / "docs/examples/acme-accelerator")]
    names = [package.name for source in sources for package in source.iterdir() if (package / "py.typed").is_file()]
    assert len(names) == len(KINDS) + 1
    known = ROOT / ".mypy_cache"  # by `make types`: of torch and all else that is installed
    if known.is_dir():
        shutil.copytree(known, tmp_path / "cache")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")),
            *("--cache-dir", str(tmp_path / "cache")),
            *(word for name in names for word in ("-p", name)),
        ],
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, [tmp_path, *sources]))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def environment(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanEnvironment]:
    """A clean environment with the wheel of every package in it."""
    root = tmp_path_factory.mktemp("installed")
    wheels = build_wheels(list(packages.values()), root / "wheels")
    assert len(wheels) == len(KINDS)
    with CleanEnvironment(root / "environment") as environment:
        environment.install(wheels)
        yield environment


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model ``tiny``, as the generated source, loader and model plugins want it."""
    folder = tmp_path_factory.mktemp("shelf") / "tiny"
    folder.mkdir()
    config = {
        "architectures": ["AcmeOneForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    random = np.random.default_rng(0)
    rows = {"embed": VOCAB_SIZE, "position": 128} | dict.fromkeys(("query", "key", "value", "out"), 32)
    arrays = {f"{name}.weight": random.standard_normal((count, 32)).astype("float32") for name, count in rows.items()}
    np.savez(folder / "weights.npz", **arrays)
    return folder.parent


@pytest.mark.slow
def test_every_wheel_is_found_and_described_where_it_is_installed(environment: CleanEnvironment) -> None:
    listed = json.loads(environment.drivetrain("plugins", "list", "--json").stdout)
    assert {row["kind"] for row in listed if row["name"] == NAME} == set(KINDS)
    shown = environment.run("-W", "error", "-c", DESCRIBE_ALL, stdin=json.dumps(list(KINDS)))
    assert shown.returncode == 0, shown.stderr
    described = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [facts["contract"] for facts in described] == [f"{kind} {KINDS[kind].version}" for kind in KINDS]


def copy_tests(package: Path, folder: Path) -> None:
    """The tests of a package and its settings, but not its sources."""
    shutil.copytree(package / "tests", folder / "tests")
    shutil.copy(package / "pyproject.toml", folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_tests_of_every_package_pass_where_it_is_installed(
    packages: dict[str, Path], environment: CleanEnvironment, tmp_path: Path, kind: str
) -> None:
    """They run the conformance kit. That each is imported anew is left out, which imports torch every time."""
    copy_tests(packages[kind], tmp_path)
    done = environment.run_tests(tmp_path, "-k", "not test_works_in_a_spawned_process")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_pytest_is_all_that_the_tests_of_a_package_need(
    packages: dict[str, Path], environment: CleanEnvironment, tmp_path: Path
) -> None:
    """As its README says, in a process that starts from nothing, and nothing is left out."""
    copy_tests(packages["tracker"], tmp_path)
    done = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path, timeout_seconds=280)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_a_model_runs_on_nothing_but_generated_parts(environment: CleanEnvironment, shelf: Path) -> None:
    model = (f"{NAME}:tiny", "--set", f"source.folder={shelf}", "--set", f"loader={NAME}")
    greedy = ("--temperature", 0, "--max-tokens", 8, "--json")
    plain = environment.drivetrain("generate", "a fox", "--model", *model, *greedy)
    assert plain.returncode == 0, plain.stderr
    kinds = ("platform", "architecture", "attention", "kernels", "scheduler")
    parts = [word for kind in kinds for word in (f"--{kind}", NAME)]
    own = environment.drivetrain("generate", "a fox", "--model", *model, *greedy, *parts)
    assert own.returncode == 0, own.stderr
    tokens = [json.loads(done.stdout)["completions"][0]["token_ids"] for done in (plain, own)]
    assert tokens[0] == tokens[1]
    rounded = environment.drivetrain(
        "generate", "a fox", "--model", *model, *greedy, *parts, "--quantizer", NAME, "--precision", NAME
    )
    assert rounded.returncode == 0, rounded.stderr


@pytest.mark.slow
def test_the_frontend_answers_and_ends_in_order(environment: CleanEnvironment, shelf: Path, tmp_path: Path) -> None:
    words = ("serve", "--model", f"{NAME}:tiny", "--set", f"source.folder={shelf}", "--frontend", NAME)
    words += ("--set", f"frontend.path={tmp_path / 's'}", "--loader", NAME)
    command = [str(environment.python), "-W", "error", "-m", "drivetrain", *words]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("Serving "), (tmp_path / "log").read_text()
            with socket.socket(socket.AF_UNIX) as client, client.makefile("rw") as lines:
                client.connect(str(tmp_path / "s"))
                client.settimeout(60)

                def ask(text: str) -> list[dict[str, Any]]:
                    lines.write(text + "\n")
                    lines.flush()
                    answer: list[dict[str, Any]] = []
                    while not answer or not {"error", "finish_reason"} & answer[-1].keys():
                        answer.append(json.loads(lines.readline()))
                    return answer

                assert ask('{"prompt": "a", "max_tokens": 5, "ignore_eos": true}')[-1]["finish_reason"] == "length"
                for bad in (
                    "{",
                    "[]",
                    "{}",
                    '{"prompt": 1}',
                    '{"prompt": "a", "max_tokens": -1}',
                    '{"prompt": "", "n": 2}',
                ):
                    assert ask(bad)[0]["error"], bad
                server.send_signal(signal.SIGTERM)
                assert lines.readline() == ""
            assert server.wait(30) == 0
        finally:
            server.kill()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not (tmp_path / "s").exists()
