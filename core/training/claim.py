"""The folder of a run belongs to one run at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from drivetrain.errors import TrainingError


@contextmanager
def claimed(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder, which is made where it is not there, as the only process that writes to it.

    The folder itself is locked, so that nothing is left in it; the lock ends with the process, however that ends. A
    file system without locks is noted. Raises TrainingError when another run holds the folder, or it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise TrainingError(
            f"the folder of the run can't be written: {error.strerror or error}", where=str(folder)
        ) from error
    try:
        _lock(handle, folder, note)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path, note: Callable[[str], None]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrainingError(
            "another run is writing to this folder",
            where=str(folder),
            hint="Wait for it or end it, or give this one its own trainer.folder and store.folder.",
        ) from error
    except OSError as error:
        note(f"{folder} can't be locked ({error.strerror}): see to it that no other run writes there")
