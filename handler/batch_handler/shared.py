"""Records that a client on the same machine left in shared memory: its request's body has the JSON header only.

Rule: one folder, files of it by plain names, and nothing is mapped. What is read is a copy, so a client that ends,
cuts its file short or writes on can neither crash the worker nor change records after their checksum was taken.

The parameters are those of Triton's system shared memory extension; a region needs no registration, since its name is
that of a file in the folder that the metadata gives:
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_shared_memory.html
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from batch_handler.tensors import GONE, OipError

__all__ = ["SHARED_MEMORY", "SharedMemory", "shared_memory_of"]

# Environment: the folder in a file system of memory that this server's user alone can open.
SHARED_MEMORY = "BATCH_HANDLER_SHARED_MEMORY"
_REGION = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,99}")


class SharedMemory:
    """The regions of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, region: str, offset: int, size: int) -> bytearray:
        """`size` bytes of a region; raises OipError where it has no such bytes. The caller bounds `size`."""
        if not _REGION.fullmatch(region):
            raise OipError(f"shared_memory_region is {region[:60]!r}, wanted the name of a file in {self.folder}")
        try:
            file = os.open(self.folder / region, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise OipError(f"shared_memory_region {region} can't be opened: {error.strerror}", GONE) from error
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise OipError(f"shared_memory_region {region} is no file", GONE)
            held = status.st_size
            if held < offset + size:
                raise OipError(f"shared_memory_region {region} has {held} bytes, wanted {offset} + {size}", GONE)
            data = bytearray(size)
            if (found := os.preadv(file, [data], offset)) != size:
                raise OipError(f"shared_memory_region {region} gave {found} bytes, wanted {size}", GONE)
        except OSError as error:
            raise OipError(f"shared_memory_region {region} can't be read: {error.strerror}", GONE) from error
        finally:
            os.close(file)
        return data


def shared_memory_of(environ: Mapping[str, str]) -> SharedMemory | None:
    """The server's shared memory; None where it has none."""
    folder = environ.get(SHARED_MEMORY)
    return SharedMemory(Path(folder)) if folder else None
