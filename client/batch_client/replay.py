"""Random chunks of a published output scored again, and compared bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batch_client.assemble import UnitAssembler
from batch_client.budget import ByteBudget
from batch_client.errors import DataError, MismatchError, UsageError
from batch_client.events import Observer, to_all
from batch_client.exchange import Exchange
from batch_client.jsontext import canonical_json
from batch_client.layout import OutputLayout
from batch_client.ledger import ChunkProof, Row
from batch_client.manifest import Manifest, manifest_rows, read_manifest
from batch_client.prepare import Services, prepare
from batch_client.scorer import Scorer
from batch_client.spec import RunSpec
from batch_client.storage import Store
from batch_client.stream import UnitStream
from batch_client.writer import encode_unit, proof_of

__all__ = ["Replay", "replay", "require_exact"]


@dataclass(frozen=True)
class Replay:
    """Chunks that were scored again and had the same bytes."""

    chunks: tuple[int, ...]
    records: int


def require_exact(manifest: Manifest) -> None:
    """Raises UsageError for a run that promised no equal bytes."""
    if not manifest.run.get("exact", True):
        raise UsageError("--replay: a --fast run promises no equal bytes")


async def replay(spec: RunSpec, services: Services, count: int, observers: tuple[Observer, ...] = ()) -> Replay:
    """Score `count` random chunks of the output of `spec` again. Writes nothing. Observers hear of its servers and
    requests.

    Raises DataError when a byte differs, of what is stored as of what is scored now, MismatchError when source, model
    or numerics are no longer those of the run, UsageError for a run that promised no equal bytes.
    """
    manifest = await read_manifest(services.output_store)
    require_exact(manifest)
    prepared = await prepare(spec, services, "or verify without --replay")
    prepared.identity.require_same(canonical_json(manifest.run), services.output_store.url,
                                   "what has changed since can't be scored again as it was")
    layout = await OutputLayout.open(prepared.plan, spec.codec)
    emit = to_all(observers)
    prepared.pool.tell(emit)
    exchange = Exchange(servers=services.servers, pool=prepared.pool, contract=prepared.contract, exact=True,
                        patience=spec.patience, clock=services.clock, rng=services.rng, emit=emit)
    scorer = Scorer(exchange, prepared.plan.micro_batch, emit)
    chosen = set(services.rng.sample(range(prepared.plan.unit_count), min(count, prepared.plan.unit_count)))
    published = {row.unit: row async for row in manifest_rows(services.output_store, manifest) if row.unit in chosen}
    done = 0
    for index in sorted(chosen):
        unit = prepared.plan.unit(index)
        assembler = UnitAssembler(unit, prepared.plan.outputs)
        # A chunk that is missing now and was not then has another ETag than its row.
        stream = UnitStream(prepared.source, prepared.plan, unit, ByteBudget(spec.max_bytes_in_flight),
                            allow_missing=True)
        async for span, records, lease in stream.spans():
            scored = await scorer.score(span, records)
            assembler.place(span, scored.outputs, scored.status)
            lease.release()
        _same_source(published[index], stream.etags, prepared.source.url)
        found = [await proof_of(key, data) async for key, data in encode_unit(layout, assembler)]
        await _compare(published[index], found, services.output_store)
        done += unit.count
    return Replay(tuple(sorted(chosen)), done)


def _same_source(wanted: Row, found: Mapping[str, str | None], where: str) -> None:
    for key, etag in found.items():
        if wanted.source.get(key, etag) != etag:
            raise MismatchError(f"{where}: chunk {key} is another one than was scored: nothing can be said of the "
                                "output")


async def _compare(wanted: Row, found: list[ChunkProof], store: Store) -> None:
    for there, now in zip(wanted.chunks, found, strict=True):
        if there != now:
            raise DataError(f"{store.url}: {now.key} scored again has SHA-256 {now.sha256}, published was "
                            f"{there.sha256}: replay on another machine to learn which of the two computes otherwise; "
                            "--deep says whether what is stored is what was published")
        blob = await store.get(there.key)
        stored = None if blob is None else await proof_of(there.key, blob.data)
        if stored != there:
            raise DataError(f"{store.url}: {there.key} scored again has the SHA-256 that was published, stored is "
                            f"{'nothing' if stored is None else stored.sha256}: restore it")

