"""``drivetrain plugins new``: writes the package of a new plugin, with a class that works."""

from __future__ import annotations

import builtins
import keyword
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from drivetrain import __version__
from drivetrain.contracts.kinds import KINDS, Kind
from drivetrain.errors import ConfigError, UnknownPluginError, nearest
from drivetrain.registry import discover
from drivetrain.testing import SUITES

NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
"""What a plugin may be called: it is typed on command lines and becomes part of the names of package and class."""

_MAX_NAME_LENGTH = 40
_RESERVED = frozenset({"auto"})
_PACKAGE = re.compile(r"[a-z_][a-z0-9_]*")

_SUFFIXES = {"kernels": "Kernels", "checkpoint": "Checkpointing"}
"""Kind -> last word of the class's name, where it is not the kind's own."""

_SUMMARIES = {
    "attention": "Attends over a paged cache one sequence at a time: simple, correct, slow.",
    "checkpoint": "Computes every unit a second time in the backward pass.",
    "frontend": "One JSON object a line over a socket of the local system.",
    "kernels": "rms_norm and silu_mul in plain torch.",
    "loader": "Reads weights.npz with config.json and tokenizer.json from a folder.",
    "model": "The smallest architecture that attends, in one layer.",
    "optimizer": "Stochastic gradient descent with momentum, by torch.",
    "partitioner": "One process holds everything.",
    "platform": "The processor of this machine, under a name of its own.",
    "precision": "bfloat16 to compute in, float32 to remember and to sum in.",
    "quantizer": "Weights as int8 with one scale a row.",
    "recipe": "Next-token training on the lines of text files.",
    "scheduler": "Short prompts first; waiting makes up for length.",
    "source": "A folder with one folder, file or link for each model.",
    "store": "One safetensors file for each state, by one process.",
    "tracker": "Figures as a table of comma-separated values.",
}
"""Kind -> what the generated class does, in the words of its docstring."""

_FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "LICENSE": "LICENSE.txt",
    ".gitignore": "gitignore.txt",
    ".github/workflows/test.yml": "workflow.yml.txt",
    "src/$package/__init__.py": "init.py.txt",
    "src/$package/py.typed": None,
    "src/$package/$module.py": "$kind.py.txt",
    "tests/test_conformance.py": "conformance/$kind.py.txt",
}
"""File of the package -> template that it is made from; None for an empty file."""


@dataclass(frozen=True)
class Scaffold:
    """A package to be written. Checked on construction; raises ConfigError or UnknownPluginError.

    kind:    what sort of plugin.
    name:    what users call it.
    package: import name; None makes one from kind and name.
    """

    kind: str
    name: str
    package: str | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        _check_name(self.kind, self.name)
        if self.package is not None:
            _check_package(self.package)

    @property
    def package_name(self) -> str:
        return self.package or f"drivetrain_{self.kind}_{self.name.replace('-', '_')}"

    @property
    def distribution(self) -> str:
        """What users install."""
        return self.package_name.strip("_").replace("_", "-")

    @property
    def class_name(self) -> str:
        """The name in capitals with the kind behind it, and no name that the class's module already uses."""
        suffix = _SUFFIXES.get(self.kind, self.kind.capitalize())
        camel = self._camel_name
        wanted = camel if camel.endswith(suffix) and camel != suffix else camel + suffix
        taken = set(re.findall(r"\w+", _template(f"{self.kind}.py.txt"))) | set(dir(builtins))
        return f"{wanted}Plugin" if wanted in taken else wanted

    @property
    def files(self) -> dict[str, str]:
        """File below the package's folder -> its text."""
        words = self._words
        return {
            Template(file).substitute(words): ""
            if template is None
            else Template(_template(Template(template).substitute(words))).substitute(words)
            for file, template in _FILES.items()
        }

    def write(self, folder: Path) -> list[Path]:
        """Make ``folder`` with all files in it, or nothing at all. Raises ConfigError when there is something."""
        if folder.exists() or folder.is_symlink():
            raise ConfigError(
                "there is something at this place already", where=str(folder), hint="Name another place with --folder."
            )
        files = self.files
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
                whole = Path(scratch, "package")
                for file, text in files.items():
                    path = whole / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8")
                shutil.move(whole, folder)
        except OSError as error:
            raise ConfigError(f"the package can't be written: {error.strerror or error}", where=str(folder)) from error
        return [folder / file for file in files]

    @property
    def _camel_name(self) -> str:
        return "".join(part.capitalize() for part in re.split(r"[-_]", self.name))

    @property
    def _words(self) -> dict[str, str]:
        """What the templates' words stand for."""
        kind = KINDS[self.kind]
        return {
            "camel_name": self._camel_name,
            "class_name": self.class_name,
            "contract_version": kind.version,
            "contract_module": kind.contract.partition(":")[0],
            "decides": kind.decides,
            "description": f"Drivetrain {self.kind} {self.name}",
            "distribution": self.distribution,
            "drivetrain_version": __version__,
            "group": kind.group,
            "key": kind.key,
            "kind": self.kind,
            "module": self.kind,
            "name": self.name,
            "package": self.package_name,
            "suite": _suite_of(kind),
            "summary": _SUMMARIES[self.kind],
        }


def _suite_of(kind: Kind) -> str:
    """The class of the conformance kit; kinds that have none of their own are tested as every plugin is."""
    return next((suite for suite, name in SUITES.items() if name == kind.name), "Suite")


def _template(name: str) -> str:
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        close = nearest(kind, KINDS)
        raise UnknownPluginError(
            f"no kind of plugin is named {kind!r}", allowed=KINDS, hint=f"Did you mean {close!r}?" if close else None
        )


def _check_name(kind: str, name: str) -> None:
    if not NAME.fullmatch(name) or len(name) > _MAX_NAME_LENGTH or name in _RESERVED:
        raise ConfigError(
            "not a name for a plugin",
            where="NAME",
            found=name,
            allowed=f"lower-case letters and digits, joined by - or _, at most {_MAX_NAME_LENGTH}, and not 'auto'",
        )
    owner = next((ref for ref in discover(kind) if ref.name == name), None)
    if owner is not None:
        raise ConfigError(
            f"{kind} {name!r} is installed already, and a name that two distributions claim can't be chosen by itself",
            where="NAME",
            found=f"{owner.distribution} {owner.version}",
            hint="Choose another name.",
        )


def _check_package(package: str) -> None:
    if not _PACKAGE.fullmatch(package) or keyword.iskeyword(package) or not package.strip("_"):
        raise ConfigError(
            "not a name for a package",
            where="--package",
            found=package,
            allowed="lower-case letters, digits and underscores, such as acme_drivetrain",
        )
    if package in sys.stdlib_module_names or package == "drivetrain":
        raise ConfigError("this name belongs to another package", where="--package", found=package)
