"""A client for servers that take many records a request: blocks are read, cut, sent, put together and written."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import aiohttp
import numpy as np
from job import Job

__all__ = ["drive", "free_port", "running", "until_ready"]

READY_SECONDS = 120.0
BLOCKS_AT_ONCE = 4

Ask = Callable[[np.ndarray], Awaitable[np.ndarray]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], job: Job,
            environ: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, which is ended as a whole: launchers do not hand signals on."""
    process = subprocess.Popen(command, cwd=job.work, env={**os.environ, **(environ or {})}, start_new_session=True,
                               stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def until_ready(server: subprocess.Popen[bytes], session: aiohttp.ClientSession, url: str) -> None:
    """Returns when the server answers 200 at `url`."""
    async with asyncio.timeout(READY_SECONDS):
        while server.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url) as reply:
                    if reply.status == 200:
                        return
            await asyncio.sleep(0.1)
    sys.exit(f"the server ended with exit code {server.returncode}")


async def drive(job: Job, ask: Ask, records_a_request: int, in_flight: int) -> float:
    """Score everything; returns the seconds."""
    images, scores = job.images(), job.create_scores()
    room, blocks = asyncio.Semaphore(in_flight), asyncio.Semaphore(BLOCKS_AT_ONCE)

    async def one(records: np.ndarray) -> np.ndarray:
        async with room:
            return await ask(records)

    async def block(rows: slice) -> None:
        async with blocks:
            records = await asyncio.to_thread(images.__getitem__, rows)
            parts = [records[at:at + records_a_request] for at in range(0, len(records), records_a_request)]
            answers = await asyncio.gather(*map(one, parts))
            await asyncio.to_thread(scores.__setitem__, rows, np.concatenate(answers))

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for rows in job.blocks():
            tasks.create_task(block(rows))
    return time.perf_counter() - began
