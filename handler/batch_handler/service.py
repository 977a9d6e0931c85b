"""The TorchServe adapter: rows and a context in, a list of bytes out, a status for each.

Rule: `handle` never raises for one request, since TorchServe answers an exception with 503 to the whole server
batch. The archive's `entry.py` imports `handle` from here and is all that TorchServe loads.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from batch_handler.counts import Counts
from batch_handler.exchange import MAX_BATCH_BYTES, MAX_RECORDS, Exchange, Pending, Reply, Request, failed, refused
from batch_handler.lane import bulk_lane_of, make_way
from batch_handler.model import Model, ModelLoadError, Tuning
from batch_handler.oip import OipError
from batch_handler.scoring import BUSY, HEARD_SECONDS, MAX_SECONDS, Failure, Score
from batch_handler.shared import shared_memory_of
from batch_handler.worker import make_lean

__all__ = ["HEARD_SECONDS", "METRICS", "Service", "handle", "initialize", "tuning_from"]

# Counters that the server's metrics file must declare, with the dimensions ModelName and Level.
METRICS = ("Batches", "BatchRequests", "BatchRecords", "MicroBatches", "RejectedRequests")

# TorchServe's worker reads this at each request. Without it JSON bodies arrive parsed, NaN and all, and their
# checksum can't be echoed. Set here, it needs no line in the server's configuration.
_DECODE = "TS_DECODE_INPUT_REQUEST"

# Of a server batch, before what is left of it is to come again: TorchServe ends a worker, with all that it has, after
# 120 s. Most bodies take milliseconds; there are pictures of 10 MiB and JSON of 60 MiB that take half a minute.
_READ_SECONDS = 10.0
_BUSY = refused(OipError(BUSY.message, BUSY.status))

_log = logging.getLogger(__name__)


class Service:
    """A loaded model behind TorchServe's calling convention."""

    def __init__(
        self, model: Model, exchange: Exchange, counts: Counts, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._model = model
        self._exchange = exchange
        self._counts = counts
        self._now = now

    def handle(self, data: Sequence[Mapping[str, Any]], context: Any) -> list[bytes]:
        """Answer a server batch: one body a row; status, content type and headers go into `context`."""
        before = self._model.micro_batches
        asked = self._that_fit(list(self._read_in_time(data, context)))
        pending = [item for item in asked if isinstance(item, Pending)]
        scores = iter(self._model.score([item.query for item in pending]))
        sent = sum(item.nbytes for item in pending)
        replies: list[Reply] = []
        for item in asked:
            reply = item if isinstance(item, Reply) else _reply(item, next(scores), len(data))
            # Shared memory is full, or the regions are gone: the first that fit are sent, and tell their clients so.
            if reply.unshared and sent + reply.unshared > MAX_BATCH_BYTES:
                reply = _BUSY
            replies.append(reply)
            sent += reply.unshared
        for index, reply in enumerate(replies):
            _send(reply, context, index)
        self._count(context, pending, replies, self._model.micro_batches - before)
        return [reply.body for reply in replies]

    def _read_in_time(self, data: Sequence[Mapping[str, Any]], context: Any) -> Iterator[Pending | Reply]:
        until = self._now() + _READ_SECONDS
        for index, row in enumerate(data):
            yield _BUSY if self._now() > until else self._read(row, context, index)

    def _read(self, row: Mapping[str, Any], context: Any, index: int) -> Pending | Reply:
        try:
            return self._exchange.read(_request(row, context.get_all_request_header(index)))
        except MemoryError:
            return refused(OipError("the server has no memory to read the request", 507))
        except Exception:  # noqa: BLE001 - a bug of ours; still only this request's
            _log.exception("a request could not be read")
            return refused(OipError("the request could not be read", 500))

    def _that_fit(self, asked: Sequence[Pending | Reply]) -> list[Pending | Reply]:
        """TorchServe gives a server batch as long as one request, and its replies come as one message: what does not
        fit behind the others comes again.
        """
        taken: list[Pending | Reply] = []
        spent, sent = 0.0, 0
        for item in asked:
            if isinstance(item, Reply):
                taken.append(item)
                continue
            seconds = self._exchange.seconds(item.query)
            if (spent and spent + seconds > MAX_SECONDS) or (sent and sent + item.nbytes > MAX_BATCH_BYTES):
                taken.append(_BUSY)
            else:
                taken.append(item)
                spent, sent = spent + seconds, sent + item.nbytes
        return taken

    def _count(self, context: Any, pending: Sequence[Pending], replies: Sequence[Reply], micro_batches: int) -> None:
        if context.metrics is None:
            return
        values = (
            1,
            len(replies),
            sum(item.query.records for item in pending),
            micro_batches,
            sum(reply.status >= HTTPStatus.BAD_REQUEST for reply in replies),
        )
        self._counts.add(context.metrics, values)


# The one service of this worker process, by a constant name.
_WORKER: dict[str, Service] = {}


def initialize(context: Any) -> None:
    """Load the model of `context`; raises `ModelLoadError`, with which the worker never becomes ready."""
    properties = context.system_properties
    lane = bulk_lane_of(os.environ)
    if lane is not None and context.model_name == lane:
        make_way()  # before the model's own threads are there
    try:
        tuning, max_records = tuning_from(os.environ, properties.get("gpu_id"))
        model = Model.open(Path(properties["model_dir"]), tuning)
    except ModelLoadError as error:
        _log.critical("not ready: %s", error, exc_info=True)
        time.sleep(HEARD_SECONDS)
        raise
    os.environ[_DECODE] = "false"
    make_lean(sys.modules.get("ts.protocol.otf_message_handler"))
    # What Pillow says of strangers' broken pictures, Python and numpy of npy headers that are read as literals: each
    # text would be a line in the log, and be kept for good.
    warnings.filterwarnings("ignore", module=r"PIL\.|batch_handler\.content")
    warnings.simplefilter("ignore", SyntaxWarning)
    described = model.description
    _log.info(
        "ready: %s %s, %s, fingerprint %s, micro-batches of %d",
        *(described.name, described.version, model.digest, model.fingerprint, model.micro_batch),
    )
    exchange = Exchange(model, max_records, lane, shared_memory_of(os.environ))
    _WORKER["service"] = Service(model, exchange, Counts(METRICS))


def handle(data: Sequence[Mapping[str, Any]] | None, context: Any) -> list[bytes]:
    """TorchServe's way in: once with `data` None to load, then for each server batch."""
    if data is None:
        initialize(context)
        return []
    return _WORKER["service"].handle(data, context)


def tuning_from(environ: Mapping[str, str], gpu_id: Any) -> tuple[Tuning, int]:
    """The tuning and the limit of records a request in the environment's `BATCH_HANDLER_*`."""
    tuning = Tuning(
        threads=_whole(environ, "BATCH_HANDLER_THREADS") or 1,
        micro_batch=_whole(environ, "BATCH_HANDLER_MICRO_BATCH") or None,
        precision=environ.get("BATCH_HANDLER_PRECISION") or "float32",
        gpu_id=None if gpu_id is None else int(gpu_id),
        runtime=environ.get("BATCH_HANDLER_RUNTIME") or None,
        ceiling=_positive(environ, "BATCH_HANDLER_CEILING"),
    )
    return tuning, _whole(environ, "BATCH_HANDLER_MAX_RECORDS") or MAX_RECORDS


def _whole(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "").strip() or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ModelLoadError(f"{name} is {text[:40]!r}, wanted a whole number")
    return int(text)


def _positive(environ: Mapping[str, str], name: str) -> float | None:
    text = environ.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ModelLoadError(f"{name} is {text[:40]!r}, wanted a number over 0")
    return value


def _request(row: Mapping[str, Any], properties: Mapping[str, Any]) -> Request:
    """A row's body and its headers in lower case, whatever names the client and the form gave them."""
    field = next((name for name in ("body", "data", *row) if name in row), None)
    # Beside the request's headers TorchServe keeps one dict a form field, with that part's content type.
    headers = {name.lower(): value for name, value in properties.items() if isinstance(value, str)}
    part = properties.get(field) if field is not None else None
    if isinstance(part, Mapping):
        kind = str(part.get("content-type") or "")
        if kind and (field != "body" or "content-type" not in headers):
            headers["content-type"] = kind
    return Request(None if field is None else row[field], headers)


def _reply(item: Pending, answer: Score | Failure, batch_requests: int) -> Reply:
    if isinstance(answer, Failure):
        return failed(answer)
    try:
        return item.reply(answer, batch_requests)
    except MemoryError:
        return refused(OipError("the server has no memory to write the reply", 507))
    except Exception:  # noqa: BLE001 - a bug of ours; still only this request's
        _log.exception("a reply could not be written")
        return refused(OipError("the reply could not be written", 500))


def _send(reply: Reply, context: Any, index: int) -> None:
    phrase = HTTPStatus(reply.status).phrase
    context.set_response_status(code=reply.status, phrase=phrase, idx=index)
    context.set_response_content_type(index, reply.content_type)
    for name, value in reply.headers.items():
        context.set_response_header(index, name, value)
