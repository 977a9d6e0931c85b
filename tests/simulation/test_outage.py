"""A short outage of many servers costs a run little more than the outage, on a virtual clock."""

import asyncio

import numpy as np

from batch_client.pipeline import execute
from batch_client.prepare import Services
from batch_client.serving import Servers
from batch_client.tokens import NoTokens
from batch_client.transport import TransportError
from support.simulated import SimulatedServer
from support.virtual import virtually
from support.world import World

URLS = tuple(f"http://server-{number}" for number in range(40))
BEGINS, ENDS = 5.0, 7.0  # seconds after the run began


class Interrupted(SimulatedServer):
    """Whatever is under way when the outage begins, and whatever is sent before it ends, breaks."""

    def __init__(self):
        super().__init__(seconds=1.0)
        self.began = asyncio.get_running_loop().time()
        self.broken = 0

    async def send(self, method, url, headers, parts, deadline):
        sent_at = asyncio.get_running_loop().time() - self.began
        if sent_at < ENDS and sent_at + self.seconds > BEGINS and method == "POST":
            await asyncio.sleep(max(BEGINS - sent_at, 0.01))
            self.broken += 1
            raise TransportError("connection reset by peer")
        return await super().send(method, url, headers, parts, deadline)


@virtually
async def test_an_outage_of_two_seconds_does_not_put_a_wide_run_to_sleep_for_minutes():
    records = np.random.default_rng(5).integers(0, 99, (8_000, 3), np.uint8)
    world = World(0, records=records)
    loop, server = asyncio.get_running_loop(), Interrupted()
    services = Services(Servers(server, dict.fromkeys(URLS, NoTokens()), "toy"), world.source, world.output,
                        clock=loop.time, rng=world.rng)
    await execute(world.spec(endpoints=URLS, in_flight=5), services)
    seconds, broken = loop.time() - server.began, server.broken
    assert broken >= 200  # all that 40 servers held
    assert seconds < 30  # 11 without the outage; one purse for all servers made it 211
