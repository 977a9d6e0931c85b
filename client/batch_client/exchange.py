"""One request until it has an answer: send, check that the reply is the answer, send again when it is not.

Whatever is not the records' own fault (no room, a broken connection, an altered reply, a token) is dealt with here;
what may be their fault goes back to `scorer.py`. What an answer means stands in `dialect.py`, whether it is the answer
to the request in `answer.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

from batch_client.answer import Expected, OtherModelError, Prediction
from batch_client.contract import ModelContract
from batch_client.dialect import Outcome, Verdict, read_reply
from batch_client.endpoint import Endpoint, Pool, Room
from batch_client.errors import CredentialsError, StoppedError
from batch_client.events import Event, RequestDone, RequestRetried, RequestSent, Step, timed
from batch_client.pieces import Pieces
from batch_client.plan import Span
from batch_client.regions import Region
from batch_client.retry import RetryBucket, full_jitter
from batch_client.serving import Servers
from batch_client.tokens import NoTokenError, authorization
from batch_client.transport import HttpReply, LateError, TransportError
from batch_handler.oip import (
    CONTENT_TYPE,
    HEADER_LENGTH,
    RECORD_STATUS,
    Extent,
    InferRequest,
    Message,
    OipError,
    RequestedOutput,
    Tensor,
    encode_request,
)

__all__ = ["Exchange"]

# A token may be refused while its server restarts or another program renews it; after this long it is wrong.
TOKEN_SECONDS = 30.0
# An output of at least this many bytes comes back through shared memory, where there is some. A smaller one is soon
# copied with the reply, and in memory would take a page of its own.
SHARED_OUTPUT_BYTES = 16 << 10
# A request on which the connection breaks, or whose reply is unsound, this often may be the reason, whatever came in
# between, such as that a server which starts again has no room: taking it apart begins with a request of zeros, which
# waits for a server that is merely gone.
BROKEN_TRIES = 8

_SUSPECT = (Outcome.FAILED, Outcome.RAISED, Outcome.REFUSED, Outcome.TOO_LARGE)


@dataclass
class _Attempt:
    """One attempt at a request: its body, its id, and the extents of its outputs in the region that it has, if any.

    read_bytes: of the outputs that were read there. probe: it looks for what is bad in a request that failed.
    """

    message: Message
    ident: str
    extents: frozenset[Extent] = frozenset()
    region: Region | None = None
    read_bytes: int = 0
    probe: bool = False

    def read(self, offset: int, size: int) -> bytearray:
        """Bytes of its region, fewer where that ends. Raises OSError."""
        data = bytearray() if self.region is None else self.region.read(offset, size)
        self.read_bytes += len(data)
        return data


@dataclass
class _Tries:
    began: float = 0.0
    made: int = 0
    broken: int = 0


class Exchange:
    """Requests of one run at a pool of servers."""

    def __init__(
        self,
        *,
        servers: Servers,
        pool: Pool,
        contract: ModelContract,
        exact: bool,
        patience: float,
        clock: Callable[[], float],
        rng: random.Random,
        emit: Callable[[Event], None],
    ) -> None:
        self.pool = pool
        self._transport = servers.transport
        self._tokens = servers.tokens
        self._model = servers.model
        self._regions = servers.regions
        self._contract = contract
        self._expected = Expected(contract, exact=exact)
        self._exact = exact
        self._patience = patience
        self._clock = clock
        self._rng = rng
        self._emit = emit
        self._bucket = RetryBucket(pool.usable)
        self._repeating = asyncio.Lock()
        self._last_success = clock()
        self._nonce = f"{rng.getrandbits(48):012x}"
        self._numbers = itertools.count()

    async def ask(self, span: Span, records: Pieces, room: Room | None = None, at: str = "") -> Prediction | Verdict:
        """The prediction for `records` (n, *source's record shape), or a verdict for which they may be to blame.

        `room` is the way to a server of a caller that takes a request apart; None is the pool's. `at` is the URL of the
        server that it would rather ask.

        Raises StoppedError when no server answered anything for longer than patience, CredentialsError for a token
        that stays refused, MismatchError or ServingError when no server is left.
        """
        tries = _Tries(self._clock())
        while True:
            async with AsyncExitStack() as held:
                with timed(Step.ROOM, self._emit, self._clock):
                    endpoint = await held.enter_async_context((room or self.pool.room)(at=at))
                # Only now: records that wait for room are held once, as they were read.
                attempt = self._placed(endpoint, span, records.each(self._contract.on_the_wire), held)
                attempt.probe = room is not None
                sent_at, lane, place = self._clock(), endpoint.lane, endpoint.in_flight
                verdict, prediction = await self._attempt(endpoint, attempt, span, tries)
                if verdict.outcome is Outcome.NO_MODEL:
                    self.pool.without_model(endpoint, lane, verdict.reason)
                self._learn(endpoint, verdict, prediction, sent_at, place)
                seconds = self._clock() - sent_at
            if prediction is not None:
                return replace(prediction, server=endpoint.url)
            if _is_suspect(verdict, tries):
                self._emit(RequestRetried(endpoint.url, str(verdict), 0.0, seconds, attempt.probe))
                return replace(verdict, server=endpoint.url)
            await self._before_next(endpoint, verdict, tries, seconds, probe=attempt.probe)

    def now(self) -> float:
        return self._clock()

    async def pause(self, tries: int) -> None:
        """Wait before an attempt that repeats another, paid for by the run's retry bucket."""
        await self._wait(full_jitter(tries, self._rng))

    async def _wait(self, seconds: float) -> None:
        """So long, and until the bucket pays for a repetition: first come, first served."""
        with timed(Step.PAUSE, self._emit, self._clock):
            await asyncio.sleep(seconds)
            async with self._repeating:
                self._bucket.resize(self.pool.usable)
                while again := self._bucket.delay(self._clock()):  # noqa: ASYNC110 - it says when to ask again
                    await asyncio.sleep(again)

    def out_of_patience(self, since: float) -> float | None:
        """Seconds since the last answer, or `since` if that is later, if they are more than the run's patience."""
        idle = self._clock() - max(self._last_success, since)
        return idle if idle > self._patience else None

    def _placed(self, endpoint: Endpoint, span: Span, records: Pieces, held: AsyncExitStack) -> _Attempt:
        """A request. Its records, and room for outputs, are in the server's shared memory while `held` lasts, or its
        records are in its body.
        """
        ident = f"{self._nonce}-{next(self._numbers)}"
        if endpoint.shared_memory is not None:
            extents, end = self._extents(ident, records) if endpoint.shared_outputs else ({}, 0)
            message = self._encode(ident, span, records, ident, extents)
            try:
                region = held.enter_context(self._regions.region(endpoint.shared_memory, ident, message.shared, end))
            except OSError:  # full, or gone with its server
                # Records have the memory first: it is not too small for them while it has outputs.
                if not extents and not endpoint.outputs_held:
                    self._send_bodies(endpoint)
                endpoint.shared_outputs = False
            else:
                if extents:
                    held.enter_context(_counted(endpoint))
                return _Attempt(message, ident, frozenset(extents.values()), region)
        return _Attempt(self._encode(ident, span, records), ident)

    def _extents(self, ident: str, records: Pieces) -> tuple[dict[str, Extent], int]:
        """Where the larger outputs go: behind the records in region `ident`; and where that ends."""
        extents, end = {}, records.nbytes
        for output in self._contract.outputs:
            size = len(records) * output.record_bytes
            if size >= SHARED_OUTPUT_BYTES:
                extents[output.name], end = Extent(ident, end, size), end + size
        return extents, end

    def _send_bodies(self, endpoint: Endpoint) -> None:
        """From now on records for this server are sent, and its outputs too."""
        if endpoint.shared_memory is not None:
            self._regions.give_up(endpoint.shared_memory)
            endpoint.shared_memory = None

    def _encode(self, ident: str, span: Span, records: Pieces, in_region: str | None = None,
                extents: Mapping[str, Extent] = MappingProxyType({})) -> Message:
        parameters: dict[str, object] = {"binary_data_output": True}
        outputs: tuple[RequestedOutput, ...] = ()
        if self._exact:
            parameters |= {"exact": True, "first_row": span.first_row}
        if extents or (not self._exact and self._contract.has_status):
            # Who names one output gets no other; and only a bulk reply has a status without being asked.
            names = (*self._contract.output_names, RECORD_STATUS)
            outputs = tuple(RequestedOutput(name, extent=extents.get(name)) for name in names)
        inputs = (Tensor(self._contract.input_name, records.arrays[0], records.arrays[1:]),)
        request = InferRequest(id=ident, inputs=inputs, outputs=outputs, parameters=parameters)
        return encode_request(request, region=in_region)

    async def _attempt(self, endpoint: Endpoint, attempt: _Attempt, span: Span,
                       tries: _Tries) -> tuple[Verdict, Prediction | None]:
        tries.made += 1
        message = attempt.message
        started = self._clock()
        self._emit(RequestSent(endpoint.url, span.count, attempt.probe))
        refused, endpoint.refused_token = endpoint.refused_token, None
        try:
            token = await self._tokens[endpoint.url].token(refused)
        except (CredentialsError, NoTokenError) as error:
            if refused is None:
                raise
            endpoint.refused_token = refused  # what renews it may be away for a moment, as a server may
            return Verdict(Outcome.TOKEN, f"no other is to be had: {error}"), None
        headers = {"Content-Type": CONTENT_TYPE, HEADER_LENGTH: str(message.header_length), **authorization(token)}
        url = f"{endpoint.url}/v2/models/{endpoint.lane or self._model}/infer"
        try:
            reply = await self._transport.send("POST", url, headers, message.parts, self.pool.deadline)
        except TransportError as error:
            return Verdict(Outcome.LATE if isinstance(error, LateError) else Outcome.BROKEN, str(error)), None
        verdict = read_reply(reply.status, reply.body)
        if verdict.outcome is Outcome.TOKEN:
            endpoint.refused_token = token
        if verdict.outcome is Outcome.NOT_SHARED and not message.shared:
            verdict = Verdict(Outcome.REFUSED, verdict.reason)
        if verdict.outcome is not Outcome.RESULT:
            return verdict, None
        return self._accepted(endpoint, attempt, span, reply, started)

    def _accepted(self, endpoint: Endpoint, attempt: _Attempt, span: Span, reply: HttpReply,
                  started: float) -> tuple[Verdict, Prediction | None]:
        """What a reply that says it is a result is worth: the prediction, if it is the answer to this attempt."""
        try:
            prediction = self._expected.prediction(reply, attempt.ident, attempt.message.crc32c, span.count,
                                                   attempt.extents, attempt.read)
        except OtherModelError as error:
            return Verdict(Outcome.OTHER_MODEL, str(error)), None
        except OipError as error:
            return Verdict(Outcome.CORRUPT, str(error)), None
        if attempt.region is not None:
            attempt.region.answered = True
        if attempt.extents and not attempt.read_bytes:
            endpoint.shared_outputs = False  # no room, or a server that does not know of it
        self._emit(RequestDone(endpoint.url, span.count, attempt.message.nbytes, len(reply.body) + attempt.read_bytes,
                               self._clock() - started, prediction.compute * 1e3, attempt.probe))
        return Verdict(Outcome.RESULT), prediction

    def _learn(self, endpoint: Endpoint, verdict: Verdict, prediction: Prediction | None, sent_at: float,
               place: int) -> None:
        if prediction is not None:
            self._last_success = self._clock()
            self._bucket.succeeded()
            self.pool.answered(endpoint, sent_at, len(prediction.status), prediction.compute, prediction.before, place)
        match verdict.outcome:
            case Outcome.BUSY:
                self.pool.overloaded(endpoint, sent_at)
            case Outcome.TOKEN:
                if self.pool.refused(endpoint, sent_at) > min(TOKEN_SECONDS, self._patience):
                    self.pool.leave_out(endpoint, CredentialsError(
                        f"{endpoint.url} refuses the token: {verdict.reason}"))
            case Outcome.LATE:
                self.pool.late(endpoint, sent_at, str(verdict))
            case Outcome.BROKEN | Outcome.CORRUPT:
                self.pool.broke(endpoint, sent_at, str(verdict))
            case Outcome.FAILED | Outcome.RAISED | Outcome.REFUSED if endpoint.on_trial:
                self.pool.sick(endpoint.url, sent_at, str(verdict))
            case Outcome.NOT_SHARED:
                self._send_bodies(endpoint)
            case Outcome.OTHER_MODEL:
                self.pool.strange(endpoint, verdict.reason)

    async def _before_next(self, endpoint: Endpoint, verdict: Verdict, tries: _Tries, seconds: float, *,
                           probe: bool) -> None:
        idle = self.out_of_patience(tries.began)
        if idle is not None:
            raise StoppedError(f"no request was answered for {idle:.0f} s (--patience {self._patience:g}); the last "
                               f"answer of {endpoint.url}: {verdict}; "
                               "the same command goes on from here")
        # A server without room, or that wants another token, rests for all requests (pool): nothing to wait for here.
        rests = verdict.outcome in (Outcome.BUSY, Outcome.TOKEN)
        delay = 0.0 if rests else full_jitter(tries.made, self._rng)
        self._emit(RequestRetried(endpoint.url, str(verdict), delay, seconds, probe))
        if not rests:
            await self._wait(delay)


@contextmanager
def _counted(endpoint: Endpoint) -> Iterator[None]:
    """One more request of this endpoint whose outputs may be in memory, for as long as the block lasts."""
    endpoint.outputs_held += 1
    try:
        yield
    finally:
        endpoint.outputs_held -= 1


def _is_suspect(verdict: Verdict, tries: _Tries) -> bool:
    if verdict.outcome in _SUSPECT:
        return True
    tries.broken += verdict.outcome in (Outcome.BROKEN, Outcome.LATE, Outcome.CORRUPT)
    return tries.broken >= BROKEN_TRIES
