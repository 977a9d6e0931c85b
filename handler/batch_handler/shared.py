"""Shared memory with clients on the same machine: their records are read there, and large outputs written.

Rule: one folder of this user's own, files of it by plain names that clients have made, and nothing is mapped. What is
read is a copy, so a client that ends, cuts its file short or writes on can neither crash the worker nor change records
after their checksum was taken. A file that is too short is not written.

The parameters are those of Triton's system shared memory extension; a region needs no registration, since its name is
that of a file in the folder that the metadata gives:
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_shared_memory.html
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from batch_handler.tensors import GONE, OipError

__all__ = ["SHARED_MEMORY", "SharedMemory", "shared_memory_of"]

# Environment: the folder in a file system of memory that this server's user alone can open.
SHARED_MEMORY = "BATCH_HANDLER_SHARED_MEMORY"
_REGION = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,99}")


class SharedMemory:
    """The regions of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, region: str, offset: int, size: int) -> memoryview:
        """`size` bytes of a region; raises OipError where it has no such bytes. The caller bounds `size`."""
        with self._open(region, os.O_RDONLY, offset + size) as file:
            data = np.empty(size, np.uint8).data  # not zeroed, as a bytearray is
            found = 0
            while found < size and (more := os.preadv(file, [data[found:]], offset + found)):  # at most 2 GiB at once
                found += more
            if found != size:
                raise OipError(f"shared_memory_region {region} gave {found} bytes, wanted {size}", GONE)
        return data

    def write(self, region: str, offset: int, data: memoryview) -> None:
        """Put `data` into a region; raises OipError where that is no file with so many bytes, or the memory is full."""
        with self._open(region, os.O_WRONLY, offset + data.nbytes) as file:
            if (taken := os.pwrite(file, data, offset)) != data.nbytes:
                raise OipError(f"shared_memory_region {region} took {taken} bytes, wanted {data.nbytes}", GONE)

    @contextmanager
    def _open(self, region: str, how: int, end: int) -> Iterator[int]:
        """A region of at least `end` bytes."""
        self.check_name(region)
        try:
            file = self._open_in_folder(region, how)
        except OSError as error:
            raise OipError(f"shared_memory_region {region} can't be opened: {error.strerror}", GONE) from error
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise OipError(f"shared_memory_region {region} is no file", GONE)
            if status.st_size < end:
                raise OipError(f"shared_memory_region {region} has {status.st_size} bytes, wanted {end}", GONE)
            yield file
        except OSError as error:
            raise OipError(f"shared_memory_region {region} can't be used: {error.strerror}", GONE) from error
        finally:
            os.close(file)

    def _open_in_folder(self, region: str, how: int) -> int:
        """Where the folder went and another user made one of its name, or a link, nothing is opened there."""
        flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | flags)
        try:
            if os.fstat(folder).st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "the folder is another user's")
            return os.open(region, how | flags, dir_fd=folder)
        finally:
            os.close(folder)

    def check_name(self, region: str) -> None:
        """Raises OipError if no region can be called so."""
        if not _REGION.fullmatch(region):
            raise OipError(f"shared_memory_region is {region[:60]!r}, wanted the name of a file in {self.folder}")


def shared_memory_of(environ: Mapping[str, str]) -> SharedMemory | None:
    """The server's shared memory; None where it has none."""
    folder = environ.get(SHARED_MEMORY)
    return SharedMemory(Path(folder)) if folder else None
