"""Records that make the model raise, its worker exit or hang, or its prediction NaN: found and listed, no others."""

import asyncio
import json
import math
import random

import numpy as np
import pytest

from batch_client.errors import DataError, StoppedError
from batch_client.pipeline import execute
from batch_client.prepare import Services
from batch_client.serving import Servers
from batch_client.spec import RunSpec
from batch_client.storage import MemoryStore
from batch_client.tokens import NoTokens
from batch_client.transport import HttpReply
from batch_handler.oip import decode_request
from support.runs import opened, source_of
from support.simulated import URL, SimulatedServer
from support.virtual import virtually
from support.world import World

RAISE, EXIT, HANG, NAN = 1001, 1002, 1003, 1004
KINDS = {"raise": RAISE, "exit": EXIT, "hang": HANG, "nan": NAN}
RESPONSE_SECONDS = 120


class PoisonedServer(SimulatedServer):
    """A worker that a record can break. Requests that are served at the same time share a server batch's fate."""

    def __init__(self, **options):
        super().__init__((3,), np.float32, micro_batch=16, seconds=0.02, **options)
        self.deaths = 0
        self.fails_on_zeros = False

    def predict(self, records, first_row):
        y = super().predict(records, first_row)
        y[(records[:, 0] == NAN)] = np.nan
        return y

    async def send(self, method, url, headers, parts, deadline):
        if method == "GET":
            return await super().send(method, url, headers, parts, deadline)
        self.requests += 1
        body = b"".join(parts)
        length = int(headers["Inference-Header-Content-Length"])
        records = decode_request(body, length, max_tensor_bytes=1 << 24).inputs[0].data
        deaths = self.deaths
        await asyncio.sleep(self.seconds)
        first = records[:, 0]
        if self.fails_on_zeros and not records.any():
            return died()
        if (first == RAISE).any():
            return HttpReply(500, {}, b'{"error": "the model raised ValueError: bad pixel"}')
        if (first == EXIT).any() or (first == HANG).any():
            await asyncio.sleep(RESPONSE_SECONDS if (first == HANG).any() else 2)
            self.deaths += 1
        if self.deaths != deaths:
            return died()
        return self.answer(body, length)


def died():
    return HttpReply(500, {}, json.dumps(
        {"code": 500, "type": "InternalServerException", "message": "Worker died."}).encode())


def world_of(count, poisons, chunk=1000):
    """Source store, records, and the records with the poisons made harmless."""
    rng = np.random.default_rng(1)
    clean = rng.integers(1, 99, (count, 3)).astype(np.float32)
    records = clean.copy()
    for index, kind in poisons.items():
        records[index, 0] = KINDS[kind]
    return source_of(records, (chunk, 3)), clean


@virtually
async def score(source, server, urls=(URL,), output=None, **options):
    output = output or MemoryStore("memory://out")
    services = Services(Servers(server, dict.fromkeys(urls, NoTokens()), "toy"), source, output,
                        clock=lambda: asyncio.get_running_loop().time(), rng=random.Random(2))
    spec = RunSpec(**{"input": "memory://source", "output": "memory://out", "endpoints": urls, "model": "toy",
                      "chunk_records": 1000, "request_records": 64, "in_flight": 4, **options})
    try:
        return await execute(spec, services), output
    except DataError as error:
        return error, output


def letters(output):
    found = {}
    for key, data in output.objects.items():
        if key.startswith("_run/failed/"):
            for record in json.loads(data)["records"]:
                found[record["index"]] = record
    return found


def test_twenty_of_four_kinds_among_fifty_thousand():
    rng = random.Random(3)
    places = rng.sample(range(50_000), 20)
    poisons = {place: list(KINDS)[number % 4] for number, place in enumerate(places)}
    server = PoisonedServer()
    source, clean = world_of(50_000, poisons)
    summary, output = score(source, server, max_failed=20, require_finite=True)
    assert summary.published
    found = opened(output)
    wanted = np.zeros(50_000, np.uint8)
    for place, kind in poisons.items():
        wanted[place] = 2 if kind == "nan" else 1
    np.testing.assert_array_equal(found["record_status"][:], wanted)
    assert set(letters(output)) == set(poisons)
    survivors = np.ones(50_000, bool)
    survivors[places] = False
    expected = server.expected(clean, 1000)
    np.testing.assert_array_equal(found["y"][:][survivors].view(np.uint32), expected[survivors].view(np.uint32))
    for place, letter in letters(output).items():
        kind = poisons[place]
        assert letter["attempts"] == (1 if kind == "nan" else 3)
        assert {"raise": "bad pixel", "nan": "not finite"}.get(kind, "Worker died") in letter["reason"]


@pytest.mark.parametrize("kind", ["raise", "exit", "hang"])
@pytest.mark.parametrize("place", [0, 31, 63, 40])
def test_one_poison_costs_at_most_the_promised_requests(kind, place):
    server = PoisonedServer()
    source, _ = world_of(64, {place: kind}, chunk=64)
    summary, output = score(source, server, max_failed=1, in_flight=1, chunk_records=64)
    assert summary.published
    assert list(letters(output)) == [place]
    probes = server.requests - 2
    assert probes <= 2 * math.ceil(math.log2(64)) + 6


@pytest.mark.parametrize("kind", ["raise", "exit"])
def test_one_poison_costs_no_more_where_there_are_two_servers(kind):
    servers = {"http://one": PoisonedServer(), "http://two": PoisonedServer()}

    class Two:
        async def send(self, method, url, *arguments):
            return await servers[url[:10]].send(method, url, *arguments)

    source, clean = world_of(64, {40: kind}, chunk=64)
    summary, output = score(source, Two(), tuple(servers), max_failed=1, chunk_records=64)
    assert summary.published
    assert list(letters(output)) == [40]
    assert sum(server.requests for server in servers.values()) - 2 <= 2 * math.ceil(math.log2(64)) + 6
    found = opened(output)["y"][:]
    expected = servers["http://one"].expected(clean, 64)
    np.testing.assert_array_equal(np.delete(found, 40, 0).view(np.uint32), np.delete(expected, 40, 0).view(np.uint32))


def test_without_leave_the_failures_are_held_back_and_a_later_run_may_accept_them():
    server = PoisonedServer()
    source, clean = world_of(3000, {1500: "raise", 2999: "exit"})
    error, output = score(source, server)
    assert isinstance(error, DataError)
    assert "2 records failed, --max-failed allows 0: they are listed in" in str(error)
    assert "--max-failed 2" in str(error)
    assert not any(key.endswith("zarr.json") for key in output.objects)
    assert [key for key in output.objects if key.startswith("y/c/")] == ["y/c/0/0"]
    summary, _ = score(source, server, output=output, max_failed=2)
    assert summary.scored == 2000
    found = opened(output)
    assert list(np.flatnonzero(found["record_status"][:])) == [1500, 2999]
    np.testing.assert_array_equal(found["y"][:1500], server.expected(clean, 1000)[:1500])


def test_nan_is_no_failure_unless_it_is_said_to_be():
    source, _ = world_of(100, {7: "nan"}, chunk=100)
    summary, output = score(source, PoisonedServer(), chunk_records=100)
    assert summary.published
    assert opened(output)["record_status"][7] == 2
    error, output = score(source, PoisonedServer(), chunk_records=100, require_finite=True)
    assert isinstance(error, DataError)
    assert letters(output) == {7: {"index": 7, "reason": "the prediction is not finite", "attempts": 1}}


def test_a_record_that_is_not_finite_is_said_so_beside_one_that_fails():
    source, _ = world_of(64, {5: "raise", 40: "nan", 41: "nan"}, chunk=64)
    summary, output = score(source, PoisonedServer(), max_failed=1, chunk_records=64)
    assert (summary.failed, summary.not_finite) == (1, 2)
    status = opened(output)["record_status"][:]
    assert {place: status[place] for place in np.flatnonzero(status)} == {5: 1, 40: 2, 41: 2}


def test_what_was_found_in_chunks_that_are_not_done_is_listed_too_when_a_run_gives_up():
    class Waiting(PoisonedServer):
        """The first chunk, which is not finite, is done after the second's record was found and before the rest."""

        async def send(self, method, url, headers, parts, deadline):
            if method != "GET":
                marks = decode_request(b"".join(parts), int(headers["Inference-Header-Content-Length"]),
                                       max_tensor_bytes=1 << 24).inputs[0].data[:, 1]
                await asyncio.sleep(float(marks.max()))
            return await super().send(method, url, headers, parts, deadline)

    records = np.ones((2200, 3), np.float32)
    records[:1100, 0] = NAN
    records[1100, 0] = RAISE
    records[0, 1], records[2199, 1] = 100, 200
    error, output = score(source_of(records, (1100, 3)), Waiting(), chunk_records=1100, request_records=112,
                          require_finite=True)
    assert isinstance(error, DataError)
    assert "1,100 records failed" in str(error)
    assert set(letters(output)) == {*range(1101)}


def test_a_server_that_fails_on_anything_convicts_nobody():
    server = PoisonedServer()
    server.fails_on_zeros = True
    source, _ = world_of(64, {5: "exit"}, chunk=64)
    with pytest.raises(StoppedError, match="zeros"):
        score(source, server, chunk_records=64, patience=300)


def test_a_model_that_refuses_everything_ends_the_run_soon():
    class Refusing(PoisonedServer):
        def answer(self, body, header_length):
            return HttpReply(400, {}, b'{"error": "wanted another dtype"}')

    server = Refusing()
    source, _ = world_of(5000, {}, chunk=1000)
    error, _ = score(source, server)
    assert isinstance(error, DataError)
    assert "wanted another dtype" in str(error)
    # Fewer than the run has requests: nothing is taken apart once zeros are refused too.
    assert server.requests < 79


@pytest.mark.parametrize("urls", [("http://one",), ("http://one", "http://two")])
def test_a_model_that_raises_on_zeros_ends_the_run_soon(urls):
    class Zeros(PoisonedServer):
        def answer(self, body, header_length):
            if not decode_request(body, header_length, max_tensor_bytes=1 << 24).inputs[0].data.any(axis=1).all():
                return HttpReply(500, {}, b'{"error": "the model raised ValueError: zero norm"}')
            return super().answer(body, header_length)

    servers = {url: Zeros() for url in urls}

    class All:
        async def send(self, method, url, *arguments):
            return await servers[url[:10]].send(method, url, *arguments)

    source, _ = world_of(100_000, {300: "raise"})
    error, _ = score(source, All(), urls, max_failed=5)
    assert isinstance(error, DataError)
    assert "zero norm" in str(error)
    assert sum(server.requests for server in servers.values()) < 600 < 100_000 / 64


def test_a_record_that_travels_alone_is_judged_by_three_failures_alone():
    server = PoisonedServer()
    source, _ = world_of(1, {0: "exit"}, chunk=1)
    summary, output = score(source, server, max_failed=1, in_flight=1, chunk_records=1)
    assert summary.published
    assert letters(output)[0]["attempts"] == 3
    assert server.deaths == 2 + 3
    assert server.requests - 2 <= 6


@pytest.mark.parametrize("answer", [
    HttpReply(507, {}, b'{"error": "out of memory"}'), HttpReply(200, {}, b"not a reply at all"),
])
@virtually
async def test_a_record_that_always_gives_the_same_bad_answer_is_found(answer):
    class Choking(SimulatedServer):
        def answer(self, body, header_length):
            return answer if bytes(world.records[37]) in body[header_length:] else super().answer(body, header_length)

    world = World(1, server=Choking(seconds=0.01))
    world.records[37] = (201, 202, 203)
    world.source.objects = World(1, records=world.records).source.objects
    assert (await world.live(max_failed=1)).failed == 1
