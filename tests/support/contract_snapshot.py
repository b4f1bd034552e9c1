"""The public contracts as data: names, signatures, defaults and fields, to be compared with the committed snapshot.

Run it to rewrite the snapshot after a change: ``python tests/support/contract_snapshot.py``. A contract whose content
changed must have a new version; before a version is released it may change, which ``--unreleased`` says. ``--release``
closes the present versions: from then on their content can't change at all.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import hashlib
import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import drivetrain.contracts
from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.versions import SHARED_VERSION

FILE = Path(__file__).resolve().parents[1] / "core" / "contracts.json"
SHARED = "shared"
"""What belongs to no kind: the base of all plugins, the kinds, the versions."""

_OF_A_KIND = ("group", "contract", "default", "purposes", "key")
_OF_NO_CONTRACT = ("KINDS", "ADAPTERS", "SHARED_VERSION")
"""Tables that grow, and the version itself; a kind's entry belongs to the kind."""

_CALLS = ("__call__", "__contains__", "__init__")
Snapshot = dict[str, Any]


# --- from code to data ---------------------------------------------------------------------------------------------


def take() -> dict[str, dict[str, Any]]:
    """Contract -> its version and its content: module -> name -> description."""
    contents: dict[str, dict[str, Any]] = {}
    kind_of = {kind.contract.partition(":")[0]: kind.name for kind in KINDS.values()}
    for found in pkgutil.iter_modules(drivetrain.contracts.__path__, "drivetrain.contracts."):
        module = importlib.import_module(found.name)
        contents.setdefault(kind_of.get(found.name, SHARED), {})[found.name] = describe_module(module)
    for kind in KINDS.values():
        contents[kind.name]["kind"] = {name: text(getattr(kind, name)) for name in _OF_A_KIND}
    return {name: {"version": version_of(name), "content": content} for name, content in sorted(contents.items())}


def version_of(contract: str) -> str:
    return SHARED_VERSION if contract == SHARED else KINDS[contract].version


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a contract's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_module(module: Any) -> dict[str, Any]:
    """Every public name that the module defines; what it imports belongs to others."""
    described: dict[str, Any] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names = [node.name]
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        for name in names:
            if not name.startswith("_") and name not in _OF_NO_CONTRACT:
                value = getattr(module, name)
                if callable(value) and not (inspect.isfunction(value) or inspect.isclass(value)):
                    value = inspect.unwrap(value)  # what a cache wraps
                is_own = getattr(value, "__module__", None) == module.__name__
                is_defined = is_own and (inspect.isclass(value) or inspect.isfunction(value))
                described[name] = describe(value) if is_defined else {"value": text(value)}
    return described


def describe(value: Any) -> dict[str, Any]:
    described: dict[str, Any] = {}
    if inspect.isfunction(value):
        described["function"] = str(inspect.signature(value))
    elif issubclass(value, enum.Enum):
        described["members"] = {member.name: text(member.value) for member in value}
    else:
        described = describe_class(value)
    notice = vars(value).get("__deprecated__")
    return described | ({"deprecated": dataclasses.asdict(notice)} if notice else {})


def own_annotations(cls: type) -> dict[str, Any]:
    """What the class itself declares. A class without annotations may come to show those of its base, depending on who
    asked before; what a base declares in the same words is therefore left to the base."""
    inherited: dict[str, Any] = {}
    for base in reversed(cls.__mro__[1:]):
        inherited |= vars(base).get("__annotations__", {})
    own = vars(cls).get("__annotations__", {})
    return {name: annotation for name, annotation in own.items() if inherited.get(name) != annotation}


def describe_class(cls: type) -> dict[str, Any]:
    is_generated = dataclasses.is_dataclass(cls) or getattr(cls, "_is_protocol", False)
    described: dict[str, Any] = {"bases": [base.__name__ for base in cls.__bases__]}
    if dataclasses.is_dataclass(cls):
        described["fields"] = {field.name: f"{field.type}{default_of(field)}" for field in dataclasses.fields(cls)}
        described["order"] = ", ".join(described["fields"])
        described["frozen"] = cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    members = {}
    own = {**dict.fromkeys(own_annotations(cls)), **vars(cls)}
    for name in sorted(own):
        is_field = name in described.get("fields", {})
        if is_field or (name.startswith("_") and (name not in _CALLS or (name == "__init__" and is_generated))):
            continue
        told = describe_member(cls, name)
        notice = getattr(vars(cls).get(name), "__deprecated__", None)
        if told:
            members[name] = f"{told}, removed in {notice.removal}" if notice else told
    return described | {"members": members}


def describe_member(cls: type, name: str) -> str:
    annotation = own_annotations(cls).get(name)
    declared = f"attribute: {annotation}" if annotation else "attribute"
    if name not in vars(cls):
        return declared
    value = vars(cls)[name]
    if isinstance(value, property):
        return f"{_abstract(value.fget)}property -> {inspect.signature(value.fget).return_annotation}"  # type: ignore[arg-type]
    if isinstance(value, classmethod | staticmethod):
        return f"{_abstract(value)}{type(value).__name__}{inspect.signature(value.__func__)}"
    if inspect.isfunction(value):
        # What a library adds to the class, such as pydantic's validators, is not part of what we promise.
        is_own = value.__module__ == cls.__module__ and value.__qualname__ == f"{cls.__qualname__}.{name}"
        return f"{_abstract(value)}method{inspect.signature(value)}" if is_own else ""
    if type(value).__name__ == "cached_property":
        return f"property -> {inspect.signature(value.func).return_annotation}"
    if name == "__init__":
        return ""
    return f"{declared} = {text(value)}"


def _abstract(member: Any) -> str:
    return "abstract " if getattr(member, "__isabstractmethod__", False) else ""


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {text(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f" = {text(field.default_factory())}"
    return ""


def text(value: Any) -> str:
    """A value as text that is the same in every process. Raises TypeError where there is none."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ", ".join(f"{field.name}={text(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__name__}({fields})"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(text, value)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{text(key)}: {text(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(text, value))})"
    if isinstance(value, type):
        return value.__name__
    shown = repr(value)
    if " at 0x" in shown:
        raise TypeError(f"{shown} has no text that is the same in every process")
    return shown


# --- comparing and rewriting ---------------------------------------------------------------------------------------


def read(file: Path = FILE) -> Snapshot:
    """The committed snapshot: ``contracts``, and the digests of ``released`` versions, which never change."""
    snapshot: Snapshot = json.loads(file.read_text(encoding="utf-8"))
    return snapshot


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    else:
        yield path, text(value)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[str]]:
    """Contract -> one line for each name that was added, removed or changed; contracts that are equal are left out."""
    found = {}
    for contract in sorted(old.keys() | new.keys()):
        before, after = (dict(leaves(side.get(contract, {}).get("content", {}))) for side in (old, new))
        lines = [f"added    {path}: {after[path]}" for path in after.keys() - before.keys()]
        lines += [f"removed  {path}: {before[path]}" for path in before.keys() - after.keys()]
        lines += [
            f"changed  {path}: {before[path]} -> {after[path]}"
            for path in before.keys() & after.keys()
            if before[path] != after[path]
        ]
        if lines:
            found[contract] = sorted(lines)
    return found


def complaints(snapshot: Snapshot, now: Mapping[str, Any]) -> list[str]:
    """What is wrong with the present contracts, beside the committed snapshot; empty when all is well."""
    told = []
    for contract, lines in differences(snapshot["contracts"], now).items():
        before = snapshot["contracts"].get(contract, {}).get("version")
        after = now.get(contract, {}).get("version")
        if before == after:
            where = "SHARED_VERSION in core/contracts/versions.py" if contract == SHARED else "core/contracts/kinds.py"
            advice = (
                f"is still {after}: raise it ({where}) and rewrite the snapshot (make contracts), or undo the change"
            )
        else:
            advice = f"went from version {before} to {after}: rewrite the snapshot (make contracts)"
        told.append("\n  ".join([f"the contract {contract!r} changed, and {advice}", *lines]))
    for contract, entry in now.items():
        committed = snapshot["contracts"].get(contract)
        if committed and committed["version"] != entry["version"] and committed["content"] == entry["content"]:
            told.append(f"the contract {contract!r} has version {entry['version']} without a change")
        released = snapshot["released"].get(contract, {}).get(entry["version"])
        if released and released != digest(entry["content"]):
            told.append(
                f"version {entry['version']} of the contract {contract!r} is released: it can't change any more"
            )
    return told


def rewritten(snapshot: Snapshot, now: Mapping[str, Any], *, unreleased: bool, release: bool) -> Snapshot:
    """The new snapshot. Raises ValueError for a change without a new version, unless none was released."""
    for contract in differences(snapshot["contracts"], now):
        committed, entry = snapshot["contracts"].get(contract), now.get(contract)
        if not committed or not entry or committed["version"] != entry["version"]:
            continue
        is_released = entry["version"] in snapshot["released"].get(contract, {})
        if is_released or not unreleased:
            more = "and it is released" if is_released else "(--unreleased allows that before a release)"
            raise ValueError(f"the contract {contract!r} changed and is still {entry['version']} {more}")
    released = {contract: dict(versions) for contract, versions in snapshot["released"].items()}
    if release:
        for contract, entry in now.items():
            released.setdefault(contract, {})[entry["version"]] = digest(entry["content"])
    return {"released": released, "contracts": dict(now)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Rewrite the snapshot of the contracts.")
    parser.add_argument("--unreleased", action="store_true", help="allow a change of a version that was not released")
    parser.add_argument("--release", action="store_true", help="close the present versions for ever")
    options = parser.parse_args()
    snapshot = read() if FILE.exists() else {"released": {}, "contracts": {}}
    now = take()
    for contract, lines in differences(snapshot["contracts"], now).items():
        print("\n  ".join([contract, *lines]))
    try:
        new = rewritten(snapshot, now, unreleased=options.unreleased, release=options.release)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    FILE.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
