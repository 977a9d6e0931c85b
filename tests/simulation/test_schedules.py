"""The real client code on a virtual clock, with faults drawn from a seed: whatever happens, the same bytes.

A failing seed is reproduced by `pytest tests/simulation/test_schedules.py -k 'seed_17-'` or by BATCH_CLIENT_SEEDS=17.
"""

import asyncio
import hashlib
import os
import random

import pytest

from batch_client import ledger
from batch_client.ledger import LedgerView
from batch_client.place import generation_of
from support.faulty import Fate
from support.virtual import run_virtually, virtually
from support.world import CHUNK, RECORDS, World, undisturbed

GROUPS = 20
A_GROUP = 25
CHUNKS, REQUESTS_A_CHUNK = RECORDS // CHUNK, 2


def seeds():
    named = os.environ.get("BATCH_CLIENT_SEEDS", "")
    if named:
        low, _, high = named.partition(":")
        return [range(int(low), int(high or int(low) + 1))]
    return [range(group * A_GROUP, (group + 1) * A_GROUP) for group in range(GROUPS)]


@virtually
async def schedule(seed, undisturbed_run):
    """One world with one, two or three clients, at least five faults, then calm."""
    root, steps, source = undisturbed_run

    rng = random.Random(seed)
    world = World(seed, source=source)
    fate = Fate(rng, steps=steps, faults=rng.randint(6, 12))
    clients = rng.choice([1, 1, 2, 3])
    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(world.until_published(fate))
    assert len(fate.injected) >= 5, fate.injected
    await world.settle()
    await world.check(root)
    return fate.injected


@pytest.mark.parametrize("group", seeds(), ids=lambda group: f"seed_{group.start}-{group.stop - 1}")
def test_every_schedule_ends_in_the_same_root(group, undisturbed_run):
    seen = set()
    for seed in group:
        try:
            seen.update(schedule(seed, undisturbed_run))
        except BaseException as error:
            error.add_note(f"BATCH_CLIENT_SEEDS={seed} reproduces this")
            raise
    if len(group) > 10:
        assert len(seen) >= 10, "the schedules have hardly any variety"


@pytest.mark.parametrize("when", ["crash before", "crash after"])
def test_a_kill_at_every_io_step_is_resumed_to_the_same_root(when, undisturbed_run):
    steps = undisturbed_run[1]
    killed = sum(run_virtually(resumed(point, when, undisturbed_run)) is not None for point in range(1, steps + 1))
    assert killed >= steps // 3, "hardly any step was a crash point"


def test_a_resumed_run_scores_nothing_again_that_is_proven(undisturbed_run, monkeypatch):
    monkeypatch.setattr(ledger, "FLUSH_ROWS", 1)  # each chunk is proven at once
    found = {run_virtually(resumed(point, "crash before", undisturbed_run))
             for point in range(1, undisturbed_run[1] + 1, 5)}
    assert max(found - {None}) > CHUNKS // 2, "every client died before much was proven"


async def resumed(point, when, undisturbed_run):
    """A client dies at one I/O step, whatever it is, and the next one ends its run: how many chunks were proven between
    their lives. None for a step at which no client can die.
    """
    root, _, source = undisturbed_run
    world = World(point, source=source)
    fate = Fate(random.Random(point), faults=0, kinds=(when,))
    fate.at = {point}
    done = None
    if await world.live(fate) is None:
        done = await proven(world.output)
        before = world.server.requests
        await world.until_published(fate, most=1)
        assert world.server.requests - before == REQUESTS_A_CHUNK * (CHUNKS - done)
    await world.check(root)
    return done


async def proven(output):
    """How many chunks the ledger proves, each of which is there as it says."""
    generation = await generation_of(output)
    if generation is None:
        return 0
    view = LedgerView(output, CHUNKS, generation)
    await view.refresh()
    async for row in view.rows():
        for key, size, sha256 in row.chunks:
            assert len(output.objects[key]) == size
            assert hashlib.sha256(output.objects[key]).hexdigest() == sha256
    return len(view)


def test_calm_worlds_agree_whatever_the_requests():
    roots = {undisturbed(request_records=size, in_flight=flight)[0] for size in (4, 8) for flight in (1, 3, 32)}
    assert len(roots) == 1


@virtually
async def test_a_source_that_changes_under_a_run_stops_it(undisturbed_run):
    from batch_client.errors import MismatchError
    world = World(1, source=make_copy(undisturbed_run[2]))
    fate = Fate(random.Random(1), faults=0, kinds=("crash before",))
    # All units are proven, the manifest is not written yet.
    fate.at = {undisturbed_run[1] - 4}
    await world.live(fate)
    assert world.ends == ["crash"]
    assert any("ledger" in key for key in world.output.objects)
    # A sound chunk with other records, as a program that writes the source again would leave it.
    world.source.objects["c/0/0"] = world.source.objects["c/1/0"]
    with pytest.raises(MismatchError, match="chunk c/0/0 changed since it was scored"):
        await world.until_published()
    assert "zarr.json" not in world.output.objects


def make_copy(store):
    copy = type(store)(store.url)
    copy.objects = dict(store.objects)
    return copy
