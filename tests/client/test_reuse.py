"""Reuse: a run that takes from an older output what it would compute again."""

import asyncio
import hashlib
import io
import random
import threading
from dataclasses import replace

import numpy as np
import pytest

from batch_client import pipeline
from batch_client.cli.observers import ProgressBar
from batch_client.cli.run import _sentence
from batch_client.errors import BrokenPromiseError, DataError, MismatchError, StoppedError
from batch_client.events import ChunkReused, ChunkWritten, RunStarted
from batch_client.layout import GENERATION_KEY, SPEC_KEY
from batch_client.ledger import LedgerView, Row
from batch_client.pipeline import execute, plan_run
from batch_client.prepare import Services
from batch_client.progress import progress_of
from batch_client.report import Report
from batch_client.report.page import render
from batch_client.reuse import copy_chunks
from batch_client.storage import Blob, MemoryStore
from batch_client.writer import proof_of
from support.runs import source_of
from support.simulated import Breaking
from support.virtual import virtually
from support.world import CHUNK, World


class Appendable:
    """A source of 95 chunks that grows to 100 and changes, with one record that can't be scored at first."""

    def __init__(self):
        rng = np.random.default_rng(4)
        self.records = rng.integers(1, 90, (100 * CHUNK, 3), np.uint8)
        self.before = self.records.copy()[: 95 * CHUNK]
        self.before[[3 * CHUNK, 40 * CHUNK + 1, 94 * CHUNK + 7]] += 1
        self.before[20 * CHUNK + 5] = 255
        self.old = source_of(self.before, (CHUNK, 3))
        self.new = source_of(self.records, (CHUNK, 3))
        # The one that failed is mended by other means than by changing it: its chunk has the same bytes.
        self.records[20 * CHUNK + 5] = 255
        self.new.objects["c/20/0"] = self.old.objects["c/20/0"]


@virtually
async def test_reuse_scores_what_changed_what_failed_and_what_was_appended():
    source = Appendable()
    server = Breaking()
    old = World(1, server=server, records=source.before, source=source.old)
    new = World(2, server=server, records=source.records, source=source.new)
    first = await old.live(max_failed=1)
    assert first.failed == 1
    server.broken = False
    before = dict(new.output.objects)
    old.output.url = "memory://old"
    fresh = await World(3, server=server, records=source.records, source=source.new).live()
    services = new.services()
    services = Services(services.servers, services.source_store, services.output_store, old.output,
                        services.clock, services.rng)
    # Nobody has to remember the earlier run's chunks.
    summary = await execute(new.spec(reuse="memory://old", chunk_records=None), services)
    assert before == {}
    assert (summary.scored, summary.reused, summary.records) == (9 * CHUNK, 91 * CHUNK, 100 * CHUNK)
    assert summary.root == fresh.root
    await new.check(fresh.root)
    wrong = Services(services.servers, services.source_store, MemoryStore("memory://x"), old.output,
                     services.clock, services.rng)
    with pytest.raises(MismatchError, match=r"chunk_records|grid_records"):
        await execute(new.spec(reuse="memory://old", chunk_records=2 * CHUNK), wrong)
    old.output.objects["y/c/7/0"] = b"altered"
    with pytest.raises(DataError, match="altered since it was published"):
        await execute(new.spec(reuse="memory://old"), wrong)


@virtually
async def test_others_rows_are_still_read_where_all_that_is_reused_was_proven_by_an_earlier_life(monkeypatch):
    source, server = Appendable(), Breaking()
    old = World(1, server=server, records=source.before, source=source.old)
    new = World(2, server=server, records=source.records, source=source.new)
    stop, seen, refresh = asyncio.Event(), [], LedgerView.refresh

    def stop_once_all_is_copied(event):
        if isinstance(event, RunStarted):
            stop.set()

    async def look(view):
        seen.append("look")
        await refresh(view)

    await old.live(max_failed=1)
    server.broken, old.output.url = False, "memory://old"
    spec = new.spec(reuse="memory://old", chunk_records=None)
    with pytest.raises(StoppedError):
        await execute(spec, services_with(new, new.output, old.output), (stop_once_all_is_copied,), stop)
    monkeypatch.setattr(pipeline, "FLUSH_SECONDS", 0.0)  # a look is due before the first row that is reused
    monkeypatch.setattr(LedgerView, "refresh", look)
    await execute(spec, services_with(new, new.output, old.output), (lambda event: seen.append(type(event)),))
    seen_while_scoring = seen[seen.index(RunStarted):len(seen) - seen[::-1].index(ChunkWritten)]
    assert ChunkReused not in seen
    assert "look" in seen_while_scoring


class Slow(MemoryStore):
    """Every write takes a second; it knows the most that it was asked for at one time."""

    def __init__(self, url):
        super().__init__(url)
        self.now = self.most = 0

    async def create(self, key, data):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(1)
        self.now -= 1
        return await super().create(key, data)


@virtually
async def test_chunks_are_copied_side_by_side_and_seen(monkeypatch):
    monkeypatch.setattr(pipeline, "COPIES_AT_ONCE", 5)
    world, old, output = World(1), MemoryStore("memory://old"), Slow("memory://out")
    seen = []
    await execute(replace(world.spec(), output="memory://old"), services_with(world, old))
    summary = await execute(world.spec(reuse="memory://old"), services_with(world, output, old), (seen.append,))
    assert output.most == 5
    assert (summary.scored, summary.reused) == (0, summary.records)
    assert summary.bytes_written == sum(len(data) for key, data in output.objects.items() if "/c/" in key)
    copied = [event for event in seen if isinstance(event, ChunkReused)]
    assert sum(event.records for event in copied) == summary.records
    started = next(place for place, event in enumerate(seen) if isinstance(event, RunStarted))
    assert seen.index(copied[-1]) < started
    assert seen[started].done == summary.records
    assert _sentence(summary).startswith(f"{summary.records} records copied, none scored, 0 failed")
    report, screen = Report("memory://in"), io.StringIO()
    bar = ProgressBar(screen)
    for event in seen:
        report(event)
        bar(event)
    bar.close()
    page = render(report.data())
    assert f"<dt>copied from an earlier output</dt><dd>{summary.records}</dd>" in page
    assert "proven before" not in page
    assert screen.getvalue().index("copying: ") < screen.getvalue().index(": 100%")


async def test_the_hash_of_a_large_copy_leaves_the_event_loop_to_others(monkeypatch):
    old, new, threads, sha256 = MemoryStore("memory://old"), MemoryStore("memory://new"), [], hashlib.sha256
    old.objects["y/c/0/0"] = bytes(1 << 20)
    row = Row(0, (await proof_of("y/c/0/0", bytes(1 << 20)),), {}, 1, 0, 0)

    def hashed(data):
        threads.append(threading.current_thread())
        return sha256(data)

    monkeypatch.setattr(hashlib, "sha256", hashed)
    await copy_chunks(old, new, row)
    assert new.objects == old.objects
    assert {*threads} - {threading.main_thread()}  # where the store in memory makes its ETags


class Incomparable(bytes):
    """To compare all of a large object keeps the event loop from others."""

    def __eq__(self, other):
        raise AssertionError("compared")

    __hash__ = bytes.__hash__


class Finding(MemoryStore):
    """Gives chunks as bytes that can't be compared."""

    async def get(self, key, start=None, stop=None):
        blob = await super().get(key, start, stop)
        return Blob(Incomparable(blob.data), blob.etag) if blob and "/c/" in key else blob


async def test_an_object_that_is_there_is_compared_by_its_hash():
    old, new = MemoryStore("memory://old"), Finding("memory://new")
    old.objects = {"y/c/0/0": bytes(1 << 20)}
    row = Row(0, (await proof_of("y/c/0/0", bytes(1 << 20)),), {}, 1, 0, 0)
    await copy_chunks(old, new, row)
    await copy_chunks(old, new, row)
    new.objects = {"y/c/0/0": bytes(1 << 20)[:-1] + b"1"}
    with pytest.raises(BrokenPromiseError, match="y/c/0/0 holds other bytes than the output it is reused from"):
        await copy_chunks(old, new, row)


@virtually
async def test_a_chunk_that_an_earlier_life_wrote_is_compared_by_its_hash():
    world = World(1)
    root = (await world.live()).root
    begun, world.output = world.output.objects, Finding("memory://out")
    world.output.objects = {key: data for key, data in begun.items()
                            if "/c/" in key or key in (SPEC_KEY, GENERATION_KEY)}
    assert (await world.live()).root == root


@virtually
async def test_a_copy_that_fails_leaves_what_was_copied_proven():
    world, old, output = World(1), MemoryStore("memory://old"), MemoryStore("memory://out")
    await execute(replace(world.spec(), output="memory://old"), services_with(world, old))
    whole = dict(old.objects)
    last = max(key for key in old.objects if "/c/" in key)
    old.objects[last] = b"altered"
    with pytest.raises(DataError, match="altered since it was published"):
        await execute(world.spec(reuse="memory://old"), services_with(world, output, old))
    proven = (await progress_of(output)).done
    assert proven > 0
    old.objects = whole
    summary = await execute(world.spec(reuse="memory://old"), services_with(world, output, old))
    assert (summary.scored, summary.reused) == (0, summary.records - proven)


@virtually
async def test_parts_copy_their_own_share_of_an_older_output():
    world, old = World(1), MemoryStore("memory://old")

    class Counting(MemoryStore):
        created = 0

        async def create(self, key, data):
            Counting.created += "/c/" in key
            return await super().create(key, data)

    output = Counting("memory://out")
    await execute(replace(world.spec(), output="memory://old"), services_with(world, old))
    for part in ((1, 3), (2, 3), (3, 3)):
        await execute(world.spec(part=part, reuse="memory://old"), services_with(world, output, old))
    assert Counting.created == len([key for key in output.objects if "/c/" in key])
    assert "_SUCCESS" in output.objects


@virtually
async def test_a_published_output_needs_what_it_reused_no_more():
    world, old, output = World(1), MemoryStore("memory://old"), MemoryStore("memory://out")
    await execute(replace(world.spec(), output="memory://old"), services_with(world, old))
    first = await execute(world.spec(reuse="memory://old"), services_with(world, output, old))
    old.objects.clear()
    again = await execute(world.spec(reuse="memory://old"), services_with(world, output, old))
    assert again.already_published
    assert again.root == first.root
    await plan_run(world.spec(reuse="memory://old"), services_with(world, output, old))
    with pytest.raises(MismatchError, match="is no published output"):
        await execute(world.spec(reuse="memory://old", overwrite=True), services_with(world, output, old))
    assert "_SUCCESS" in output.objects


def services_with(world, output, old=None):
    return Services(world.server.servers(), world.source, output, reuse_store=old, rng=random.Random(1))
