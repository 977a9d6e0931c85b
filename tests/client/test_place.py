"""Beginning, going on and removing, at the same place and the same moment."""

import asyncio

import pytest

from batch_client.errors import MismatchError, StorageError, UsageError
from batch_client.layout import GENERATION_KEY, REMOVING_KEY, SPEC_KEY, SUCCESS_KEY
from batch_client.place import begin, check_place, generation_of, require_generation
from batch_client.progress import progress_of
from batch_client.removal import contents_of, remove_output
from batch_client.storage import MemoryStore
from support.identities import identity_of
from support.virtual import virtually
from support.world import World

A, B = "a" * 16, "b" * 16
MINE = identity_of()
GONE = "was removed, or is being removed"


class Meanwhile(MemoryStore):
    """Calls `meanwhile` once, before or after what is done to the object `key`."""

    def __init__(self, what, key, meanwhile, *, after=False):
        super().__init__("memory://out")
        self._when, self._meanwhile, self._after = (what, key), meanwhile, after

    async def _done(self, what, key, doing):
        meanwhile = None
        if self._when == (what, key):
            self._when, meanwhile = None, self._meanwhile
        if meanwhile is not None and not self._after:
            await meanwhile()
        done = await doing
        if meanwhile is not None and self._after:
            await meanwhile()
        return done

    async def create(self, key, data):
        return await self._done("create", key, super().create(key, data))

    async def delete(self, key):
        return await self._done("delete", key, super().delete(key))


async def test_who_comes_first_names_the_generation_and_others_take_it():
    store = MemoryStore("memory://out")
    first, second = await begin(store, MINE, A), await begin(store, MINE, B)
    assert (first.generation, first.first) == (A, True)
    assert (second.generation, second.first) == (A, False)
    with pytest.raises(MismatchError, match="belongs to another run"):
        await begin(store, identity_of(model="other"), B)
    await require_generation(store, A)
    with pytest.raises(MismatchError, match=GONE):
        await require_generation(store, B)


async def test_a_generation_counts_no_more_once_a_removal_has_begun():
    store = MemoryStore("memory://out")
    await begin(store, MINE, A)
    store.objects[REMOVING_KEY] = b"0123"
    assert await generation_of(store) is None
    with pytest.raises(MismatchError, match=GONE):
        await require_generation(store, A)


@pytest.mark.parametrize("name", [b"", b"x", b"A" * 16, b"../../../../../..", b"a" * 17, b"\xff" * 16])
async def test_a_generation_that_is_no_name_of_ours_is_no_part_of_a_key(name):
    store = MemoryStore("memory://out")
    store.objects[GENERATION_KEY] = name
    with pytest.raises(MismatchError, match="_run/generation can't be read: wanted 16 hexadecimal digits"):
        await generation_of(store)


@pytest.mark.parametrize(("key", "after", "follower", "refusal"), [
    (SPEC_KEY, False, None, None),  # it is begun anew
    (SPEC_KEY, True, None, (MismatchError, "is no output of batch-client")),
    (GENERATION_KEY, False, None, (MismatchError, "is no output of batch-client")),
    (GENERATION_KEY, True, None, (StorageError, "says that it exists and has none")),
    *((key, after, "other", (MismatchError, "belongs to another run"))
      for key in (SPEC_KEY, GENERATION_KEY) for after in (False, True)),
])
async def test_an_output_that_is_removed_while_it_is_begun_is_not_begun(key, after, follower, refusal):
    """Whatever the client goes on with, it is no generation of another run, and none without a spec."""
    async def removed():
        await remove_output(store)
        if follower is not None:
            await begin(store, identity_of(model=follower), B)

    store = Meanwhile("create", key, removed, after=after)
    store.objects = {SPEC_KEY: MINE.to_json()}
    if refusal is not None:
        with pytest.raises(refusal[0], match=refusal[1]):
            await begin(store, MINE, A)
        return
    assert (await begin(store, MINE, A)).generation == A
    assert store.objects == {SPEC_KEY: MINE.to_json(), GENERATION_KEY: A.encode()}


@virtually
async def removed(what, key, meanwhile, *, after):
    """A world whose published output was removed, and what `meanwhile(world)` did before or after `key` went."""
    world = World(1)
    await world.live()
    store = Meanwhile(what, key, lambda: meanwhile(world), after=after)
    store.objects, world.output = world.output.objects, store
    await remove_output(store)
    return world


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("key", [GENERATION_KEY, "y/c/0/0", "record_status/c/11", SPEC_KEY])
def test_nothing_begins_while_an_output_is_removed(key, after):
    """Otherwise old chunks would be found, proven, and deleted after that."""
    tried = []

    async def begins(world):
        with pytest.raises(MismatchError, match="is being removed, or its removal was cut off: finish it"):
            await world.live()
        if SPEC_KEY in world.output.objects:
            assert (await progress_of(world.output)).removing
        tried.append(key)

    assert removed("delete", key, begins, after=after).output.objects == {}
    assert tried == [key]


def test_what_a_client_writes_while_its_output_is_removed_goes_too():
    async def writes(world):
        world.output.objects["y/c/3/0"] = world.output.objects[GENERATION_KEY] = b"a" * 16

    assert removed("delete", SPEC_KEY, writes, after=True).output.objects == {}


@virtually
async def test_a_client_that_writes_on_and_on_stops_the_removal_which_can_be_finished_later(root):
    world = World(1)

    class Busy(MemoryStore):
        writing = True

        async def delete(self, key):
            await super().delete(key)
            if self.writing and key == "y/c/3/0":
                self.objects[key] = b"again"

    await world.live()
    store = Busy("memory://out")
    store.objects, world.output = world.output.objects, store
    with pytest.raises(StorageError, match="still listed after they were deleted"):
        await remove_output(store)
    with pytest.raises(MismatchError, match="its removal was cut off"):
        await world.live()
    store.writing = False
    assert (await world.live(overwrite=True)).root == root
    await world.check(root)


async def test_a_removal_that_another_one_has_finished_deletes_nothing_of_what_follows():
    async def finished():
        await remove_output(store)
        await begin(store, MINE, B)

    store = Meanwhile("delete", GENERATION_KEY, finished, after=True)
    store.objects = {SPEC_KEY: MINE.to_json(), GENERATION_KEY: A.encode(), "y/c/0/0": b"1"}
    with pytest.raises(StorageError, match="somebody else has removed what was there"):
        await remove_output(store)
    assert store.objects == {SPEC_KEY: MINE.to_json(), GENERATION_KEY: B.encode()}


async def test_an_output_that_is_published_at_the_last_moment_is_not_cleaned_away():
    async def published():
        store.objects[SUCCESS_KEY] = b""

    store = Meanwhile("create", REMOVING_KEY, published)
    store.objects = {SPEC_KEY: MINE.to_json(), GENERATION_KEY: A.encode()}
    with pytest.raises(UsageError, match="is published: --clean removes only outputs that are not"):
        await remove_output(store, published=False)
    assert set(store.objects) == {SPEC_KEY, GENERATION_KEY, SUCCESS_KEY}
    await check_place(store, MINE)
    # The mark of a removal that was asked for, by --overwrite, stays.
    store.objects[REMOVING_KEY] = b"0123"
    with pytest.raises(UsageError, match="is published"):
        await remove_output(store, published=False)
    assert store.objects[REMOVING_KEY] == b"0123"


async def test_an_empty_place_is_left_alone():
    store = MemoryStore("memory://out")
    await remove_output(store)
    assert (await contents_of(store)).objects == 0
    assert await asyncio.wait_for(generation_of(store), 1) is None
