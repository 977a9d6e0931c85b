"""What a place for objects promises (`Store`): create-only put, get with ETag, head, list, delete.

Only create-only writes exist: nothing that a store holds is ever replaced through this protocol. `MemoryStore` is the
promise in a dict; `buckets.py` has it for every place that obstore reaches.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Blob", "MemoryStore", "Meta", "Store", "child_url", "put_same"]


@dataclass(frozen=True)
class Blob:
    """An object's bytes (or a range of them) and the ETag it had."""

    data: memoryview
    etag: str | None


@dataclass(frozen=True)
class Meta:
    """What a listing or a head says of an object: `size` in bytes, `modified` in seconds since 1970."""

    key: str
    size: int
    etag: str | None
    modified: float = 0.0


class Store(Protocol):
    """A place for objects. Keys are relative to `url`. Every method may raise StorageError or CredentialsError,
    UsageError where there is no such bucket, and DataError for a name that no key can have.
    """

    url: str

    async def get(self, key: str, start: int | None = None, stop: int | None = None) -> Blob | None:
        """An object's bytes [start, stop), None if there is no such object; a negative `start` counts from the end."""

    async def head(self, key: str) -> Meta | None:
        """An object's size and ETag, None if there is no such object."""

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        """Write an object that does not exist yet; False (and nothing written) if it does."""

    async def delete(self, key: str) -> None:
        """Remove an object; no error if there is none."""

    def list(self, prefix: str) -> AsyncIterator[Meta]:
        """All objects whose key begins with `prefix`, which ends with a slash or is empty."""


class MemoryStore:
    """A Store in a dict, for a calibration and for simulations."""

    def __init__(self, url: str = "memory://") -> None:
        self.url = url
        self.objects: dict[str, bytes] = {}

    async def get(self, key: str, start: int | None = None, stop: int | None = None) -> Blob | None:
        data = self.objects.get(key)
        return None if data is None else Blob(memoryview(data)[start:stop], self._etag(data))

    async def head(self, key: str) -> Meta | None:
        data = self.objects.get(key)
        return None if data is None else Meta(key, len(data), self._etag(data))

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        if key in self.objects:
            return False
        self.objects[key] = bytes(data)
        return True

    async def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    async def list(self, prefix: str) -> AsyncIterator[Meta]:
        for key in sorted(self.objects):
            if key.startswith(prefix):
                yield Meta(key, len(self.objects[key]), self._etag(self.objects[key]))

    @staticmethod
    def _etag(data: bytes) -> str:
        return f'"{hashlib.sha256(data).hexdigest()[:32]}"'


async def put_same(store: Store, key: str, data: bytes) -> bool:
    """Write unless it exists: whether `key` holds `data` afterwards: written now, or found there."""
    if await store.create(key, data):
        return True
    stored = await store.get(key)
    return stored is not None and bytes(stored.data) == data  # a memoryview compares item by item


def child_url(url: str, key: str) -> str:
    """The URL of an object below a store's URL."""
    return f"{url.rstrip('/')}/{key}" if key else url
