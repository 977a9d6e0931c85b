"""Planted bugs: each breaks one promise, and the checks that the other tests rely on must notice it."""

import asyncio
import contextlib
import random

import numpy as np
import pytest

from batch_client import answer, ledger, pipeline, writer
from batch_client.answer import Expected, Prediction
from batch_client.errors import BatchClientError, DataError, MismatchError
from batch_client.ledger import Ledger
from batch_client.removal import remove_output
from batch_client.scorer import Scorer
from batch_client.storage import MemoryStore
from batch_client.transport import HttpReply
from batch_handler.oip import OipError, decode_reply, decode_request
from support.faulty import CrashError, Fate
from support.simulated import SimulatedServer
from support.virtual import run_virtually, virtually
from support.world import World

SEEDS = range(40)
# What a bug is noticed by: its own consequence, and no other one.
OTHER_ROOT, OTHER_BYTES, GONE = "the root is", "has SHA-256", " is gone, "
CRASHES = ("crash before", "crash after")
# A planted bug replaces one step of the product: there is no other way to have it wrong on purpose.


def caught(undisturbed_run, words="", server=None, faults=10, kinds=None, steps=None):
    """How many of the seeds notice that something is wrong, and say it in these words."""
    count = 0
    for seed in SEEDS:
        world = World(seed, source=undisturbed_run[2], server=server() if server else None)

        async def run(world=world, seed=seed):
            await world.until_published(
                Fate(random.Random(seed), steps=steps or undisturbed_run[1], faults=faults, kinds=kinds))
            await world.settle()
            await world.check(undisturbed_run[0])

        try:
            run_virtually(run())
        except (AssertionError, BatchClientError) as error:
            count += words in str(error)
    return count


def test_without_a_bug_nothing_is_caught(undisturbed_run):
    assert caught(undisturbed_run) == 0


def test_publishing_early_is_caught(undisturbed_run, monkeypatch):
    async def early(store, layout, plan, identity, proven):
        for key, document in await layout.metadata({"root": "sha256:early"}):
            await store.create(key, document)
        await store.create("_SUCCESS", b"")
        return "sha256:early"

    monkeypatch.setattr(pipeline, "publish", early)
    assert caught(undisturbed_run, "there is none") == len(SEEDS)


def test_proving_before_writing_is_caught(undisturbed_run, monkeypatch):
    add, put = Ledger.add, writer.ChunkWriter._put
    writes = []

    async def at_once(self, row):
        await add(self, row)
        await self.flush()

    async def unawaited(self, key, data):
        async def later():
            await asyncio.sleep(0.03)  # by the publication it is there, unless its client has died
            with contextlib.suppress(CrashError):  # its client is gone
                await put(self, key, data)

        writes.append(asyncio.create_task(later()))
        return await writer.proof_of(key, data), False

    monkeypatch.setattr(Ledger, "add", at_once)
    late = {"kinds": CRASHES, "faults": 4, "steps": 130}  # a crash matters between a proof and its write
    assert caught(undisturbed_run, **late) == 0
    monkeypatch.setattr(writer.ChunkWriter, "_put", unawaited)
    assert caught(undisturbed_run, faults=0) == 0
    assert caught(undisturbed_run, GONE, **late) > len(SEEDS) // 2


def test_believing_that_what_exists_is_right_is_caught(undisturbed_run, monkeypatch):
    async def trusting(self, key, data):
        await self._store.create(key, data)
        return await writer.proof_of(key, data), False

    class Unsteady(SimulatedServer):
        """Its bits depend on how many requests it has had."""

        def predict(self, records, first_row):
            return super().predict(records, first_row) + np.float32(self.requests)

    # Where a crash leaves a chunk unproven, the next client computes another one.
    assert caught(undisturbed_run, "holds other bytes", Unsteady, kinds=CRASHES) > len(SEEDS) // 3
    monkeypatch.setattr(writer.ChunkWriter, "_put", trusting)
    assert caught(undisturbed_run, OTHER_BYTES, Unsteady, kinds=CRASHES) > len(SEEDS) // 3


def test_taking_any_reply_is_caught(undisturbed_run, monkeypatch):
    def gullible(self, reply, ident, checksum, count):
        tensors = {tensor.name: tensor.data for tensor in reply.outputs}
        return Prediction({"y": tensors["y"]}, tensors["record_status"])

    monkeypatch.setattr(Expected, "_check", gullible)
    assert caught(undisturbed_run, OTHER_ROOT, kinds=("swapped", "stale"), faults=20, steps=60) > len(SEEDS) // 2


def test_not_checking_the_replys_checksum_is_caught(undisturbed_run, monkeypatch):
    def trusting(reply, extents, read):
        length = int(reply.headers.get("inference-header-content-length") or 0)
        try:
            return decode_reply(reply.body, length, max_tensor_bytes=1 << 20)
        except OipError as error:
            if "CRC" not in str(error):
                raise
            text = reply.body[:length].replace(b'"crc32c"', b'"crc32x"')
            return decode_reply(text + reply.body[length:], length, max_tensor_bytes=1 << 20)

    monkeypatch.setattr(answer, "_decode", trusting)
    # Most flips fall into bytes that are checked in another way too.
    assert caught(undisturbed_run, OTHER_ROOT, kinds=("flipped",), faults=20, steps=60) > len(SEEDS) // 8


def test_retrying_a_refused_request_for_ever_is_caught(undisturbed_run, monkeypatch):
    class Refusing(SimulatedServer):
        def answer(self, body, header_length):
            if self.requests > 200:
                raise AssertionError("asked again and again")
            return HttpReply(400, {}, b'{"error": "never"}')

    async def stubborn(self, span, rows):
        while True:
            answer = await self._exchange.ask(span, rows)
            if isinstance(answer, Prediction):
                return answer

    monkeypatch.setattr(Scorer, "score", stubborn)
    with pytest.raises(BaseExceptionGroup) as noticed:
        run_virtually(World(1, source=undisturbed_run[2], server=Refusing()).until_published())
    assert noticed.group_contains(AssertionError, match="asked again and again")


class Mixing(SimulatedServer):
    """The naive handler: it puts the records of whatever requests are there into one batch of variable size."""

    def answer(self, body, header_length):
        neighbours = self.at_once
        self.mixed = neighbours
        return super().answer(body, header_length)

    def predict(self, records, first_row):
        return super().predict(records, first_row) + np.float32(2**-12) * np.float32(getattr(self, "mixed", 0))


def test_a_handler_that_mixes_requests_is_caught(undisturbed_run):
    assert caught(undisturbed_run, OTHER_ROOT, Mixing) == len(SEEDS)
    roots = set()
    for flight in (1, 4):
        world = World(0, source=undisturbed_run[2], server=Mixing(seconds=0.01), in_flight=flight)
        roots.add(run_virtually(world.until_published()).root)
    assert len(roots) == 2


@virtually
async def test_a_request_that_travels_is_what_the_server_computes(undisturbed_run):
    """The checksum of the request comes back: a flipped bit on the way there is noticed too."""
    class Deaf(SimulatedServer):
        def answer(self, body, header_length):
            altered = bytearray(body)
            altered[-1] ^= 4
            decode_request(bytes(altered), header_length, max_tensor_bytes=1 << 20)
            return super().answer(bytes(altered) if self.requests % 3 == 0 else body, header_length)

    world = World(1, source=undisturbed_run[2], server=Deaf(seconds=0.01))
    assert (await world.until_published()).retries > 5
    await world.check(undisturbed_run[0])


def test_proofs_of_a_removed_output_that_count_are_caught(undisturbed_run, monkeypatch):
    """The check of the generation planted away, and a removal under a client that is about to publish."""
    async def blind(store, generation):
        pass

    async def run():
        world = World(1, source=undisturbed_run[2])

        class Removed(MemoryStore):
            async def create(self, key, data):
                if key == "_run/manifest/00000000.json" and "_run/removing" not in self.objects:
                    await remove_output(self)
                return await super().create(key, data)

        world.output = Removed("memory://out")
        await world.live()
        await world.check(undisturbed_run[0])

    with pytest.raises(MismatchError, match="was removed"):
        run_virtually(run())
    monkeypatch.setattr(ledger, "require_generation", blind)
    with pytest.raises(DataError, match="is not what was published"):
        run_virtually(run())
