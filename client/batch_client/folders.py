"""Folders for the length of a command, under a random name: whoever uses one holds it locked (`flock`), so that what a
process that was killed has left is known, and goes with the next command of its kind.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batch_client.errors import ServingError

__all__ = ["GOING", "RANDOM", "is_ours", "sweep_folders", "temporary_folder"]

# The end of a name that mkdtemp makes; and behind it where the folder is being removed.
RANDOM = r"[A-Za-z0-9_]{8}"
GOING = ".gone"
# Between making a folder and locking it; a server's guard needs a moment to start.
UNLOCKED_SECONDS = 60.0


@contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """A new folder for this user alone, removed at the end of the block, as are those of the same kind that were left.

    Raises ServingError where none can be made.
    """
    prefix = f"batch-client-{kind}-"
    sweep_folders(Path(tempfile.gettempdir()), prefix, _remove)
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as error:
        raise ServingError(f"no temporary folder can be made ({error}): set TMPDIR to a place that can be "
                           "written") from error
    try:
        with _locked(folder):
            yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with suppress(ImportError):  # on Windows nothing is known to be left
        import fcntl  # noqa: PLC0415 - not on Windows

        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            yield
        finally:
            os.close(handle)
        return
    yield


def sweep_folders(parent: Path, prefix: str, remove: Callable[[Path], None]) -> None:
    """Have `remove` take this user's folders whose names are `prefix` and RANDOM, which nobody holds locked."""
    with suppress(ImportError, OSError):
        import fcntl  # noqa: PLC0415 - not on Windows

        for folder in parent.glob(f"{prefix}*"):
            with suppress(OSError):  # of one folder, which somebody may be removing: the others are looked at too
                # A removal that was cut off has left the second name.
                if (not re.fullmatch(re.escape(prefix) + RANDOM, folder.name.removesuffix(GOING))
                        or not is_ours(folder) or time.time() - folder.lstat().st_mtime <= UNLOCKED_SECONDS):
                    continue
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it is used
                    remove(folder)
                finally:
                    os.close(handle)


def is_ours(folder: Path) -> bool:
    """Whether it is a folder, and this user's alone."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
