"""Records → predictions: send, check that the reply is the answer, and decide what to do when it is not.

A reply is taken only if its id, checksum of the request, names, dtypes, shapes, model digest and fingerprint are
the expected ones. What a bad answer means stands in `dialect.py`; what is done about it stands here.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from batch_client.contract import ModelContract
from batch_client.dialect import Outcome, Verdict, read_reply
from batch_client.endpoint import Endpoint, Pool
from batch_client.errors import CredentialsError, DataError, StoppedError
from batch_client.events import Event, RequestDone, RequestRetried, RequestSent
from batch_client.plan import Span
from batch_client.retry import RetryBucket, full_jitter
from batch_client.tokens import TokenSource, authorization
from batch_client.transport import HttpReply, Transport, TransportError
from batch_handler.oip import (
    CONTENT_TYPE,
    HEADER_LENGTH,
    InferReply,
    InferRequest,
    Message,
    OipError,
    Tensor,
    decode_reply,
    encode_request,
)

__all__ = ["RECORD_STATUS", "Scored", "Scorer"]

RECORD_STATUS = "record_status"
REQUEST_SECONDS = 300.0
# A token that was just renewed and is refused again will not get better.
TOKEN_TRIES = 3
# The handler failed on the same request this many times: the request, not the server, is the reason.
FAILED_TRIES = 3


@dataclass(frozen=True)
class Scored:
    """One request's predictions: an array (records, *output shape) by output name, and a uint8 status a record."""

    outputs: Mapping[str, np.ndarray]
    status: np.ndarray


@dataclass
class _Tries:
    failed: int = 0
    token: int = 0
    attempts: int = 0
    refused_token: str | None = None


class Scorer:
    """Scores spans of records at a pool of servers until they are scored or can't be."""

    def __init__(
        self,
        *,
        transport: Transport,
        pool: Pool,
        contract: ModelContract,
        tokens: TokenSource,
        patience: float,
        clock: Callable[[], float],
        rng: random.Random,
        emit: Callable[[Event], None],
    ) -> None:
        self._transport = transport
        self._pool = pool
        self._contract = contract
        self._tokens = tokens
        self._patience = patience
        self._clock = clock
        self._rng = rng
        self._emit = emit
        self._bucket = RetryBucket()
        self._last_success = clock()
        self._nonce = f"{rng.getrandbits(48):012x}"
        self._numbers = itertools.count()

    async def score(self, span: Span, rows: np.ndarray) -> Scored:
        """Predictions for `rows` (records, *input shape) of the wire's dtype, whose places begin at `span.first_row`.

        Raises DataError when the servers can't score these records, StoppedError when patience is over,
        CredentialsError, ServingError.
        """
        tries = _Tries()
        while True:
            message, ident = self._encode(span, rows)
            async with self._pool.room() as endpoint:
                sent_at = self._clock()
                verdict, scored = await self._attempt(endpoint, message, ident, span, tries)
                self._learn(endpoint, verdict, sent_at)
            if scored is not None:
                return scored
            await self._before_next(endpoint, verdict, span, tries)

    def _encode(self, span: Span, rows: np.ndarray) -> tuple[Message, str]:
        ident = f"{self._nonce}-{next(self._numbers)}"
        return encode_request(InferRequest(
            id=ident,
            inputs=(Tensor(self._contract.input_name, rows),),
            parameters={"exact": True, "first_row": span.first_row, "binary_data_output": True},
        )), ident

    async def _attempt(self, endpoint: Endpoint, message: Message, ident: str, span: Span,
                       tries: _Tries) -> tuple[Verdict, Scored | None]:
        token = await self._tokens.token(tries.refused_token)
        headers = {"Content-Type": CONTENT_TYPE, HEADER_LENGTH: str(message.header_length), **authorization(token)}
        url = f"{endpoint.url}/v2/models/{self._contract.name}/infer"
        started = self._clock()
        self._emit(RequestSent(endpoint.url, span.count))
        try:
            reply = await self._transport.send("POST", url, headers, message.parts,
                                               min(REQUEST_SECONDS, max(self._patience, 1.0)))
        except TransportError as error:
            return Verdict(Outcome.BROKEN, str(error)), None
        verdict = read_reply(reply.status, reply.body)
        tries.refused_token = token if verdict.outcome is Outcome.TOKEN else None
        if verdict.outcome is not Outcome.RESULT:
            return verdict, None
        try:
            answer = _decode(reply)
            scored = self._check(answer, message, ident, span.count)
        except _OtherModelError as error:
            return Verdict(Outcome.OTHER_MODEL, str(error)), None
        except OipError as error:
            return Verdict(Outcome.CORRUPT, str(error)), None
        self._emit(RequestDone(endpoint.url, span.count, message.nbytes, len(reply.body), self._clock() - started,
                               _milliseconds(answer.parameters.get("compute_ms"))))
        return verdict, scored

    def _learn(self, endpoint: Endpoint, verdict: Verdict, sent_at: float) -> None:
        match verdict.outcome:
            case Outcome.RESULT:
                self._last_success = self._clock()
                self._bucket.succeeded()
                self._pool.succeeded(endpoint)
            case Outcome.BUSY:
                self._pool.overloaded(endpoint, sent_at)
            case Outcome.BROKEN | Outcome.CORRUPT:
                self._pool.broke(endpoint)
            case Outcome.OTHER_MODEL | Outcome.NO_MODEL:
                self._pool.leave_out(endpoint, verdict.reason)

    async def _before_next(self, endpoint: Endpoint, verdict: Verdict, span: Span, tries: _Tries) -> None:
        tries.attempts += 1
        self._give_up(endpoint, verdict, span, tries)
        delay = full_jitter(tries.attempts, self._rng)
        if verdict.outcome is not Outcome.BUSY:
            delay = max(delay, self._bucket.delay(self._clock()))
        self._emit(RequestRetried(endpoint.url, f"{verdict.outcome.value}: {verdict.reason}", delay))
        await asyncio.sleep(delay)

    def _give_up(self, endpoint: Endpoint, verdict: Verdict, span: Span, tries: _Tries) -> None:
        records = f"records {span.start} to {span.stop - 1}"
        match verdict.outcome:
            case Outcome.REFUSED | Outcome.TOO_LARGE:
                raise DataError(f"{endpoint.url} refuses {records}: {verdict.reason}")
            case Outcome.FAILED:
                tries.failed += 1
                if tries.failed >= FAILED_TRIES:
                    raise DataError(f"{endpoint.url} failed {tries.failed} times on {records}: {verdict.reason}; "
                                    "the server's log has the reason")
            case Outcome.TOKEN:
                tries.token += 1
                if tries.token >= TOKEN_TRIES:
                    raise CredentialsError(f"{endpoint.url} refuses the token: {verdict.reason}")
        idle = self._clock() - self._last_success
        if idle > self._patience:
            raise StoppedError(f"no request was answered for {idle:.0f} s (--patience {self._patience:g}); the last "
                               f"answer of {endpoint.url}: {verdict.outcome.value}: {verdict.reason}; "
                               "the same command goes on from here")

    def _check(self, reply: InferReply, message: Message, ident: str, count: int) -> Scored:
        contract = self._contract
        found = (str(reply.parameters.get("model_digest", contract.digest)),
                 str(reply.parameters.get("fingerprint", contract.fingerprint)))
        if reply.id != ident:
            raise OipError(f"the reply has id {reply.id!r}, the request {ident!r}")
        if contract.fingerprint != "unverified" and reply.parameters.get("request_crc32c") != message.crc32c:
            raise OipError("the server received other bytes than were sent")
        if found != (contract.digest, contract.fingerprint):
            raise _OtherModelError(f"its model is {found[0]} with numerics {found[1]}, this run's is "
                                   f"{contract.digest} with {contract.fingerprint}")
        tensors = {tensor.name: tensor.data for tensor in reply.outputs}
        status = tensors.pop(RECORD_STATUS, None)
        if status is None:
            status = np.zeros(count, np.uint8)
        if status.shape != (count,) or status.dtype != np.uint8:
            raise OipError(f"{RECORD_STATUS} is {status.dtype} {status.shape}, wanted uint8 ({count},)")
        for output in contract.outputs:
            array = tensors.get(output.name)
            wanted = (count, *output.shape)
            if array is None or array.shape != wanted or array.dtype != output.dtype:
                shown = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise OipError(f"output {output.name} is {shown}, wanted {output.dtype} {wanted}")
        return Scored({output.name: tensors[output.name] for output in contract.outputs}, status)


class _OtherModelError(Exception):
    """A sound reply of a model, or of numerics, that are not this run's."""


def _decode(reply: HttpReply) -> InferReply:
    length = reply.headers.get(HEADER_LENGTH.lower())
    if length is not None and not length.isdecimal():
        raise OipError(f"{HEADER_LENGTH} is {length[:40]!r}, wanted a number")
    return decode_reply(reply.body, None if length is None else int(length))


def _milliseconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
