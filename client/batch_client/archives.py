"""An archive by path or URL → a file on this machine, for as long as it is needed.

Rule: the tuning file beside it is optional. A store that has none says so; a web server may answer any name with an
error or a page, so from there only what is a tuning file is one, and `tuning` refuses it if it is damaged.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote

from batch_client.buckets import ObjectStore, open_store
from batch_client.errors import CredentialsError, ServingError, StorageError, UsageError
from batch_client.folders import temporary_folder
from batch_client.machine import device
from batch_client.storage import Store, child_url
from batch_client.tuning import MAX_BYTES, is_tuning, tuning_path
from batch_client.urls import WEB, require_path_alone, split_url

__all__ = ["local_archive"]

# Each piece has a store's whole patience for itself, and is all of an archive that is held in memory.
# 16 MiB take longer than that on a line of under 0.3 MB/s only.
PIECE_BYTES = 16 << 20
WEB_SECONDS = 3600.0  # for an archive in one answer


def _existing(location: str) -> Path:
    try:
        path = Path(location).expanduser().absolute()
        found, folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a home that nobody has
        raise ServingError(f"archive {location}: can't be read ({error}); name a file made by batch-client "
                           "pack") from error
    if folder:
        raise ServingError(f"archive {location}: this is a folder; wanted a file made by batch-client pack")
    if not found:
        raise ServingError(f"archive {location}: there is no such file; make one with batch-client pack")
    return path


@asynccontextmanager
async def local_archive(location: str, *, anonymous: bool = False) -> AsyncIterator[Path]:
    """The archive at a path, or fetched from s3://, https:// or another store's URL to a temporary file, with the
    tuning file for this kind of machine beside it where there is one.

    Raises UsageError for a URL that names no object by its path alone; ServingError when there is none, it has no room
    here, or a tuning file beside it is too large for one; StorageError when a store fails or it is replaced meanwhile.
    """
    scheme = split_url(location).scheme
    if len(scheme) <= 1:
        yield _existing(location)
        return
    base, name = _split(location)
    store = open_store(base, anonymous=anonymous)
    web = scheme in WEB
    with temporary_folder("archive") as folder:
        path = folder / name
        try:
            if not await (_fetch_at_once(open_store(base, anonymous=anonymous, seconds=WEB_SECONDS), path) if web else
                          _fetch(store, path)):
                raise ServingError(f"archive {location}: there is no such object")
            await _fetch_tuning(store, path, web=web)
        except OSError as error:
            raise ServingError(f"archive {location}: no room for it here ({error}): set TMPDIR to a place that "
                               "can be written and is large enough") from error
        yield path


def _split(url: str) -> tuple[str, str]:
    """The URL of an object's folder, and the object's name there."""
    require_path_alone(url)
    base, _, name = url.rstrip("/").rpartition("/")
    name = unquote(name)
    if "://" not in base:
        raise UsageError(f"archive {url}: wanted an object below a bucket or host, such as s3://bucket/model.mar")
    if "/" in name or "\0" in name or name in (".", ".."):  # it becomes a file's
        raise UsageError(f"archive {url}: {name!r} can't be a file's name")
    return base, name


async def _fetch_at_once(store: ObjectStore, path: Path) -> bool:
    """As `_fetch`, in one answer: not every web server gives ranges."""
    found = False
    with path.open("wb") as file:
        async for piece in store.stream(path.name):
            found = True
            file.write(piece)
    return found


async def _fetch(store: Store, path: Path) -> bool:
    """The object of `path`'s name into that file; False if there is none."""
    with path.open("wb") as file:
        meta = await store.head(path.name)
        if meta is None:
            return False
        for start in range(0, meta.size, PIECE_BYTES):
            blob = await store.get(path.name, start, min(start + PIECE_BYTES, meta.size))
            if blob is None or blob.etag != meta.etag:
                raise StorageError(f"{child_url(store.url, path.name)} was replaced while it was fetched: try again")
            file.write(blob.data)
    return True


async def _fetch_tuning(store: Store, archive: Path, *, web: bool) -> None:
    path = tuning_path(archive, await asyncio.to_thread(device, os.environ))
    key = f"{path.parent.name}/{path.name}"
    try:
        # Not every web server gives ranges, and most give a size: so it is asked for before the bytes are.
        meta = await store.head(key)
        if meta is None or (web and meta.size > MAX_BYTES):
            return
        if meta.size > MAX_BYTES:
            raise ServingError(f"{child_url(store.url, key)} is over {MAX_BYTES:,} bytes, which no tuning file is: "
                               "delete it")
        blob = await store.get(key)
    except CredentialsError:  # what S3 says of a missing object to whom may not list: there is none
        return
    except StorageError:
        if web:
            return
        raise
    if blob is not None and (not web or is_tuning(bytes(blob.data))):
        path.parent.mkdir()
        path.write_bytes(blob.data)
