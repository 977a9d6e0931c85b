"""What a run will take and cost, from a few seconds of it. Pure.

The first answers, which came before the servers were busy, are left out. The others are cut into batches of equal
number, and the interval is Student's over the batches' seconds a record: the method of batch means (Law and Kelton,
Simulation Modeling and Analysis, chapter 9), which bears that neighbouring answers are not independent. It is taken of
the logarithm, by the delta method: a time is never negative, and from few batches such an interval covers what it says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from batch_client.plan import Plan

__all__ = ["Answer", "Cost", "FirstAnswers", "Forecast", "Prices", "cost_of", "forecast", "measured"]

# What a calibration waits for: time for the pipeline to settle, and answers for an interval. A model of a second a
# record needs longer for the same certainty, but nobody waits for ever.
SECONDS, MOST_SECONDS = 20.0, 120.0
ENOUGH_ANSWERS = 60
# Answers that came while the pipeline filled, as a share of all.
WARM_UP = 0.2
# The 97.5th percentile of Student's t for 2, 3, … degrees of freedom: 3, 4, … batches, 95 % between the two ends.
STUDENT = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
LEAST_BATCHES, MOST_BATCHES = 3, len(STUDENT) + 2
ANSWERS_A_BATCH = 2
# The most that an interval's ends differ from its middle, as a power of e: figures stay finite where batches stood
# still.
MOST_RELATIVE = 20.0
# Of a run's objects beside its chunks: a ledger segment for as many output chunks or seconds, whatever comes first
# (ledger.py), at most one a chunk.
CHUNKS_A_SEGMENT, SECONDS_A_SEGMENT = 64, 10.0


@dataclass(frozen=True)
class Answer:
    """So many records have their predictions: when the last of them came, in seconds of one clock."""

    at: float
    records: int


class FirstAnswers:
    """The answers of the first seconds of a run, until they are enough to forecast it."""

    def __init__(self, began: float) -> None:
        self.answers: list[Answer] = []
        self._began = began

    def add(self, answer: Answer) -> None:
        """Note an answer, unless there are enough."""
        if not self.enough(answer.at):
            self.answers.append(answer)

    def enough(self, now: float) -> bool:
        """Whether nothing more is noted."""
        spent = now - self._began
        return spent >= MOST_SECONDS or (spent >= SECONDS and len(self.answers) >= ENOUGH_ANSWERS)


@dataclass(frozen=True)
class Forecast:
    """Seconds for `records` records, and the two ends of their 95 % interval. It covers what varied during the
    calibration, not what changes later.
    """

    records: int
    records_per_s: float
    seconds: float
    seconds_low: float
    seconds_high: float


@dataclass(frozen=True)
class Prices:
    """What an hour of the machines and 1,000 requests to the store cost, in one currency."""

    hour: float = 0.0
    thousand_puts: float = 0.0
    thousand_gets: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Of a run, or of its part; the ends are those of the forecast's interval."""

    total: float
    low: float
    high: float


def forecast(answers: Sequence[Answer], records: int) -> Forecast | None:
    """How long `records` records take, from answers in the order of their time; None if there are too few."""
    warm = int(len(answers) * WARM_UP)
    counted = len(answers) - warm - 1
    batches = min(MOST_BATCHES, counted // ANSWERS_A_BATCH)
    if batches < LEAST_BATCHES:
        return None
    ends = [warm + counted * number // batches for number in range(batches + 1)]
    costs = [_seconds_a_record(answers, first, last) for first, last in pairwise(ends)]
    mean = _seconds_a_record(answers, ends[0], ends[-1])
    if mean <= 0:
        return None
    relative = STUDENT[batches - LEAST_BATCHES] * statistics.stdev(costs) / batches**0.5 / mean
    factor = math.exp(min(relative, MOST_RELATIVE))
    return Forecast(records, 1 / mean, records * mean, records * mean / factor, records * mean * factor)


def measured(records: int, seconds: float, found: Forecast | None) -> Forecast | None:
    """The forecast of so many records that were seen to take these seconds, the first and the last ones included: they
    are its middle, and its interval holds that of `found`, which answers alone gave.
    """
    if records == 0 or seconds <= 0:
        return found
    ends = (seconds, seconds) if found is None else (found.seconds_low, found.seconds_high)
    return Forecast(records, records / seconds, seconds, min(seconds, ends[0]), max(seconds, ends[1]))


def _seconds_a_record(answers: Sequence[Answer], first: int, last: int) -> float:
    """From the answer `first` to the answer `last`, which is included."""
    records = sum(answer.records for answer in answers[first + 1:last + 1])
    return (answers[last].at - answers[first].at) / records


def cost_of(plan: Plan, prices: Prices, found: Forecast | None, parts: int = 1) -> Cost:
    """Machines for the forecast's time, if there is one, and the store's requests of an undisturbed run, or of one of
    its `parts`.
    """
    seconds = (0.0,) * 3 if found is None else (found.seconds, found.seconds_low, found.seconds_high)
    return Cost(*(_requests(plan, prices, each, parts) + each / 3600 * prices.hour for each in seconds))


def _requests(plan: Plan, prices: Prices, seconds: float, parts: int) -> float:
    units = plan.unit_count / parts
    segments = min(units, max(units / CHUNKS_A_SEGMENT, seconds / SECONDS_A_SEGMENT))
    puts, gets = plan.objects_written / parts + segments, plan.objects_read / parts
    return puts / 1000 * prices.thousand_puts + gets / 1000 * prices.thousand_gets
