"""Taking an output away: the order in which it goes, and what a removal that is cut off leaves."""

import asyncio

import pytest

from batch_client.buckets import open_store
from batch_client.errors import DataError, StoppedError, StorageError
from batch_client.removal import contents_of, remove_output
from batch_client.storage import MemoryStore
from support.virtual import run_virtually, virtually
from support.world import World


@virtually
async def test_removal_takes_away_first_what_opens_and_last_what_says_whose_it_is():
    world = World(1)
    order = []

    class Watching(MemoryStore):
        listed = 0

        async def delete(self, key):
            order.append(key)
            await super().delete(key)

        async def list(self, prefix):
            async for meta in super().list(prefix):
                self.listed += 1
                yield meta

    await world.live()
    store = Watching("memory://out")
    store.objects = dict(world.output.objects)
    await remove_output(store)
    assert store.objects == {}
    assert store.listed < 5 * len(world.output.objects)  # a listing of millions takes minutes
    assert order[0] == "_run/generation"
    assert set(order[1:3]) == {"zarr.json", "_SUCCESS"}
    assert order[-2:] == ["_run/spec.json", "_run/removing"]


@pytest.mark.parametrize("deletes", range(1, 30, 3))
@virtually
async def test_a_removal_that_is_cut_off_leaves_no_proof_of_what_is_gone(deletes):
    """Outputs may be called anything: also what a listing has before `_run/`."""
    world = World(1)

    class Killed(MemoryStore):
        left = deletes

        async def delete(self, key):
            if not self.left:
                raise StoppedError("killed")
            self.left -= 1
            await super().delete(key)

    await world.live()
    store = Killed("memory://out")
    store.objects = {key.replace("y/", "OUTPUT0/"): data for key, data in world.output.objects.items()}
    store.objects["_run/spec.json"] = store.objects["_run/spec.json"].replace(b'"y"', b'"OUTPUT0"')
    chunks = sum("/c/" in key for key in store.objects)
    assert chunks == 24
    with pytest.raises(StoppedError):
        await remove_output(store)
    assert "_run/spec.json" in store.objects
    assert "_run/generation" not in store.objects
    assert "_run/removing" in store.objects
    assert "_SUCCESS" not in store.objects or deletes < 3
    if any(key.startswith("_run/ledger/") for key in store.objects):
        assert sum("/c/" in key for key in store.objects) == chunks


@virtually
async def test_removal_of_objects_that_stay_is_no_endless_loop():
    world = World(1)

    class Keeping(MemoryStore):
        async def delete(self, key):
            pass

    await world.live()
    store = Keeping("memory://out")
    store.objects = world.output.objects
    with pytest.raises(StorageError, match="still listed"):
        await remove_output(store)


def test_a_removal_of_files_leaves_no_folders_below_the_output(tmp_path):
    world = World(1)
    run_virtually(world.live())

    async def run():
        store = open_store(str(tmp_path / "runs" / "out"))
        for key, data in world.output.objects.items():
            await store.create(key, data)
        (tmp_path / "notes.txt").write_text("precious")
        await remove_output(open_store(str(tmp_path / "runs" / "out")))
        assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
            "notes.txt", "runs", "runs/out"]

    asyncio.run(run())


async def test_a_file_with_a_name_that_no_key_has_is_said_to_be_in_the_way(tmp_path):
    (tmp_path / "Icon\r").touch()
    with pytest.raises(DataError, match=r"the file 'Icon\\r' has a name that no key can have: rename or remove it"):
        await contents_of(open_store(str(tmp_path)))
