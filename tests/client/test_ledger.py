"""A view of a ledger says what a dict of its rows would, in a few bytes a chunk; and proofs that can't be written."""

import asyncio
import dataclasses
import tracemalloc
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from batch_client import ledger
from batch_client.errors import DataError, MismatchError, StorageError
from batch_client.events import ChunkWritten
from batch_client.layout import GENERATION_KEY, LEDGER_PREFIX
from batch_client.ledger import ChunkProof, Ledger, LedgerView, Row, row_json, rows_from_json, segment_of
from batch_client.pipeline import execute
from batch_client.place import begin
from batch_client.removal import remove_output
from batch_client.storage import MemoryStore
from batch_client.stringset import StringSet
from batch_client.transport import HttpReply
from support.identities import identity_of
from support.simulated import SimulatedServer
from support.virtual import virtually
from support.world import World

GENERATION = "0123456789abcdef"
UNITS = 40
MANY = 100_000


@pytest.fixture(scope="module", autouse=True)
def _small_blocks_and_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "BLOCK_UNITS", 7)
        patch.setattr(ledger, "READS_AT_ONCE", 3)
        yield


def row_of(unit, sha256="a", failed=None):
    chunks = (ChunkProof(f"y/c/{unit}/0", 100 + unit, sha256), ChunkProof(f"record_status/c/{unit}", 12, "b"))
    return Row(unit, chunks, {f"c/{unit}": f'"{unit}"', f"c/{unit + 1}": None}, 5 + unit,
               unit % 3 if failed is None else failed, unit % 2)


def begun():
    """A store with an output that a client has begun."""
    store = MemoryStore("memory://out")
    store.objects[GENERATION_KEY] = GENERATION.encode()
    return store


@st.composite
def ledgers(draw, shas=("a",)):
    """Segments of several writers, in the order in which they appear: rows in any order, some of them twice."""
    rows = st.builds(row_of, st.integers(0, UNITS - 1), st.sampled_from(shas))
    segments = draw(st.lists(st.lists(rows, max_size=9), max_size=9))
    names = draw(st.lists(st.tuples(st.sampled_from("wxyz"), st.integers(0, 99)), min_size=len(segments),
                          max_size=len(segments), unique=True))
    return [(f"{LEDGER_PREFIX}{GENERATION}/{writer}/{seq:06d}.json", rows)
            for (writer, seq), rows in zip(names, segments, strict=True)]


@given(ledgers(), st.integers(0, 9), st.lists(st.integers(0, 80), max_size=9))
@settings(max_examples=200)
@virtually
async def test_a_view_says_what_a_dict_of_all_rows_says(segments, halfway, own):
    naive = {row.unit: row for _, rows in segments for row in rows}
    everything = [row for _, rows in segments for row in rows]
    store = begun()
    view = LedgerView(store, UNITS, GENERATION)
    for number, (key, rows) in enumerate(segments):
        if number == halfway:
            await view.refresh()
        store.objects[key] = segment_of(rows)
    for place in own:
        if place < len(everything):
            view.add(everything[place])
    await view.refresh()
    await view.refresh()
    assert len(view) == len(naive)
    assert [unit for unit in range(UNITS) if unit in view] == sorted(naive)
    assert [*view.unproven(range(1, UNITS))] == [unit for unit in range(1, UNITS) if unit not in naive]
    for name in ("records", "failed", "not_finite", "missing_chunks"):
        assert getattr(view, name) == sum(getattr(row, name) for row in naive.values())
    assert [row async for row in view.rows()] == [naive[unit] for unit in sorted(naive)]


@given(ledgers(shas=("a", "a", "a", "c")), st.booleans())
@settings(max_examples=200)
@virtually
async def test_two_writers_who_proved_different_bytes_are_noticed_in_any_order(segments, backwards):
    proofs = {}
    for _, rows in segments:
        for row in rows:
            proofs.setdefault(row.unit, set()).add(row.chunks)
    contradictory = any(len(chunks) > 1 for chunks in proofs.values())
    noticed = pytest.raises(MismatchError, match=r"two writers proved different bytes for output chunk \d+: the output")
    store = begun()
    view = LedgerView(store, UNITS, GENERATION)
    with noticed if contradictory else nullcontext():
        for key, rows in segments[::-1] if backwards else segments:
            store.objects[key] = segment_of(rows)
            await view.refresh()


@pytest.mark.parametrize("unit", [-1, UNITS, 1 << 40])
def test_a_row_for_a_chunk_that_the_run_has_not_is_refused(unit):
    with pytest.raises(MismatchError, match=f"a row for output chunk {unit}, and the run has {UNITS}"):
        LedgerView(MemoryStore(), UNITS, GENERATION).add(row_of(unit))


@virtually
async def test_a_row_that_is_gone_or_altered_when_it_is_read_again_is_noticed():
    store = begun()
    keys = [f"{LEDGER_PREFIX}{GENERATION}/w/{seq:06d}.json" for seq in range(4)]
    for seq, key in enumerate(keys):
        store.objects[key] = segment_of([row_of(unit) for unit in range(seq * 10, seq * 10 + 10)])
    view = LedgerView(store, UNITS, GENERATION)
    await view.refresh()
    good = store.objects.pop(keys[2])
    with pytest.raises(StorageError, match="row of output chunk 20 is not found again: run the same command"):
        [row async for row in view.rows()]
    store.objects[keys[2]] = good.replace(b'"a"', b'"d"')
    with pytest.raises(MismatchError, match=r"can't be read \(its SHA-256 is that of other bytes\); remove it"):
        [row async for row in view.rows()]
    store.objects[keys[2]] = segment_of(rows_from_json(good.replace(b'"a"', b'"d"')))
    with pytest.raises(MismatchError, match="different bytes for output chunk 20"):
        [row async for row in view.rows()]


@given(st.lists(st.integers(0, 60)))
def test_segments_are_read_a_bounded_number_of_bytes_at_a_time(sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "READ_BYTES", 50)
        batches = list(ledger._batches(dict(enumerate(sizes))))
    assert [key for batch in batches for key in batch] == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or (len(batch) <= 3 and sum(sizes[key] for key in batch) <= 50)


@pytest.mark.parametrize("wrong", [
    b"[]", b"{}", b'{"rows":{}}', b'{"rows":[1]}', b'{"rows":[{"unit":1}]}', b'{"rows":[' * 200_000,
    b'{"rows":[%b]}' % row_json(row_of(1)).replace(b'"ok":6', b'"ok":"6"'),
    b'{"rows":[%b]}' % row_json(row_of(1)).replace(b'"y/c/1/0",', b""),
    b'{"rows":[%b]}' % row_json(row_of(1)).replace(b'"c/1":', b'"c/1":1,"c":'),
])
def test_rows_of_another_form_are_refused(wrong):
    assert len(rows_from_json(b'{"rows":[%b]}' % row_json(row_of(1)))) == 1
    with pytest.raises(ValueError, match=r"JSON|Expected|required|recursion"):
        rows_from_json(wrong)


@virtually
async def test_a_segment_over_the_bound_is_refused_before_it_is_read(monkeypatch):
    class Listed(MemoryStore):
        """Says what is there, and is not asked for it."""

        async def get(self, key, start=None, stop=None):
            assert not key.startswith(LEDGER_PREFIX)
            return await super().get(key, start, stop)

    store, key = begun(), f"{LEDGER_PREFIX}{GENERATION}/w/000000.json"
    store.objects[key] = segment_of([row_of(1)])
    size = len(store.objects[key])
    monkeypatch.setattr(ledger, "LARGEST_SEGMENT", size)
    view = LedgerView(store, UNITS, GENERATION)
    await view.refresh()
    assert 1 in view
    monkeypatch.setattr(ledger, "LARGEST_SEGMENT", size - 1)
    listed = Listed(store.url)
    listed.objects = store.objects
    with pytest.raises(MismatchError, match=f"{size} bytes, no ledger segment is that large: remove it"):
        await LedgerView(listed, UNITS, GENERATION).refresh()


def long_row(unit):
    """As long as a row of a run of images."""
    chunks = (ChunkProof(f"scores/c/{unit}/0", 40_004, f"{unit:064x}"),
              ChunkProof(f"record_status/c/{unit}", 1_004, f"{unit:064x}"))
    return Row(unit, chunks, {f"c/{unit}/0/0": f'"{unit:032x}"'}, 1000, 0, 0)


@virtually
async def test_a_view_of_a_hundred_thousand_chunks_takes_less_than_five_megabytes(monkeypatch):
    monkeypatch.setattr(ledger, "READS_AT_ONCE", 64)
    monkeypatch.setattr(ledger, "BLOCK_UNITS", 1024)
    store = begun()
    for seq, low in enumerate(range(0, MANY, 64)):
        store.objects[f"{LEDGER_PREFIX}{GENERATION}/d48e7e7adbeeb904/{seq:06d}.json"] = segment_of(
            [long_row(unit) for unit in range(low, min(low + 64, MANY))])
    tracemalloc.start()
    try:
        view = LedgerView(store, MANY, GENERATION)
        await view.refresh()
        assert view.records == MANY * 1000
        rows = view.rows()
        for unit in range(5_000):
            assert (await anext(rows)).unit == unit
        await rows.aclose()
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@given(st.lists(st.text(max_size=3)), st.lists(st.text(max_size=3)))
def test_a_string_set_is_a_set(first, second):
    found = StringSet()
    added = set()
    for batch in (first, second):
        for text in batch:
            found.add(text)
        added.update(batch)
        for text in {*first, *second, "", "x"}:
            assert (text in found) == (text in added)


async def ledger_of(store, identity, name):
    return Ledger(store, (await begin(store, identity, name)).generation, name, lambda: 0.0)


A, B = "a" * 16, "b" * 16


@virtually
async def test_what_was_proven_before_a_removal_proves_nothing_of_the_output_that_follows():
    store = MemoryStore("memory://out")
    first = await ledger_of(store, identity_of(), A)
    view = LedgerView(store, UNITS, A)
    await first.add(row_of(0, failed=0))
    await remove_output(store)
    assert store.objects == {}
    # The removed output's client goes on for a while, beside one that begins the next.
    for _ in range(2):
        with pytest.raises(MismatchError, match="was removed, or is being removed"):
            await first.flush()
        with pytest.raises(MismatchError, match="was removed, or is being removed"):
            await view.refresh()
        follower = await ledger_of(store, identity_of(model="other"), B)
    # A segment that it wrote at the last moment, or whose PUT lands late.
    store.objects[f"{LEDGER_PREFIX}{A}/{A}/000000.json"] = segment_of([row_of(1)])
    await follower.add(row_of(2, failed=0))
    await follower.flush()
    found = LedgerView(store, UNITS, B)
    await found.refresh()
    assert [unit for unit in range(UNITS) if unit in found] == [2]


@virtually
async def test_segments_are_written_before_they_are_larger_than_any_that_is_read():
    store = MemoryStore("memory://out")
    written = await ledger_of(store, identity_of(), A)
    many = {f"c/{chunk}": None for chunk in range(ledger.FLUSH_SOURCE_CHUNKS // 2)}
    for unit in range(6):
        await written.add(replace(row_of(unit, failed=0), source=many))
    assert sum(key.startswith(LEDGER_PREFIX) for key in store.objects) == 3
    # A record that failed may not fail again: its chunk is proven at once.
    await written.add(row_of(7, failed=1))
    assert sum(key.startswith(LEDGER_PREFIX) for key in store.objects) == 4


@virtually
async def test_rows_that_gathered_during_a_flush_are_written_in_segments_that_can_be_read():
    class Slow(MemoryStore):
        async def create(self, key, data):
            await asyncio.sleep(5)
            return await super().create(key, data)

    store = Slow("memory://out")
    written = await ledger_of(store, identity_of(), A)
    many = {f"c/{chunk}": None for chunk in range(ledger.FLUSH_SOURCE_CHUNKS // 2)}
    async with asyncio.TaskGroup() as tasks:
        for unit in range(9):
            tasks.create_task(written.add(replace(row_of(unit, failed=0), source=many)))
    await written.flush()
    segments = [data for key, data in store.objects.items() if key.startswith(LEDGER_PREFIX)]
    assert [len(rows_from_json(data)) for data in segments] == [2, 2, 2, 2, 1]
    view = LedgerView(store, UNITS, A)
    await view.refresh()
    assert len(view) == 9


@virtually
async def test_a_flush_whose_answer_was_lost_loses_no_row():
    class Losing(MemoryStore):
        lost = True

        async def create(self, key, data):
            done = await super().create(key, data)
            if self.lost:
                self.lost = False
                raise StorageError("connection reset")
            return done

    store = Losing()
    store.objects[GENERATION_KEY] = b"a" * 16
    ledger = Ledger(store, "a" * 16, "w", lambda: 0.0)
    rows = [Row(unit, (ChunkProof(f"y/c/{unit}", 1, "0"),), {}, 1, 0, 0) for unit in (0, 1)]
    await ledger.add(rows[0])
    with pytest.raises(StorageError, match="connection reset"):
        await ledger.flush()
    await ledger.add(rows[1])
    await ledger.flush()
    view = LedgerView(store, 2, "a" * 16)
    await view.refresh()
    assert [row.unit async for row in view.rows()] == [0, 1]


class NoLedger(MemoryStore):
    """A store that is away whenever a proof is to be written."""

    async def create(self, key, data):
        if key.startswith(LEDGER_PREFIX):
            raise StorageError("the store is away")
        return await super().create(key, data)


async def run_without_ledger(server, *observers):
    world = World(1, server)
    services = dataclasses.replace(world.services(), output_store=NoLedger("memory://o"))
    await execute(world.spec(), services, observers)


@virtually
async def test_an_error_that_ends_a_run_is_told_also_where_the_store_is_away():
    class Refusing(SimulatedServer):
        def answer(self, body, header_length):
            if self.requests > 8:
                return HttpReply(400, {}, b'{"error": "no more"}')
            return super().answer(body, header_length)

    with pytest.raises(DataError, match="nothing can be scored"):
        await run_without_ledger(Refusing())
    with pytest.raises(StorageError, match="the store is away"):
        await run_without_ledger(SimulatedServer())


@virtually
async def test_a_run_that_is_cancelled_waits_for_no_store():
    def cancel(event):
        if isinstance(event, ChunkWritten):
            task.cancel()

    task = asyncio.ensure_future(run_without_ledger(SimulatedServer(seconds=0.01), cancel))
    with pytest.raises(asyncio.CancelledError):
        await task
