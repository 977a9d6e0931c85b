"""Shared memory between client and server on one machine: a request's records, and room for its outputs, as a file in
a folder in memory.

What goes through HTTP is copied by the socket, by Java several times and by the worker's socket again; what lies in
memory is written once and read once. A region has the name of one attempt at a request. Its file becomes another one's
only when the attempt has its answer; else it is removed, and a server that reads or writes it later does so where
nobody looks.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from batch_client.folders import GOING, RANDOM, is_ours, sweep_folders

__all__ = ["MEMORY", "Region", "Regions", "new_folder", "remove_folder", "sweep", "usable_folder"]

MEMORY = Path("/dev/shm")  # noqa: S108 - folders there are made by mkdtemp, for their owner alone
PREFIX = "batch-client-"
_FOLDER = re.compile(re.escape(f"{MEMORY}/{PREFIX}") + RANDOM)


def new_folder() -> Path | None:
    """A folder in memory for this user alone; None where the machine has no such place.

    Its server's guard locks it; folders that nobody has locked are removed here.
    """
    sweep_folders(MEMORY, PREFIX, remove_folder)
    try:
        return Path(tempfile.mkdtemp(prefix=PREFIX, dir=MEMORY))
    except OSError:
        return None


def remove_folder(folder: Path) -> None:
    """Remove what `new_folder` made, and the regions in it."""
    # Under another name nobody can make a region in it meanwhile. server_guard.py does the same.
    going = folder.with_suffix(GOING)
    with suppress(OSError):
        folder.rename(going)
    for path in (going, folder):
        shutil.rmtree(path, ignore_errors=True)


def usable_folder(said: object) -> Path | None:
    """The folder that a server says it reads, if it is on this machine and this user's alone, else None.

    Its name is random, so a folder of that name here is that server's. Nothing else that a server may name is taken.
    """
    if not isinstance(said, str) or not _FOLDER.fullmatch(said):
        return None
    return Path(said) if is_ours(Path(said)) else None


class Region:
    """One file in shared memory, open. answered: set it when the server is done with it, so that it is used again."""

    def __init__(self, file: int) -> None:
        self._file = file
        self.answered = False

    def read(self, offset: int, size: int) -> bytearray:
        """`size` bytes from `offset` on, fewer where the file ends. Raises OSError."""
        data = bytearray(size)
        found = os.preadv(self._file, [data], offset)
        return data if found == size else data[:found]


class Regions:
    """What one client has in the shared memory of its servers; closed, nothing of it is left.

    A file whose request was answered gets the name of the next region: written pages cost a sixth of new ones.
    """

    def __init__(self) -> None:
        self._free: dict[Path, list[Path]] = {}
        self._given_up: set[Path] = set()

    @contextmanager
    def region(self, folder: Path, name: str, parts: Sequence[memoryview], size: int = 0) -> Iterator[Region]:
        """A region of `folder` that begins with `parts` one after the other and has at least `size` bytes, for as long
        as the block lasts; with no `size` it has the parts only. What follows them in a new file takes memory only when
        it is written.

        Raises OSError when it can't be written whole: no room, or the folder is gone with its server.
        """
        free = self._free.setdefault(folder, [])
        path = folder / name
        fresh = os.O_CREAT | os.O_EXCL
        if free:
            with suppress(FileNotFoundError):  # idle for so long that its server has swept it
                free.pop().rename(path)
                fresh = 0
        try:
            file = _opened(path, fresh, parts, size)
        except BaseException:
            # In memory that is full there is nothing to spare: neither half a region nor files that wait for the next.
            _unlink([path, *free])
            free.clear()
            raise
        region = Region(file)
        try:
            yield region
        finally:
            os.close(file)
            if region.answered and folder not in self._given_up:
                free.append(path)
            else:
                _unlink([path])

    def give_up(self, folder: Path) -> None:
        """Keep no files there for later regions: those of now are removed when their blocks end."""
        self._given_up.add(folder)
        _unlink(self._free.pop(folder, ()))

    def close(self) -> None:
        """Remove every region."""
        for free in self._free.values():
            _unlink(free)
        self._free.clear()


def _opened(path: Path, fresh: int, parts: Sequence[memoryview], size: int) -> int:
    """A file that begins with `parts` and has at least `size` bytes, open to read and write. Raises OSError."""
    file = os.open(path, os.O_RDWR | fresh | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        held, least = _own_size(file, path), size or sum(len(part) for part in parts)
        # A file without room for outputs gives back what those of an earlier request took: records need it more.
        if held < least or not size:
            os.ftruncate(file, least)
        _write(file, parts)
    except BaseException:
        os.close(file)
        raise
    return file


def _own_size(file: int, path: Path) -> int:
    """How long a file is; raises PermissionError if it is not this user's: its server may have ended, and another user
    have made a folder of its name.
    """
    status = os.fstat(file)
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{path} is another user's")
    return status.st_size


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _write(file: int, parts: Sequence[memoryview]) -> None:
    for part in parts:
        left = part
        while left:
            left = left[os.write(file, left):]


def sweep(folder: Path, seconds: float) -> None:
    """Remove regions older than that: whoever made them was killed, or has given up."""
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                if time.time() - path.lstat().st_mtime > seconds:
                    path.unlink()
