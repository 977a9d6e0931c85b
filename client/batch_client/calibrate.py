"""A few seconds of a run, for a forecast of the whole: the same pipeline, into memory that is thrown away."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from batch_client.errors import DataError, StoppedError
from batch_client.events import (
    Event,
    Observer,
    RecordFailed,
    RecordsScored,
    RequestRetried,
    RunStarted,
    ServerJoined,
    ServerLeftOut,
)
from batch_client.forecast import Answer, FirstAnswers, Forecast, forecast, measured
from batch_client.pipeline import execute, plan_run
from batch_client.plan import Plan
from batch_client.prepare import Services
from batch_client.spec import RunSpec
from batch_client.storage import MemoryStore, Meta
from batch_client.summary import peak_memory

__all__ = ["Calibration", "calibrate"]

# In the key of each chunk of an array (Zarr v3's default encoding), and of nothing else.
CHUNK = "/c/"


@dataclass(frozen=True)
class Calibration:
    """The plan of the whole run, and what a part of it showed: `forecast`, of the run or of its `--part`, is None where
    there were too few answers. `left_out` has the reasons for servers that it went on without. `peak_memory_bytes` is
    of this process, its imports included.
    """

    plan: Plan
    forecast: Forecast | None
    records: int
    failed: int
    left_out: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int


class _Watcher:
    """Notes when answers come, and ends the run when there are enough of them."""

    def __init__(self, services: Services, stop: asyncio.Event) -> None:
        self.plan: Plan | None = None
        self.failed = 0
        self.refused = ""
        self.left_out: dict[str, str] = {}
        self.began = services.clock()
        self.first = FirstAnswers(self.began)
        self._clock = services.clock
        self._stop = stop

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.plan, self.began = event.plan, self._clock()
                self.first = FirstAnswers(self.began)
            case RecordsScored():  # not the requests: those that look for a bad record are no progress
                self.first.add(Answer(self._clock(), len(event.status)))
            case RequestRetried():
                self.refused = f"{event.endpoint} said: {event.reason}"
            case ServerLeftOut():
                self.left_out[event.endpoint] = event.reason
            case ServerJoined():
                self.left_out.pop(event.endpoint, None)
            case RecordFailed():
                self.failed += 1
        if self.first.enough(self._clock()):
            self._stop.set()


class _Forgetful(MemoryStore):
    """Takes chunks and drops their bytes: nobody will read them, and a run does not hold them either. What is listed is
    what was taken.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._sizes: dict[str, int] = {}

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        self._sizes.setdefault(key, len(data))
        return await super().create(key, b"" if CHUNK in key else data)

    async def list(self, prefix: str) -> AsyncIterator[Meta]:
        async for meta in super().list(prefix):
            yield replace(meta, size=self._sizes[meta.key])


async def calibrate(spec: RunSpec, services: Services, observers: tuple[Observer, ...] = ()) -> Calibration:
    """Score the first records of `spec` for some seconds and forecast the whole. Writes nothing anywhere.

    Raises what the run would raise at its beginning and in these seconds, and StoppedError when no server answers.
    """
    stop = asyncio.Event()
    watcher = _Watcher(services, stop)
    aside = replace(services, output_store=_Forgetful("memory://calibration"), reuse_store=None)
    # An output that is there or reused has a say in the chunks.
    chunk_records = (await plan_run(spec, services, observers)).grid_records
    alike = replace(spec, output=aside.output_store.url, reuse=None, overwrite=False, part=None,
                    max_failed=sys.maxsize, chunk_records=chunk_records)
    try:
        await execute(alike, aside, (watcher,), stop)
    except StoppedError:
        if not stop.is_set():
            raise
    if watcher.plan is None:
        raise DataError("the calibration ended before its first record")
    answers = watcher.first.answers
    if not answers and watcher.refused:
        raise StoppedError(f"no request was answered within {services.clock() - watcher.began:.0f} s; the last time "
                           f"{watcher.refused}")
    plan, scored, seconds = watcher.plan, sum(answer.records for answer in answers), services.clock() - watcher.began
    records = plan.records_in(plan.part(spec.part))
    found = forecast(answers, records)
    if scored == plan.count:  # all of it: that took what it took, and a part its share
        found = measured(records, seconds * records / plan.count, found)
    return Calibration(plan, found, scored, watcher.failed, tuple(watcher.left_out.values()), seconds, peak_memory())
