"""How `verify` reads an output, and what it refuses before that."""

import asyncio

import numpy as np
import pytest

from batch_client import verify
from batch_client.cli import main
from batch_client.errors import DataError
from batch_client.storage import MemoryStore
from support.runs import source_of
from support.simulated import Breaking
from support.virtual import run_virtually
from support.world import CHUNK, World

BAD = np.ones((10 * CHUNK, 3), np.uint8)
BAD[7 * CHUNK + 2] = 255
SERVER = ["--endpoint", "http://127.0.0.1:9", "--model", "toy"]


@pytest.mark.parametrize(("flags", "exact", "code", "wanted"), [
    ([], True, 64, "name what scores the records: --endpoint URL (repeatable) or --archive"),
    (["--endpoint", "127.0.0.1:9", "--model", "toy"], True, 64, "wanted a URL such as http://host:8080"),
    ([*SERVER, "--max-bytes-in-flight", "0"], True, 64, "--max-bytes-in-flight 0: wanted at least 1"),
    (SERVER, False, 64, "a --fast run promises no equal bytes"),
    (SERVER, True, 65, "is not what was published"),
])
def test_what_cant_be_replayed_is_refused_before_anything_is_read(flags, exact, code, wanted, monkeypatch, capfd):
    """The output is damaged, which who reads it finds."""
    world = World(1)
    run_virtually(world.live(exact=exact))
    del world.output.objects["y/c/0/0"]
    monkeypatch.setattr("batch_client.buckets.open_store", lambda *_, **__: world.output)
    assert main(["verify", "out", "--replay", "1", *flags]) == code
    assert wanted in capfd.readouterr().err


def test_a_source_that_has_moved_can_be_brought_back(monkeypatch, capfd):
    world = World(1)
    run_virtually(world.live())
    monkeypatch.setattr("batch_client.buckets.open_store",
                        lambda url, **_: world.output if url == "out" else MemoryStore(url))
    assert main(["verify", "out", "--replay", "1", *SERVER]) == 65
    said = capfd.readouterr().err
    assert "memory://source: no Zarr array there" in said
    assert said.endswith("; the run read it there, as the manifest says: bring it back to that place, or verify "
                         "without --replay\n")


def busiest_of(store, monkeypatch):
    """Has each read of a chunk take a second; how many bytes, and how many reads, were under way at most."""
    get, now, most = store.get, [0, 0], [0, 0]

    async def slow(key, start=None, stop=None):
        blob = await get(key, start, stop)
        if "/c/" not in key:
            return blob
        work = (len(blob.data), 1)
        now[:] = [value + one for value, one in zip(now, work, strict=True)]
        most[:] = map(max, most, now)
        await asyncio.sleep(1)
        now[:] = [value - one for value, one in zip(now, work, strict=True)]
        return blob

    monkeypatch.setattr(store, "get", slow)
    return most


@pytest.mark.parametrize(("reads", "nbytes"), [(5, 1 << 20), (5, 200), (5, 1)])
def test_bytes_are_read_side_by_side_within_bounds_and_counted(reads, nbytes, monkeypatch):
    world = World(1)
    run_virtually(world.live())
    monkeypatch.setattr(verify, "READS_AT_ONCE", reads)
    monkeypatch.setattr(verify, "READ_BYTES", nbytes)
    most, seen = busiest_of(world.output, monkeypatch), []
    found = run_virtually(verify.verify_output(world.output, deep=True, advance=lambda *told: seen.append(told)))
    largest = max(len(data) for key, data in world.output.objects.items() if "/c/" in key)
    assert most[0] <= max(nbytes, largest)
    assert (1 if nbytes == 1 else 2) <= most[1] <= (1 if nbytes == 1 else reads)
    assert {whole for _, whole in seen} == {found.nbytes}
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert done[-1] == found.nbytes


def test_a_status_that_is_not_what_its_row_counts_is_found_in_any_batch(monkeypatch):
    world = World(1, server=Breaking(), records=BAD, source=source_of(BAD, (CHUNK, 3)))
    run_virtually(world.live(max_failed=1))
    monkeypatch.setattr(verify, "READS_AT_ONCE", 5)

    async def altered(store, key, problems):
        """As if the bytes were those that were proven, and the row a lie."""

    monkeypatch.setattr(verify, "_bytes", lambda *_: altered(None, None, None))
    objects = world.output.objects
    objects["record_status/c/1"], objects["record_status/c/7"] = (
        objects["record_status/c/7"], objects["record_status/c/1"])
    with pytest.raises(DataError, match=r"chunk 1 of record_status counts .*; chunk 7 of record_status counts"):
        run_virtually(verify.verify_output(world.output, deep=True))
