"""Settings come from a file, options and assignments; whatever is wrong is named with its place, path and cure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drivetrain.assembly import resolve_parts
from drivetrain.config import EngineSettings, Settings, load_settings, parse_assignment
from drivetrain.config.settings import TOP_LEVEL_KEYS, parse_bytes
from drivetrain.contracts.kinds import KINDS
from drivetrain.errors import ConfigError
from drivetrain.registry import PartRequest
from support import fake_plugins as fakes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def load(file: Path, text: str, options: Mapping[str, Any] | None = None, *assignments: str) -> Settings:
    file.write_text(text, encoding="utf-8")
    return load_settings(file, options, assignments)


def message(file: Path, text: str, options: Mapping[str, Any] | None = None, *assignments: str) -> str:
    """The error, with the folder left out."""
    with pytest.raises(ConfigError) as caught:
        load(file, text, options, *assignments)
    return str(caught.value).replace(f"{file.parent}/", "")


def asked(settings: Settings, kind: str) -> tuple[str, Mapping[str, Any], str]:
    request = settings.parts[kind]
    return request.name, request.options, Path(request.origin).name


# --- what is understood --------------------------------------------------------------------------------------------


def test_nothing_at_all_gives_the_defaults() -> None:
    assert load_settings() == Settings(None, {}, EngineSettings(), None)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null\n", "{}\n", "---\n...\n"])
def test_an_empty_file_gives_the_defaults(file: Path, text: str) -> None:
    assert load(file, text) == Settings()


def test_a_part_is_a_name_or_a_table(file: Path) -> None:
    loaded = load(
        file,
        "model: smollm2-135m\n"
        "attention: sdpa\n"
        "scheduler: {name: priority, max_running: 8}\n"
        "precision:\n"
        "  name: fp32\n"
        "quantizer: none\n",
    )
    assert loaded.model == "smollm2-135m"
    assert asked(loaded, "attention") == ("sdpa", {}, "run.yaml:2")
    assert asked(loaded, "scheduler") == ("priority", {"max_running": 8}, "run.yaml:3")
    assert asked(loaded, "precision") == ("fp32", {}, "run.yaml:5")
    assert asked(loaded, "quantizer") == ("none", {}, "run.yaml:6")
    assert set(loaded.parts) == {"attention", "scheduler", "precision", "quantizer"}


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_kind_has_a_key_and_a_table_without_a_name_means_the_default(file: Path, kind: Any) -> None:
    assert kind.key in TOP_LEVEL_KEYS
    assert asked(load(file, f"{kind.key}: some-name\n"), kind.name)[0] == "some-name"
    name, options, _ = asked(load(file, f"{kind.key}: {{x: 1}}\n"), kind.name)
    assert (name, options) == (kind.default, {"x": 1})
    assert not load(file, f"{kind.key}: {{x: 1}}\n").parts[kind.name].is_named
    assert load(file, f"{kind.key}: {{name: y, x: 1}}\n").parts[kind.name].is_named


def test_the_model_plugin_is_set_with_architecture_and_the_weights_with_model(file: Path) -> None:
    loaded = load(file, "model: org/name\narchitecture: decoder\n")
    assert (loaded.model, loaded.parts["model"].name) == ("org/name", "decoder")


def test_the_engines_settings_and_the_allowed_distributions(file: Path) -> None:
    loaded = load(
        file,
        "engine: {max_model_len: 512, kv_memory: 2GiB, prefix_cache: off, timeout_seconds: 5}\n"
        "plugins: {allow: [drivetrain, acme-kit]}\n",
    )
    assert loaded.engine.kv_bytes == 2 * 2**30
    assert (loaded.engine.max_model_len, loaded.engine.prefix_cache) == (512, False)
    assert loaded.engine.timeout_seconds == 5.0
    assert loaded.allow == ("drivetrain", "acme-kit")


def test_settings_can_not_be_changed_afterwards(file: Path) -> None:
    loaded = load(file, "engine: {max_waiting: 3}\n")
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.model = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        loaded.engine.max_waiting = 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        (123, 123),
        ("1B", 1),
        ("2GiB", 2**31),
        ("2gib", 2**31),
        (" 1.5 KiB ", 1536),
        ("3MB", 3_000_000),
        ("0.1KB", 100),
        ("9007199254740993", 9007199254740993),
        ("9" * 400, int("9" * 400)),
    ],
)
def test_sizes_are_exact(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1 2", "1TiBB", "1e9", "nan", "inf", "1,5GiB", "0x10", "True", "auto"]
)
def test_what_is_no_size_is_refused(text: str, file: Path) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)
    if text != "auto":
        assert "is no size" in message(file, f"engine: {{kv_memory: {text!r}}}\n")


@given(st.integers(0, 10**30), st.sampled_from(["", "B", "KiB", "MiB", "GiB", "KB", "MB", "GB"]))
def test_whole_numbers_of_any_unit_come_out_whole(number: int, unit: str) -> None:
    factor = {"K": 1, "M": 2, "G": 3}.get(unit[:1], 0)
    assert parse_bytes(f"{number}{unit}") == number * (1024 if "i" in unit else 1000) ** factor


# --- layers --------------------------------------------------------------------------------------------------------


def test_later_layers_win_file_then_options_then_assignments(file: Path) -> None:
    loaded = load(
        file,
        "model: one\nscheduler: fcfs\nattention: a\n",
        {"model": "two", "scheduler": "priority", "precision": None},
        "model=three",
    )
    assert loaded.model == "three"
    assert asked(loaded, "scheduler") == ("priority", {}, "command line")
    assert asked(loaded, "attention") == ("a", {}, "run.yaml:3")
    assert "precision" not in loaded.parts


def test_a_part_named_again_loses_the_options_of_the_one_before(file: Path) -> None:
    text = "scheduler:\n  name: priority\n  aging_seconds: 5\n"
    assert asked(load(file, text, {"scheduler": "fcfs"}), "scheduler") == ("fcfs", {}, "command line")
    assert asked(load(file, text, None, "scheduler=fcfs"), "scheduler") == ("fcfs", {}, "command line")
    table = {"scheduler": {"name": "fcfs", "max_running": 3}}
    assert asked(load(file, text, table), "scheduler") == ("fcfs", {"max_running": 3}, "command line")


def test_an_assignment_changes_one_option_and_keeps_the_others(file: Path) -> None:
    text = "scheduler:\n  name: priority\n  aging_seconds: 5\n"
    loaded = load(file, text, None, "scheduler.max_running=3")
    assert asked(loaded, "scheduler") == ("priority", {"aging_seconds": 5, "max_running": 3}, "run.yaml:2")
    loaded = load(file, text, None, "scheduler.name=fcfs")
    assert asked(loaded, "scheduler") == ("fcfs", {"aging_seconds": 5}, "command line")


def test_an_assignment_to_an_option_of_a_part_given_by_name(file: Path) -> None:
    loaded = load(file, "scheduler: priority\n", None, "scheduler.max_running=3", "attention.block_size=32")
    assert asked(loaded, "scheduler") == ("priority", {"max_running": 3}, "run.yaml:1")
    assert asked(loaded, "attention") == ("auto", {"block_size": 32}, "command line")


def test_options_of_the_engine_are_merged_with_the_files(file: Path) -> None:
    loaded = load(
        file, "engine: {max_waiting: 7, stall_seconds: 5}\n", {"engine": {"max_waiting": 9}}, "engine.max_model_len=64"
    )
    engine = loaded.engine
    assert (engine.max_waiting, engine.stall_seconds, engine.max_model_len) == (9, 5.0, 64)
    allowed = load(file, "plugins: {allow: [a]}\n", None, "plugins.allow=[b, c]").allow
    assert allowed == ("b", "c")


def test_what_the_caller_gave_is_neither_changed_nor_shared() -> None:
    table = {"name": "fcfs", "deep": {"list": [1]}}
    loaded = load_settings(None, {"scheduler": table}, ["scheduler.deep.more=2", "scheduler.max_running=3"])
    assert table == {"name": "fcfs", "deep": {"list": [1]}}
    table["deep"]["list"].append(5)  # type: ignore[index]
    assert loaded.parts["scheduler"].options == {"deep": {"list": [1], "more": 2}, "max_running": 3}


def test_values_from_python_become_what_a_file_could_hold() -> None:
    options = {"scheduler": {"name": "fcfs", "path": Path("a/b"), "pair": (1, 2)}}
    assert load_settings(None, options).parts["scheduler"].options == {"path": "a/b", "pair": [1, 2]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=c", (("a", "b"), "c")),
        ("a=1", (("a",), 1)),
        ("a.b.c=[1, x]", (("a", "b", "c"), [1, "x"])),
        ("a={x: true}", (("a",), {"x": True})),
        ("a=b=c", (("a",), "b=c")),
        (" a . b = c ", (("a", "b"), "c")),
        ("a=", (("a",), None)),
        ("a='1'", (("a",), "1")),
        ("a=org/name", (("a",), "org/name")),
        ("a=pypi:x==1/y.gguf", (("a",), "pypi:x==1/y.gguf")),
    ],
)
def test_assignments_are_read_as_yaml(text: str, expected: object) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["", "=", "a", "=1", "a.=1", ".a=1", "a..b=1", " =1"])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--set: not an assignment; found .* allowed: path.to.setting=value"):
        parse_assignment(text)


@pytest.mark.parametrize(
    "value", ["[1", "{a: b", "a: b: c", "2024-13-01", "!!int x", "!!python/object:os.system x", "*x"]
)
def test_a_value_that_is_no_yaml_is_refused_in_one_line(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--set scheduler.x: not valid YAML: ") as caught:
        parse_assignment(f"scheduler.x={value}")
    assert "\n" not in str(caught.value)


# --- what is wrong, and where --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: m\nscheduller: fcfs\n", "run.yaml:2: unknown setting 'scheduller'; allowed: model, platform, "),
        ("model: m\nscheduller: fcfs\n", "Did you mean 'scheduler'?"),
        ("\n\n1: x\n", "run.yaml:3: unknown setting '1'"),
        ("model: 5\n", "run.yaml:1: model must be a name; found 5"),
        ("model: ''\n", "run.yaml:1: model must be a name; found ''"),
        ("model: [a]\n", "run.yaml:1: model must be a name; found ['a']"),
        ("model: m\nscheduler: 5\n", "run.yaml:2: scheduler takes a plugin's name, or a table with name and options"),
        (
            "scheduler:\n",
            "run.yaml:1: scheduler takes a plugin's name, or a table with name and options; found 'nothing'",
        ),
        (
            "checkpoint: off\n",
            "run.yaml:1: checkpoint takes a plugin's name, or a table with name and options; found False",
        ),
        ("scheduler:\n  max_running: 3\n  name: 7\n", "run.yaml:3: scheduler.name must be a plugin's name; found 7"),
        ("scheduler: {name: ''}\n", "run.yaml:1: scheduler.name must be a plugin's name; found ''"),
        ("architecture: [x]\n", "run.yaml:1: architecture takes a plugin's name"),
        ("engine: 5\n", "run.yaml:1: engine takes a table of settings; found 5"),
        (
            "engine:\n  max_waitin: 5\n",
            "run.yaml:2: engine.max_waitin: unknown setting 'max_waitin'; allowed: max_model_len",
        ),
        ("engine:\n  max_waitin: 5\n", "Did you mean 'max_waiting'?"),
        ("engine:\n\n  max_waiting: many\n", "run.yaml:3: engine.max_waiting: Input should be a valid integer"),
        (
            "engine:\n  max_waiting: 0\n",
            "run.yaml:2: engine.max_waiting: Input should be greater than or equal to 1; found 0",
        ),
        ("engine:\n  max_waiting: yes\n", "run.yaml:2: engine.max_waiting: must be a number; found True"),
        ("engine: {prefix_cache: 7}\n", "run.yaml:1: engine.prefix_cache: Input should be a valid boolean"),
        ("engine: {timeout_seconds: 0}\n", "engine.timeout_seconds: Input should be greater than 0; found 0"),
        ("engine: {timeout_seconds: '.nan'}\n", "engine.timeout_seconds: "),
        ("engine: {timeout_seconds: 'inf'}\n", "engine.timeout_seconds: Input should be a finite number"),
        ("engine: {kv_memory: 2XB}\n", "engine.kv_memory: '2XB' is no size; write a number with B"),
        ("engine: {1: 2}\n", "run.yaml:1: the keys of engine must be strings; found 1"),
        (
            "plugins: all\n",
            "run.yaml:1: plugins takes a table; found 'all'; allowed: allow: [distribution, ...], lock: FILE",
        ),
        (
            "plugins:\n  alow: [a]\n",
            "run.yaml:2: plugins.alow: unknown setting 'alow'; allowed: allow, lock. Did you mean 'allow'?",
        ),
        ("plugins: {}\n", "run.yaml:1: plugins.allow takes a list of distributions; found 'nothing'"),
        (
            "plugins:\n  allow: drivetrain\n",
            "run.yaml:2: plugins.allow takes a list of distributions; found 'drivetrain'",
        ),
        ("plugins: {allow: [1]}\n", "plugins.allow takes a list of distributions; found [1]"),
        ("model: a\nmodel: b\n", "run.yaml:2: model is given twice, first at run.yaml:1"),
        (
            "engine:\n  max_waiting: 1\n  max_waiting: 2\n",
            "run.yaml:3: engine.max_waiting is given twice, first at run.yaml:2",
        ),
        (
            "scheduler:\n  name: a\n  x:\n  - {b: 1, b: 2}\n",
            "run.yaml:4: scheduler.x.0.b is given twice, first at run.yaml:4",
        ),
        ("- model: m\n", "run.yaml: the file must hold a table of settings; found 'list'"),
        ("just words\n", "run.yaml: the file must hold a table of settings; found 'str'"),
        ("5\n", "run.yaml: the file must hold a table of settings; found 'int'"),
        ("model: m\nscheduler: {name: fcfs\n", "run.yaml:3: not valid YAML: "),
        ("model: m\n\tscheduler: x\n", "run.yaml:2: not valid YAML: "),
        ("model: m\n---\nmodel: n\n", "not valid YAML: but found another document"),
        ("model: \x00\n", "run.yaml: not valid YAML: special characters are not allowed"),
        ("scheduler: {name: fcfs, x: 2024-13-01}\n", "run.yaml: not valid YAML: ValueError: month must be in 1..12"),
        ("scheduler: {name: fcfs, x: !!bool maybe}\n", "run.yaml: not valid YAML: KeyError"),
        ("scheduler: {name: fcfs, x: !!timestamp never}\n", "run.yaml: not valid YAML: "),
        ("scheduler: {name: fcfs, x: 0b_}\n", "run.yaml: not valid YAML: ValueError"),
        (
            "scheduler: !!python/object/apply:os.getcwd []\n",
            "run.yaml:1: not valid YAML: could not determine a constructor",
        ),
        ("? [a]\n: b\n", "run.yaml:1: not valid YAML: found unhashable key"),
        (
            "scheduler: &s {name: fcfs, x: *s}\n",
            "run.yaml:1: scheduler.x repeats a table or list through an alias (*name)",
        ),
        ("scheduler: &s [*s]\n", "run.yaml:1: scheduler.0 repeats a table or list through an alias"),
        ("scheduler: {name: fcfs, x: " + "[" * 3000 + "}\n", "run.yaml: not valid YAML: RecursionError"),
        ("scheduler: {name: fcfs, x: " + "[" * 40 + "]" * 40 + "}\n", "32 deep at most"),
        (
            "scheduler:\n  name: fcfs\n  day: 2024-10-01\n",
            "run.yaml:3: scheduler.day holds a value that a setting can't have",
        ),
        ("scheduler:\n  name: fcfs\n  day: 2024-10-01\n", "found 'date'; allowed: a string, a finite number"),
        ("scheduler: {name: fcfs, x: [!!set {a}]}\n", "scheduler.x.0 holds a value that a setting can't have"),
        ("scheduler: {name: fcfs, x: .nan}\n", "scheduler.x holds a value that a setting can't have; found nan"),
        ("engine: {stall_seconds: .inf}\n", "engine.stall_seconds holds a value that a setting can't have; found inf"),
        ("scheduler: {name: fcfs, x: {1: 2}}\n", "the keys of scheduler.x must be strings; found 1"),
    ],
)
def test_an_error_names_the_line_the_path_what_was_found_and_what_is_allowed(
    file: Path, text: str, expected: str
) -> None:
    assert expected in message(file, text)


@pytest.mark.parametrize(
    ("options", "assignments", "expected"),
    [
        ({"scheduller": "x"}, [], "command line: unknown setting 'scheduller'"),
        ({"scheduler": 5}, [], "command line: scheduler takes a plugin's name"),
        ({"engine": {"max_waiting": 0}}, [], "command line: engine.max_waiting: Input should be greater"),
        (
            {"scheduler": {"x": {1}}},
            [],
            "command line: scheduler.x holds a value that a setting can't have; found 'set'",
        ),
        ({}, ["engin.max_waiting=1"], "command line: unknown setting 'engin'"),
        ({}, ["engine.max_waiting=no-number"], "command line: engine.max_waiting: Input should be a valid integer"),
        ({}, ["engine.max_waiting=0"], "command line: engine.max_waiting: Input should be greater"),
        ({}, ["model.name=x"], "command line: model.name: model is no table; found 'm'"),
        (
            {},
            ["engine.kv_memory.size=1"],
            "command line: engine.kv_memory.size: engine.kv_memory is no table; found '1GiB'",
        ),
        ({}, ["scheduler.x.y.z=1", "scheduler.x.y=2", "scheduler.x.y.z=3"], "scheduler.x.y is no table; found 2"),
        ({}, ["scheduler.name=5"], "command line: scheduler.name must be a plugin's name; found 5"),
        ({}, ["plugins.allow=drivetrain"], "command line: plugins.allow takes a list of distributions"),
    ],
)
def test_an_error_from_the_command_line_says_so(
    file: Path, options: dict[str, Any], assignments: list[str], expected: str
) -> None:
    assert expected in message(file, "model: m\nengine: {kv_memory: 1GiB}\n", options, *assignments)


def test_a_scalar_is_not_silently_replaced_by_a_table(file: Path) -> None:
    assert "engine is no table; found 5" in message(file, "engine: 5\n", None, "engine.max_waiting=3")


def test_an_option_that_no_plugin_has_is_placed_on_its_own_line(file: Path) -> None:
    """The file's reader keeps the lines, and the selection, much later, uses them."""
    text = "model: tiny-model\nscheduler:\n  name: fcfs\n  label: x\n  max_runing: 3\n"
    loaded = load(file, text)
    with pytest.raises(ConfigError) as caught:
        resolve_parts(loaded, registry=fakes.serving_registry())
    assert str(caught.value).startswith(f"{file}:5: scheduler.max_runing: ")
    loaded = load(file, "scheduler:\n  name: fcfs\n  max_running: 3\n", None, "scheduler.max_running=0")
    with pytest.raises(ConfigError, match=r"^command line: scheduler.max_running: "):
        resolve_parts(loaded, registry=fakes.serving_registry())


def test_files_that_can_not_be_read(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match="can't read the file: No such file"):
        load_settings(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="can't read the file: Is a directory"):
        load_settings(tmp_path)
    file.write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"run.yaml: the file is not UTF-8 text"):
        load_settings(file)
    file.write_bytes("\ufeffmodel: mit-BOM\n".encode())
    assert load_settings(file).model == "mit-BOM"


def test_a_huge_tree_of_aliases_is_refused_at_once(file: Path) -> None:
    lines = ["scheduler:", "  name: fcfs", "  a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    assert "repeats a table or list" in message(file, "\n".join(lines))


# --- whatever a file holds -----------------------------------------------------------------------------------------

_VALUES = "name allow max_waiting kv_memory 2GiB auto yes null ~ 5 .nan 1e3 2024-13-01 0o7 0b_ 1:2"
_SIGNS = "!!int !!set &a *a << { } [ ] | ' \" # ! = % --- ? \u2028 \x85 \ud7ff"
_words = st.sampled_from([*TOP_LEVEL_KEYS, *_VALUES.split(), *_SIGNS.split(), "- ", ": ", ", ", "\n", "\n  ", "\t"])
_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words | st.integers(), inner, max_size=4),
    max_leaves=10,
)


def error_of(load: Callable[[], Settings]) -> ConfigError | None:
    """The ConfigError of a load; None when there are settings. Any other exception passes."""
    try:
        loaded = load()
    except ConfigError as error:
        return error
    assert isinstance(loaded, Settings)
    assert all(isinstance(request, PartRequest) for request in loaded.parts.values())
    return None


@given(st.text(max_size=60) | st.lists(_words, max_size=14).map("".join) | st.binary(max_size=40))
@example("<<: {model: m}\n")
@example("<<: [{model: m}, {scheduler: fcfs}]\n")
@example("engine: {<<: {max_waiting: 3}}\n")
@example("model: !!str\n")
@example("model: &a b\nscheduler: *a\n")
@example("? {a: b}\n: c\n")
@example("!<tag:yaml.org,2002:map> {}\n")
@settings(max_examples=300, deadline=None)
def test_any_file_gives_settings_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, content: str | bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    refused = error_of(lambda: load_settings(file))
    assert refused is None or "any.yaml" in str(refused)


@given(st.dictionaries(st.sampled_from(TOP_LEVEL_KEYS), _trees, max_size=4), st.lists(_words, max_size=5).map("".join))
@settings(max_examples=200, deadline=None)
def test_any_options_and_assignments_give_settings_or_a_config_error(options: dict[str, Any], value: str) -> None:
    refused = error_of(lambda: load_settings(None, options, [f"scheduler.x={value}"]))
    assert refused is None or str(refused)
