"""Every bit flipped on the way and in the store, truncations, swaps: none is ever taken for a result."""

import asyncio
import itertools
import os
import random
import re
from contextlib import AsyncExitStack
from dataclasses import replace

import numpy as np
import pytest

from batch_client import answer, exchange
from batch_client.answer import Prediction
from batch_client.contract import ModelContract
from batch_client.dialect import Outcome
from batch_client.endpoint import Pool
from batch_client.errors import BrokenPromiseError, DataError
from batch_client.exchange import Exchange, _Attempt, _Tries
from batch_client.layout import SPEC_KEY
from batch_client.pieces import Pieces
from batch_client.plan import OutputGeometry, Span
from batch_client.transport import HttpReply
from batch_client.verify import verify_output
from batch_handler.oip import HEADER_LENGTH, Extent, OipError, crc32c
from batch_handler.shared import SharedMemory
from support.faulty import Fate
from support.simulated import URL, SimulatedServer
from support.virtual import virtually
from support.world import World

ROWS = np.arange(24, dtype=np.uint8).reshape(8, 3)
PIECES = Pieces([ROWS[:3], ROWS[3:]])
SPAN = Span(0, 8, 0)


class Altering(SimulatedServer):
    """Alters the body of one request or one reply, or the request's region before or after it was answered."""

    def __init__(self, **options):
        super().__init__(**options)
        self.alter_request = self.alter_reply = lambda body: body
        self.alter_region = self.alter_region_after = lambda path: None

    async def send(self, method, url, headers, parts, deadline):
        path = None
        if self.shared_memory is not None:
            name = re.search(rb'"shared_memory_region":"([^"]+)"', b"".join(parts))[1].decode()
            path = self.shared_memory.folder / name
            self.alter_region(path)
        reply = await super().send(method, url, headers, [self.alter_request(b"".join(parts))], deadline)
        if path is not None:
            self.alter_region_after(path)
        return HttpReply(reply.status, reply.headers, self.alter_reply(reply.body))


@pytest.fixture
def exchange_with():
    def make(server):
        contract = ModelContract("toy", "1", server.digest, server.fingerprint, 4, "x", np.dtype(np.uint8), (3,),
                                 (OutputGeometry("y", np.dtype(np.float32), (2,)),))
        pool = Pool((URL,), 4, lambda: 0.0, random.Random(1))
        return Exchange(servers=server.servers(), pool=pool, contract=contract, exact=True, patience=60,
                        clock=lambda: 0.0, rng=random.Random(1), emit=lambda _: None)

    return make


@pytest.fixture
def memory(tmp_path):
    """A server's shared memory; that it is in memory is not what these tests are about."""
    return SharedMemory(tmp_path)


async def attempt(exchange):
    endpoint, server = exchange.pool.endpoints[0], exchange._transport
    endpoint.shared_memory = server.shared_memory and server.shared_memory.folder
    async with AsyncExitStack() as held:
        asked = exchange._placed(endpoint, SPAN, PIECES, held)
        assert bool(asked.message.shared) == (server.shared_memory is not None)
        return await exchange._attempt(endpoint, asked, SPAN, _Tries())


def flipped(body, bit):
    altered = bytearray(body)
    altered[bit // 8] ^= 1 << bit % 8
    return bytes(altered)


def flip(body, rng):
    return flipped(body, rng.randrange(len(body) * 8))


@pytest.fixture
def outputs_in_memory(monkeypatch):
    """However small they are."""
    monkeypatch.setattr(exchange, "SHARED_OUTPUT_BYTES", 1)


@pytest.mark.parametrize("shared", ["nothing", "records", "outputs too"])
@pytest.mark.parametrize("where", ["alter_request", "alter_reply"])
def test_every_flipped_bit_is_noticed(where, shared, exchange_with, memory, request):
    if shared == "outputs too":
        request.getfixturevalue("outputs_in_memory")
    server = Altering(shared_memory=None if shared == "nothing" else memory)
    exchange = exchange_with(server)
    exchange._numbers = itertools.repeat(7)  # one request, again and again
    outcomes, bodies = set(), []

    async def run():
        setattr(server, where, lambda body: bodies.append(body) or body)
        verdict, prediction = await attempt(exchange)
        assert isinstance(prediction, Prediction)
        for bit in range(8 * len(bodies[0])):
            setattr(server, where, lambda body, bit=bit: bodies.append(body) or flipped(body, bit))
            verdict, prediction = await attempt(exchange)
            assert prediction is None
            outcomes.add(verdict.outcome)

    asyncio.run(run())
    assert len(set(bodies)) == 1
    # Another name, or more bytes than there are, is a region that is not there.
    assert outcomes <= {Outcome.CORRUPT, Outcome.REFUSED, *([Outcome.NOT_SHARED] if shared != "nothing" else [])}
    assert (server.returned > 0) == (shared == "outputs too")
    if (where, shared) == ("alter_reply", "outputs too"):
        assert server.returned == server.requests


def flip_bit(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_every_flipped_bit_of_a_region_is_noticed(exchange_with, memory):
    server = Altering(shared_memory=memory)
    exchange = exchange_with(server)

    async def run():
        assert (await attempt(exchange))[1] is not None
        for bit in range(ROWS.size * 8):
            server.alter_region = lambda path, bit=bit: flip_bit(path, bit)
            verdict, prediction = await attempt(exchange)
            assert (verdict.outcome, prediction) == (Outcome.CORRUPT, None)
        server.alter_region = lambda path: None
        assert (await attempt(exchange))[1] is not None

    asyncio.run(run())


def test_without_the_echo_a_flipped_bit_of_a_region_would_be_scored(exchange_with, memory, monkeypatch):
    # The control of the test above: it is the checksum that notices, and nothing else does.
    server = Altering(shared_memory=memory)
    exchange = exchange_with(server)

    async def run():
        _, good = await attempt(exchange)
        monkeypatch.setattr(server, "checksum", lambda body, shared: crc32c(body, ROWS))
        server.alter_region = lambda path: flip_bit(path, 7)
        _, bad = await attempt(exchange)
        assert (bad.outputs["y"][0] != good.outputs["y"][0]).any()

    asyncio.run(run())


OUTPUT_AT, OUTPUT_BYTES = ROWS.nbytes, len(ROWS) * 2 * 4


def test_every_flipped_bit_of_an_output_in_memory_is_noticed(exchange_with, memory, outputs_in_memory):
    server = Altering(shared_memory=memory)
    exchange = exchange_with(server)

    async def run():
        _, good = await attempt(exchange)
        for bit in range(OUTPUT_BYTES * 8):
            server.alter_region_after = lambda path, bit=bit: flip_bit(path, OUTPUT_AT * 8 + bit)
            verdict, prediction = await attempt(exchange)
            assert (verdict.outcome, prediction) == (Outcome.CORRUPT, None)
        # The control: a bit beside it changes nothing.
        for bit in (OUTPUT_AT * 8 - 1, 0):
            server.alter_region_after = lambda path, bit=bit: flip_bit(path, bit)
            _, same = await attempt(exchange)
            np.testing.assert_array_equal(same.outputs["y"], good.outputs["y"])

    asyncio.run(run())
    assert server.returned == OUTPUT_BYTES * 8 + 3


def test_the_larger_outputs_are_one_after_the_other_behind_the_records(exchange_with, memory):
    exchange = exchange_with(Altering(shared_memory=memory))
    shapes = {"a": (2,), "small": (), "b": (3, 5), "c": (7,)}
    exchange._contract = replace(exchange._contract, outputs=tuple(
        OutputGeometry(name, np.dtype(np.float64), shape) for name, shape in shapes.items()))
    rows = Pieces([np.zeros((1024, 3), np.uint8)])
    extents, end = exchange._extents("r", rows)
    sizes = {"a": 16384, "b": 122_880, "c": 57_344}
    assert {name: extent.size for name, extent in extents.items()} == sizes
    assert [extent.offset for extent in extents.values()] == [3072, 3072 + 16384, 3072 + 16384 + 122_880]
    assert end == 3072 + sum(sizes.values())
    assert {extent.region for extent in extents.values()} == {"r"}


@pytest.mark.parametrize("alter", [
    lambda path: os.truncate(path, OUTPUT_AT + OUTPUT_BYTES - 1), lambda path: os.truncate(path, 0),
    lambda path: path.write_bytes(bytes(OUTPUT_AT + OUTPUT_BYTES)),
], ids=["cut", "empty", "zeros"])
def test_an_output_in_memory_that_is_cut_or_anothers_is_noticed(alter, exchange_with, memory, outputs_in_memory):
    server = Altering(shared_memory=memory)
    exchange = exchange_with(server)
    server.alter_region_after = alter
    verdict, prediction = asyncio.run(attempt(exchange))
    assert (verdict.outcome, prediction) == (Outcome.CORRUPT, None)


def test_a_server_that_says_another_extent_than_it_was_given_is_not_believed(
        exchange_with, memory, outputs_in_memory, monkeypatch):
    server = Altering(shared_memory=memory)
    exchange = exchange_with(server)
    monkeypatch.setattr(Extent, "to_json", lambda extent: {
        "shared_memory_region": extent.region, "shared_memory_byte_size": extent.size,
        "shared_memory_offset": extent.offset - 1 if extent.offset else 0})
    verdict, prediction = asyncio.run(attempt(exchange))
    assert (verdict.outcome, prediction) == (Outcome.CORRUPT, None)
    assert "wanted them where the request has room" in verdict.reason


@pytest.mark.parametrize(("alter", "outcome"), [
    (lambda path: os.truncate(path, ROWS.nbytes - 1), Outcome.NOT_SHARED),
    (lambda path: os.truncate(path, 0), Outcome.NOT_SHARED),
    (lambda path: path.rename(path.with_name("elsewhere")), Outcome.NOT_SHARED),
    (lambda path: path.write_bytes(bytes(ROWS.nbytes)), Outcome.CORRUPT),
    (lambda path: path.write_bytes(ROWS.tobytes()[::-1]), Outcome.CORRUPT),
], ids=["cut", "empty", "gone", "zeros", "reversed"])
def test_a_region_that_is_cut_gone_or_anothers_is_noticed(alter, outcome, exchange_with, memory):
    server = Altering(shared_memory=memory)
    exchange = exchange_with(server)
    server.alter_region = alter
    verdict, prediction = asyncio.run(attempt(exchange))
    assert (verdict.outcome, prediction) == (outcome, None)


def test_every_truncation_is_noticed(exchange_with):
    server = Altering()
    exchange = exchange_with(server)
    whole = []
    server.alter_reply = lambda body: whole.append(body) or body

    async def run():
        await attempt(exchange)
        for length in range(len(whole[0])):
            server.alter_reply = lambda body, length=length: body[:length]
            verdict, prediction = await attempt(exchange)
            assert (verdict.outcome, prediction) == (Outcome.CORRUPT, None)
        server.alter_reply = lambda body: body + b"\0"
        assert (await attempt(exchange))[0].outcome is Outcome.CORRUPT

    asyncio.run(run())


def test_every_reply_to_another_request_is_noticed(exchange_with):
    server = SimulatedServer()
    exchange = exchange_with(server)

    async def run():
        pairs = []
        for number in range(50):
            rows = Pieces([ROWS + number])
            ident = f"request-{number}"
            asked = _Attempt(exchange._encode(ident, SPAN, rows), ident)
            headers = {"Inference-Header-Content-Length": str(asked.message.header_length)}
            pairs.append((asked, await server.send("POST", URL, headers, asked.message.parts, 1)))
        taken = 0
        for mine, (asked, _) in enumerate(pairs):
            for theirs, (_, reply) in enumerate(pairs):
                server.send = lambda *_, reply=reply: asyncio.sleep(0, reply)
                exchange._placed = lambda *_, asked=asked: asked
                _, prediction = await attempt(exchange)
                assert (prediction is not None) == (mine == theirs)
                taken += prediction is not None
        assert taken == 50

    asyncio.run(run())


@virtually
async def test_every_flipped_bit_of_a_stored_chunk_is_noticed():
    world = World(3, records=np.arange(48, dtype=np.uint8).reshape(16, 3))  # two chunks an array
    rng = random.Random(11)
    await world.until_published(Fate(rng, faults=0))
    assert (await verify_output(world.output, deep=True)).records == len(world.records)
    keys = [key for key in world.output.objects if "/c/" in key]
    for key in keys:
        good = world.output.objects[key]
        for bit in range(len(good) * 8):
            world.output.objects[key] = flipped(good, bit)
            with pytest.raises(DataError, match="SHA-256"):
                await verify_output(world.output, deep=True)
        world.output.objects[key] = good
    for key in [key for key in world.output.objects if key.endswith("zarr.json")]:
        good = world.output.objects[key]
        world.output.objects[key] = good.replace(b"float32", b"int32  ") if b"float32" in good else flip(good, rng)
        with pytest.raises(DataError, match="SHA-256"):
            await verify_output(world.output, deep=True)
        world.output.objects[key] = good
    for _ in range(100):
        good = world.output.objects[SPEC_KEY]
        world.output.objects[SPEC_KEY] = flip(good, rng)
        with pytest.raises(DataError, match=r"_run/spec\.json is of another run"):
            await verify_output(world.output)
        world.output.objects[SPEC_KEY] = good
    good = world.output.objects.pop(SPEC_KEY)
    with pytest.raises(DataError, match=r"_run/spec\.json is missing"):
        await verify_output(world.output)
    world.output.objects[SPEC_KEY] = good
    for key in keys:
        good = world.output.objects.pop(key)
        with pytest.raises(DataError, match="missing"):
            await verify_output(world.output)
        world.output.objects[key] = good[:-1]
        with pytest.raises(DataError, match="wanted"):
            await verify_output(world.output)
        world.output.objects[key] = good


@virtually
async def test_a_chunk_that_was_altered_before_its_proof_is_never_overwritten_nor_believed():
    world = World(4)
    fate = Fate(random.Random(1), faults=0, kinds=("crash before",))
    fate.at = set(range(60, 70))
    await world.live(fate)
    keys = sorted(key for key in world.output.objects if key.startswith("y/c/"))
    proven = any("ledger" in key for key in world.output.objects)
    assert keys
    assert not proven
    world.output.objects[keys[0]] = flip(world.output.objects[keys[0]], random.Random(2))
    with pytest.raises(BrokenPromiseError, match="nothing was overwritten"):
        await world.until_published()


@pytest.mark.parametrize("length", ["", "-1", "1.0", "\u00b2", "\u0661", "1" * 19, "1" * 5000])
def test_a_replys_length_that_is_no_number_of_bytes_is_an_unsound_reply(length):
    with pytest.raises(OipError, match="wanted a number"):
        answer._decode(HttpReply(200, {HEADER_LENGTH.lower(): length}, b"{}"), frozenset(), None)
