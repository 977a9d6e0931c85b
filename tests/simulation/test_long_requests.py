"""Requests that take minutes, at one worker that computes whatever was sent to it: few are sent in vain."""

import asyncio
import random

import numpy as np
import pytest

from batch_client.limiter import REQUEST_SECONDS
from batch_client.pipeline import execute
from batch_client.prepare import Services
from batch_client.serving import Servers
from batch_client.spec import RunSpec
from batch_client.storage import MemoryStore
from batch_client.tokens import NoTokens
from batch_client.transport import LateError
from support.runs import source_of
from support.simulated import URL, SimulatedServer
from support.virtual import virtually

REQUESTS = 40


class OneWorker(SimulatedServer):
    """First come, first served; who gave up waiting is served too."""

    def __init__(self, each, told, stated):
        super().__init__()
        self.each, self.told, self.stated = each, told, stated
        self.worker = asyncio.Semaphore(1)
        self.late = 0

    def metadata(self):
        found = super().metadata()
        if self.stated:
            found.parameters["micro_batch_ms"] = self.each * 1e3 * self.micro_batch / 100
        return found

    def reply_parameters(self):
        return {**super().reply_parameters(), "compute_ms": self.each * 1e3 if self.told else 0.0}

    async def send(self, method, url, headers, parts, deadline):
        if method == "GET":
            return await super().send(method, url, headers, parts, deadline)

        async def work():
            async with self.worker:
                await asyncio.sleep(self.each)
                return await super(OneWorker, self).send(method, url, headers, parts, deadline)

        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(work())), deadline)
        except TimeoutError:
            self.late += 1
            raise LateError("no answer") from None


@pytest.mark.parametrize(("each", "told", "stated", "most_late", "patience"), [
    (20, False, False, 0, 600), (40, False, False, 0, 600), (60, False, False, 0, 600), (90, False, False, 1, 600),
    (120, False, False, 3, 600), (60, True, False, 0, 600), (90, True, False, 1, 600), (120, True, False, 3, 600),
    (140, True, True, 0, 600), (140, False, True, 0, 600),
    (20, False, False, 2, 60), (20, True, False, 2, 60), (25, False, True, 0, 60), (40, False, False, 2, 120),
])
@virtually
async def test_no_more_is_sent_than_is_answered_in_time(each, told, stated, most_late, patience):
    """told: a reply says how long it was computed. stated: the server says before what a micro-batch takes."""
    records = np.random.default_rng(1).integers(1, 99, (100 * REQUESTS, 3), np.uint8)
    source = source_of(records, (100, 3))
    clock = asyncio.get_running_loop().time
    server, began = OneWorker(each, told, stated), clock()
    services = Services(Servers(server, {URL: NoTokens()}, "toy"), source, MemoryStore("memory://out"),
                        clock=clock, rng=random.Random(1))
    await execute(RunSpec(input="memory://in", output="memory://out", endpoints=(URL,), model="toy",
                          chunk_records=100, request_records=100, patience=patience), services)
    assert server.late <= most_late
    assert clock() - began < REQUESTS * each + 2 * REQUEST_SECONDS
