"""Ten thousand bits flipped on the way, truncations, swaps: none is ever taken for a result."""

import asyncio
import random

import numpy as np
import pytest

from batch_client.contract import ModelContract
from batch_client.dialect import Outcome
from batch_client.endpoint import Pool
from batch_client.errors import BrokenPromiseError, DataError
from batch_client.exchange import Exchange, Prediction, _Tries
from batch_client.plan import OutputGeometry, Span
from batch_client.transport import HttpReply
from batch_client.verify import verify_output
from support.faulty import Fate
from support.simulated import URL, SimulatedServer
from support.virtual import run_virtually
from support.world import World

FLIPS = 10_000
ROWS = np.arange(24, dtype=np.uint8).reshape(8, 3)
SPAN = Span(0, 8, 0)


class Altering(SimulatedServer):
    """Alters the body of one request or one reply."""

    def __init__(self):
        super().__init__()
        self.alter_request = self.alter_reply = lambda body: body

    async def send(self, method, url, headers, parts, deadline):
        reply = await super().send(method, url, headers, [self.alter_request(b"".join(parts))], deadline)
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


async def attempt(exchange):
    message, ident = exchange._encode(SPAN, ROWS)
    return await exchange._attempt(exchange.pool.endpoints[0], message, ident, SPAN, _Tries())


def flip(body, rng):
    altered = bytearray(body)
    bit = rng.randrange(len(altered) * 8)
    altered[bit // 8] ^= 1 << bit % 8
    return bytes(altered)


@pytest.mark.parametrize("where", ["alter_request", "alter_reply"])
def test_every_flipped_bit_is_noticed(where, exchange_with):
    server = Altering()
    exchange = exchange_with(server)
    rng = random.Random(7)
    outcomes = set()

    async def run():
        verdict, prediction = await attempt(exchange)
        assert isinstance(prediction, Prediction)
        setattr(server, where, lambda body: flip(body, rng))
        for _ in range(FLIPS // 2):
            verdict, prediction = await attempt(exchange)
            assert prediction is None
            outcomes.add(verdict.outcome)

    asyncio.run(run())
    assert outcomes <= {Outcome.CORRUPT, Outcome.REFUSED}


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
            rows = ROWS + number
            message, ident = exchange._encode(SPAN, rows)
            reply = await server.send("POST", URL, {"Inference-Header-Content-Length": str(message.header_length)},
                                      message.parts, 1)
            pairs.append((message, ident, reply))
        taken = 0
        for mine, (message, ident, _) in enumerate(pairs):
            for theirs, (_, _, reply) in enumerate(pairs):
                server.send = lambda *_, reply=reply: asyncio.sleep(0, reply)
                exchange._encode = lambda *_, message=message, ident=ident: (message, ident)
                _, prediction = await attempt(exchange)
                assert (prediction is not None) == (mine == theirs)
                taken += prediction is not None
        assert taken == 50

    asyncio.run(run())


def test_every_flipped_bit_of_a_stored_chunk_is_noticed():
    world = World(3)
    rng = random.Random(11)

    async def run():
        await world.until_published(Fate(rng, faults=0))
        assert (await verify_output(world.output, deep=True)).records == len(world.records)
        keys = [key for key in world.output.objects if "/c/" in key]
        for _ in range(1000):
            key = rng.choice(keys)
            good = world.output.objects[key]
            world.output.objects[key] = flip(good, rng)
            with pytest.raises(DataError, match="SHA-256"):
                await verify_output(world.output, deep=True)
            world.output.objects[key] = good
        for key in [key for key in world.output.objects if key.endswith("zarr.json")]:
            good = world.output.objects[key]
            world.output.objects[key] = good.replace(b"float32", b"int32  ") if b"float32" in good else flip(good, rng)
            with pytest.raises(DataError, match="SHA-256"):
                await verify_output(world.output, deep=True)
            world.output.objects[key] = good
        for key in keys:
            good = world.output.objects.pop(key)
            with pytest.raises(DataError, match="missing"):
                await verify_output(world.output)
            world.output.objects[key] = good[:-1]
            with pytest.raises(DataError, match="wanted"):
                await verify_output(world.output)
            world.output.objects[key] = good

    run_virtually(run())


def test_a_chunk_that_was_altered_before_its_proof_is_never_overwritten_nor_believed():
    world = World(4)

    async def run():
        fate = Fate(random.Random(1), faults=0, kinds=("crash before",))
        fate.at = {60}
        await world.live(fate)
        keys = sorted(key for key in world.output.objects if key.startswith("y/c/"))
        proven = any("ledger" in key for key in world.output.objects)
        assert keys
        assert not proven
        world.output.objects[keys[0]] = flip(world.output.objects[keys[0]], random.Random(2))
        with pytest.raises(BrokenPromiseError, match="nothing was overwritten"):
            await world.until_published(Fate(random.Random(1), faults=0))

    run_virtually(run())
