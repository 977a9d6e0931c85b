"""The Python API: the same run as the command line's."""

from __future__ import annotations

import asyncio

from batch_client.calibrate import Calibration
from batch_client.calibrate import calibrate as calibrate_run
from batch_client.errors import StoppedError
from batch_client.eventloop import run_until_complete
from batch_client.events import Observer
from batch_client.pipeline import execute, plan_run
from batch_client.plan import Plan
from batch_client.prepare import serving
from batch_client.spec import RunSpec
from batch_client.summary import RunSummary

__all__ = ["calibrate", "plan", "run", "run_async", "run_until_complete"]

# From the request to stop to the end, whatever the run is doing: starting a server, draining, waiting for a store.
STOP_SECONDS = 16.0


async def run_async(spec: RunSpec, observers: tuple[Observer, ...] = (),
                    stop: asyncio.Event | None = None) -> RunSummary:
    """Score every record of `spec.input` into `spec.output`, or go on with a run that was stopped.

    observers: called with every event (`batch_client.events`), in the event loop.
    stop: when set, work in flight is finished and StoppedError is raised.

    Raises the errors of `batch_client.errors`; each says what to do, and has the command line's exit code.
    """
    stop = stop or asyncio.Event()
    work = asyncio.ensure_future(_serve_and_execute(spec, observers, stop))
    watcher = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            await asyncio.wait({work}, timeout=STOP_SECONDS)
    finally:
        watcher.cancel()
        work.cancel()
        await asyncio.wait({work})
    if work.cancelled():
        raise StoppedError("stopped before the end; what is finished is kept: the same command goes on from there")
    return work.result()


async def _serve_and_execute(spec: RunSpec, observers: tuple[Observer, ...], stop: asyncio.Event) -> RunSummary:
    async with serving(spec) as services:
        return await execute(spec, services, observers, stop)


def run(spec: RunSpec, observers: tuple[Observer, ...] = ()) -> RunSummary:
    """`run_async` for programs without an event loop of their own."""
    return run_until_complete(run_async(spec, observers))


async def plan(spec: RunSpec) -> Plan:
    """The sizes that `run_async` would choose; writes nothing and sends no record."""
    async with serving(spec) as services:
        return await plan_run(spec, services)


async def calibrate(spec: RunSpec) -> Calibration:
    """Score the first records of a run for some seconds and forecast the whole; writes nothing."""
    async with serving(spec) as services:
        return await calibrate_run(spec, services)
