"""The event loop of a program that has none of its own."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable
from contextvars import Context
from typing import TypeVar, TypeVarTuple

if sys.platform == "win32":
    from asyncio import ProactorEventLoop as _BaseLoop
else:
    from uvloop import Loop as _BaseLoop

__all__ = ["ENDING_SIGNALS", "run_until_complete", "run_verb"]

# Beside SIGINT, which asyncio answers itself; Windows has none that a loop could answer.
ENDING_SIGNALS = () if sys.platform == "win32" else (signal.SIGTERM, signal.SIGHUP)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def run_until_complete(main: Coroutine[object, object, T]) -> T:
    """Run a coroutine on uvloop where there is one: it moves about 1.7 times the requests of asyncio's own loop."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main)


def run_verb(main: Coroutine[object, object, T]) -> T:
    """As `run_until_complete`; the first SIGTERM or SIGHUP cancels it, where the process has a handler for that.

    A handler of Python's would raise at whatever runs just then, and what C calls back loses an exception: the verb
    went on. asyncio cancels at SIGINT alone, and not where that is ignored.
    """
    handlers = {number: handler for number in ENDING_SIGNALS if callable(handler := signal.getsignal(number))}
    try:
        return run_until_complete(_cancelled_by(handlers, main))
    finally:
        for number, handler in handlers.items():  # a loop that closes leaves SIG_DFL
            signal.signal(number, handler)


async def _cancelled_by(numbers: Iterable[int], main: Coroutine[object, object, T]) -> T:
    task, asked = asyncio.current_task(), False

    def cancel() -> None:
        nonlocal asked
        if task is not None and not asked:  # what cleans up is not to be cut off by the next
            asked = True
            task.cancel()

    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, cancel)
    return await main


class _Loop(_BaseLoop):
    """A loop that a late answer from another thread may miss. Reads that are under way when a run ends (zarr asks for
    several objects at once, and the first refusal ends them all) are answered by obstore's threads, now and then just
    after the loop was closed: https://github.com/PyO3/pyo3-async-runtimes/issues/90. They print the traceback of it.
    So a thread that asks a closed loop for something is not told that nobody will do it.
    """

    def call_soon_threadsafe(self, callback: Callable[[*Ts], object], *args: *Ts,
                             context: Context | None = None) -> asyncio.Handle:
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise
            # Nobody waits for it any more.
            return asyncio.Handle(callback, args, self, context)
