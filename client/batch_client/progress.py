"""How far a run is, from its ledger: from any machine, without a model and without the clients that work on it."""

from __future__ import annotations

from dataclasses import dataclass

from batch_client.errors import MismatchError
from batch_client.jsontext import parse_json
from batch_client.layout import FAILED_PREFIX, LEDGER_PREFIX, REMOVING_KEY, SPEC_KEY
from batch_client.ledger import LedgerView
from batch_client.place import generation_of
from batch_client.publish import published_manifest
from batch_client.storage import Meta, Store, child_url

__all__ = ["Progress", "Writer", "progress_of"]

# The rate is that of the segments written in this many last seconds before the newest.
RATE_SECONDS = 600.0
# Several segments may be written at once, and stores tell whole seconds: over less than this the rate is chance.
RATE_LEAST_SECONDS = 10.0


@dataclass(frozen=True)
class Writer:
    """One client's life: its segments, and when it wrote the last, in seconds since 1970 by the store's clock."""

    name: str
    segments: int
    last_wrote: float


@dataclass(frozen=True)
class Progress:
    """State of an output; `removing` says that its removal has begun, and nothing in it is proven any more.

    chunks_with_dead_letters: output chunks of which records failed. records_per_s: how quick the clients were of late;
    None, as `seconds_left`, where nothing can be said.
    """

    output: str
    published: bool
    removing: bool
    root: str | None
    records: int
    done: int
    failed: int
    not_finite: int
    chunks: int
    chunks_done: int
    chunks_with_dead_letters: int
    records_per_s: float | None
    seconds_left: float | None
    writers: tuple[Writer, ...]


async def progress_of(store: Store) -> Progress:
    """Raises MismatchError for a place that is no output of ours, StorageError for a ledger that can't be read."""
    spec = await store.get(SPEC_KEY)
    if spec is None:
        raise MismatchError(f"{store.url}: no output of batch-client (no {SPEC_KEY})")
    try:
        run = parse_json(spec.data)
        records, a_chunk = int(run["stop"]) - int(run["start"]), int(run["chunk_records"])
    except (ValueError, KeyError, TypeError) as error:
        raise MismatchError(f"{child_url(store.url, SPEC_KEY)} can't be read ({error})") from error
    if records < 1 or a_chunk < 1:
        raise MismatchError(f"{child_url(store.url, SPEC_KEY)} can't be of a run: {records} records in chunks "
                            f"of {a_chunk}")
    chunks = -(-records // a_chunk)
    generation = await generation_of(store)
    # What is published says itself what it has, whatever has become of its ledger.
    manifest = await published_manifest(store)
    view = LedgerView(store, chunks, generation or "")
    writers: tuple[Writer, ...] = ()
    segments: list[Meta] = []
    if generation is not None:
        if manifest is None:
            await view.refresh()
        writers, segments = await _writers(store, generation)
    proven = manifest or view
    rate = _rate([(meta.modified, meta.size) for meta in segments], proven.records)
    return Progress(
        output=store.url,
        published=manifest is not None,
        removing=await store.head(REMOVING_KEY) is not None,
        root=None if manifest is None else manifest.root,
        records=records,
        done=proven.records,
        failed=proven.failed,
        not_finite=proven.not_finite,
        chunks=chunks,
        chunks_done=len(view) if manifest is None else chunks,
        # By chunk: one that several clients, or one of them again, took apart has several files.
        chunks_with_dead_letters=len({meta.key.partition("-")[0] async for meta in store.list(FAILED_PREFIX)}),
        records_per_s=rate,
        seconds_left=(records - view.records) / rate if rate and manifest is None else None,
        writers=writers,
    )


async def _writers(store: Store, generation: str) -> tuple[tuple[Writer, ...], list[Meta]]:
    """Whoever wrote, and all segments, both in the order of time."""
    ours = f"{LEDGER_PREFIX}{generation}/"
    segments = sorted([meta async for meta in store.list(ours)], key=lambda meta: meta.modified)
    by_name: dict[str, list[Meta]] = {}
    for meta in segments:
        by_name.setdefault(meta.key[len(ours):].partition("/")[0], []).append(meta)
    writers = sorted((Writer(name, len(own), own[-1].modified) for name, own in by_name.items()),
                     key=lambda writer: writer.last_wrote)
    return tuple(writers), segments


def _rate(segments: list[tuple[float, int]], done: int) -> float | None:
    """Records of the segments in the last stretch over its seconds. A segment, of which its time and its bytes are
    known, has rows of about one size, and so as much of the records as of all segments' bytes.
    """
    recent = [(time, size) for time, size in segments if time >= segments[-1][0] - RATE_SECONDS]
    seconds = recent[-1][0] - recent[0][0] if recent else 0.0
    if seconds < RATE_LEAST_SECONDS or not done:
        return None
    share = sum(size for _, size in recent[1:]) / max(1, sum(size for _, size in segments))
    return done * share / seconds
