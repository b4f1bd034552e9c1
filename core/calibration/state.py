"""What a run leaves on the disk as it goes, so that one that was interrupted goes on where it was.

A folder beside the output: ``run.json`` says what is being made of what; ``hidden-0`` and ``hidden-1`` hold what goes
into a layer and what comes out of it, by turns; ``layer-00003.safetensors`` holds a finished layer. A layer's file
appears, by renaming, once everything that it stands for is on the disk; until then the input of the layer is left as it
was.

Shapes: N tokens of all windows; E hidden size.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drivetrain.contracts.packed import PackedWeight
from drivetrain.errors import CalibrationError

_RUN = "run.json"
_OUTER = "outer"


@dataclass(frozen=True)
class FinishedLayer:
    """What became of one decoder layer, or of a layer outside of them.

    packed:  dotted name of each packed linear layer -> its weight.
    changed: dotted name of each other tensor that is not the files' any more.
    """

    packed: Mapping[str, PackedWeight]
    changed: Mapping[str, torch.Tensor]


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # --- whose it is -------------------------------------------------------------------------------------------------

    def begin(self, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder, or take up the one that is there.

        Raises CalibrationError when one is there and was not asked for, when it is of another run, and when it can't be
        made.
        """
        if not self.path.exists():
            try:
                self.path.mkdir(parents=True)
            except OSError as error:
                raise CalibrationError(
                    f"the folder of the run can't be made: {error.strerror}", where=str(self.path), hint="Name another."
                ) from error
            self._write_text(_RUN, json.dumps(fingerprint, indent=2, sort_keys=True))
            return
        if not resume:
            raise CalibrationError(
                "a run that did not end is there",
                where=str(self.path),
                hint="Go on with it by --resume, or remove the folder.",
            )
        theirs = self._fingerprint()
        ours = json.loads(json.dumps(fingerprint))
        differing = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        if differing:
            details = "; ".join(f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}" for key in differing)
            raise CalibrationError(
                f"the run that did not end is another one: {details}",
                where=str(self.path),
                hint="Give it the same model, text and options, or remove the folder.",
            )

    def _fingerprint(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / _RUN).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CalibrationError(
                f"no run can be taken up here: {error}", where=str(self.path), hint="Remove the folder."
            ) from error

    def remove(self) -> None:
        """The end of the run."""
        shutil.rmtree(self.path)

    # --- what goes from layer to layer -------------------------------------------------------------------------------

    def hidden(self, layer: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """What goes into ``layer`` (and comes out of the one before), [N, E]: a file, mapped into memory."""
        path = self.path / f"hidden-{layer % 2}"
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        if not path.exists() or path.stat().st_size != num_bytes:
            with path.open("wb") as file:
                file.truncate(num_bytes)
        return torch.from_file(str(path), shared=True, size=shape[0] * shape[1], dtype=dtype).view(shape)

    def settle_hidden(self, layer: int) -> None:
        """Have what goes into ``layer`` on the disk."""
        with (self.path / f"hidden-{layer % 2}").open("rb") as file:
            os.fsync(file.fileno())

    # --- finished layers ---------------------------------------------------------------------------------------------

    def num_finished(self) -> int:
        """Decoder layers that are finished, from the first on."""
        count = 0
        while self._file(count).exists():
            count += 1
        return count

    def has(self, name: str | int) -> bool:
        """Whether a layer is finished: a decoder layer by number, another by name."""
        return self._file(name).exists()

    def save(self, name: str | int, layer: FinishedLayer) -> None:
        """Note a layer as finished, at once or not at all."""
        from safetensors.torch import save_file

        tensors = {f"changed/{key}": tensor.contiguous() for key, tensor in layer.changed.items()}
        forms = {}
        for linear, packed in layer.packed.items():
            tensors |= {f"packed/{linear}/{part}": tensor.contiguous() for part, tensor in packed.tensors.items()}
            if packed.order is not None:
                tensors[f"order/{linear}"] = packed.order
            forms[linear] = {
                "operation": packed.operation,
                "parts": list(packed.tensors),
                "out_features": packed.out_features,
                "in_features": packed.in_features,
                "params": dict(packed.params),
            }
        path = self._file(name)
        unfinished = path.with_suffix(".unfinished")
        save_file(tensors, str(unfinished), metadata={"layers": json.dumps(forms)})
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)
        self._settle_names()

    def load(self, name: str | int) -> FinishedLayer:
        """A finished layer."""
        from safetensors import safe_open

        path = self._file(name)
        try:
            with safe_open(str(path), framework="pt") as file:
                forms = json.loads(file.metadata()["layers"])
                packed = {linear: _packed(file, linear, form) for linear, form in forms.items()}
                keys = [key for key in file.keys() if key.startswith("changed/")]  # noqa: SIM118
                changed = {key.removeprefix("changed/"): file.get_tensor(key) for key in keys}
        except Exception as error:  # the library raises its own, OSError and KeyError
            raise CalibrationError(
                f"the finished layer can't be read: {error}", where=str(path), hint="Remove the folder, and start anew."
            ) from error
        return FinishedLayer(packed, changed)

    def finished(self) -> Iterator[str | int]:
        """Every finished layer: decoder layers in order, then the others by name."""
        yield from range(self.num_finished())
        yield from sorted(path.stem.removeprefix(f"{_OUTER}-") for path in self.path.glob(f"{_OUTER}-*.safetensors"))

    def _file(self, name: str | int) -> Path:
        stem = f"layer-{name:05}" if isinstance(name, int) else f"{_OUTER}-{name}"
        return self.path / f"{stem}.safetensors"

    def _write_text(self, name: str, text: str) -> None:
        unfinished = self.path / f"{name}.unfinished"
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self.path / name)
        self._settle_names()

    def _settle_names(self) -> None:
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _packed(file: Any, linear: str, form: Mapping[str, Any]) -> PackedWeight:
    order = f"order/{linear}"
    return PackedWeight(
        operation=form["operation"],
        tensors={part: file.get_tensor(f"packed/{linear}/{part}") for part in form["parts"]},
        out_features=form["out_features"],
        in_features=form["in_features"],
        params=form["params"],
        order=file.get_tensor(order) if order in file.keys() else None,  # noqa: SIM118
    )


class ChangedTensors(Mapping[str, torch.Tensor]):
    """The changed tensors of all finished layers; each is read when it is asked for."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._where: dict[str, str | int] = {}
        for name in run.finished():
            self._where |= dict.fromkeys(run.load(name).changed, name)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._run.load(self._where[key]).changed[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
