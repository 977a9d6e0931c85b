"""An archive by path or URL → a file on this machine, for as long as it is needed."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from batch_client.errors import CredentialsError, ServingError
from batch_client.machine import device
from batch_client.storage import Store, open_store
from batch_client.tuning import tuning_path

__all__ = ["local_archive"]


def _existing(location: str) -> Path:
    path = Path(location).expanduser().absolute()
    if not path.is_file():
        raise ServingError(f"--archive {location}: there is no such file; make one with batch-client pack")
    return path


@asynccontextmanager
async def local_archive(location: str, *, anonymous: bool = False) -> AsyncIterator[Path]:
    """The archive at a path, or fetched from s3://, https:// or another store's URL to a temporary file, with the
    tuning file for this kind of machine beside it where there is one.

    Raises ServingError when there is none.
    """
    if len(urlsplit(location).scheme) <= 1:
        yield _existing(location)
        return
    base, _, name = location.rstrip("/").rpartition("/")
    store = open_store(base, anonymous=anonymous)
    blob = await store.get(name)
    if blob is None:
        raise ServingError(f"--archive {location}: there is no such object")
    with tempfile.TemporaryDirectory(prefix="batch-client-") as folder:
        path = Path(folder) / name
        path.write_bytes(blob.data)
        await _fetch_tuning(store, path)
        yield path


async def _fetch_tuning(store: Store, archive: Path) -> None:
    path = tuning_path(archive, await asyncio.to_thread(device, os.environ))
    try:
        blob = await store.get(f"{path.parent.name}/{path.name}")
    except CredentialsError:  # what S3 says of a missing object to whom may not list: there is none
        return
    if blob is not None:
        path.parent.mkdir()
        path.write_bytes(blob.data)
