"""Lanes: where bulk requests go, and that it changes nothing else."""

import asyncio
import json
import random
from dataclasses import replace

import pytest

from batch_client.errors import ServingError
from batch_client.pipeline import execute
from batch_client.prepare import Services
from batch_client.serving import Servers
from batch_client.storage import MemoryStore
from batch_client.tokens import NoTokens
from batch_client.transport import HttpReply
from support.simulated import SimulatedServer
from support.virtual import run_virtually, virtually
from support.world import World

MISSING = HttpReply(404, {}, b'{"code": 404, "type": "ModelNotFoundException", "message": "no such model"}')


class LaneServer(SimulatedServer):
    """A server whose metadata names a bulk lane, and that has the models in `known`."""

    def __init__(self, lane="toy.bulk", known=("toy", "toy.bulk"), **options):
        super().__init__(**options)
        self.lane = lane
        self.known = known
        self.asked = []

    def metadata(self):
        metadata = super().metadata()
        return replace(metadata, parameters={**metadata.parameters, "bulk_lane": self.lane})

    async def send(self, method, url, headers, parts, deadline):
        if method == "POST":
            model = url.removesuffix("/infer").rpartition("/v2/models/")[2]
            self.asked.append(model)
            if model not in self.known:
                await asyncio.sleep(self.seconds)
                return MISSING
        return await super().send(method, url, headers, parts, deadline)


def run_at(server, **options):
    """One run: its summary and its world."""
    world = World(1, server=server, **options)
    return run_virtually(world.live()), world


def test_bulk_requests_go_to_the_lane_and_the_output_is_the_models(root):
    server = LaneServer()
    summary, world = run_at(server)
    assert set(server.asked) == {"toy.bulk"}
    assert summary.root == root
    assert json.loads(world.output.objects["_run/spec.json"])["model"] == "toy"


def test_a_lane_that_is_not_there_leaves_the_models_own_name(root):
    """Four requests are turned away together: the first to come back must not make the others speak of the model."""
    server = LaneServer(known=("toy",), seconds=0.01)
    summary, _ = run_at(server)
    assert server.asked.count("toy.bulk") == 4
    assert server.asked[-1] == "toy"
    assert summary.root == root
    with pytest.raises(ServingError, match="no such model"):
        run_at(LaneServer(known=()))


def test_a_lane_may_be_withdrawn_while_a_run_uses_it(root):
    class Withdrawn(LaneServer):
        async def send(self, *request):
            self.known = ("toy", "toy.bulk")[:1 + (len(self.asked) < 10)]
            return await super().send(*request)

    server = Withdrawn(seconds=0.01)
    summary, _ = run_at(server)
    assert set(server.asked) == {"toy", "toy.bulk"}
    assert summary.root == root


def test_a_model_is_asked_for_by_the_name_that_the_server_has_for_it_and_keeps_its_own(root):
    class Registered(LaneServer):
        """Has an archive's model under another name than the archive gives it."""

        def metadata(self):
            return replace(super().metadata(), name="archives-own")

    server = Registered(lane=None)
    summary, world = run_at(server)
    assert set(server.asked) == {"toy"}
    assert summary.root == root
    assert json.loads(world.output.objects["_run/spec.json"])["model"] == "archives-own"


@pytest.mark.parametrize("lane", [None, 7, "", "..", "../models", "a/b", "a?b", "é"])
def test_what_can_be_no_lane_is_none(lane, root):
    server = LaneServer(lane=lane)
    summary, _ = run_at(server)
    assert set(server.asked) == {"toy"}
    assert summary.root == root


@virtually
async def test_servers_with_and_without_lanes_share_a_run(root):
    servers = {"http://one": LaneServer(seconds=0.01), "http://two": SimulatedServer(seconds=0.01)}
    world = World(1)

    class Two:
        async def send(self, method, url, headers, parts, deadline):
            return await servers[url[:10]].send(method, url, headers, parts, deadline)

    services = Services(Servers(Two(), dict.fromkeys(servers, NoTokens()), "toy"), world.source,
                        MemoryStore("memory://out"), clock=asyncio.get_running_loop().time, rng=random.Random(1))
    assert (await execute(world.spec(), services)).root == root
    assert set(servers["http://one"].asked) == {"toy.bulk"}
    assert servers["http://two"].requests > 0


@virtually
async def test_an_output_begun_with_lanes_goes_on_without(root):
    world = World(1, server=LaneServer())
    await world.live(part=(1, 2))
    world.server = SimulatedServer()
    summary = await world.live()
    assert 0 < summary.scored < len(world.records)
    await world.check(root)
