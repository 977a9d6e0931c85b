"""Records → predictions, with the records that can't be predicted found and named.

A request on which the model or its worker failed twice is a suspect. It is split into halves of whole records, which
keep their places: the other half's records are overwritten by zeros, so that the shape and every survivor's bits stay
what they are. A record is given up after three failures alone, with a success of zeros in between, which shows that the
server is well: it is the same that failed, and probes stay there. While there are others, one that fails on zeros is
ejected, or passed over after three such failures, and another is asked. For one such record among n this takes at most
2⌈log₂ n⌉ + 6 requests beyond the first two where one server is asked throughout; a change of server costs a request of
zeros and repeats a probe.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from batch_client.answer import Prediction
from batch_client.assemble import STATUS_FAILED
from batch_client.dialect import Outcome, Verdict
from batch_client.endpoint import Room
from batch_client.errors import DataError, StoppedError
from batch_client.events import Event, RecordFailed
from batch_client.exchange import Exchange
from batch_client.figures import counted
from batch_client.pieces import Pieces
from batch_client.plan import Span

__all__ = ["HopelessError", "Scored", "Scorer"]

# The model or its worker failed on the same request this many times: the request is a suspect.
SUSPECT_AFTER = 2
FAILURES_ALONE = 3
# The handler's own word, which is about one request and not about those that were with it in a server batch.
_OF_ONE_REQUEST = (Outcome.RAISED, Outcome.REFUSED)


@dataclass(frozen=True)
class Scored:
    """Predictions of a span: arrays (records, *output shape) by output name, a uint8 status a record, and the records
    that could not be predicted (their outputs are zero, their status is `failed`).
    """

    outputs: Mapping[str, np.ndarray]
    status: np.ndarray
    failures: tuple[RecordFailed, ...] = ()


@dataclass(eq=False)
class _Case:
    """A suspect request while it is taken apart. `server` is the one that failed on it, then the last one asked."""

    span: Span
    records: np.ndarray
    room: Room
    alone: bool
    server: str
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    status: np.ndarray = field(init=False)
    failures: list[RecordFailed] = field(default_factory=list)
    told: int = 0  # failures that were emitted

    def __post_init__(self) -> None:
        self.status = np.full(self.span.count, STATUS_FAILED, np.uint8)


class HopelessError(DataError):
    """More records failed than a run takes apart; `failures` are those of the requests that were being taken apart."""

    def __init__(self, message: str, failures: Sequence[RecordFailed]) -> None:
        super().__init__(message)
        self.failures = failures


class _CompanyError(Exception):
    """A worker died under a probe that was not alone there: nothing is known of its records."""

    def __init__(self, verdict: Verdict, failed: int) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict
        self.failed = failed  # records that were given up before it


class Scorer:
    """Scores spans of records through an `Exchange`.

    most_failed: records that may be given up, over all spans; beyond it nothing more is taken apart.
    """

    def __init__(self, exchange: Exchange, micro_batch: int, emit: Callable[[Event], None],
                 most_failed: int = sys.maxsize) -> None:
        self._exchange = exchange
        self._micro_batch = micro_batch
        self._emit = emit
        self._most_failed = most_failed
        self._failed = 0
        self._most_records = sys.maxsize  # of a request, as far as a server has said
        self._open: list[_Case] = []

    async def score(self, span: Span, records: Pieces) -> Scored:
        """Predictions for `records` (n, *record shape of the source), whose places begin at `span.first_row`.

        Raises DataError when the server fails on zeros too or takes no request of this size, HopelessError when more
        records failed than `most_failed`, and what `Exchange.ask` raises.
        """
        failed = 0
        if span.count > max(self._most_records, self._micro_batch):
            return await self._split(span, records, Verdict(Outcome.TOO_LARGE))
        while True:
            answer = await self._exchange.ask(span, records)
            if isinstance(answer, Prediction):
                return Scored(answer.outputs, answer.status)
            failed += 1
            if answer.outcome is Outcome.TOO_LARGE:
                self._most_records = min(self._most_records, span.count - 1)
                return await self._split(span, records, answer)
            if answer.outcome not in (Outcome.FAILED, Outcome.RAISED) or failed >= SUSPECT_AFTER:
                return await self._isolate(span, records, answer)
            await self._exchange.pause(failed)

    async def _split(self, span: Span, records: Pieces, verdict: Verdict) -> Scored:
        """Two requests for one that is too large for the server, cut between micro-batches."""
        micro_batches = -(-(span.first_row % self._micro_batch + span.count) // self._micro_batch)
        if micro_batches < 2:
            raise DataError(f"records {span.start} to {span.stop - 1}: {verdict.outcome.value} ({verdict.reason}): "
                            "raise max_request_size there, or pack the model with a smaller --micro-batch")
        count = micro_batches // 2 * self._micro_batch - span.first_row % self._micro_batch
        first = Span(span.start, span.start + count, span.first_row)
        second = Span(span.start + count, span.stop, span.first_row + count)
        parts = [await self.score(first, records[:count]), await self.score(second, records[count:])]
        return Scored(
            {name: np.concatenate([part.outputs[name] for part in parts]) for name in parts[0].outputs},
            np.concatenate([part.status for part in parts]),
            parts[0].failures + parts[1].failures)

    async def _isolate(self, span: Span, pieces: Pieces, verdict: Verdict) -> Scored:
        records = pieces.joined()
        try:
            case = await self._take_apart(span, records, verdict)
        except _CompanyError as error:
            self._failed -= error.failed
            case = await self._take_apart(span, records, error.verdict)
        self._tell(case)
        return Scored(case.outputs, case.status, tuple(case.failures))

    async def _take_apart(self, span: Span, records: np.ndarray, verdict: Verdict) -> _Case:
        """The handler's own word is about one request. Where a worker died or hung, all that were aboard failed with
        it: so nothing else may be aboard.
        """
        if verdict.outcome in _OF_ONE_REQUEST:
            return await self._case(_Case(span, records, self._exchange.pool.room, alone=False, server=verdict.server),
                                    verdict)
        async with self._exchange.pool.alone() as room:
            return await self._case(_Case(span, records, room, alone=True, server=verdict.server), verdict)

    async def _case(self, case: _Case, verdict: Verdict) -> _Case:
        self._open.append(case)
        try:
            await self._require_health(case)
            await self._narrow(case, 0, case.span.count, verdict)
        finally:
            self._open.remove(case)
        return case

    async def _ask(self, case: _Case, records: np.ndarray) -> Prediction | Verdict:
        answer = await self._exchange.ask(case.span, Pieces([records]), case.room, case.server)
        case.server = answer.server
        return answer

    async def _require_health(self, case: _Case) -> None:
        """A request of zeros in the shape of the suspect must succeed at a server, which is asked from then on, or
        nothing can be said about its records.
        """
        tries, began, pool = 0, self._exchange.now(), self._exchange.pool
        failing: Counter[str] = Counter()  # servers that say themselves that they can't score zeros, and how often
        while True:
            answer = await self._ask(case, np.zeros_like(case.records))
            if isinstance(answer, Prediction):
                if not case.outputs:
                    case.outputs = {name: np.zeros_like(array) for name, array in answer.outputs.items()}
                return
            tries += 1
            pool.sick(answer.server, self._exchange.now(), str(answer))
            failing[answer.server] += answer.outcome in _OF_ONE_REQUEST
            usable = [one.url for one in pool.endpoints if one.left_out is None]
            certain = answer.outcome is Outcome.REFUSED or (answer.outcome is Outcome.RAISED
                                                            and tries >= FAILURES_ALONE)
            which = f"records {case.span.start} to {case.span.stop - 1}"
            if certain and all(failing[url] for url in usable):
                raise DataError(f"{which}: {answer.outcome.value}, and on zeros in their place too "
                                f"({answer.reason}): nothing can be scored")
            if self._exchange.out_of_patience(began) is not None:
                raise StoppedError(f"{which}: the server fails on zeros in their place too ({answer.reason}) and "
                                   "has answered nothing within --patience; the same command goes on from here")
            if failing[case.server] >= FAILURES_ALONE and usable:  # its successes on records keep it from an ejection
                case.server = min(usable, key=lambda url: failing[url])
            await self._exchange.pause(tries)

    async def _narrow(self, case: _Case, low: int, high: int, verdict: Verdict) -> None:
        """Records [low, high) of the case failed together: find out which."""
        if high - low == 1:
            await self._judge(case, low, verdict)
            return
        middle = (low + high) // 2
        for start, stop in ((low, middle), (middle, high)):
            answer = await self._probe(case, start, stop)
            if isinstance(answer, Verdict):
                await self._narrow(case, start, stop, answer)

    async def _judge(self, case: _Case, row: int, verdict: Verdict) -> None:
        """The verdict on one record. It has failed alone once, unless it is all that its request had: that one may have
        had company at the server, and the server's health has just been seen.
        """
        single = case.span.count == 1
        for time in range(FAILURES_ALONE - (0 if single else 1)):
            if time or not single:
                await self._require_health(case)
            answer = await self._probe(case, row, row + 1)
            if isinstance(answer, Prediction):
                return
            verdict = answer
        reason = verdict.reason or verdict.outcome.value
        case.failures.append(RecordFailed(case.span.start + row, reason, FAILURES_ALONE))
        self._failed += 1
        if self._failed > self._most_failed:
            if self._failed == self._most_failed + 1:  # of others that are under way the first has told
                for one in self._open:
                    self._tell(one)
            raise HopelessError(
                f"{counted(self._failed, 'record')} failed alone, the last of them record {case.span.start + row} "
                f"({reason}): then it is the model and not a few records; mend it, or leave these records out with "
                "--records", [failure for one in self._open for failure in one.failures])

    def _tell(self, case: _Case) -> None:
        untold, case.told = case.failures[case.told:], len(case.failures)
        for failure in untold:
            self._emit(failure)

    async def _probe(self, case: _Case, low: int, high: int) -> Prediction | Verdict:
        """Records [low, high) in their places, zeros in all others; what they give is kept.

        Raises _CompanyError when it failed for a reason that may be another request's.
        """
        records = np.zeros_like(case.records)
        records[low:high] = case.records[low:high]
        well = case.server
        answer = await self._ask(case, records)
        if isinstance(answer, Prediction):
            for name, array in case.outputs.items():
                array[low:high] = answer.outputs[name][low:high]
            case.status[low:high] = answer.status[low:high]
        elif not case.alone and answer.outcome not in _OF_ONE_REQUEST:
            raise _CompanyError(answer, len(case.failures))
        elif case.server != well:  # which had no room, or broke: of this one zeros have said nothing
            await self._require_health(case)
            return await self._probe(case, low, high)
        return answer
