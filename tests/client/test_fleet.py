"""Several servers: those that differ, can't be reached, or come and go while a run goes on."""

import asyncio
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from batch_client.agreement import AGAIN_SECONDS, ask_again
from batch_client.calibrate import calibrate
from batch_client.cli.run import _sentence
from batch_client.contract import fetch_contract
from batch_client.endpoint import Pool
from batch_client.errors import DataError, MismatchError, ServingError, StoppedError, UsageError
from batch_client.events import ServerAway, ServerJoined, ServerLeftOut
from batch_client.pipeline import execute, plan_run
from batch_client.prepare import Services
from batch_client.replay import replay
from batch_client.serving import Servers
from batch_client.storage import MemoryStore
from batch_client.tokens import FileTokens, NoTokens
from batch_client.transport import HttpReply, TransportError
from batch_client.verify import verify_output
from support.faulty import calm
from support.runs import opened
from support.simulated import SimulatedServer
from support.virtual import virtually
from support.world import CHUNK, World


class OtherNumerics(SimulatedServer):
    """Another kind of machine: other bits, another fingerprint, the same model."""

    def __init__(self):
        super().__init__()
        self.fingerprint = "other numerics"

    def predict(self, records, first_row):
        return super().predict(records, first_row) + np.float32(2**-12)


def two_servers(first, second):
    class Two:
        async def send(self, method, url, headers, parts, deadline):
            server = first if url.startswith("http://one") else second
            return await server.send(method, url, headers, parts, deadline)

    return Servers(Two(), dict.fromkeys(("http://one", "http://two"), NoTokens()), "toy")


def services_on(servers, world, output):
    return Services(servers, world.source, output, clock=lambda: asyncio.get_running_loop().time(),
                    rng=random.Random(1))


def run_on(servers, world, output, *observers, **options):
    return execute(world.spec(**options), services_on(servers, world, output), observers)


@virtually
async def test_servers_that_differ_are_left_out_and_the_run_goes_on(root):
    world = World(1)
    first, second = SimulatedServer(), OtherNumerics()
    said = []
    summary = await run_on(two_servers(first, second), world, world.output, said.append)
    assert summary.root == root
    assert second.requests == 0
    (why,) = [event.reason for event in said if isinstance(event, ServerLeftOut)]
    assert why == ("http://two: its model has simulated 'other numerics'; the first server's has simulated "
                   "'numerics'; serve it in that way, or leave it out")
    other = MemoryStore("memory://other")
    assert (await run_on(two_servers(second, first), world, other)).root != root


class Unreachable:
    requests = 0

    async def send(self, method, *_):
        self.requests += method != "GET"
        raise TransportError("nobody listens there")


@pytest.mark.parametrize(("other", "reason"), [
    (SimulatedServer(micro_batch=8), "http://two: its model has another name, version, micro-batch, input or output"),
    (Unreachable(), "http://two: can't be reached (nobody listens there): check"),
])
@virtually
async def test_a_server_that_the_run_goes_on_without_is_named(root, other, reason):
    """One with the same digest that takes other micro-batches, and one that can't be reached."""
    world = World(1)
    said = []
    summary = await run_on(two_servers(SimulatedServer(), other), world, world.output, said.append)
    assert summary.root == root
    assert other.requests == 0
    (why,) = [event.reason for event in said if isinstance(event, ServerLeftOut)]
    assert why.startswith(reason)
    assert summary.left_out == (why,)
    assert ", 0 retries, without 1 of 2 servers → memory://out" in _sentence(summary)
    assert "servers" not in _sentence(replace(summary, left_out=()))
    part = replace(summary, published=False)
    assert " s, without 1 of 2 servers: this part is done, " in _sentence(part)
    assert [limit > 0 for limit in summary.in_flight] == [True, False]
    found = await calibrate(world.spec(), services_on(two_servers(SimulatedServer(), other), world, world.output))
    assert found.left_out == (why,)
    said.clear()
    await plan_run(world.spec(), services_on(two_servers(SimulatedServer(), other), world, world.output),
                   (said.append,))
    assert [event.reason for event in said] == [why]


class ComesLater:
    """A server that nobody reaches at first, and after some seconds of the run's clock is `server`."""

    def __init__(self, server, after):
        self.server = server
        self.after = after
        self.began = asyncio.get_running_loop().time()

    async def send(self, *arguments):
        if asyncio.get_running_loop().time() < self.began + self.after:
            raise TransportError("nobody listens there")
        return await self.server.send(*arguments)


@virtually
async def test_a_server_that_comes_up_while_a_run_goes_on_takes_part(root):
    world = World(1)
    first, second = SimulatedServer(seconds=20.0), SimulatedServer()
    said = []
    summary = await run_on(two_servers(first, ComesLater(second, after=45.0)), world, world.output, said.append,
                           in_flight=1)
    assert summary.root == root
    assert second.requests > 0
    assert summary.left_out == ()
    out, back = [event for event in said if isinstance(event, ServerLeftOut | ServerJoined)]
    assert out.asked_again
    assert "http://two: can't be reached" in out.reason
    assert (back.endpoint, round(back.seconds), back.in_flight) == ("http://two", 2 * AGAIN_SECONDS, 2)
    assert (summary.ceiling_records_per_s, summary.percent_of_ceiling) == (None, None)


@virtually
async def test_a_server_whose_token_is_not_written_yet_comes_later(root, tmp_path):
    """`serve --token-out` writes it when the server is ready."""
    world = World(1)
    files = [tmp_path / name for name in ("one", "two")]
    files[0].write_text("token")
    second = SimulatedServer()
    said = []
    servers = two_servers(SimulatedServer(seconds=20.0), second)
    servers = replace(servers, tokens=dict(zip(servers.urls, map(FileTokens, files), strict=True)))
    asyncio.get_running_loop().call_later(10.0, files[1].write_text, "token")
    summary = await run_on(servers, world, world.output, said.append, in_flight=1)
    assert (summary.root, summary.left_out) == (root, ())
    assert second.requests > 0
    out, back = [event for event in said if isinstance(event, ServerLeftOut | ServerJoined)]
    assert out.reason.startswith("http://two: --token-file ")
    assert back.endpoint == "http://two"


@virtually
async def test_where_no_token_can_be_read_the_first_files_error_is_the_runs(tmp_path):
    world = World(1)
    servers = two_servers(SimulatedServer(), SimulatedServer())
    servers = replace(servers, tokens={url: FileTokens(tmp_path / url[-3:]) for url in servers.urls})
    with pytest.raises(ServingError, match=r"--token-file .*one: there is no such file; wanted"):
        await run_on(servers, world, world.output)


@virtually
async def test_an_observer_that_fails_at_a_server_that_comes_up_ends_the_run_there_and_then():
    world = World(1)

    def observe(event):
        match event:
            case ServerJoined():
                raise RuntimeError("not ready for it")

    servers = two_servers(SimulatedServer(seconds=20.0), ComesLater(SimulatedServer(), after=45.0))
    began = asyncio.get_running_loop().time()
    with pytest.raises(RuntimeError, match="not ready for it"):
        await run_on(servers, world, world.output, observe, in_flight=1)
    assert asyncio.get_running_loop().time() - began < 3 * AGAIN_SECONDS
    assert "_SUCCESS" not in world.output.objects


@virtually
async def test_what_is_learnt_of_a_server_while_it_is_asked_again_stands():
    server = SimulatedServer()
    pool = Pool(("http://one", "http://two"), 4, asyncio.get_running_loop().time, random.Random(1))
    second = pool.endpoints[1]

    class Revealing:
        async def send(self, *arguments):
            pool.leave_out(second, MismatchError("http://two: a reply under way was another model's"))
            return await server.send(*arguments)

    servers = two_servers(server, Revealing())
    contract = await fetch_contract(servers, "http://one")
    pool.leave_out(second, ServingError("http://two: gone"))
    asker = asyncio.create_task(ask_again(servers, pool, contract, exact=True))
    await asyncio.sleep(3 * AGAIN_SECONDS)
    assert "another model's" in str(second.left_out)
    assert not asker.done()
    asker.cancel()


@virtually
async def test_a_server_that_comes_up_with_another_model_is_out_for_good(root):
    world = World(1)
    other = OtherNumerics()
    said = []
    summary = await run_on(two_servers(SimulatedServer(seconds=20.0), ComesLater(other, after=10.0)), world,
                           world.output, said.append, in_flight=1)
    assert summary.root == root
    assert other.requests == 0
    out, for_good = [event for event in said if isinstance(event, ServerLeftOut | ServerJoined)]
    assert out.asked_again
    assert not for_good.asked_again
    assert "; this run's has simulated 'numerics'; serve it in that way" in for_good.reason
    assert summary.left_out == (for_good.reason,)


@virtually
async def test_a_model_that_is_gone_for_a_while_comes_back(root):
    """As where a server starts again and loads it after it listens."""
    world, began = World(1), 0.0

    class Reloading(SimulatedServer):
        async def send(self, method, url, headers, parts, deadline):
            if 5.0 < asyncio.get_running_loop().time() - began < 25.0:
                url = url.replace("toy", "nothing")
                return HttpReply(404, {}, b'{"code": 404, "type": "ModelNotFoundException", "message": "no"}')
            return await super().send(method, url, headers, parts, deadline)

    second = Reloading(seconds=3.0)
    began, said = asyncio.get_running_loop().time(), []
    summary = await run_on(two_servers(SimulatedServer(seconds=20.0), second), world, world.output, said.append,
                           in_flight=1)
    assert (summary.root, summary.left_out) == (root, ())
    assert [type(event) for event in said if isinstance(event, ServerLeftOut | ServerJoined)] == [
        ServerLeftOut, ServerJoined]


@virtually
async def test_a_run_goes_on_with_the_server_that_has_its_model(root):
    """A second life meets first a server with another version: it is the output that says which model is the run's."""
    world = World(1)
    newer = SimulatedServer(digest="sha256:newer")
    fate = calm()
    fate.at, fate.kinds = set(range(40, 80)), ("crash before",)
    await world.live(fate)
    assert world.ends == ["crash"]
    summary = await run_on(two_servers(newer, SimulatedServer()), world, world.output)
    assert newer.requests == 0
    assert summary.root == root
    with pytest.raises(MismatchError, match="its model is sha256:newer"):
        await run_on(two_servers(newer, newer), world, world.output, overwrite=False)


@virtually
async def test_a_fast_run_uses_all_servers_and_its_manifest_says_what_it_gives_up():
    world = World(1)
    first, second = SimulatedServer(seconds=0.01), OtherNumerics()
    summary = await run_on(two_servers(first, second), world, world.output, exact=False)
    assert summary.published
    assert first.requests > 0
    assert second.requests > 0
    manifest = json.loads(world.output.objects["_run/manifest.json"])
    assert "given_up" in manifest
    assert (await verify_output(world.output, deep=True)).records == len(world.records)
    found = opened(world.output)
    np.testing.assert_allclose(found["y"][:], first.expected(world.records, CHUNK), atol=1e-2)
    services = Services(two_servers(first, second), world.source, world.output, rng=random.Random(1))
    with pytest.raises(UsageError, match="promises no equal bytes"):
        await replay(world.spec(exact=False), services, 1)


DIED = HttpReply(500, {}, b'{"code": 500, "type": "InternalServerException", "message": "Worker died."}')
OUT_OF_MEMORY = HttpReply(500, {}, b'{"error": "the model raised RuntimeError: CUDA out of memory"}')
MOVED = HttpReply(302, {}, b"sign in first")  # of a proxy before it


class Sick(SimulatedServer):
    """Its model is the run's, and it answers no request."""

    def __init__(self, reply):
        super().__init__(seconds=0.01)
        self.reply = reply

    def answer(self, body, header_length):
        return self.reply


@pytest.mark.parametrize("reply", [DIED, OUT_OF_MEMORY, MOVED])
@pytest.mark.parametrize("first", [True, False])
@virtually
async def test_a_server_that_fails_on_zeros_is_left_alone_and_no_record_is_to_blame(root, reply, first):
    world = World(1)
    sick, well = Sick(reply), SimulatedServer(seconds=1.0)
    said = []
    servers = two_servers(sick, well) if first else two_servers(well, sick)
    summary = await run_on(servers, world, world.output, said.append)
    assert (summary.root, summary.failed) == (root, 0)
    (away,) = [event for event in said if isinstance(event, ServerAway)]
    assert away.endpoint == ("http://one" if first else "http://two")
    assert str(reply.status) in away.reason


@pytest.mark.parametrize(("reply", "error", "words"), [
    (DIED, StoppedError, "fails on zeros"), (OUT_OF_MEMORY, DataError, "nothing can be scored"),
    (MOVED, DataError, "nothing can be scored"),
])
@virtually
async def test_servers_that_all_fail_on_zeros_end_a_run_as_one_does(reply, error, words):
    world = World(1)
    with pytest.raises(error, match=words):
        await run_on(two_servers(Sick(reply), Sick(reply)), world, world.output, patience=600.0)


@virtually
async def test_a_server_that_fails_on_zeros_is_no_reason_to_give_up_while_another_is_away(root):
    world = World(1)

    class Restarting(SimulatedServer):
        async def send(self, method, *arguments):
            if method != "GET" and asyncio.get_running_loop().time() < 1200.0:
                raise TransportError("nobody listens there")
            return await super().send(method, *arguments)

    summary = await run_on(two_servers(Sick(OUT_OF_MEMORY), Restarting()), world, world.output, patience=600.0)
    assert (summary.root, summary.failed) == (root, 0)
