"""Read settings from a file, option values and ``a.b=c`` assignments, and say exactly where something is wrong.

Later layers win: file, then options, then assignments. A part named again is replaced with its options, since options
belong to the plugin that was named before; the tables ``engine``, ``trainer`` and ``plugins`` are merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from drivetrain.config.settings import TOP_LEVEL_KEYS, EngineSettings, Settings
from drivetrain.config.trainer import TrainerSettings
from drivetrain.contracts.kinds import KINDS
from drivetrain.errors import ConfigError, first_fault, nearest
from drivetrain.registry.selection import PartRequest

_KIND_OF_KEY = {kind.key: kind.name for kind in KINDS.values()}
_PLUGINS_KEYS = ("allow", "lock")
_DEEPEST = 32
_IMPORTED = "DeepSpeed configuration"

Tree = dict[str, Any]
Lines = dict[tuple[str, ...], str]
"""Dotted path (as a tuple) -> where it was said: ``run.yaml:4``, ``--set``, ``argument``."""

_Table = TypeVar("_Table", bound=BaseModel)


def load_settings(
    file: Path | str | None = None,
    options: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    *,
    origin: str = "command line",
    imported: Mapping[str, Any] | None = None,
) -> Settings:
    """Merge and check all layers. Raises ConfigError with place, path, what was found and what is allowed.

    options:     top-level key -> value; None values are skipped.
    assignments: ``a.b=c`` strings; the value is read as YAML.
    origin:      what to call the place that ``options`` and ``assignments`` come from.
    imported:    settings that were read from another program's configuration; they win over the file's, key by key of
                 the tables, and over nothing else.
    """
    tree: Tree = {}
    lines: Lines = {}
    if file is not None:
        tree, lines = _read_file(Path(file))
    for key, value in (imported or {}).items():
        for path, leaf in _leaves((key,), value):
            _assign(tree, lines, path, _plain(leaf, path, lines, _IMPORTED), _IMPORTED)
    for key, value in (options or {}).items():
        if value is not None:
            _check_key(key, origin)
            _replace(tree, lines, key, _plain(value, (key,), lines, origin), origin)
    for assignment in assignments:
        path, value = parse_assignment(assignment)
        _assign(tree, lines, path, _plain(value, path, lines, origin), origin)
    return _check(tree, lines, default_origin=str(file) if file else origin)


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Dotted path -> what is no table; a part's name comes first, since it sets its options back."""
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key in sorted(value, key=lambda key: key != "name"):
        yield from _leaves((*path, key), value[key])


def parse_assignment(text: str, where: str = "--set") -> tuple[tuple[str, ...], Any]:
    """``"a.b=c"`` -> (("a", "b"), c), the value read as YAML. Raises ConfigError, which says ``where`` it stood."""
    path, equals, value = text.partition("=")
    parts = tuple(part.strip() for part in path.split("."))
    if not equals or not all(parts):
        raise ConfigError("not an assignment", where=where, found=text, allowed="path.to.setting=value")
    return parts, _read_yaml(value, f"{where} {path}", {})


def _read_file(path: Path) -> tuple[Tree, Lines]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"can't read the file: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError("the file is not UTF-8 text", where=str(path)) from error
    lines: Lines = {}
    tree = _read_yaml(text, str(path), lines)
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError("the file must hold a table of settings", where=str(path), found=type(tree).__name__)
    for key in tree:
        _check_key(key, lines.get((str(key),), str(path)))
    return _plain(tree, (), lines, str(path)), lines


def _read_yaml(text: str, place: str, lines: Lines) -> Any:
    """The value that ``text`` holds; the line of each key goes into ``lines``."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _collect_lines(node, (), place, lines, set())
        return loader.construct_document(node)
    except ConfigError:
        raise
    except Exception as error:
        # Beside its own errors PyYAML lets through what its converters raise: ValueError for the date 2024-13-01,
        # KeyError for "!!bool maybe", RecursionError for a thousand brackets, ...
        mark = getattr(error, "problem_mark", None)
        problem = (
            getattr(error, "problem", None) or getattr(error, "reason", None) or f"{type(error).__name__}: {error}"
        )
        where = f"{place}:{mark.line + 1}" if mark and not place.startswith("--set") else place
        raise ConfigError(f"not valid YAML: {problem}", where=where) from error


def _collect_lines(node: yaml.Node, prefix: tuple[str, ...], place: str, lines: Lines, seen: set[int]) -> None:
    """Note the line of every key; a key given twice is an error rather than the last one winning.

    So is a table or list that an alias repeats: it could hold itself, or grow without bound.
    """
    if not isinstance(node, yaml.CollectionNode):
        return
    if id(node) in seen:
        raise ConfigError(
            f"{'.'.join(prefix)} repeats a table or list through an alias (*name)",
            where=f"{place}:{node.start_mark.line + 1}",
            hint="Write it out.",
        )
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect_lines(item, (*prefix, str(index)), place, lines, seen)
        return
    for key, value in node.value:
        here = (*prefix, str(key.value))
        where = f"{place}:{key.start_mark.line + 1}"
        if here in lines:
            raise ConfigError(f"{'.'.join(here)} is given twice, first at {lines[here]}", where=where)
        lines[here] = where
        _collect_lines(value, here, place, lines, seen)


def _plain(value: Any, path: tuple[str, ...], lines: Lines, default: str) -> Any:
    """A copy of ``value`` that JSON can hold, since plans and reports carry it."""
    if isinstance(value, Mapping) and len(path) < _DEEPEST:
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(
                    f"the keys of {'.'.join(path)} must be strings", where=_place(path, lines, default), found=key
                )
        return {key: _plain(item, (*path, key), lines, default) for key, item in value.items()}
    if isinstance(value, list | tuple) and len(path) < _DEEPEST:
        return [_plain(item, (*path, str(index)), lines, default) for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ConfigError(
        f"{'.'.join(path)} holds a value that a setting can't have",
        where=_place(path, lines, default),
        found=value if isinstance(value, float) else type(value).__name__,
        allowed=f"a string, a finite number, true or false, null; lists and tables of these, {_DEEPEST} deep at most",
    )


def _place(path: tuple[str, ...], lines: Lines, default: str) -> str:
    """Where the setting at ``path``, or else the nearest table around it, was said."""
    return next((lines[path[:length]] for length in range(len(path), 0, -1) if path[:length] in lines), default)


def _check_key(key: Any, where: str) -> None:
    if key not in TOP_LEVEL_KEYS:
        raise _unknown(key if isinstance(key, str) else repr(key), where, TOP_LEVEL_KEYS)


def _replace(tree: Tree, lines: Lines, key: str, value: Any, origin: str) -> None:
    if key not in _KIND_OF_KEY and isinstance(tree.get(key), dict) and isinstance(value, dict):
        tree[key] = {**tree[key], **value}
    else:
        _forget(lines, (key,))
        tree[key] = value
    lines[key,] = origin
    if isinstance(value, dict):
        lines.update({(key, name): origin for name in value})


def _forget(lines: Lines, path: tuple[str, ...]) -> None:
    """Forget where the parts of a value were said that is about to be replaced."""
    for known in [known for known in lines if known[: len(path)] == path]:
        del lines[known]


def _assign(tree: Tree, lines: Lines, path: tuple[str, ...], value: Any, origin: str) -> None:
    _check_key(path[0], origin)
    node = tree
    for depth, part in enumerate(path[:-1]):
        child = node.get(part)
        if child is None:
            child = {}
        elif depth == 0 and part in _KIND_OF_KEY and isinstance(child, str):
            # A part given by its bare name becomes a table that can take options.
            child = {"name": child}
        elif not isinstance(child, dict):
            raise ConfigError(
                f"{'.'.join(path[: depth + 1])} is no table", where=f"{origin}: {'.'.join(path)}", found=child
            )
        node[part] = child
        node = child
    _forget(lines, path)
    node[path[-1]] = value
    lines[path] = origin


def _check(tree: Tree, lines: Lines, default_origin: str) -> Settings:
    model = tree.get("model")
    if model is not None and (not isinstance(model, str) or not model.strip()):
        raise ConfigError("model must be a name", where=lines.get(("model",), default_origin), found=model)
    parts = {
        kind: _part(kind, key, tree[key], lines, default_origin) for key, kind in _KIND_OF_KEY.items() if key in tree
    }
    engine = _table("engine", EngineSettings, tree, lines, default_origin)
    trainer = _table("trainer", TrainerSettings, tree, lines, default_origin)
    return Settings(model, parts, engine, *_plugins(tree, lines, default_origin), trainer)


def _part(kind: str, key: str, value: Any, lines: Lines, default_origin: str) -> PartRequest:
    given = next((place for path, place in lines.items() if path[0] == key), default_origin)
    where = lines.get((key, "name")) or lines.get((key,)) or given
    if isinstance(value, str) and value:
        return PartRequest(kind, value, {}, where)
    if not isinstance(value, dict):
        raise ConfigError(
            f"{key} takes a plugin's name, or a table with name and options",
            where=where,
            found="nothing" if value is None else value,
        )
    options, is_named = dict(value), "name" in value
    name = options.pop("name", KINDS[kind].default)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{key}.name must be a plugin's name", where=where, found="nothing" if name is None else name)
    places = {path[1:]: place for path, place in lines.items() if path[0] == key and len(path) > 1}
    return PartRequest(kind, name, options, where, places, is_named)


def _table(key: str, model: type[_Table], tree: Tree, lines: Lines, default_origin: str) -> _Table:
    """The settings of a table that no plugin decides."""
    value = tree.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{key} takes a table of settings", where=lines.get((key,), default_origin), found=value)
    try:
        return model.model_validate(value or {})
    except ValidationError as error:
        first, inner, message = first_fault(error.errors(), value or {})
        path = (key, *inner)
        place = f"{_place(path, lines, default_origin)}: {'.'.join(path)}"
        if first["type"] == "extra_forbidden":
            raise _unknown(path[-1], place, list(model.model_fields)) from error
        raise ConfigError(message, where=place, found=first["input"]) from error


def _unknown(name: str, place: str, known: Iterable[str]) -> ConfigError:
    close = nearest(name, known)
    return ConfigError(
        f"unknown setting {name!r}", where=place, allowed=known, hint=f"Did you mean {close!r}?" if close else None
    )


def _plugins(tree: Tree, lines: Lines, default_origin: str) -> tuple[tuple[str, ...] | None, str | None]:
    """The settings ``plugins.allow`` and ``plugins.lock``."""
    value = tree.get("plugins")
    if value is None:
        return None, None
    where = lines.get(("plugins",), default_origin)
    if not isinstance(value, dict):
        raise ConfigError(
            "plugins takes a table", where=where, found=value, allowed="allow: [distribution, ...], lock: FILE"
        )
    for key in value:
        if key not in _PLUGINS_KEYS:
            raise _unknown(key, f"{_place(('plugins', key), lines, default_origin)}: plugins.{key}", _PLUGINS_KEYS)
    lock = value.get("lock")
    if "lock" in value and (not isinstance(lock, str) or not lock):
        raise ConfigError(
            "plugins.lock takes the name of a file that drivetrain plugins lock wrote",
            where=_place(("plugins", "lock"), lines, default_origin),
            found="nothing" if lock is None else lock,
        )
    return (_allow(value, lines, default_origin) if "allow" in value or not value else None), lock


def _allow(plugins: Tree, lines: Lines, default_origin: str) -> tuple[str, ...]:
    allow = plugins.get("allow")
    if not isinstance(allow, list) or not all(isinstance(name, str) and name for name in allow):
        raise ConfigError(
            "plugins.allow takes a list of distributions",
            where=_place(("plugins", "allow"), lines, default_origin),
            found="nothing" if allow is None else allow,
        )
    return tuple(allow)
