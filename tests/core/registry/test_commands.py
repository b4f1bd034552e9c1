"""``explain --why-not``, ``plugins lock``, ``--locked`` and ``doctor --config`` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drivetrain.cli import main
from drivetrain.registry.lock import read_lock
from support.distributions import run_python, write_distribution

Capture = pytest.CaptureFixture[str]


def test_explain_answers_why_not(capsys: Capture) -> None:
    words = ["explain", "--why-not", "scheduler/priority", "--why-not", "attention/nothing"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "why not scheduler/priority (drivetrain " in shown
    assert ")? not asked\n  nothing else was asked, since 'fcfs' is the default; asked now, it says yes" in shown
    assert "why not attention/nothing? not installed\n" in shown
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["why_not"]
    assert [(entry["name"], entry["verdict"]) for entry in told] == [
        ("priority", "not asked"),
        ("nothing", "not installed"),
    ]
    assert main(["explain", "--why-not", "nonsense"]) == 1
    assert "KIND/NAME" in capsys.readouterr().err


def test_without_why_not_the_json_is_as_it_was(capsys: Capture) -> None:
    assert main(["explain", "--json"]) == 0
    assert "why_not" not in json.loads(capsys.readouterr().out)


def test_a_lock_is_written_kept_and_refuses_what_differs(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "plugins.lock"
    assert main(["plugins", "lock", "--file", str(file)]) == 0
    shown = capsys.readouterr()
    assert "drivetrain" in shown.out
    assert f"locked in {file}" in shown.err
    assert "drivetrain" in read_lock(file)
    assert main(["explain", "--locked", str(file)]) == 0
    content = json.loads(file.read_text())
    content["distributions"]["drivetrain"]["version"] = "0.0.1"
    content["distributions"]["gone-kit"] = {"version": "1.0", "record": None, "editable": False}
    file.write_text(json.dumps(content))
    capsys.readouterr()
    config = tmp_path / "run.yaml"
    config.write_text(f"plugins: {{lock: {file}}}\n")
    for words in (["--locked", str(file)], ["--config", str(config)], ["--set", f"plugins.lock={file}"]):
        assert main(["explain", *words]) == 1
        table, _, error = capsys.readouterr().err.rstrip("\n").rpartition("\n")
        assert [line.split()[0] for line in table.splitlines()] == ["distribution", "drivetrain", "gone-kit"]
        assert error.startswith(
            f"error: {file}: 2 of the distributions that register plugins differ from what is locked."
        )


def test_a_lock_is_checked_before_any_observer_is_loaded(tmp_path: Path) -> None:
    site, file = tmp_path / "site", tmp_path / "plugins.lock"
    run_python(f"from drivetrain.cli import main; main(['plugins', 'lock', '--file', {str(file)!r}])")
    source = {"acme_watch.py": "print('LOADED')\n"}
    write_distribution(site, "acme-watch", {"drivetrain.observer": {"w": "acme_watch"}}, source)
    code = f"from drivetrain.cli import main; print(main(['serve', '--model', 'x', '--locked', {str(file)!r}]))"
    assert run_python(code, site) == "1\n"


@pytest.mark.slow
def test_doctor_looks_up_the_names_of_a_configuration(tmp_path: Path, capsys: Capture) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: m\nattention: paged-nonsense\nplugins: {allow: [drivetrain, no-such-kit]}\n")
    assert main(["doctor", "--config", str(config), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    subjects = {finding["subject"]: finding["text"] for finding in report["findings"] if finding["level"] == "problem"}
    assert "no installed plugin of kind 'attention' is named 'paged-nonsense'" in subjects[f"{config}:2: attention"]
    assert "no installed distribution 'no-such-kit' registers a plugin" in subjects["plugins.allow"]
