"""`_run/manifest.json`: every chunk of a published output with size and SHA-256, and one root hash over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from batch_client.errors import MismatchError
from batch_client.layout import MANIFEST_KEY
from batch_client.ledger import ChunkProof, Row
from batch_client.spec import RunIdentity, canonical_json
from batch_client.storage import Store, child_url

__all__ = ["Manifest", "read_manifest", "root_over", "write_manifest"]

FORMAT = 1
_FAST = ("the run was not exact: a record's bits may depend on the records that it was scored with, the servers may "
         "have had different numerics, and of two clients' bytes for one chunk the first were kept")


@dataclass(frozen=True)
class Manifest:
    """A manifest as it was read: `run` is the identity's fields, `rows` are in the order of the units."""

    root: str
    records: int
    run: Mapping[str, Any]
    rows: tuple[Row, ...]
    metadata: tuple[ChunkProof, ...]


def root_over(rows: Iterable[Row]) -> str:
    """One hash over every chunk's key, size and SHA-256 in order, and nothing that varies, as `sha256:<hex>`."""
    digest = hashlib.sha256()
    for row in rows:
        for chunk in row.chunks:
            digest.update(f"{chunk.key} {chunk.size} {chunk.sha256}\n".encode())
    return "sha256:" + digest.hexdigest()


def write_manifest(identity: RunIdentity, rows: Iterable[Row], metadata: Iterable[ChunkProof]) -> bytes:
    """The manifest's bytes; equal for equal runs. `metadata` are the group's and the arrays' documents."""
    rows = list(rows)
    value: dict[str, Any] = {
        "format": FORMAT,
        "root": root_over(rows),
        "run": identity.to_value(),
        "records": {
            "ok": sum(row.ok for row in rows),
            "failed": sum(row.failed for row in rows),
            "not_finite": sum(row.not_finite for row in rows),
        },
        "metadata": [[document.key, document.size, document.sha256] for document in metadata],
        "rows": [row.to_value() for row in rows],
    }
    if not identity.exact:
        value["given_up"] = _FAST
    return canonical_json(value)


async def read_manifest(store: Store) -> Manifest:
    """Raises MismatchError when there is none, or it can't be read."""
    blob = await store.get(MANIFEST_KEY)
    where = child_url(store.url, MANIFEST_KEY)
    if blob is None:
        raise MismatchError(f"{where}: there is none: {store.url} is no published output of batch-client")
    try:
        value = json.loads(bytes(blob.data))
        if value["format"] != FORMAT:
            raise MismatchError(f"{where} has format {value['format']!r}, wanted {FORMAT}: use a newer batch-client")
        return Manifest(str(value["root"]), int(value["run"]["stop"]) - int(value["run"]["start"]), value["run"],
                        tuple(Row.from_value(row) for row in value["rows"]),
                        tuple(ChunkProof(str(key), int(size), str(sha256)) for key, size, sha256 in value["metadata"]))
    except (ValueError, KeyError, TypeError) as error:
        raise MismatchError(f"{where} can't be read ({type(error).__name__}: {error})") from error
