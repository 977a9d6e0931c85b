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
from batch_client.figures import number, significant

__all__ = ["Found", "Measured", "Opener", "Trial", "find_best"]

# Loading takes longer when the machine is busy with the best way's windows too.
LOAD_SLACK = 1.5
LEAST_WINDOW, MOST_WINDOW = 0.25, 1.5
MOST_LOADING = 600.0  # seconds, where the search must not end for it


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
        return {**asdict(self.way), "records_per_s": significant(self.records_per_s),
                "against_best": round(self.against_best, 3), "failure": self.failure}


@dataclass
class Found:
    """The best way so far, its records/s, its gain over where the search began, and all that was tried, in order."""

    best: Way
    records_per_s: float = 0.0
    gain: float = 1.0
    tried: list[Measured] = field(default_factory=list)
    complete: bool = False

    @property
    def compared(self) -> bool:
        """Whether the best way is one of several; where time was short it is the first alone."""
        return self.complete or len(self.tried) > 1


async def find_best(
    start: Way, space: Space, opened: Opener, *, seconds: float, clock: Callable[[], float], say: Callable[[str], None],
) -> Found:
    """Search from `start` for at most about `seconds`; `start` itself is measured however long it takes.

    Raises ServingError when `start` does not work.
    """
    async with AsyncExitStack() as holding:
        search = _Search(start, opened, holding, deadline=clock() + seconds,
                         window=min(MOST_WINDOW, max(LEAST_WINDOW, seconds / 150)), clock=clock, say=say)
        say(f"model alone: {start}")
        await search.begin(max(seconds, MOST_LOADING))
        search.found.complete = await search.climb(space)
        if search.found.best != start:
            say(f"model alone: {start} once more, beside the best")
            await search.compare_with_start()
        return search.found


class _Search:
    """The best way so far, ready to be measured, and what is known of the others; `holding` ends its processes."""

    def __init__(self, start: Way, opened: Opener, holding: AsyncExitStack, *, deadline: float, window: float,
                 clock: Callable[[], float], say: Callable[[str], None]) -> None:
        self.found = Found(start)
        self._start = start
        self._opened = opened
        self._holding = holding
        self._deadline = deadline
        self._window = window
        self._clock = clock
        self._say = say
        self._held: Trial
        self._rates: list[float] = []
        self._seconds_a_way = 0.0

    async def begin(self, seconds: float) -> None:
        """Measure where the search begins."""
        began = self._clock()
        self._held = await self._holding.enter_async_context(self._opened(self._start, seconds))
        loading = self._clock() - began
        self._rates = [await self._held.window(self._window) for _ in range(ROUNDS)]
        windows = (self._clock() - began - loading) / ROUNDS
        self._seconds_a_way = LOAD_SLACK * loading + (2 * ROUNDS + 1) * windows
        self.found.records_per_s = statistics.median(self._rates)
        self.found.tried.append(Measured(self._start, self.found.records_per_s, 1.0))

    async def climb(self, space: Space) -> bool:
        """Go to neighbours that are better, as long as there is time for one and for the comparison with the start.
        Whether all were tried.
        """
        found = self.found
        while (way := next_way(found.best, space, {one.way for one in found.tried})) is not None:
            left = self._deadline - self._clock() - self._seconds_a_way
            if left < self._seconds_a_way:
                return False
            self._say(f"model alone: {way} (best {number(found.records_per_s)} records/s, {left:.0f} s left)")
            try:
                await self._try(way, left)
            except TimeoutError:
                found.tried.append(Measured(way, 0.0, 0.0, "the time was over"))
                return False
            except _BrokenWayError as error:
                found.tried.append(Measured(way, 0.0, 0.0, str(error)))
                # If it is the best way that is gone, that ends it all.
                self._rates.append(await self._held.window(self._window))
            found.records_per_s = statistics.median(self._rates)
        return True

    async def _try(self, way: Way, seconds: float) -> None:
        """Raises _BrokenWayError, or TimeoutError when it is not measured within `seconds`."""
        async with AsyncExitStack() as rival:
            try:
                async with asyncio.timeout(seconds):  # of measuring: a winner is taken over whole
                    trial = await rival.enter_async_context(self._opened(way, seconds))
                    best, other = await _in_turn(self._held, trial, self._window)
            except ServingError as error:
                raise _BrokenWayError(str(error)) from error
            self._rates += best
            self.found.tried.append(Measured(way, statistics.median(other), ratio(best, other)))
            if wins(best, other):
                await self._holding.aclose()
                self._holding.push_async_exit(rival.pop_all())
                self._held, self._rates, self.found.best = trial, other, way

    async def compare_with_start(self) -> None:
        """What the best way gains over the beginning, from windows of their own: of several that won, and are taken
        together, some may have won by chance. Without a gain the beginning stays; where the two can't be loaded side by
        side, the best stays, with what the medians say.
        """
        found, first = self.found, self.found.tried[0].records_per_s
        try:
            async with self._opened(self._start, MOST_LOADING) as start:
                before, best = await _in_turn(start, self._held, self._window)
        except ServingError as error:
            self._say(f"model alone: the best could not be compared with the beginning once more: {error}")
            found.gain = found.records_per_s / first
            return
        if wins(before, best):
            found.gain, found.records_per_s = ratio(before, best), statistics.median(best)
        else:
            found.best, found.records_per_s = self._start, statistics.median(before)


class _BrokenWayError(Exception):
    """A way that does not load, or that fails while it is measured; the text says why."""


async def _in_turn(held: Trial, trial: Trial, window: float) -> tuple[list[float], list[float]]:
    """Windows of the best way and of another, one after the other, until it is clear which is quicker."""
    best = [await held.window(window)]
    other: list[float] = []
    while not other or not decided(best, other):
        other.append(await trial.window(window))
        best.append(await held.window(window))
    return best, other
