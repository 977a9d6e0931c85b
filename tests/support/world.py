"""A small world: a source, an output, a server; clients live and die in it on a virtual clock."""

from __future__ import annotations

import asyncio
import random

import numpy as np

from batch_client.errors import BatchClientError
from batch_client.pipeline import execute
from batch_client.prepare import Services
from batch_client.serving import Servers
from batch_client.spec import RunSpec
from batch_client.storage import MemoryStore
from batch_client.tokens import NoTokens
from batch_client.verify import verify_output
from support.faulty import CrashError, FaultyStore, FaultyTransport, Life, calm
from support.runs import opened, source_of
from support.simulated import URL, SimulatedServer
from support.virtual import virtually

RECORDS, CHUNK = 96, 8
# How a client may end although nothing is wrong with the run: 74 and 75 say "the same command goes on".
RESUMABLE = (74, 75)


class World:
    """One source and one output; `lives` clients have worked on it."""

    def __init__(self, seed, server=None, records=None, source=None, **options):
        self.rng = random.Random(seed)
        self.records = np.random.default_rng(5).integers(0, 99, (RECORDS, 3), np.uint8) if records is None else records
        self.source = source or source_of(self.records, (CHUNK, 3))
        self.output = MemoryStore("memory://out")
        self.server = server or SimulatedServer(seconds=0.01)
        self.options = {"chunk_records": CHUNK, "request_records": 4, "in_flight": 4, "patience": 3600.0, **options}
        self.lives = 0
        self.ends = []

    def spec(self, **changes):
        return RunSpec(**{"input": "memory://source", "output": "memory://out", "endpoints": (URL,), "model": "toy",
                          **self.options, **changes})

    def services(self, fate=None):
        fate, life = fate or calm(), Life()
        transport = FaultyTransport(self.server, fate, life)
        return Services(
            Servers(transport, {URL: NoTokens()}, "toy"), FaultyStore(self.source, fate, life),
            FaultyStore(self.output, fate, life), clock=lambda: asyncio.get_running_loop().time(),
            rng=random.Random(self.rng.random()))

    async def live(self, fate=None, **changes):
        """One client from its start to its end, undisturbed where no fate is given. Returns its summary, or None if it
        ended in a way that may be resumed.

        Raises whatever a user would have to look at.
        """
        self.lives += 1
        try:
            return await execute(self.spec(**changes), self.services(fate))
        except CrashError:
            self.ends.append("crash")
        except BaseExceptionGroup as group:
            if group.split(CrashError)[1] is not None:
                raise
            self.ends.append("crash")
        except BatchClientError as error:
            if error.exit_code not in RESUMABLE:
                raise
            self.ends.append(str(error))
        return None

    async def until_published(self, fate=None, most=40, **changes):
        for _ in range(most):
            summary = await self.live(fate, **changes)
            if summary is not None and summary.published:
                return summary
        raise AssertionError(f"not published after {most} lives: {self.ends[-3:]}")

    async def settle(self):
        """Let PUTs that are still under way land."""
        await asyncio.sleep(1000)

    async def check(self, root=None):
        """The output is whole, in order, and what it would have been without any fault."""
        verification = await verify_output(self.output, deep=True)
        assert verification.records == len(self.records)
        if root is not None:
            assert verification.root == root, f"the root is {verification.root}, wanted {root}"
        found = opened(self.output)
        np.testing.assert_array_equal(found["y"][:].view(np.uint32),
                                      self.server.expected(self.records, CHUNK).view(np.uint32))
        assert (found["record_status"][:] == 0).all()


@virtually
async def undisturbed(**options):
    """The root hash of a run to which nothing happens, the I/O steps it takes, and its source."""
    world, fate = World(0, **options), calm()
    summary = await world.until_published(fate)
    await world.check()
    return summary.root, fate.step, world.source
