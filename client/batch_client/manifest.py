"""The manifest: every chunk of a published output with size and SHA-256, and one root hash over them.

`_run/manifest.json` is its head; the rows are in parts of bounded size beside it, `_run/manifest/<first unit>.json`,
which the head proves. So neither who publishes nor who reads ever holds all rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from batch_client.errors import DataError, MismatchError
from batch_client.jsontext import canonical_json, parse_json
from batch_client.layout import MANIFEST_KEY, MANIFEST_PREFIX
from batch_client.ledger import ChunkProof, Row, row_json, rows_from_json
from batch_client.spec import RunIdentity
from batch_client.storage import Store, child_url

__all__ = ["Manifest", "ManifestBuilder", "RootHash", "manifest_rows", "read_manifest"]

FORMAT = 3
# A part is closed by the row with which it reaches this many bytes: some 13,000 rows of an image run.
PART_BYTES = 4 << 20
_FAST = ("the run was not exact: a record's bits may depend on the records that it was scored with, the servers may "
         "have had different numerics, and of two clients' bytes for one chunk the first were kept")


class RootHash:
    """One hash over every chunk's key, size and SHA-256 in order, and nothing that varies."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, row: Row) -> None:
        for chunk in row.chunks:
            self._digest.update(f"{chunk.key} {chunk.size} {chunk.sha256}\n".encode())

    def __str__(self) -> str:
        """The hash of what was added so far, as `sha256:<hex>`."""
        return f"sha256:{self._digest.hexdigest()}"


@dataclass(frozen=True)
class Manifest:
    """A manifest's head as it was read: `run` is the identity's fields, `records` how many it was for, the counts are
    of records by status, `missing_chunks` of source chunks that were taken as the fill value, once for each output
    chunk that read them; `parts` are in the order of the units.
    """

    root: str
    records: int
    run: Mapping[str, Any]
    ok: int
    failed: int
    not_finite: int
    missing_chunks: int
    metadata: tuple[ChunkProof, ...]
    parts: tuple[ChunkProof, ...]


class ManifestBuilder:
    """Rows in the order of the units → parts, then the head. Equal rows have equal bytes, whoever builds them."""

    def __init__(self) -> None:
        self.root = RootHash()
        self.units = 0
        self._missing_chunks = 0
        self._counts = dict.fromkeys(("ok", "failed", "not_finite"), 0)
        self._parts: list[ChunkProof] = []
        self._rows: list[bytes] = []
        self._nbytes = 0

    def add(self, row: Row) -> tuple[str, bytes] | None:
        """Take the next row; key and bytes of the part that it closes."""
        self.root.add(row)
        self.units += 1
        for name in self._counts:
            self._counts[name] += getattr(row, name)
        self._missing_chunks += row.missing_chunks
        self._rows.append(row_json(row))
        self._nbytes += len(self._rows[-1])
        return self.close() if self._nbytes >= PART_BYTES else None

    def close(self) -> tuple[str, bytes] | None:
        """Key and bytes of the rows that are in no part yet, if there are any."""
        if not self._rows:
            return None
        key = f"{MANIFEST_PREFIX}{self.units - len(self._rows):08d}.json"
        body = b'{"rows":[%b]}' % b",".join(self._rows)
        self._parts.append(ChunkProof(key, len(body), hashlib.sha256(body).hexdigest()))
        self._rows, self._nbytes = [], 0
        return key, body

    def head(self, identity: RunIdentity, metadata: Iterable[ChunkProof]) -> bytes:
        """The head's bytes, once all parts are closed. `metadata` are the group's and the arrays' documents."""
        value: dict[str, Any] = {
            "format": FORMAT,
            "root": str(self.root),
            "run": identity.to_value(),
            "records": self._counts,
            "missing_chunks": self._missing_chunks,
            "metadata": list(metadata),
            "parts": self._parts,
        }
        if not identity.exact:
            value["given_up"] = _FAST
        return canonical_json(value)


async def read_manifest(store: Store) -> Manifest:
    """The head. Raises MismatchError when there is none, or it can't be read."""
    blob = await store.get(MANIFEST_KEY)
    where = child_url(store.url, MANIFEST_KEY)
    if blob is None:
        raise MismatchError(f"{where}: there is none: {store.url} is no published output of batch-client")
    try:
        value = parse_json(blob.data)
        if value["format"] != FORMAT:
            raise MismatchError(f"{where} has format {value['format']!r}, wanted {FORMAT}: use the version of "
                                "batch-client that published it")
        metadata, parts = (tuple(ChunkProof(str(key), int(size), str(sha256)) for key, size, sha256 in value[name])
                           for name in ("metadata", "parts"))
        ok, failed, not_finite = (int(value["records"][name]) for name in ("ok", "failed", "not_finite"))
        records = int(value["run"]["stop"]) - int(value["run"]["start"])
        return Manifest(str(value["root"]), records, value["run"], ok, failed, not_finite,
                        int(value["missing_chunks"]), metadata, parts)
    except (ValueError, KeyError, TypeError) as error:
        raise MismatchError(f"{where} can't be read ({type(error).__name__}: {error})") from error


async def manifest_rows(store: Store, manifest: Manifest) -> AsyncIterator[Row]:
    """All rows in order, read a part at a time.

    Raises DataError for a part that is missing, or is not what the head says.
    """
    for part in manifest.parts:
        blob = await store.get(part.key)
        where = child_url(store.url, part.key)
        if blob is None:
            raise DataError(f"{where} is missing: it is not what was published")
        found = hashlib.sha256(blob.data).hexdigest()
        if found != part.sha256:
            raise DataError(f"{where} is not what was published: it has SHA-256 {found}, wanted {part.sha256}")
        try:
            rows = rows_from_json(blob.data)
        except ValueError as error:
            raise DataError(f"{where} can't be read ({error})") from error
        for row in rows:
            yield row
