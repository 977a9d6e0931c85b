"""A manifest in parts: what was put in comes out, whatever is altered is noticed, and publishing may stop anywhere."""

import hashlib
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import asdict

from batch_client import manifest
from batch_client.errors import BrokenPromiseError, DataError, MismatchError
from batch_client.jsontext import canonical_json
from batch_client.layout import GENERATION_KEY, LEDGER_PREFIX, MANIFEST_KEY, MANIFEST_PREFIX, OutputLayout
from batch_client.ledger import ChunkProof, LedgerView, Row, row_json, segment_of
from batch_client.manifest import ManifestBuilder, manifest_rows, read_manifest
from batch_client.publish import publish
from batch_client.reader import ETags
from batch_client.storage import MemoryStore
from batch_client.verify import verify_output
from support.faulty import Fate
from support.plans import plan_of
from support.virtual import run_virtually, virtually
from support.world import World, undisturbed

PART_BYTES = 700


@pytest.fixture(scope="module", autouse=True)
def _small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "PART_BYTES", PART_BYTES)
        yield


@pytest.fixture(scope="module")
def small_run():
    """As `undisturbed_run`, in more steps: the parts are small."""
    return undisturbed()


def published():
    world = World(3)
    run_virtually(world.until_published())
    parts = sorted(key for key in world.output.objects if key.startswith(MANIFEST_PREFIX))
    assert len(parts) > 3
    return world.output, parts


class Identity:
    exact = True

    def to_value(self):
        return {"start": 0, "stop": 0}


text = st.text(max_size=12)
proofs = st.builds(ChunkProof, text, st.integers(0, 1 << 40), text)


@given(st.lists(st.tuples(st.lists(proofs, max_size=4).map(tuple), st.dictionaries(text, st.none() | text, max_size=6),
                          *[st.integers(0, 9)] * 3), max_size=30))
@settings(max_examples=200)
@virtually
async def test_rows_come_out_of_bounded_parts_as_they_went_in(values):
    rows = [Row(unit, *value) for unit, value in enumerate(values)]
    builder, store = ManifestBuilder(), MemoryStore()
    parts = [part for part in (*map(builder.add, rows), builder.close()) if part is not None]
    store.objects.update(parts)
    store.objects[MANIFEST_KEY] = builder.head(Identity(), [ChunkProof("zarr.json", 1, "f")])
    assert list(map(row_json, rows)) == [canonical_json(asdict(row)) for row in rows]
    longest = max([0, *(len(row_json(row)) for row in rows)])
    assert all(len(body) < PART_BYTES + longest + 30 + len(rows) for _, body in parts)
    assert all(len(body) >= PART_BYTES for _, body in parts[:-1])
    found = await read_manifest(store)
    assert [row async for row in manifest_rows(store, found)] == rows
    digest = hashlib.sha256()
    for row in rows:
        for key, size, sha256 in row.chunks:
            digest.update(f"{key} {size} {sha256}\n".encode())
    assert found.root == f"sha256:{digest.hexdigest()}"
    assert (found.ok, found.failed, found.not_finite) == tuple(sum(value[at] for value in values) for at in (2, 3, 4))
    assert found.missing_chunks == sum(list(value[1].values()).count(None) for value in values)
    assert [part.key for part in found.parts] == [key for key, _ in parts]
    for key, body in parts:
        assert key == f"{MANIFEST_PREFIX}{json.loads(body)['rows'][0]['unit']:08d}.json"


def noticed(store, words):
    with pytest.raises((DataError, MismatchError), match=words):
        run_virtually(verify_output(store))


def test_every_alteration_of_a_part_is_noticed():
    store, parts = published()
    rng = random.Random(5)
    for key in parts:
        good = store.objects[key]
        for _ in range(100):
            altered = bytearray(good)
            altered[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
            store.objects[key] = bytes(altered)
            noticed(store, f"{re.escape(key)} is not what was published: it has SHA-256")
        others = [store.objects[other] for other in parts if other != key]
        for altered in (b"", good[:-1], good + b" ", b'{"rows":[]}', *others):
            store.objects[key] = altered
            noticed(store, f"{re.escape(key)} is not what was published: it has SHA-256")
        del store.objects[key]
        noticed(store, f"{re.escape(key)} is missing")
        store.objects[key] = good
    assert run_virtually(verify_output(store, deep=True)).objects == 24


@pytest.mark.parametrize(("alter", "words"), [
    (lambda head: head["parts"].pop(), "proves 72 records of 96"),
    (lambda head: head["parts"].pop(1), "has chunk 6 where chunk 3 belongs"),
    (lambda head: head["parts"].reverse(), "where chunk 0 belongs"),
    (lambda head: head["parts"].append(head["parts"][-1]), "where chunk 12 belongs"),
    (lambda head: head["records"].update(failed=1, ok=95), r"counts \(95, 1, 0\) .* its rows have \(96, 0, 0\)"),
    (lambda head: head.update(root="sha256:0"), "has root sha256:0, its rows have sha256:"),
    (lambda head: head["metadata"][0].__setitem__(1, 7), r"y/zarr.json is \d+ bytes, wanted 7 bytes"),
    (lambda head: head.update(missing_chunks=1), "counts 1 missing source chunks, its rows have 0"),
    (lambda head: head.update(format=1), "has format 1, wanted 3"),
    (lambda head: head.pop("parts"), "can't be read"),
    (lambda head: head["run"].pop("stop"), "can't be read"),
])
def test_an_alteration_of_the_head_is_noticed(alter, words):
    store, _ = published()
    head = json.loads(store.objects[MANIFEST_KEY])
    alter(head)
    store.objects[MANIFEST_KEY] = json.dumps(head).encode()
    noticed(store, words)


def test_verify_names_a_few_problems_and_counts_the_rest():
    store, _ = published()
    for unit in range(5):
        del store.objects[f"y/c/{unit}/0"]
    store.objects["y/c/5/0"] += b"more"
    store.objects["y/c/99/0"] = b"a stray"
    noticed(store, "y/c/0/0 is missing, wanted .* y/c/4/0 is missing, wanted [0-9]+ bytes and 2 more$")
    store, _ = published()
    store.objects["y/c/99/0"] = b"a stray"
    noticed(store, ": y/c/99/0 is no chunk of this run$")


@pytest.mark.parametrize(("rows", "words"), [
    ([(0, 100), (1, 100)], "2 of 3 output chunks are proven: not publishing"),
    ([(0, 100), (1, 99), (2, 50)], "output chunk 1 is proven with 99 records of 100: not publishing"),
])
@virtually
async def test_what_is_not_complete_is_not_published(rows, words):
    plan = plan_of(250, 100, chunk_records=100)
    store = MemoryStore()
    store.objects[GENERATION_KEY] = b"a" * 16
    store.objects[f"{LEDGER_PREFIX}{'a' * 16}/w/000000.json"] = segment_of(
        [Row(unit, (), {}, ok, 0, 0) for unit, ok in rows])
    view = LedgerView(store, plan.unit_count, "a" * 16)
    await view.refresh()
    with pytest.raises(BrokenPromiseError, match=words):
        await publish(store, await OutputLayout.open(plan, "none"), plan, Identity(), view)
    assert len(store.objects) == 2


@pytest.mark.parametrize(("key", "left", "said"), [
    ("y/c/1/0", None, "y/c/1/0 is gone, [0-9]+ were written: remove _run"),
    ("record_status/c/1", b"short", "record_status/c/1 has 5 bytes, 12 were written: remove it and _run"),
])
@virtually
async def test_what_is_gone_since_it_was_proven_is_not_published_until_it_is_there_again(key, left, said, small_run):
    """A run may take days, and a bucket have a rule that deletes what is old."""
    world = World(1)
    await world.live(part=(1, 2))
    objects = world.output.objects
    del objects[key]
    if left is not None:
        objects[key] = left
    with pytest.raises(DataError, match=said) as error:
        await world.live()
    assert not [name for name in objects if name.endswith("zarr.json")]
    segments = re.findall(r"_run/ledger/\S+\.json", str(error.value))
    assert len(segments) == 1
    for name in segments + [key] * (left is not None):
        del objects[name]
    assert (await world.live()).scored == len(world.records) // 2
    await world.check(small_run[0])


@virtually
async def test_what_is_gone_beside_records_that_failed_is_not_scored_again_alone():
    """They may not fail again, and then their chunks, which are there, are others."""
    plan, store = plan_of(250, 100, chunk_records=100), MemoryStore()
    store.objects[GENERATION_KEY] = b"a" * 16
    store.objects[f"{LEDGER_PREFIX}{'a' * 16}/w/000000.json"] = segment_of([
        Row(0, (ChunkProof("y/c/0/0", 10, "0" * 64),), {}, 100, 0, 0), Row(1, (), {}, 99, 1, 0),
        Row(2, (), {}, 50, 0, 0)])
    view = LedgerView(store, plan.unit_count, "a" * 16)
    await view.refresh()
    with pytest.raises(DataError, match="y/c/0/0 is gone, 10 were written: run again with --overwrite, since"):
        await publish(store, await OutputLayout.open(plan, "none"), plan, Identity(), view)


@pytest.mark.parametrize("when", ["crash before", "crash after"])
def test_a_kill_at_every_step_of_publishing_is_resumed_to_the_same_root(when, small_run):
    root, steps, source = small_run

    async def run(point):
        world = World(point, source=source)
        fate = Fate(random.Random(point), faults=0, kinds=(when,))
        fate.at = {point}
        await world.live(fate)
        begun = any(key.startswith(MANIFEST_PREFIX) for key in world.output.objects)
        opens = "zarr.json" in world.output.objects
        await world.until_published(fate)
        await world.check(root)
        return begun and not opens

    # The last steps: the parts, the head, three documents and _SUCCESS, after the ledger was read again twice; before
    # each of the last four the generation is looked at, in two steps.
    assert sum(run_virtually(run(point)) for point in range(steps - 20, steps + 1)) >= 5


@virtually
async def test_a_part_that_somebody_else_wrote_keeps_a_run_from_publishing(small_run):
    world = World(1, source=small_run[2])
    fate = Fate(random.Random(1), faults=0, kinds=("crash before",))
    fate.at = {small_run[1] - 4 * 3}
    await world.live(fate)
    last = max(key for key in world.output.objects if key.startswith(MANIFEST_PREFIX))
    world.output.objects[last] += b" "
    with pytest.raises(MismatchError, match="holds other bytes than this run would publish"):
        await world.until_published()
    assert MANIFEST_KEY not in world.output.objects


def test_etags_tell_what_changed_went_and_appeared():
    etags = ETags()
    etags.add("c/0", '"1"')
    etags.add("c/1", "")
    assert etags.has("c/0", '"1"')
    assert etags.has("c/1", "")
    assert etags.has("c/2", None)
    assert not etags.has("c/0", '"2"')
    assert not etags.has("c/0", "")
    assert not etags.has("c/0", None)
    assert not etags.has("c/2", '"1"')
