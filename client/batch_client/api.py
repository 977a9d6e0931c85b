"""The Python API: the same run as the command line's."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable
from contextlib import suppress

from batch_client.calibrate import Calibration
from batch_client.calibrate import calibrate as calibrate_run
from batch_client.errors import STOPPED, STOPPED_AT_ONCE, StoppedError, UsageError
from batch_client.eventloop import run_until_complete
from batch_client.events import Event, Observer, RunStarted, observer_name
from batch_client.pipeline import execute, plan_run
from batch_client.plan import Plan
from batch_client.prepare import open_services
from batch_client.spec import RunSpec
from batch_client.summary import RunSummary

__all__ = ["calibrate", "plan", "run", "run_async"]

# From the request to stop to the end, whatever the run is doing: draining, waiting for a store.
STOP_SECONDS = 16.0


async def run_async(spec: RunSpec, observers: Iterable[Observer] = (),
                    stop: asyncio.Event | None = None) -> RunSummary:
    """Score every record of `spec.input` into `spec.output`, or go on with a run that was stopped.

    observers: called with every event (`batch_client.events`), in the event loop.
    stop: when set, work in flight is finished and StoppedError is raised.

    Raises the errors of `batch_client.errors`; each says what to do, and has the command line's exit code.
    """
    chosen = _checked(spec, observers)
    if stop is None:
        stop = asyncio.Event()
    elif not isinstance(stop, asyncio.Event):
        raise UsageError(f"stop is a {type(stop).__module__}.{_kind(stop)}: wanted an asyncio.Event, which a loop can "
                         "wait for")
    begun = asyncio.Event()

    def watch(event: Event) -> None:
        if isinstance(event, RunStarted):
            begun.set()

    work = asyncio.ensure_future(_serve_and_execute(spec, (watch, *chosen), stop))
    watcher = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done() and begun.is_set():  # before that there is nothing to finish
            await asyncio.wait({work}, timeout=STOP_SECONDS)
    finally:
        watcher.cancel()
        work.cancel()
        await asyncio.wait({work})
    if work.cancelled():
        raise StoppedError(STOPPED if begun.is_set() else STOPPED_AT_ONCE)
    return work.result()


def _checked(spec: RunSpec, observers: Iterable[Observer]) -> tuple[Observer, ...]:
    """The observers. Raises UsageError for what would fail at the first event, after the output was begun."""
    if not isinstance(spec, RunSpec):
        raise UsageError(f"spec is a {_kind(spec)}: wanted a RunSpec, such as RunSpec(input=…, output=…, archive=…)")
    if not isinstance(observers, Iterable):
        raise UsageError(f"observers is a {_kind(observers)}: wanted a tuple of them, such as (observer,)")
    chosen = tuple(observers)
    for observer in chosen:
        if not callable(observer):
            raise UsageError(f"an observer is a {_kind(observer)}: wanted what can be called with an event")
        if inspect.iscoroutinefunction(observer) or inspect.iscoroutinefunction(observer.__call__):
            raise UsageError(f"observer {observer_name(observer)} is a coroutine function, which nobody would await: "
                             "wanted a plain function that is quick")
    return chosen


def _kind(value: object) -> str:
    return type(value).__name__


async def _serve_and_execute(spec: RunSpec, observers: tuple[Observer, ...], stop: asyncio.Event) -> RunSummary:
    async with open_services(spec) as services:
        return await execute(spec, services, observers, stop)


def run(spec: RunSpec, observers: Iterable[Observer] = ()) -> RunSummary:
    """`run_async` for programs without an event loop of their own."""
    with suppress(RuntimeError):  # there is none
        asyncio.get_running_loop()
        raise UsageError("run() can't be called where an event loop runs, as in a notebook: await run_async(spec)")
    return run_until_complete(run_async(spec, observers))


async def plan(spec: RunSpec, observers: Iterable[Observer] = ()) -> Plan:
    """The sizes that `run_async` would choose; writes nothing and sends no record. Observers hear of servers that a
    run would go on without.
    """
    chosen = _checked(spec, observers)
    async with open_services(spec) as services:
        return await plan_run(spec, services, chosen)


async def calibrate(spec: RunSpec, observers: Iterable[Observer] = ()) -> Calibration:
    """Score the first records of a run for some seconds and forecast the whole; writes nothing. Observers hear what
    those of `plan` do.
    """
    chosen = _checked(spec, observers)
    async with open_services(spec) as services:
        return await calibrate_run(spec, services, chosen)
