"""Folders for the length of a command, under a random name. Whoever uses one holds a file in it locked (`flock`), so
that what a process that was killed has left is known, and goes with a later command of its kind.
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

__all__ = ["GOING", "LOCK", "RANDOM", "is_ours", "sweep_folders", "temporary_folder"]

# The end of a name that mkdtemp makes; and behind it where the folder is being removed.
RANDOM = r"[A-Za-z0-9_]{8}"
GOING = ".gone"
# A file, since a network's file system may keep locks of folders to one machine. server_guard.py has the same.
LOCK = "lock"
# Between making a folder and locking it; a server's guard needs a moment to start.
UNLOCKED_SECONDS = 60.0


@contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """A new folder for this user alone, removed at the end of the block, as are those of the same kind that were left.

    Raises ServingError where none can be made.
    """
    prefix = f"batch-client-{kind}-"
    try:
        sweep_folders(Path(tempfile.gettempdir()), prefix, _remove, LOCK)
        folder = Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as error:
        raise ServingError(f"no temporary folder can be made ({error}): set TMPDIR to a place that can be "
                           "written") from error
    handle = _locked(folder)
    try:
        yield folder
    finally:
        _remove(folder)
        if handle is not None:
            os.close(handle)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: Path) -> int | None:
    """The open file that holds the folder locked; None where none can be, and nothing would be known to be left."""
    with suppress(ImportError, OSError):
        import fcntl  # noqa: PLC0415 - not on Windows

        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        return handle
    return None


def sweep_folders(parent: Path, prefix: str, remove: Callable[[Path], None], lock: str = ".") -> None:
    """Have `remove` take this user's folders whose names are `prefix` and RANDOM and whose `lock`, a file in them or
    the folder itself, nobody holds locked.
    """
    with suppress(ImportError, OSError):
        import fcntl  # noqa: PLC0415 - not on Windows

        for folder in parent.glob(f"{prefix}*"):
            with suppress(OSError):  # of one folder, which somebody may be removing: the others are looked at too
                # A removal that was cut off has left the second name.
                if (not re.fullmatch(re.escape(prefix) + RANDOM, folder.name.removesuffix(GOING))
                        or not is_ours(folder) or time.time() - folder.lstat().st_mtime <= UNLOCKED_SECONDS):
                    continue
                handle = os.open(folder / lock, (os.O_RDONLY if lock == "." else os.O_RDWR) | os.O_NOFOLLOW)
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
