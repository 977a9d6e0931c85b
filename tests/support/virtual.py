"""An event loop on a virtual clock: waiting takes no time, and a run that waits for nothing is told so."""

from __future__ import annotations

import asyncio
import selectors
from functools import wraps


class StuckError(AssertionError):
    """Nothing is ready and nothing is scheduled: the program would hang for ever."""


class _NoSelector(selectors.SelectSelector):
    """Nothing arrives from outside; a wait moves the clock."""

    loop = None

    def select(self, timeout=None):
        if timeout is None:
            raise StuckError("the run waits for something that will not happen")
        self.loop.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only while everybody waits; work for threads is done at once, in place."""

    def __init__(self):
        self.now = 1000.0
        selector = _NoSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self):
        return self.now

    def run_in_executor(self, executor, func, *args):
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits it
            future.set_exception(error)
        return future


def run_virtually(main):
    """Run a coroutine to its end on a fresh virtual loop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def virtually(test):
    """A coroutine function as one that runs it virtually: for pytest, a test without a loop."""
    @wraps(test)
    def run(*arguments, **options):
        return run_virtually(test(*arguments, **options))

    return run
