"""The search for the best way to run a model: measures what `search` says, within a budget of seconds."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from batch_client.bench.search import ROUNDS, Space, Way, decided, next_way, ratio, wins
from batch_client.errors import ServingError

__all__ = ["Found", "Measured", "Opener", "Trial", "find_best"]

# Loading takes longer when the machine is busy with the best way's windows too.
LOAD_SLACK = 1.5
LEAST_WINDOW, MOST_WINDOW = 0.25, 1.5


class Trial(Protocol):
    """A way that is ready to be measured."""

    async def window(self, seconds: float) -> float:
        """Records/s over `seconds`."""


# A way and the seconds that its loading may take → a trial; raises ServingError for a way that does not work.
Opener = Callable[[Way, float], AbstractAsyncContextManager[Trial]]


@dataclass(frozen=True)
class Measured:
    """A way that was tried: records/s, how much quicker than the best before it, or why it does not work."""

    way: Way
    records_per_s: float
    against_best: float
    failure: str = ""

    def to_value(self) -> dict[str, Any]:
        return {**asdict(self.way), "records_per_s": round(self.records_per_s, 1),
                "against_best": round(self.against_best, 3), "failure": self.failure}


@dataclass
class Found:
    """The best way so far, its records/s, its gain over where the search began, and all that was tried, in order."""

    best: Way
    records_per_s: float = 0.0
    gain: float = 1.0
    tried: list[Measured] = field(default_factory=list)
    complete: bool = False


async def find_best(
    start: Way, space: Space, opened: Opener, *, seconds: float, clock: Callable[[], float], say: Callable[[str], None],
) -> Found:
    """Search from `start` for at most about `seconds`; `start` itself is measured however long it takes.

    Raises ServingError when `start` does not work.
    """
    deadline = clock() + seconds
    window = min(MOST_WINDOW, max(LEAST_WINDOW, seconds / 150))
    found = Found(start)
    say(f"model alone: {start}")
    began = clock()
    async with AsyncExitStack() as holding:
        held = await holding.enter_async_context(opened(start, max(seconds, 600.0)))
        loading = clock() - began
        rates = [await held.window(window) for _ in range(ROUNDS)]
        windows = (clock() - began - loading) / ROUNDS
        found.records_per_s = statistics.median(rates)
        found.tried.append(Measured(start, found.records_per_s, 1.0))
        while (way := next_way(found.best, space, {one.way for one in found.tried})) is not None:
            left = deadline - clock()
            if left < LOAD_SLACK * loading + (2 * ROUNDS + 1) * windows:
                return found
            say(f"model alone: {way} (best {found.records_per_s:,.0f} records/s, {left:.0f} s left)")
            async with AsyncExitStack() as rival:
                try:
                    async with asyncio.timeout(left):
                        trial = await rival.enter_async_context(opened(way, left))
                        best, other = await _in_turn(held, trial, window)
                except TimeoutError:
                    found.tried.append(Measured(way, 0.0, 0.0, "the time was over"))
                    return found
                except ServingError as error:
                    found.tried.append(Measured(way, 0.0, 0.0, str(error)))
                    rates.append(await held.window(window))  # if it is the best way that is gone, that ends it all
                    continue
                rates += best
                won = ratio(best, other)
                found.tried.append(Measured(way, statistics.median(other), won))
                if wins(best, other):
                    await holding.aclose()
                    holding.push_async_exit(rival.pop_all())
                    held, rates = trial, other
                    found.best, found.gain = way, found.gain * won
            found.records_per_s = statistics.median(rates)
    found.complete = True
    return found


async def _in_turn(held: Trial, trial: Trial, window: float) -> tuple[list[float], list[float]]:
    """Windows of the best way and of another, one after the other, until it is clear which is quicker."""
    best = [await held.window(window)]
    other: list[float] = []
    while not other or not decided(best, other):
        other.append(await trial.window(window))
        best.append(await held.window(window))
    return best, other
