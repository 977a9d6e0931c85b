"""An archive by path or URL → a file on this machine, for as long as it is needed."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from batch_client.errors import ServingError
from batch_client.storage import open_store

__all__ = ["local_archive"]


def _existing(location: str) -> Path:
    path = Path(location).expanduser().absolute()
    if not path.is_file():
        raise ServingError(f"--archive {location}: there is no such file; make one with batch-client pack")
    return path


@asynccontextmanager
async def local_archive(location: str, *, anonymous: bool = False) -> AsyncIterator[Path]:
    """The archive at a path, or fetched from s3://, https:// or another store's URL to a temporary file.

    Raises ServingError when there is none.
    """
    if len(urlsplit(location).scheme) <= 1:
        yield _existing(location)
        return
    base, _, name = location.rstrip("/").rpartition("/")
    blob = await open_store(base, anonymous=anonymous).get(name)
    if blob is None:
        raise ServingError(f"--archive {location}: there is no such object")
    with tempfile.TemporaryDirectory(prefix="batch-client-") as folder:
        path = Path(folder) / name
        path.write_bytes(blob.data)
        yield path
